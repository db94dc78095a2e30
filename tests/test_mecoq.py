import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.feature_extraction import create_feature_extractor

import loss
from methods.mecoq import BACKBONES, CodebookAttention, CodeMemory, MeCoQ, build_backbone
from utils import InputError


def quantizer_of(codewords, alpha=10.0):
    M, K, d = codewords.shape
    quantizer = CodebookAttention(M, K, M * d, alpha).to(codewords.dtype)
    quantizer.codebooks.data = codewords.clone()
    return quantizer


# ---------------------------------------------------------------- quantizer


def test_golden_codes_and_reconstruction(golden):
    numbers = golden("release_loss")
    for i, c in enumerate(json.loads(str(numbers["config"]))):
        x, C = (torch.from_numpy(numbers[f"{i}/{name}"]) for name in ("x1", "C"))
        assert C.shape == (c["M"], c["K"], c["D"])
        quantizer = quantizer_of(C)
        soft_codes, reconstruction = quantizer(x)
        np.testing.assert_allclose(soft_codes.detach(), numbers[f"{i}/p1"], atol=1e-6)
        np.testing.assert_allclose(reconstruction.detach().flatten(1), numbers[f"{i}/h1"], atol=1e-6)
        np.testing.assert_array_equal(quantizer.hard_codes(x), numbers[f"{i}/hard1"])
        error = loss.quantization_error(quantizer.segments(x), reconstruction)
        assert error.item() == pytest.approx(float(numbers[f"{i}/err1"]), rel=1e-5)


def test_quantizer_is_its_equations():
    """Eq. 1-5 and 15 in NumPy loops, from codebooks that are not of unit length."""
    B, M, K, d, alpha = 5, 3, 7, 4, 6.0
    codebooks = torch.randn(M, K, d, dtype=torch.float64)
    z = torch.randn(B, M * d, dtype=torch.float64)
    quantizer = quantizer_of(codebooks, alpha)
    soft_codes, reconstruction = quantizer(z)
    codes = quantizer.hard_codes(z)
    assert codes.dtype == torch.uint8
    for b in range(B):
        for m in range(M):
            segment = z[b, m * d : (m + 1) * d].numpy()
            segment = segment / np.sqrt((segment**2).sum())
            words = np.stack([c / np.sqrt((c**2).sum()) for c in codebooks[m].numpy()])
            p = np.exp(alpha * words @ segment)
            p /= p.sum()
            np.testing.assert_allclose(soft_codes[b, m].detach(), p, rtol=1e-12)
            np.testing.assert_allclose(reconstruction[b, m].detach(), p @ words, rtol=1e-10)
            assert codes[b, m] == ((words - segment) ** 2).sum(axis=1).argmin()


def test_quantizer_gradient_against_finite_differences():
    quantizer = CodebookAttention(M=2, K=5, D=6, alpha=10.0).double()
    z = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def f(z, codebooks):
        return torch.func.functional_call(quantizer, {"codebooks": codebooks}, (z,))

    assert torch.autograd.gradcheck(f, (z, quantizer.codebooks.detach().requires_grad_()))


def test_large_codebooks_give_codes_above_a_byte():
    quantizer = CodebookAttention(M=1, K=1000, D=8, alpha=10.0)
    z = quantizer.codewords()[0, [3, 999, 256]].detach()
    assert quantizer.hard_codes(z).flatten().tolist() == [3, 999, 256]


def test_zero_embedding_has_finite_codes():
    quantizer = CodebookAttention(M=2, K=4, D=8, alpha=10.0)
    z = torch.zeros(1, 8, requires_grad=True)
    quantizer(z)[1].sum().backward()
    assert z.grad.isfinite().all()


# ---------------------------------------------------------------- memory


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=12))
def test_memory_is_a_queue(size, batches):
    memory, queue, count = CodeMemory(size, 1, 2), [], 0
    for batch in batches:
        rows = torch.arange(count, count + batch, dtype=torch.float32)
        count += batch
        memory.enqueue(rows[:, None, None].expand(-1, 1, 2))
        queue = (queue + rows.tolist())[-size:]
        entries = memory.entries()
        assert entries.shape == (len(queue), 1, 2)
        assert sorted(entries[:, 0, 0].tolist()) == queue
        assert (entries[:, :, 0] == entries[:, :, 1]).all()


def test_memory_stays_out_of_the_state_dict_and_of_gradients():
    memory = CodeMemory(4, 2, 3)
    assert memory.state_dict() == {}
    soft_codes = torch.rand(3, 2, 3, requires_grad=True)
    memory.enqueue(soft_codes)
    assert not memory.entries().requires_grad
    soft_codes.data.zero_()
    assert memory.entries().ne(0).all()


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_memory_kinds_against_loops(kind):
    """Soft and hard codes come back through today's codewords, features as they were."""
    M, K, d, B = 2, 5, 3, 4
    backbone = torch.nn.Identity()
    backbone.dim = 1
    model = MeCoQ(backbone, M * d, M, K, 2.0, 6, kind)
    z = torch.randn(B, M * d)
    p, _ = model.quantizer(z)
    model.remember(z, p)
    model.quantizer.codebooks.data = torch.randn(M, K, d)
    today = model.quantizer.codewords()
    ours = model.recall(today)
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
    backbone = torch.nn.Identity()
    backbone.dim = 1
    model = MeCoQ(backbone, 4, 2, 3, 10.0, None, trained_codebooks=False)
    model.quantizer(model(torch.randn(5, 1)))[1].sum().backward()
    assert model.quantizer.codebooks.grad is None
    assert model.projection.weight.grad is not None


# ---------------------------------------------------------------- backbones

LAST_LAYER = {"vgg16": "classifier.5", "squeezenet1_0": "features.12.cat", "resnet18": "flatten", "resnet50": "flatten"}


@pytest.mark.parametrize("name", LAST_LAYER)
def test_features_are_torchvisions(name, tmp_path):
    """A state dict with torchvision's keys, its head included, in half precision, gives torchvision's features."""
    theirs = torchvision.models.get_model(name, weights=None).eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    torch.save(state, tmp_path / "weights.pth")
    ours = build_backbone(name, str(tmp_path / "weights.pth"), 1, bf16=False).eval()
    x = torch.randn(34, 3, 64, 64)
    with torch.no_grad():
        expected = create_feature_extractor(theirs, {LAST_LAYER[name]: "f"})(x)["f"]
        if expected.dim() == 4:
            expected = expected.mean(dim=(2, 3))
        torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
        bf16 = build_backbone(name, str(tmp_path / "weights.pth"), 0, bf16=True).eval()(x)
    assert bf16.dtype == torch.float32
    assert F.cosine_similarity(bf16, expected).min() > 0.99


def test_trainable_layers_of_vgg16_and_its_dropout(tmp_path):
    """fc7, then fc6 too; never a convolution. Weights: true keys and shapes, each tensor one number in the file."""
    theirs = torchvision.models.vgg16(weights=None, init_weights=False)
    state = {k: torch.full((1,), 0.01).expand(v.shape) for k, v in theirs.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    expected = [set(), {"classifier.3"}, {"classifier.0", "classifier.3"}]
    for trainable, names in enumerate(expected):
        backbone = build_backbone("vgg16", str(tmp_path / "vgg16.pth"), trainable, bf16=False)
        trained = {n.removeprefix("net.").rpartition(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
        assert trained == names
        assert all((p == 0.01).all() for p in backbone.parameters())
    x = torch.rand(2, 3, 32, 32)
    assert backbone.dim == backbone(x).shape[1] == 4096
    assert (backbone(x) == 0).float().mean() == pytest.approx(0.5, abs=0.05)  # dropout after fc7
    assert (backbone.eval()(x) > 0).all()


@pytest.mark.parametrize(("name", "count"), [("squeezenet1_0", 8), ("resnet18", 8), ("resnet50", 16)])
def test_every_block_can_be_trained(name, count):
    assert BACKBONES[name][1] == count
    trained = []
    for number in range(count + 1):
        backbone = build_backbone(name, "random", number, bf16=False)
        trained.append(sum(p.requires_grad for p in backbone.parameters()))
    assert trained == sorted(set(trained))
    total = len(list(backbone.parameters()))
    assert trained[0] == 0
    assert trained[-1] == total - {"squeezenet1_0": 2, "resnet18": 3, "resnet50": 3}[name]  # all but the stem


def test_frozen_batch_statistics_do_not_change_and_trained_ones_do():
    backbone = build_backbone("resnet18", "random", 1, bf16=False).train()
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone(torch.rand(4, 3, 64, 64))
    changed = {n for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
    assert changed == {n for n in before if "layer4.1" in n}


def test_convnet_is_trained_as_a_whole():
    backbone = build_backbone("convnet", "random", 0, bf16=True)
    assert all(p.requires_grad for p in backbone.parameters())
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.dim)
    assert backbone(torch.rand(2, 3, 8, 8)).shape == (2, backbone.dim)


def damaged(state, kind):
    state = dict(state)
    if kind == "missing":
        del state["features.3.squeeze.weight"]
    elif kind == "shape":
        state["features.3.squeeze.weight"] = torch.zeros(2, 2)
    elif kind == "foreign":
        state["features.99.weight"] = torch.zeros(2)
    elif kind == "nan":
        state["features.3.squeeze.weight"] = torch.full((16, 96, 1, 1), torch.nan)
    elif kind == "meta":
        state["features.3.squeeze.weight"] = torch.empty((16, 96, 1, 1), device="meta")
    elif kind == "nested":
        state = {"state_dict": state}
    return state


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"do not fit squeezenet1_0: features.3.squeeze.weight is missing"),
        ("shape", r"features.3.squeeze.weight is \[2, 2\] instead of \[16, 96, 1, 1\]"),
        ("foreign", r"features.99.weight is not part of it"),
        ("nan", r"features.3.squeeze.weight does not hold plain finite numbers"),
        ("meta", r"features.3.squeeze.weight does not hold plain finite numbers"),
        ("nested", r"is not a state dict"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_key(kind, words, tmp_path):
    state = torchvision.models.squeezenet1_0(weights=None).state_dict()
    torch.save(damaged(state, kind), tmp_path / "w.pth")
    with pytest.raises(InputError, match=words):
        build_backbone("squeezenet1_0", str(tmp_path / "w.pth"), 0, bf16=False)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off", b".", b"e", b"J\x00", None])
def test_unreadable_weights(content, tmp_path):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"w\.pth"):
        build_backbone("squeezenet1_0", str(path), 0, bf16=False)


def test_weights_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(InputError):
        build_backbone("squeezenet1_0", str(tmp_path / "w.pth"), 0, bf16=False)
    assert not (tmp_path / "hacked").exists()


def test_imagenet_weights_without_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(InputError, match=r"no route to host.*pass --weights PATH"):
        build_backbone("squeezenet1_0", "imagenet", 0, bf16=False)


def test_gradients_reach_all_that_is_learned_and_nothing_else():
    model = MeCoQ(build_backbone("squeezenet1_0", "random", 1, bf16=True), D=8, M=2, K=4, alpha=10.0, queue_size=None)
    soft_codes, reconstruction = model.quantizer(model(torch.rand(4, 3, 64, 64)))
    assert soft_codes.shape == (4, 2, 4)
    loss.contrastive_loss(*reconstruction.flatten(1).chunk(2), T=0.3).backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"projection.weight", "projection.bias", "quantizer.codebooks"}
    expected |= {n for n, _ in model.named_parameters() if n.startswith("backbone.net.features.12.")}
    assert learned == expected


@pytest.mark.skipif("MECOQ_ALL" not in os.environ, reason="a minute of compiling: scripts/test.sh --all")
def test_compiled_features_are_the_same_but_for_rounding():
    backbone = build_backbone("squeezenet1_0", "random", 1, bf16=False)
    x = torch.rand(40, 3, 48, 48)
    expected = backbone(x)
    backbone.compile_frozen(48, "cpu")
    torch.testing.assert_close(backbone(x), expected, atol=1e-4, rtol=1e-3)


def test_what_can_not_be_compiled_is_said_in_one_line(monkeypatch):
    def compile_nothing(function):
        def fails(*_):
            raise RuntimeError("no compiler\nfound")

        return fails

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(InputError, match=r"--compile: PyTorch can not .*no compiler found"):
        build_backbone("squeezenet1_0", "random", 1, bf16=False).compile_frozen(32, "cpu")
