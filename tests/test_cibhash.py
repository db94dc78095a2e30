"""CIBHash: encoder, straight-through codes, loss, packed codes and search, against plain loops and golden numbers."""

import itertools
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import Killed, hamming_map, method_of, no_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import engine
import loss
import main
import retrieval
from config import parse
from methods import backbones, cibhash
from methods.backbones import Backbone
from methods.cibhash import CIBHash, Objective, straight_through, zeros_and_ones
from utils import InputError

RUN = ["--method", "CIBHash", "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--topK", "20",
       "--limit", "120", "--batch_size", "32", "--lr", "0.003", "--lr_scaling", "1", "--epoch_num", "3",
       "--num_workers", "0", "--hidden_dim", "32", "--eval_interval", "1", "--feature_cache", "off",
       "--save_interval", "2", "--notes", "bits"]  # fmt: skip
LAYERS = {"W1": "encoder.0.weight", "b1": "encoder.0.bias", "W2": "encoder.2.weight", "b2": "encoder.2.bias"}


def config_of(*flags):
    return parse([*RUN, *flags])


def encoder_of(numbers, prefix, suffix, device, *flags):
    """The method without a backbone, in double precision, with golden weights."""
    weights = {name: torch.from_numpy(numbers[f"{prefix}/{name}{suffix}"]).double().to(device) for name in LAYERS}
    (hidden, dim), bits = weights["W1"].shape, len(weights["b2"])
    config = parse(["--method", "CIBHash", "--code_length", str(bits), "--hidden_dim", str(hidden), *flags])
    method = cibhash.build(no_backbone(dim), config).double().to(device)
    for name, key in LAYERS.items():
        method.get_parameter(key).data = weights[name]
    return method


def bare(bits=16, **choices):
    """The method whose images are their own logits."""
    method = CIBHash(no_backbone(bits), bits, 4, Objective(**choices))
    method.encoder = nn.Identity()
    return method


def relative_error(ours, theirs):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max())


# ---------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", range(4))
def test_golden_losses_and_gradients(case, golden, device, monkeypatch):
    numbers = golden("cibhash")
    c = json.loads(str(numbers["config"]))["cases"][case]
    flags = ["--recipe", "release", "--T", str(c["T"]), "--kl_weight", str(c["weight"])]
    method = encoder_of(numbers, case, "", device, *flags)
    views = torch.cat([torch.from_numpy(numbers[f"{case}/f_{v}"]) for v in "ij"]).double().to(device).requires_grad_()
    seen, original = {}, {name: getattr(loss, name) for name in ("contrastive_loss", "log_negative_term")}

    def contrastive_loss(z_i, z_j, **options):
        z_i.retain_grad(), z_j.retain_grad()
        seen.update(z_i=z_i, z_j=z_j)
        return original["contrastive_loss"](z_i, z_j, **options)

    def log_negative_term(log_negatives, log_positive, **options):
        others = log_negatives[log_negatives.isfinite()].view(2 * c["N"], -1)
        seen.update(logits=torch.cat([log_positive[:, None], others], dim=1))
        return original["log_negative_term"](log_negatives, log_positive, **options)

    monkeypatch.setattr(loss, "contrastive_loss", contrastive_loss)
    monkeypatch.setattr(loss, "log_negative_term", log_negative_term)
    terms = method.loss(views, 0)
    terms["loss/total_loss"].backward()
    ours = {"g_z_i": seen["z_i"].grad, "g_z_j": seen["z_j"].grad, "logits": seen["logits"]}
    ours |= {f"g_{name}": method.get_parameter(key).grad for name, key in LAYERS.items()}
    ours["g_f_i"], ours["g_f_j"] = views.grad.chunk(2)
    ours["p_i"], ours["p_j"] = p_i, p_j = method(views).sigmoid().chunk(2)
    ours |= {"kl_ij": loss.bernoulli_kl(p_i, p_j), "kl_ji": loss.bernoulli_kl(p_j, p_i)}
    ours |= {"contra": terms["loss/contrastive"], "kl": terms["loss/kl"], "loss": terms["loss/total_loss"]}
    for name, value in ours.items():
        assert relative_error(value, numbers[f"{case}/{name}"]) < 1e-6, name
    z = torch.cat([seen["z_i"], seen["z_j"]]).detach()
    assert relative_error(z @ z.T / z.shape[1] / c["T"], numbers[f"{case}/sim"]) < 1e-6
    for name in ("z_i", "z_j"):
        np.testing.assert_array_equal(seen[name].detach().cpu(), numbers[f"{case}/{name}"])


@pytest.mark.parametrize("alphabet", ["pm", "01"])
def test_golden_bernoulli_draws(alphabet, golden, device, monkeypatch):
    """Codes, loss and gradients of given draws, through the method."""
    numbers = golden("cibhash")
    c = json.loads(str(numbers["config"]))["bernoulli"]
    p, u = (
        torch.cat([torch.from_numpy(numbers[f"bernoulli/{x}_{v}"]) for v in "ij"]).double().to(device) for x in "pu"
    )
    method = bare(c["bits"], T=c["T"], alphabet=alphabet, sampling="bernoulli", kl_weight=0.0)
    seen, original = [], loss.contrastive_loss
    monkeypatch.setattr(loss, "contrastive_loss", lambda *z, T: seen.append(torch.cat(z)) or original(*z, T=T))
    monkeypatch.setattr(torch, "rand_like", lambda given: u)
    logits = p.logit().requires_grad_()
    total = method.loss(logits, 0)["loss/total_loss"]
    total.backward()
    expected = {x: np.concatenate([numbers[f"bernoulli/{alphabet}/{x}_{v}"] for v in "ij"]) for x in ("z", "g_p")}
    np.testing.assert_array_equal(seen[0].detach().cpu(), expected["z"])
    assert relative_error(total, numbers[f"bernoulli/{alphabet}/contra"]) < 1e-9
    assert relative_error(logits.grad / (p * (1 - p)), expected["g_p"]) < 1e-6


def test_golden_trace(golden, device):
    """40 steps of Adam of the encoder, through the flags, the optimiser and the engine."""
    numbers = golden("cibhash")
    c = json.loads(str(numbers["config"]))["trace"]
    flags = ["--recipe", "release", "--T", str(c["T"]), "--kl_weight", str(c["weight"]), "--lr", str(c["lr"])]
    method = encoder_of(numbers, "trace", "_0", device, *flags)
    views = list(torch.from_numpy(numbers["trace/features"]).double().to(device).flatten(1, 2))
    steps = [views[step % c["batches"]] for step in range(c["steps"])]
    told = Namespace(values={})
    told.add_scalar = lambda tag, value, step: told.values.setdefault(tag, []).append(value)
    training = engine.start(parse(["--method", "CIBHash", *flags]), method, steps)
    training.events = told
    engine.train_epoch(training, steps)
    for tag, name in (("total_loss", "loss"), ("contrastive", "contra"), ("kl", "kl")):
        np.testing.assert_allclose(told.values[f"loss/{tag}"], numbers[f"trace/{name}"], rtol=1e-9)
    for name, key in LAYERS.items():
        assert relative_error(method.get_parameter(key), numbers[f"trace/{name}"]) < 1e-6, name
    codes = method.codes(method(views[0][: c["N"]]))
    np.testing.assert_array_equal(np.unpackbits(codes.cpu().numpy(), axis=1), numbers["trace/code"] > 0)


@pytest.mark.parametrize("bits", [16, 64])
def test_golden_retrieval(bits, golden, device):
    """Hamming distances, and MAP with ties in database order, from packed codes."""
    numbers, part = golden("cibhash"), f"retrieval{bits}"
    method = bare(bits)
    z = {name: torch.from_numpy(numbers[f"{part}/{name}_codes"]).float().to(device) for name in ("query", "db")}
    queries, codes = method.query(z["query"]), method.codes(z["db"])
    scores = retrieval.aqs_scores(method.tables(queries[:8]), codes)
    np.testing.assert_array_equal((bits - scores.cpu()) / 2, numbers[f"{part}/hamming"])
    for kind, labels in (("single", "class"), ("multi", "multi")):
        relevant = [torch.from_numpy(numbers[f"{part}/{name}_{labels}"]).to(device) for name in ("query", "db")]
        for topK in (50, 1000, None):
            found = retrieval.evaluate(method.tables, queries, codes, relevant, topK).map
            assert found == pytest.approx(float(numbers[f"{part}/{kind}/MAP@{topK}"]), abs=1e-4)


# ---------------------------------------------------------------- codes


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**30))
def test_bits_are_packed_as_numpy_does(n, octets, seed):
    logits = torch.randn(n, 8 * octets, generator=torch.Generator().manual_seed(seed))
    logits[0, :3] = 0.0  # p = 1/2: no bit
    codes = bare(8 * octets).codes(logits)
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes, np.packbits(logits.numpy() > 0, axis=1))
    np.testing.assert_array_equal(np.unpackbits(codes.numpy(), axis=1), logits.numpy() > 0)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**30))
def test_scores_are_hamming_distances(Q, n, octets, seed):
    """Against a comparison bit by bit; B - 2 Hamming, exactly."""
    bits = np.random.default_rng(seed).integers(0, 2, (Q + n, 8 * octets), dtype=np.uint8)
    method = bare(8 * octets)
    codes = torch.from_numpy(np.packbits(bits, axis=1))
    tables = method.tables(codes[:Q])
    assert tables.shape == (Q, octets, 256)
    assert (tables.dtype, method.M, method.K) == (torch.float32, octets, 256)
    hamming = [[sum(int(a != b) for a, b in zip(query, row, strict=True)) for row in bits[Q:]] for query in bits[:Q]]
    np.testing.assert_array_equal(retrieval.aqs_scores(tables, codes[Q:]), 8 * octets - 2 * np.array(hamming))


# ---------------------------------------------------------------- the loss


def test_codes_in_training_are_exact_and_their_gradient_is_the_identity():
    p = torch.rand(50, 16, requires_grad=True)
    weights = torch.randn(50, 16)
    signs = straight_through(p, 0.5)
    assert torch.equal(signs, torch.where(p > 0.5, 1.0, -1.0))
    (gradient,) = torch.autograd.grad((signs * weights).sum(), p)
    assert torch.equal(gradient, weights)
    bits = zeros_and_ones(straight_through(p, 0.5))
    assert torch.equal(bits, (p > 0.5).float())
    (gradient,) = torch.autograd.grad((bits * weights).sum(), p)
    assert torch.equal(gradient, weights / 2)  # b = (sign + 1) / 2


def test_a_code_of_zeros_has_cosine_zero_and_no_gradient():
    """Its direction is nearly 0 / 0: without care one such code would outweigh all others 10^12 times."""
    method = bare(8, sampling="sign", alphabet="01", kl_weight=0.0)
    logits = torch.randn(6, 8)
    logits[1] = -logits[1].abs()
    logits.requires_grad_()
    total = method.loss(logits, 0)["loss/total_loss"]
    total.backward()
    assert logits.grad[1].abs().max() == 0
    assert 0 < logits.grad.abs().max() < 10
    bits = (logits > 0).double().tolist()

    def cosine(a, b):
        lengths = math.sqrt(sum(a) * sum(b))
        return sum(s * t for s, t in zip(a, b, strict=True)) / lengths if lengths else 0.0

    expected = 0.0
    for i, row in enumerate(bits):
        terms = {j: math.exp(cosine(row, other) / 0.3) for j, other in enumerate(bits) if j != i}
        expected -= math.log(terms[(i + 3) % 6] / sum(terms.values())) / 6
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def codes_in_training(method, logits, monkeypatch):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(loss, "contrastive_loss", lambda *z, T: seen.append(torch.cat(z).detach()) or torch.zeros(()))
        method.loss(logits, 0)
    return seen[0]


@pytest.mark.parametrize(("alphabet", "low"), [("01", 0), ("pm", -1)])
def test_bernoulli_draws_have_the_probability_of_the_bit(alphabet, low, monkeypatch):
    """From torch's generator: the same for the same state; each image and bit its own."""
    method = bare(16, sampling="bernoulli", alphabet=alphabet)
    p = torch.tensor([0.02, 0.3, 0.5, 0.9]).repeat(4)
    logits = p.logit().expand(20000, 16)
    torch.manual_seed(5)
    codes = codes_in_training(method, logits, monkeypatch)
    assert set(codes.unique().tolist()) == {low, 1}
    torch.testing.assert_close((codes == 1).float().mean(dim=0), p, atol=0.02, rtol=0)
    torch.manual_seed(5)
    assert torch.equal(codes_in_training(method, logits, monkeypatch), codes)
    assert not torch.equal(codes_in_training(method, logits, monkeypatch), codes)
    together = ((codes[:, 1] == 1) & (codes[:, 5] == 1)).float().mean()
    assert together == pytest.approx(0.3**2, abs=0.02)


def test_signs_draw_nothing(monkeypatch):
    method, logits = bare(16, sampling="sign", alphabet="pm"), torch.randn(10, 16)
    state = torch.get_rng_state()
    codes = codes_in_training(method, logits, monkeypatch)
    assert torch.equal(codes, torch.where(logits > 0, 1.0, -1.0))
    assert torch.equal(torch.get_rng_state(), state)


def slow_kl(p, q):
    total = 0.0
    for row, other in zip(p.tolist(), q.tolist(), strict=True):
        for a, b in zip(row, other, strict=True):
            total += a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    return total / len(p)


def test_kl_is_its_equation_and_finite_at_the_ends():
    p, q = (torch.rand(5, 8, dtype=torch.float64).clamp(0.05, 0.95) for _ in range(2))
    assert float(loss.bernoulli_kl(p, q)) == pytest.approx(slow_kl(p, q), rel=1e-6)
    assert float(loss.bernoulli_kl(p, p)) == pytest.approx(0, abs=1e-12)
    ends = torch.tensor([[0.0, 1.0]], requires_grad=True)
    value = loss.bernoulli_kl(ends, 1 - ends)
    value.backward()
    assert float(value.detach()) == pytest.approx(-2 * math.log(1e-8), rel=1e-3)
    assert ends.grad.isfinite().all()


@pytest.mark.parametrize("detach", [True, False])
def test_kl_term_of_both_views_by_the_flags(detach):
    """Its value, its weight, and its gradient by differences: through the first of two distributions, or both."""
    flags = ["--sampling", "sign", "--kl_weight", "0.5", "--detach_kl" if detach else "--no-detach_kl"]
    method = method_of(config_of(*flags)).double()
    method.backbone, method.encoder = no_backbone(16), nn.Identity()
    p, q = torch.rand(2, 3, 16, dtype=torch.float64).clamp(0.1, 0.9)
    logits = torch.cat([p, q]).logit().requires_grad_()
    terms = method.loss(logits, 0)
    both = (slow_kl(p, q) + slow_kl(q, p)) / 2
    assert float(terms["loss/kl"].detach()) == pytest.approx(both, rel=1e-6)
    torch.testing.assert_close(terms["loss/total_loss"], terms["loss/contrastive"] + 0.5 * terms["loss/kl"])
    terms["loss/kl"].backward()
    step = torch.zeros(3, 16, dtype=torch.float64)
    step[1, 2] = 1e-5
    up, down = (logits[:3] + step).sigmoid().detach(), (logits[:3] - step).sigmoid().detach()
    slope = slow_kl(up, q) - slow_kl(down, q)
    if not detach:
        slope += slow_kl(q, up) - slow_kl(q, down)
    assert float(logits.grad[1, 2]) == pytest.approx(slope / 2 / 2e-5, rel=1e-4)


def test_quantization_error_is_the_distance_to_the_code_at_test():
    p = torch.tensor([[0.9, 0.2, 0.6, 1.0], [0.5001, 0.0, 0.3, 0.75]]).repeat(1, 2)
    error = bare(8).loss(p.logit(), 0)["quant_err"]
    expected = np.mean([(2 * x - 1 - (1 if x > 0.5 else -1)) ** 2 for x in p.flatten().tolist()])
    assert float(error) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_step_reads_nothing_from_the_device(recipe, monkeypatch):
    """Tensors on the meta device have no values: whatever asked for one would fail."""
    config = config_of("--recipe", recipe, "--precision", "fp32")
    steps = [torch.empty(12, 3, 16, 16, device="meta")] * 2
    training = engine.start(config, method_of(config).to("meta"), steps)
    monkeypatch.setattr(engine.StepLog, "add", lambda *_: None)
    engine.train_epoch(training, steps)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("bits", "number"), [(16, 4211728), (32, 4228128), (64, 4260928)])
def test_parameters_are_as_many_as_the_fact_sheet_says(bits, number):
    method = cibhash.build(no_backbone(4096), parse(["--method", "CIBHash", "--code_length", str(bits)]))
    assert sum(p.numel() for p in method.parameters()) == number
    for layer in (method.encoder[0], method.encoder[2]):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.99 * bound < layer.weight.detach().abs().max() <= bound
    logits = method(torch.randn(200, 4096))
    assert logits.shape == (200, bits)
    assert (logits < 0).any()  # no ReLU behind the second layer


class SmallVgg(nn.Module):
    """VGG's parts, of a few channels."""

    def __init__(self):
        super().__init__()
        self.features, self.avgpool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(7)
        widths = (4 * 49, 64, 64)
        layers = [[nn.Linear(i, o), nn.ReLU(), nn.Dropout()] for i, o in itertools.pairwise(widths)]
        self.classifier = nn.Sequential(*layers[0], *layers[1], nn.Linear(64, 10))


def test_dropout_of_frozen_layers_is_active_in_training_and_off_at_test():
    net = SmallVgg()
    blocks, _ = backbones.vgg16(net)
    method = CIBHash(Backbone(net, blocks, 64, 0, bf16=False), 16, 8, Objective(sampling="sign"))
    images = torch.rand(40, 3, 16, 16)
    method.train()
    dropped = [(method.backbone(images) == 0).float().mean(dim=0) for _ in range(2)]
    method.eval()
    tested = [method.backbone(images) for _ in range(2)]
    live = (tested[0] > 0).all(dim=0)
    assert live.sum() > 5
    assert dropped[0][live].mean() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(*dropped)
    assert torch.equal(*tested)
    assert {p.requires_grad for p in net.parameters()} == {False}
    method.train()
    losses = {float(method.loss(images, 0)["loss/kl"].detach()) for _ in range(3)}
    assert len(losses) == 3
    method.loss(torch.cat([images[:20]] * 2), 0)["loss/kl"].backward()  # the same views, told apart by dropout
    assert method.encoder[0].weight.grad.abs().max() > 0


# ---------------------------------------------------------------- runs and checkpoints


def test_a_run_learns_resumes_and_is_tested_by_hamming_distance(tmp_path, monkeypatch):
    """Bernoulli draws go on with the same generator; MAP is that of a comparison bit by bit, ties in database order."""
    flags = [*RUN, "--epoch_num", "6", "--code_length", "32", "--ties", "database"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main([*flags, "--output", str(whole)]) == 0
    assert main.main([*flags, "--epoch_num", "0", "--output", str(tmp_path / "untrained")]) == 0
    trained, untrained = (
        json.loads((tmp_path / name / "checkpoints/bits/metrics.json").read_text()) for name in ("whole", "untrained")
    )
    assert (trained["method"], trained["bits"]) == ("CIBHash", 32)
    assert trained["map"] > untrained["map"] + 0.05

    original, steps = CIBHash.loss, []

    def killed_at_the_eleventh_step(*arguments):
        steps.append(0)
        if len(steps) == 11:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CIBHash, "loss", killed_at_the_eleventh_step)
        main.main([*flags, "--output", str(stopped)])
    assert main.main([*flags, "--output", str(stopped), "--resume"]) == 0
    for name in ("model.cpt", "db_codes.npy", "PR_curve.txt"):
        first, second = ((output / "checkpoints/bits" / name).read_bytes() for output in (whole, stopped))
        assert first == second, name
    check_map(parse(flags), whole / "checkpoints/bits", trained["map"])


def check_map(config, folder, found):
    splits, method = engine.build(config)
    method.load_checkpoint(folder / "model.cpt")
    features = engine.build_features(config, method.backbone, {"query": splits.query})["query"]
    method.eval()
    with torch.inference_mode():
        queries = torch.cat([method.embed(batch.float()) for batch in features]).numpy() > 0
    database = np.unpackbits(np.load(folder / "db_codes.npy"), axis=1)
    assert found == pytest.approx(hamming_map(queries, database, splits, 20), abs=1e-9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--code_length", "32"], "give --code_length 32 --hidden_dim 32"),
        (["--hidden_dim", "8"], "give --code_length 16 --hidden_dim 8"),
        (["--method", "MeCoQ"], "there is no encoder of two layers in it"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(flags, words, tmp_path):
    other = parse(["--backbone", "convnet", "--image_size", "16", *flags]) if "--method" in flags else config_of(*flags)
    torch.save(method_of(other).state_dict(), tmp_path / "model.cpt")
    with pytest.raises(InputError) as error:
        method_of(config_of()).load_checkpoint(tmp_path / "model.cpt")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model.cpt") in str(error.value)
