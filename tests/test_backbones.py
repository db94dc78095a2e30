"""Backbones: torchvision's features, what is trained of them, their precision, their weights."""

import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import config_of, method_of, small_run
from torchvision.models.feature_extraction import create_feature_extractor

import engine
from methods import BACKBONES
from methods.backbones import build_backbone
from utils import InputError

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
    for trainable, names in (1, {"classifier.3"}), (2, {"classifier.0", "classifier.3"}):
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
    assert BACKBONES[name].trainable == count
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


@pytest.mark.skipif("MECOQ_HOSTILE" not in os.environ, reason="a minute of compiling: scripts/test.sh --all")
def test_compiled_features_are_the_same_but_for_rounding():
    backbone = build_backbone("squeezenet1_0", "random", 1, bf16=False)
    x = torch.rand(40, 3, 48, 48)
    expected = backbone(x)
    backbone.compile_frozen(48, "cpu", ())
    torch.testing.assert_close(backbone(x), expected, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch):
    def compile_nothing(function):
        def fails(*_):
            raise RuntimeError("no compiler\nfound")

        return fails

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(InputError, match=r"--compile: PyTorch cannot .*no compiler found"):
        build_backbone("squeezenet1_0", "random", 1, bf16=False).compile_frozen(32, "cpu", ())


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["squeezenet1_0", "resnet18"])
def test_frozen_blocks_run_in_the_precision_asked_for_and_all_that_learns_in_float32(name, precision):
    flags = ["--backbone", name, "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1"]
    method = method_of(config_of(*flags, "--precision", precision))
    last = {"squeezenet1_0": "net.features.12.expand3x3", "resnet18": "net.layer4.1.conv2"}[name]
    dtypes = {}
    modules = dict(method.backbone.named_modules())
    blocks = method.backbone.blocks
    hooked = {"first": blocks[0][0], "frozen": blocks[-2], "trained": modules[last], "projection": method.projection}

    def note(place, out):
        if isinstance(out, torch.Tensor):  # not while the blocks are traced
            dtypes.setdefault(place, set()).add(out.dtype)

    for place, module in hooked.items():
        module.register_forward_hook(lambda _, __, out, place=place: note(place, out))
    images = torch.rand(8, 3, 32, 32)
    method.train().loss(images, 0)
    method.eval()
    kept = method.backbone.prefix(images)
    method.embed(kept)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dtypes == {"first": {half}, "frozen": {half}, "trained": {torch.float32}, "projection": {torch.float32}}
    assert kept.dtype == torch.float32
    assert torch.equal(kept, kept.bfloat16().float()) == (precision == "bf16")


def test_a_run_trains_fc7_of_vgg16_and_no_other_layer(tmp_path):
    """One trained layer, whose input is not what test images are kept as."""
    flags = [
        "--backbone", "vgg16", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1",
        "--lr_scaling", "1", "--hp_beta", "0", "--limit", "24", "--batch_size", "12", "--epoch_num", "1",
    ]  # fmt: skip
    trained = torch.load(small_run(tmp_path, *flags) / "model.cpt", weights_only=True, mmap=True)
    _, method = engine.build(config_of(*flags))  # as the run began
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, trained[name])}
    fc7 = {f"backbone.net.classifier.3.{kind}" for kind in ("weight", "bias")}
    assert changed == fc7 | {"projection.weight", "projection.bias", "quantizer.codebooks"}
    assert trained.keys() == method.state_dict().keys()
