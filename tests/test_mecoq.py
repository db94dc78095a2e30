"""MeCoQ: quantizer, memory, objective, checkpoints, against plain loops and the golden numbers of the authors' code."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import HOSTILE, config_of, method_of, no_backbone, small_run, splits_of
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
import loss
import retrieval
from config import parse
from methods import mecoq
from methods.backbones import build_backbone
from methods.mecoq import CodebookAttention, Codebooks, CodeMemory, MeCoQ, Memory, Objective
from utils import InputError


def quantizer_of(codewords, alpha=10.0):
    M, K, d = codewords.shape
    quantizer = CodebookAttention(Codebooks(M, K, M * d, alpha)).to(codewords.device, codewords.dtype)
    quantizer.codebooks.data = codewords.clone()
    return quantizer


# ---------------------------------------------------------------- quantizer


def test_golden_codes_and_reconstruction(golden, device):
    numbers = golden("release_loss")
    for i, c in enumerate(json.loads(str(numbers["config"]))):
        x, C = (torch.from_numpy(numbers[f"{i}/{name}"]).to(device) for name in ("x1", "C"))
        assert C.shape == (c["M"], c["K"], c["D"])
        quantizer = quantizer_of(C)
        soft_codes, reconstruction = quantizer(x)
        np.testing.assert_allclose(soft_codes.detach().cpu(), numbers[f"{i}/p1"], atol=1e-6)
        np.testing.assert_allclose(reconstruction.detach().cpu().flatten(1), numbers[f"{i}/h1"], atol=1e-6)
        np.testing.assert_array_equal(quantizer.hard_codes(x).cpu(), numbers[f"{i}/hard1"])
        error = loss.quantization_error(quantizer.segments(x), reconstruction)
        assert error.item() == pytest.approx(float(numbers[f"{i}/err1"]), rel=1e-5)


def test_quantizer_is_its_equations(device):
    """Eq. 1-5 and 15 in NumPy loops, from codebooks that are not of unit length."""
    B, M, K, d, alpha = 5, 3, 7, 4, 6.0
    codebooks = torch.randn(M, K, d, dtype=torch.float64)
    z = torch.randn(B, M * d, dtype=torch.float64)
    quantizer = quantizer_of(codebooks.to(device), alpha)
    soft_codes, reconstruction = (x.detach().cpu() for x in quantizer(z.to(device)))
    codes = quantizer.hard_codes(z.to(device)).cpu()
    assert codes.dtype == torch.uint8
    for b in range(B):
        for m in range(M):
            segment = z[b, m * d : (m + 1) * d].numpy()
            segment = segment / np.sqrt((segment**2).sum())
            words = np.stack([c / np.sqrt((c**2).sum()) for c in codebooks[m].numpy()])
            p = np.exp(alpha * words @ segment)
            p /= p.sum()
            np.testing.assert_allclose(soft_codes[b, m], p, rtol=1e-12)
            np.testing.assert_allclose(reconstruction[b, m], p @ words, rtol=1e-10)
            assert codes[b, m] == ((words - segment) ** 2).sum(axis=1).argmin()


def test_quantizer_gradient_against_finite_differences():
    quantizer = CodebookAttention(Codebooks(M=2, K=5, D=6, alpha=10.0)).double()
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(z, codebooks):
        return torch.func.functional_call(quantizer, {"codebooks": codebooks}, (z,))

    assert torch.autograd.gradcheck(f, (z, quantizer.codebooks.detach().requires_grad_()))


def test_codewords_start_short_so_that_they_turn_quickly():
    """A tenth of unit length, in all directions alike."""
    codebooks = method_of(config_of("--K", "256", "--M", "4", "--feat_dim", "32")).quantizer.codebooks.detach()
    assert codebooks.shape == (4, 256, 8)
    torch.testing.assert_close(codebooks.norm(dim=-1), torch.full((4, 256), 0.1))
    assert codebooks.mean(dim=(0, 1)).norm() < 0.01
    gradients = []
    for length in (0.1, 1.0):
        quantizer = quantizer_of(length * F.normalize(codebooks, dim=-1))
        quantizer(torch.linspace(-1, 1, 64).view(2, 32))[1].square().sum().backward()
        gradients.append(quantizer.codebooks.grad)
    torch.testing.assert_close(gradients[0], 10 * gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("K", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_codes_are_bytes_if_they_fit(K, dtype):
    quantizer = CodebookAttention(Codebooks(M=1, K=K, D=8, alpha=10.0))
    codes = quantizer.hard_codes(quantizer.codewords()[0].detach())
    assert codes.dtype == dtype
    assert codes.flatten().tolist() == list(range(K))


def test_large_codebooks_give_codes_above_a_byte():
    quantizer = CodebookAttention(Codebooks(M=1, K=1000, D=8, alpha=10.0))
    z = quantizer.codewords()[0, [3, 999, 256]].detach()
    assert quantizer.hard_codes(z).flatten().tolist() == [3, 999, 256]


def test_zero_embedding_has_finite_codes():
    quantizer = CodebookAttention(Codebooks(M=2, K=4, D=8, alpha=10.0))
    z = torch.zeros(1, 8, requires_grad=True)
    quantizer(z)[1].sum().backward()
    assert z.grad.isfinite().all()


# ---------------------------------------------------------------- memory


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=12))
def test_memory_is_a_queue(device, size, batches):
    memory, queue, count = CodeMemory(size, 1, 2).to(device), [], 0
    for batch in batches:
        rows = torch.arange(count, count + batch, dtype=torch.float32)
        count += batch
        memory.enqueue(rows[:, None, None].expand(-1, 1, 2).to(device))
        queue = (queue + rows.tolist())[-size:]
        entries = memory.entries()
        assert entries.shape == (len(queue), 1, 2)
        assert sorted(entries[:, 0, 0].tolist()) == queue
        assert (entries[:, :, 0] == entries[:, :, 1]).all()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(1, 9), max_size=12))
def test_a_memory_that_moves_on_by_whole_batches(device, size, whole, batches):
    """As the released queue: a partial batch leaves older entries where it did not write. Slots as a dictionary."""
    batches = [min(batch, whole, size) for batch in batches]
    memory, slots, count = CodeMemory(size, 1, 1, advance=whole).to(device), {}, 0
    for number, batch in enumerate(batches):
        rows = torch.arange(count, count + batch, dtype=torch.float32)
        memory.enqueue(rows[:, None, None].to(device))
        slots |= {(number * whole + i) % size: count + i for i in range(batch)}
        count += batch
        assert sorted(memory.entries().flatten().tolist()) == sorted(slots.values())


def test_the_flag_makes_the_memory_move_on_by_both_views_of_a_batch():
    flags = ("--batch_size", "16", "--queue_size", "48")
    released, ours = (method_of(config_of(*flags, "--queue_advance", kind)) for kind in ("batch", "entries"))
    for method, moved in ((released, 32), (ours, 24)):
        method.loss(torch.rand(24, 3, 16, 16), 0)
        method.after_step()
        assert method.memory.next == moved
        assert len(method.memory.entries()) == 24
        state = method.extra_state()
        other = method_of(config_of(*flags))
        other.load_extra_state(state)
        assert torch.equal(other.memory.entries(), method.memory.entries())


def test_how_codewords_are_drawn():
    """Normalised uniform numbers in two dimensions crowd towards the square's diagonals: the density of the angle t
    within (-pi / 4, pi / 4) is 1 / (8 cos^2 t), against 1 / (2 pi) on the circle."""
    within, expected = {}, {"sphere": 1 / 2, "xavier": 1 - np.tan(np.pi / 8)}
    for init in expected:
        quantizer = CodebookAttention(Codebooks(M=4, K=20000, D=8, alpha=10.0, init=init))
        words = quantizer.codewords().detach()
        torch.testing.assert_close(words.norm(dim=-1), torch.ones(4, 20000))
        angle = torch.atan2(words[..., 1], words[..., 0]) % (np.pi / 2)
        within[init] = ((angle - np.pi / 4).abs() < np.pi / 8).double().mean()  # of a diagonal
        assert words.mean(dim=1).abs().max() < 0.03
    assert within == pytest.approx(expected, abs=0.01)
    built = [method_of(config_of("--codebook_init", init)).quantizer.codebooks for init in expected]
    assert not torch.equal(*built)


def test_memory_stays_out_of_the_state_dict_and_of_gradients():
    memory = CodeMemory(4, 2, 3)
    assert memory.state_dict() == {}
    soft_codes = torch.rand(3, 2, 3, requires_grad=True)
    memory.enqueue(soft_codes)
    assert not memory.entries().requires_grad
    soft_codes.data.zero_()
    assert memory.entries().ne(0).all()


@pytest.mark.parametrize(("kind", "width"), [("soft", 8), ("hard", 8), ("feature", 4)])
@pytest.mark.parametrize("size", [1, 40, 384])
def test_memory_is_as_large_as_asked(kind, width, size):
    method = method_of(config_of("--memory", kind, "--queue_size", str(size)))
    assert method.memory.codes.shape == (size, 2, width)
    images = torch.rand(12, 3, 16, 16)
    for _ in range(35):
        method.loss(images, 0)
        method.after_step()
    assert len(method.memory.entries()) == min(size, 35 * 12)


def test_no_memory_unless_it_is_asked_for():
    assert method_of(config_of("--queue_begin_epoch", "-1")).memory is None
    assert method_of(config_of("--memory", "none")).memory is None


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_memory_kinds_against_loops(kind):
    """Soft and hard codes come back through today's codewords, features as they were."""
    M, K, d, B = 2, 5, 3, 4
    method = MeCoQ(no_backbone(1), Codebooks(M, K, M * d, 2.0), Objective(T=0.3), Memory(kind, 6))
    z = torch.randn(B, M * d)
    p, _ = method.quantizer(z)
    method.remember(z, p)
    method.quantizer.codebooks.data = torch.randn(M, K, d)
    today = method.quantizer.codewords()
    ours = method.recall(today)
    assert ours.shape == (B, M, d)
    for b in range(B):
        for m in range(M):
            segment = z[b, m * d : (m + 1) * d]
            expected = {
                "soft": sum(p[b, m, k] * today[m, k] for k in range(K)),
                "hard": today[m, int(p[b, m].argmax())],
                "feature": segment / segment.norm(),
            }[kind]
            torch.testing.assert_close(ours[b, m], expected)


def test_frozen_codebooks_do_not_learn():
    method = MeCoQ(no_backbone(1), Codebooks(2, 3, 4, trained=False), Objective(T=0.3))
    method.quantizer(method(torch.randn(5, 1)))[1].sum().backward()
    assert method.quantizer.codebooks.grad is None
    assert method.projection.weight.grad is not None


# ---------------------------------------------------------------- objective


def test_objective_is_equation_14_over_both_views_and_the_memory():
    method = method_of(config_of("--hp_lambda", "0.3", "--queue_begin_epoch", "4"))
    method.memory.enqueue(torch.rand(11, 2, 8).softmax(-1))
    images = torch.rand(10, 3, 16, 16)
    terms = method.loss(images, epoch=4)
    p, _ = method.quantizer(method(images))
    C = F.normalize(method.quantizer.codebooks, dim=-1)

    def decode(soft):
        return torch.cat([soft[:, m] @ C[m] for m in range(2)], dim=1)

    views = decode(p)
    memory = decode(method.memory.codes[:11])
    contrastive = loss.contrastive_loss(views[:5], views[5:], memory, T=0.3, pos_prior=0.1)
    expected = contrastive + 0.3 * loss.code_entropy(p) + 0.5 * loss.codeword_diversity(C)
    torch.testing.assert_close(terms["loss/total_loss"], expected)
    without = method.loss(images, epoch=3)["loss/simclr_loss"]
    torch.testing.assert_close(without, loss.contrastive_loss(views[:5], views[5:], T=0.3, pos_prior=0.1))
    terms["loss/total_loss"].backward()
    assert method.quantizer.codebooks.grad.abs().sum() > 0
    method.after_step()  # both views go into the memory, behind what is there
    torch.testing.assert_close(method.memory.codes[11:21], p.detach())


def test_golden_release_trace(golden, device):
    """60 steps of the released code, memory from epoch 2 on: loss, weights, codebooks and queue."""
    numbers = golden("release_trace")
    c = json.loads(str(numbers["config"]))
    shared = ("K", "alpha", "T", "pos_prior", "queue_begin_epoch", "queue_size", "hp_lambda", "hp_gamma", "hp_beta",
              "lr", "momentum", "start_lr", "final_lr")  # fmt: skip
    flags = ["--mode", "debias", "--M", str(c["M"]), "--batch_size", str(c["N"])]
    config = parse(["--recipe", "release", *flags]).replace(
        epoch_num=c["epochs"], warmup_epoch_num=c["warmup_epochs"], feat_dim=c["M"] * c["D"], memory="soft",
        **{name: c[name] for name in shared},
    )  # fmt: skip
    method = mecoq.build(no_backbone(c["feat_in"]), config).to(device)
    method.projection.weight.data, method.projection.bias.data, method.quantizer.codebooks.data = (
        torch.from_numpy(numbers[name]).to(device) for name in ("W0", "b0", "C0")
    )
    steps = list(torch.from_numpy(numbers["feats"]).to(device).flatten(1, 2))
    writer = Namespace(losses=[])
    writer.add_scalar = lambda tag, value, step: tag == "loss/total_loss" and writer.losses.append(value)
    training = engine.start(config, method, steps[: c["steps_per_epoch"]])
    training.events = writer
    for epoch in range(c["epochs"]):
        training.epoch, training.step, training.sums = epoch, 0, {}
        engine.train_epoch(training, steps[epoch * c["steps_per_epoch"] :][: c["steps_per_epoch"]])
    np.testing.assert_allclose(writer.losses, numbers["loss"], atol=1e-4)
    method.cpu()
    np.testing.assert_allclose(method.projection.weight.detach(), numbers["W"], atol=1e-4)
    np.testing.assert_allclose(method.projection.bias.detach(), numbers["b"], atol=1e-4)
    np.testing.assert_allclose(method.quantizer.codewords(), numbers["C"], atol=1e-4)
    np.testing.assert_allclose(method.memory.codes, numbers["queue"], atol=1e-4)


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_a_step_reads_nothing_from_the_device(kind, monkeypatch):
    """Tensors on the meta device have no values: whatever asked for one would fail. What is read every
    `--log_interval` steps is taken away, and fails if it is not."""
    config = config_of("--queue_begin_epoch", "0", "--memory", kind, "--hp_lambda", "0.1", "--precision", "fp32")
    method = method_of(config).to("meta")
    steps = [torch.empty(12, 3, 16, 16, device="meta")] * 3
    training = engine.start(config, method, steps)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        engine.train_epoch(training, steps)
    monkeypatch.setattr(engine.StepLog, "add", lambda *_: None)
    training.step = 0
    engine.train_epoch(training, steps)


def test_gradients_reach_all_that_is_learned_and_nothing_else():
    backbone = build_backbone("squeezenet1_0", "random", 1, bf16=True)
    method = MeCoQ(backbone, Codebooks(2, 4, 8), Objective(T=0.3))
    soft_codes, reconstruction = method.quantizer(method(torch.rand(4, 3, 64, 64)))
    assert soft_codes.shape == (4, 2, 4)
    loss.contrastive_loss(*reconstruction.flatten(1).chunk(2), T=0.3).backward()
    learned = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"projection.weight", "projection.bias", "quantizer.codebooks"}
    expected |= {n for n, _ in method.named_parameters() if n.startswith("backbone.net.features.12.")}
    assert learned == expected


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("recipe", ["paper", *["release"] * HOSTILE])
def test_a_checkpoint_of_the_authors_release(recipe, tmp_path):
    """Their keys, `vgg.*`, `projection.*`, `pq_layer._C`: MAP as by torchvision's network and plain scoring."""
    vgg = torchvision.models.vgg16(weights=None).eval()
    M, K, d = 2, 64, 4
    projection, C = torch.nn.Linear(4096, M * d), F.normalize(torch.randn(M, K, d), dim=-1)
    projection.weight.data *= 30  # random features differ little: let the codes differ all the same
    state = {f"vgg.{key}": value for key, value in vgg.state_dict().items() if not key.startswith("classifier.6")}
    state |= {f"projection.{key}": value for key, value in projection.state_dict().items()} | {"pq_layer._C": C}
    torch.save(state, tmp_path / "model.cpt")
    folder = small_run(
        tmp_path, "--backbone", "vgg16", "--image_size", "32", "--limit", "60", "--M", "2", "--K", "64",
        "--precision", "fp32", "--recipe", recipe, "--test_only", "--checkpoint", str(tmp_path / "model.cpt"),
    )  # fmt: skip
    splits = splits_of("Digits", limit=60)
    vgg.classifier = vgg.classifier[:6]
    T = torchvision.transforms
    transform = T.Compose([T.Resize((32, 32)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    @torch.inference_mode()
    def embed(images):
        return projection(vgg(torch.stack([transform(images.picture(i)) for i in range(60)]))).view(60, M, d)

    db, query = embed(splits.database), embed(splits.query)
    codes = torch.einsum("nmd,mkd->nmk", F.normalize(db, dim=-1), C).argmax(dim=-1)
    agree = (codes.numpy() == np.load(folder / "db_codes.npy")).mean()
    assert agree > 0.98  # float32 in another order: a tie may fall otherwise
    codes = torch.from_numpy(np.load(folder / "db_codes.npy")).long()
    decoded = torch.stack([C[m][codes[:, m]] for m in range(M)], dim=1)  # [n, M, d]
    segments = F.normalize(query, dim=-1) if recipe == "paper" else query
    scores = torch.einsum("qmd,nmd->qn", segments.double(), decoded.double())
    hits = torch.from_numpy(splits.query.labels[:, None] == splits.database.labels[None])
    order = scores.float().argsort(dim=1, descending=True, stable=True)
    expected = retrieval.average_precision(hits.gather(1, order)[:, :20]).mean()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["map_by_ties"]["database"] == pytest.approx(float(expected), abs=2e-3)


def codebook_is_zero(codebooks):
    return torch.zeros_like(codebooks)


def codeword_is_zero(codebooks):
    codebooks[1, 3] = 0
    return codebooks


def codebooks_are_bytes(codebooks):
    return (codebooks * 100).round().clamp(-100, 100).to(torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (codebook_is_zero, "a codeword is zero: it has no direction"),
        (codeword_is_zero, "a codeword is zero: it has no direction"),
        (codebooks_are_bytes, "quantizer.codebooks does not hold plain finite numbers"),
        (lambda codebooks: codebooks * torch.nan, "quantizer.codebooks does not hold plain finite numbers"),
        (lambda codebooks: codebooks.to(torch.complex64), "quantizer.codebooks does not hold plain finite numbers"),
        (torch.Tensor.to_sparse, "quantizer.codebooks does not hold plain finite numbers"),
        (lambda codebooks: codebooks.to("meta"), "quantizer.codebooks does not hold plain finite numbers"),
        (lambda codebooks: codebooks[0], "there are no codebooks [M, K, D / M] in it"),
        (lambda codebooks: codebooks[:, :6], "give --M 2 --K 6 --feat_dim 8"),
    ],
)
def test_codebooks_that_mean_nothing_are_refused(change, words, tmp_path):
    method = method_of(config_of())
    state = method.state_dict()
    state["quantizer.codebooks"] = change(state["quantizer.codebooks"].clone())
    torch.save(state, tmp_path / "model.cpt")
    with pytest.raises(InputError) as error:
        method.load_checkpoint(tmp_path / "model.cpt")
    assert words in str(error.value)
    assert str(tmp_path / "model.cpt") in str(error.value)


@pytest.mark.parametrize("name", ["projection.weight", "backbone.net.0.0.weight"])
def test_weights_of_whole_numbers_are_refused(name, tmp_path):
    method = method_of(config_of())
    state = method.state_dict()
    state[name] = (state[name] * 50).to(torch.int8)
    torch.save(state, tmp_path / "model.cpt")
    with pytest.raises(InputError, match=f"{name} does not hold plain finite numbers"):
        method.load_checkpoint(tmp_path / "model.cpt")
