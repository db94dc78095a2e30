"""SPQ: network, quantizer, loss, training, search, against plain loops and the golden numbers of the fact sheet."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Killed, method_of, no_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import engine
import loss
import main
import retrieval
from config import parse
from methods import spq
from methods.backbones import build_backbone
from methods.spq import SPQ, Objective, SoftQuantizer
from utils import InputError

RUN = ["--method", "SPQ", "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--topK", "20",
       "--limit", "120", "--batch_size", "32", "--lr", "0.003", "--epoch_num", "3", "--num_workers", "0",
       "--M", "2", "--K", "8", "--L", "4", "--warmup_epoch_num", "0", "--eval_interval", "1", "--feature_cache", "off",
       "--save_interval", "2", "--notes", "spq"]  # fmt: skip
SETTINGS = [(pairs, anchors) for pairs in ("cross", "all") for anchors in ("embeddings", "both")]


def config_of(*flags):
    return parse([*RUN, *flags])


def codebooks_of(C, M):
    """The K x (M L) matrix whose columns are the codebooks side by side -> `[M, K, L]`."""
    return torch.stack(torch.as_tensor(C).chunk(M, dim=1))


def quantizer_of(C, M, scale=5.0):
    C = torch.as_tensor(C)
    quantizer = SoftQuantizer(M, len(C), C.shape[1] // M, scale).to(C.device, C.dtype)
    quantizer.codebooks.data = codebooks_of(C, M)
    return quantizer


def relative_error(ours, theirs):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max())


# ---------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", range(4))
def test_golden_losses_and_gradients(case, dtype, golden, device, monkeypatch):
    """Soft codes, reconstructions, codes, cosines, logits, losses and gradients, through the method itself."""
    numbers = golden("spq")
    c = json.loads(str(numbers["config"]))["cases"][case]
    given = {name: numbers[f"{case}/{name}"] for name in ("x_a", "x_b", "C")}
    x_a, x_b, C = (torch.from_numpy(array).to(device, dtype) for array in given.values())
    method = SPQ(no_backbone(1), quantizer_of(C, c["M"], c["tau_q"]), Objective(c["tau"], "all", "both"))
    method.head = nn.Identity()
    seen, original = [], loss.log_negative_term

    def watched(log_negatives, log_positive, **options):
        seen.append((log_negatives, log_positive))
        return original(log_negatives, log_positive, **options)

    monkeypatch.setattr(loss, "log_negative_term", watched)
    views = torch.cat([x_a, x_b]).requires_grad_()
    terms = method.loss(views, 0)
    terms["loss/total_loss"].backward()
    soft, z = method.quantizer(views)
    g_C = torch.cat(list(method.quantizer.codebooks.grad), dim=1)
    ours = {"g_C": g_C, "loss": terms["loss/total_loss"]}
    for name, halves in {"soft": soft, "z": z, "g_x": views.grad}.items():
        ours[f"{name}_a"], ours[f"{name}_b"] = halves.chunk(2)
    for name, (log_negatives, log_positive) in zip(("ab", "ba"), seen, strict=True):
        others = log_negatives[log_negatives.isfinite()].view(2 * c["N"], -1)
        ours[f"logits_{name}"] = torch.cat([log_positive[:, None], others], dim=1)
        ours[f"loss_{name}"] = terms[f"loss/{name}"]
    for name, value in ours.items():
        assert relative_error(value, numbers[f"{case}/{name}"]) < 1e-5, name
    for x, name in ((x_a, "a"), (x_b, "b")):
        np.testing.assert_array_equal(method.codes(x).cpu(), numbers[f"{case}/code_{name}"])
    for name, x, z in (("ab", x_a, ours["z_b"]), ("ba", x_b, ours["z_a"])):
        U = F.normalize(torch.cat([x, z]), dim=1)
        assert relative_error(U @ U.T, numbers[f"{case}/cos_{name}"]) < 1e-5
    method.objective = Objective(c["tau"], "cross", "embeddings")
    assert relative_error(method.loss(views, 0)["loss/total_loss"], numbers[f"{case}/cross_only"]) < 1e-5


def test_golden_trace(golden, device):
    """40 steps of Adam of head and quantizer, through the flags, the optimiser and the engine."""
    numbers = golden("spq")
    c = json.loads(str(numbers["config"]))["trace"]
    values = [c["M"], c["K"], c["L"], c["tau_q"], c["tau"], c["lr"], c["weight_decay"]]
    flags = ["--M", "--K", "--L", "--soft_quantization_scale", "--T", "--lr", "--hp_beta"]
    pairs = [str(word) for pair in zip(flags, values, strict=True) for word in pair]
    config = parse(["--method", "SPQ", "--recipe", "release", "--disable_scheduler", *pairs])
    method = spq.build(no_backbone(c["feat"]), config).double().to(device)
    W, b, C = (torch.from_numpy(numbers[f"trace/{name}0"]).double().to(device) for name in "WbC")
    method.head.weight.data, method.head.bias.data, method.quantizer.codebooks.data = W, b, codebooks_of(C, c["M"])
    views = list(torch.from_numpy(numbers["trace/features"]).double().to(device).flatten(1, 2))
    steps = [views[step % c["batches"]] for step in range(c["steps"])]
    writer = Namespace(losses=[])
    writer.add_scalar = lambda tag, value, step: tag == "loss/total_loss" and writer.losses.append(value)
    training = engine.start(config, method, steps)
    training.events = writer
    engine.train_epoch(training, steps)
    np.testing.assert_allclose(writer.losses, numbers["trace/loss"], rtol=1e-9)
    learned = method.head.weight, method.head.bias, torch.cat(list(method.quantizer.codebooks), dim=1)
    for ours, name in zip(learned, "WbC", strict=True):
        assert relative_error(ours, numbers[f"trace/{name}"]) < 1e-6, name


def fill(parameter, j, is_weight):
    """The golden network's parameter j."""
    i = torch.arange(parameter.numel(), dtype=torch.float64)
    if parameter.dim() > 1:
        values = 0.8 * (0.7 * i + j).sin() / math.sqrt(parameter[0].numel())
    else:
        values = 0.1 * (i + j).sin() + is_weight
    parameter.data.copy_(values.view(parameter.shape))


def test_golden_network(golden, device):
    numbers = golden("spq")
    net = json.loads(str(numbers["config"]))["net"]
    torch.manual_seed(0)
    backbone = build_backbone("resnet18_small", "random", 0, bf16=True)
    ours = list(backbone.net.named_parameters())
    assert sum(p.numel() for _, p in ours) == net["number"] == 11431488
    assert len(ours) == len(net["parameters"])
    for j, ((name, parameter), (theirs, shape)) in enumerate(zip(ours, net["parameters"], strict=True)):
        assert name == theirs.replace("shortcut", "downsample").replace("fc_out", "fc")
        assert list(parameter.shape) == shape
        fill(parameter, j, name.endswith("weight"))
    image = torch.from_numpy(numbers["net/image"]).to(device)
    backbone.to(device)
    with torch.no_grad():
        single = backbone.eval()(image)  # float32, whatever `--precision`: all of it is learned
        exact = backbone.net.double().eval()(image.double())
        trained = backbone.net.train()(image.double())
    assert single.dtype == torch.float32
    assert relative_error(exact, numbers["net/feature_eval"]) < 1e-6
    assert relative_error(single, numbers["net/feature_eval"]) < 1e-4
    assert relative_error(trained, numbers["net/feature_train"]) < 1e-6


@pytest.mark.parametrize("name", ["retrieval", "ties"])
def test_golden_retrieval(name, golden, device):
    """Distances, and MAP with ties in database order, from the method's tables."""
    numbers = {key.removeprefix(f"{name}/"): array for key, array in golden("spq").items() if key.startswith(name)}
    queries, codes, C = (torch.from_numpy(numbers[key]).to(device) for key in ("query", "db_codes", "C"))
    method = SPQ(no_backbone(1), quantizer_of(C, codes.shape[1]), Objective())
    queries = method.query(queries)
    with torch.inference_mode():
        scores = retrieval.aqs_scores(method.tables(queries[:8]), codes)
        np.testing.assert_allclose(-scores.cpu(), numbers["distance"], atol=1e-4)
        for kind, labels in (("single", "class"), ("multi", "multi")):
            relevant = [torch.from_numpy(numbers[f"{part}_{labels}"]).to(device) for part in ("query", "db")]
            for topK in (50, 1000, None):
                found = retrieval.evaluate(method.tables, queries, codes, relevant, topK).map
                assert found == pytest.approx(float(numbers[f"{kind}/MAP@{topK}"]), abs=1e-4)


# ---------------------------------------------------------------- equations


def cosine(a, b):
    return sum(s * t for s, t in zip(a, b, strict=True)) / math.sqrt(sum(s * s for s in a) * sum(t * t for t in b))


def slow_direction(x, z, T, pairs, anchors):
    """The mean of the anchors' cross-entropies, in Python floats."""
    N, rows = len(x), x + z
    total, count = 0.0, N if anchors == "embeddings" else 2 * N
    for i in range(count):
        partner = (i + N) % (2 * N)
        others = [j for j in range(2 * N) if j != i and (pairs == "all" or (j < N) != (i < N))]
        assert len(others) == (2 * N - 1 if pairs == "all" else N)
        terms = {j: math.exp(cosine(rows[i], rows[j]) / T) for j in others}
        total -= math.log(terms[partner] / sum(terms.values()))
    return total / count


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SETTINGS), st.integers(1, 5), st.integers(2, 5), st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 2**30),
)  # fmt: skip
def test_loss_in_one_direction_is_its_equation(setting, N, D, T, seed):
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(2))
    pairs, anchors = setting
    expected = slow_direction(x.tolist(), z.tolist(), T, pairs, anchors)
    ours = loss.cross_quantized_loss(x, z, T=T, pairs=pairs, anchors=anchors)
    assert float(ours) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("pairs", "anchors"), SETTINGS)
def test_both_directions_by_the_flags(pairs, anchors):
    """Embeddings of the first views against reconstructions of the second, and the reverse: added or averaged."""
    method = method_of(config_of("--pairs", pairs, "--anchors", anchors, "--T", "0.4")).double()
    method.backbone, method.head = no_backbone(8), nn.Identity()
    x = torch.randn(6, 8, dtype=torch.float64)
    _, z = method.quantizer(x)
    terms = {tag: float(value.detach()) for tag, value in method.loss(x, 0).items()}
    a, b = slice(0, 3), slice(3, 6)
    expected = [slow_direction(x[s].tolist(), z[t].tolist(), 0.4, pairs, anchors) for s, t in ((a, b), (b, a))]
    assert [terms["loss/ab"], terms["loss/ba"]] == pytest.approx(expected, rel=1e-9)
    share = 1 if pairs == "all" else 0.5
    assert terms["loss/total_loss"] == pytest.approx(share * sum(expected), rel=1e-9)
    assert terms["quant_err"] == pytest.approx(float((x - z.detach()).square().mean()), rel=1e-9)


def test_quantizer_is_its_equations():
    """Soft codes, reconstruction, codes and tables in NumPy loops; nothing is normalised."""
    B, M, K, L, scale = 5, 3, 7, 4, 0.7
    C, x = torch.randn(K, M * L, dtype=torch.float64), torch.randn(B, M * L, dtype=torch.float64)
    quantizer = quantizer_of(C, M, scale)
    soft_codes, z = quantizer(x)
    codes, tables = quantizer.hard_codes(x), SPQ(no_backbone(1), quantizer, Objective()).tables(x)
    assert codes.dtype == torch.uint8
    for b in range(B):
        for m in range(M):
            part = slice(m * L, (m + 1) * L)
            squared = ((C[:, part] - x[b, part]) ** 2).sum(dim=1).numpy()
            p = np.exp(-scale * squared) / np.exp(-scale * squared).sum()
            np.testing.assert_allclose(soft_codes[b, m].detach(), p, rtol=1e-10)
            np.testing.assert_allclose(z[b, part].detach(), p @ C[:, part].numpy(), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(tables[b, m].detach(), -np.sqrt(squared), rtol=1e-12)
            assert codes[b, m] == squared.argmin()


def test_quantizer_gradient_against_finite_differences():
    quantizer = SoftQuantizer(M=2, K=5, L=3, scale=2.0).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(x, codebooks):
        return torch.func.functional_call(quantizer, {"codebooks": codebooks}, (x,))

    assert torch.autograd.gradcheck(f, (x, quantizer.codebooks.detach().requires_grad_()))


def test_an_embedding_at_a_codeword_has_a_finite_gradient():
    quantizer = SoftQuantizer(M=2, K=4, L=3, scale=5.0)
    x = quantizer.codebooks[:, 2].detach().reshape(1, 6).requires_grad_()
    quantizer(x)[1].square().sum().backward()
    assert x.grad.isfinite().all()
    assert quantizer.codebooks.grad.isfinite().all()
    assert quantizer.hard_codes(x).tolist() == [[2, 2]]


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_distances_far_from_the_origin_keep_their_order(offset):
    """||x||^2 - 2xc + ||c||^2 in float32 would lose differences of this size."""
    C, x = torch.randn(64, 8) + offset, torch.randn(40, 8) + offset
    expected = quantizer_of(C.double(), 2).hard_codes(x.double())
    assert torch.equal(quantizer_of(C, 2).hard_codes(x), expected)


@pytest.mark.parametrize(("K", "dtype"), [(2, torch.uint8), (256, torch.uint8), (512, torch.int32)])
def test_codes_are_bytes_if_they_fit(K, dtype):
    quantizer = SoftQuantizer(M=1, K=K, L=8, scale=5.0)
    codes = quantizer.hard_codes(quantizer.codebooks[0].detach())
    assert codes.dtype == dtype
    assert codes.flatten().tolist() == list(range(K))


# ---------------------------------------------------------------- the network and its beginnings


@pytest.mark.parametrize(("M", "number"), [(4, 11465344), (8, 11499200), (16, 11566912)])
def test_parameters_are_as_many_as_the_fact_sheet_says(M, number):
    flags = ["--method", "SPQ", "--recipe", "release", "--M", str(M)]
    method = spq.build(build_backbone("resnet18_small", "random", 0, False), parse(flags))
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == number
    (own, _) = method.parameter_groups(1.0, 1.0)
    assert sum(p.numel() for p in own["params"]) == number - 11431488


@pytest.mark.parametrize(("name", "dim"), [("resnet18_small", 512), ("resnet18_tiny", 128)])
def test_small_networks_take_small_images(name, dim):
    backbone = build_backbone(name, "random", 0, bf16=True)
    assert all(p.requires_grad for p in backbone.parameters())
    maps = []
    for layer in (backbone.net.layer1, backbone.net.layer4):
        layer.register_forward_hook(lambda _, __, out: maps.append(out.shape[1:]))
    for side in (8, 13, 32):
        features = backbone(torch.rand(2, 3, side, side))
        assert features.shape == (2, dim) == (2, backbone.dim)
        assert (features >= 0).all()
    assert maps[-2:] == [(dim // 8, 32, 32), (dim, 4, 4)]


def test_small_networks_begin_as_torch_has_it():
    """A convolution's numbers are uniform within 1 / sqrt(inputs), not He's normal ones, as torchvision draws them."""
    net = build_backbone("resnet18_small", "random", 0, bf16=False).net
    for layer in (net.conv1, net.layer3[0].conv2, net.fc):
        weight = layer.weight.detach()
        bound = 1 / math.sqrt(weight[0].numel())
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_how_head_and_codebooks_begin():
    D, M, K, L = 128, 8, 32, 16
    config = parse(["--method", "SPQ", "--M", str(M), "--K", str(K), "--L", str(L)])
    uniform, normal = (spq.build(no_backbone(D), config.replace(head_init=how)) for how in ("uniform", "normal"))
    inputs = {"head.weight": D, "quantizer.codebooks": K}
    for name, count in inputs.items():
        bound = math.sqrt(6 / (count + M * L))  # the codebooks' is that of the whole matrix
        weight = uniform.get_parameter(name).detach()
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        weight = normal.get_parameter(name).detach()
        std = 0.1 * math.sqrt(2 / (count + M * L))
        assert weight.std() == pytest.approx(std, rel=0.05)
        assert weight.abs().max() > 3 * std
    assert 0.9 / math.sqrt(D) < uniform.head.bias.detach().abs().max() <= 1 / math.sqrt(D)
    assert normal.head.bias is None
    assert spq.build(no_backbone(4), parse(["--method", "SPQ"])).quantizer.codebooks.shape == (8, 16, 16)


# ---------------------------------------------------------------- training


def test_batch_normalisation_sees_each_view_alone():
    method = method_of(config_of()).train()
    views = torch.rand(12, 3, 16, 16) * torch.tensor([1.0] * 6 + [3.0] * 6).view(12, 1, 1, 1)
    separately = torch.cat([method(views[:6]), method(views[6:])])
    together = method(views)
    assert not torch.allclose(separately, together, rtol=1e-2)
    error = method.loss(views, 0)["quant_err"]
    expected = (separately - method.quantizer(separately)[1]).square().mean()
    torch.testing.assert_close(error, expected)
    assert next(b for n, b in method.named_buffers() if n.endswith("tracked")) == 2 + 1 + 2


def step(method):
    """An optimisation step on two views that batch normalisation has not seen. Returns what changed."""
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    method.train()
    method.loss(torch.rand(16, 3, 16, 16) + 1, 0)["loss/total_loss"].backward()
    optimizer.step()
    return {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_normalisation_is_frozen_after_the_first_validation(frozen):
    method = method_of(config_of("--freeze_bn" if frozen else "--no-freeze_bn"))
    names = set(method.state_dict())
    statistics = {name for name in names if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(statistics) == 3 * 6
    assert step(method) == names
    method.eval()
    method.after_validation()
    assert step(method) == (names - statistics if frozen else names)  # scale and shift learn all the same
    again = method_of(config_of("--freeze_bn" if frozen else "--no-freeze_bn"))
    again.load_extra_state(method.extra_state())
    assert step(again) == (names - statistics if frozen else names)
    assert not any(module.training for module in method.eval().modules())


def test_a_step_reads_nothing_from_the_device(monkeypatch):
    """Tensors on the meta device have no values: whatever asked for one would fail."""
    for pairs, anchors in SETTINGS:
        config = config_of("--pairs", pairs, "--anchors", anchors, "--precision", "fp32")
        steps = [torch.empty(12, 3, 16, 16, device="meta")] * 2
        training = engine.start(config, method_of(config).to("meta"), steps)
        monkeypatch.setattr(engine.StepLog, "add", lambda *_: None)
        engine.train_epoch(training, steps)


# ---------------------------------------------------------------- runs and checkpoints


def test_a_run_learns(tmp_path):
    flags = [*RUN, "--M", "4", "--K", "16", "--L", "8", "--limit", "240", "--augmentation", "MeCoQ"]
    metrics = []
    for epochs in ("0", "6"):
        assert main.main([*flags, "--epoch_num", epochs, "--output", str(tmp_path / epochs)]) == 0
        metrics.append(json.loads((tmp_path / epochs / "checkpoints/spq/metrics.json").read_text()))
    assert [found["epochs_run"] for found in metrics] == [0, 6]
    assert (metrics[1]["method"], metrics[1]["bits"]) == ("SPQ", 16)
    assert metrics[1]["map"] > metrics[0]["map"] + 0.1


def test_a_run_freezes_and_resumes(tmp_path, monkeypatch):
    """Batch normalisation is frozen after the first of four epochs; the second run is killed in the third."""
    flags = [*RUN, "--freeze_bn", "--epoch_num", "4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main([*flags, "--output", str(whole)]) == 0
    original, steps = SPQ.loss, []

    def killed_in_the_third_epoch(*arguments):
        steps.append(0)
        if len(steps) == 9:  # of 3 an epoch: the partial last batch is left out
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SPQ, "loss", killed_in_the_third_epoch)
        main.main([*flags, "--output", str(stopped)])
    state = torch.load(stopped / "checkpoints/spq/last.cpt", weights_only=True)
    assert (state["epoch"], state["step"], state["extra"]) == (2, 2, {"bn_frozen": True})
    assert state["model"]["backbone.net.0.1.num_batches_tracked"] == 2 * 3  # two views a step, in the first epoch
    assert main.main([*flags, "--output", str(stopped), "--resume"]) == 0
    for name in ("model.cpt", "db_codes.npy", "PR_curve.txt"):
        first, second = ((output / "checkpoints/spq" / name).read_bytes() for output in (whole, stopped))
        assert first == second, name
    last = [torch.load(output / "checkpoints/spq/last.cpt", weights_only=True) for output in (whole, stopped)]
    assert all(torch.equal(last[0]["model"][name], last[1]["model"][name]) for name in last[0]["model"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--M", "4"], "--M 4 --K 8 --L 4 --head_init normal"),
        (["--K", "16"], "--M 2 --K 16 --L 4 --head_init normal"),
        (["--L", "2"], "--M 2 --K 8 --L 2 --head_init normal"),
        (["--head_init", "uniform"], "--M 2 --K 8 --L 4 --head_init uniform"),
        (["--method", "CIBHash"], "there is no head, or there are no codebooks [M, K, L], in it"),
        (["--method", "MeCoQ"], "there is no head, or there are no codebooks [M, K, L], in it"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(flags, words, tmp_path):
    shared = ["--backbone", "convnet", "--image_size", "16"]
    other = parse([*shared, *flags]) if "--method" in flags else config_of(*flags)
    torch.save(method_of(other).state_dict(), tmp_path / "model.cpt")
    with pytest.raises(InputError) as error:
        method_of(config_of()).load_checkpoint(tmp_path / "model.cpt")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model.cpt") in str(error.value)


def test_a_checkpoint_is_loaded(tmp_path):
    flags = ["--head_init", "uniform"]
    method = method_of(config_of(*flags))
    step(method)
    torch.save(method.state_dict(), tmp_path / "model.cpt")
    again = method_of(config_of(*flags))
    again.load_checkpoint(tmp_path / "model.cpt")
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(again.eval()(images), method.eval()(images))
