"""Frozen blocks as prepared for bfloat16 give the bits of the blocks as they are."""

import copy
import ctypes

import pytest
import torch
import torchvision
from torch import nn

import distributed
import feature_cache
from methods import prepared
from methods.backbones import build_backbone
from methods.prepared import Pooling, Prepared

NETWORKS = [
    ("squeezenet1_0", 0, 64), ("squeezenet1_0", 2, 33), ("resnet18", 0, 33), ("resnet50", 3, 32), ("vgg16", 1, 32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _thin_vgg(monkeypatch):
    """VGG16 with the same blocks, thin."""
    real = torchvision.models.get_model

    def get_model(name, **options):
        if name != "vgg16":
            return real(name, **options)
        net = torchvision.models.VGG(torchvision.models.vgg.make_layers([16, "M"] * 5), init_weights=False)
        net.classifier[0], net.classifier[3] = nn.Linear(16 * 49, 4096), nn.Linear(4096, 4096)
        return net

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


@torch.inference_mode()
def as_they_are(backbone, x):
    """What leaves the frozen blocks under autocast, as one would write it down."""
    with torch.autocast("cpu", torch.bfloat16, enabled=backbone.bf16):
        x = x.contiguous(memory_format=torch.channels_last)
        for block in backbone.blocks[: backbone.split]:
            x = block(x)
        return x.float()


def frozen_of(backbone, x):
    """The same by the backbone itself."""
    x = backbone.prefix(x)
    return backbone._frozen(x, backbone.cut, backbone.split) if backbone.cut < backbone.split else x


def assert_same(backbone, x):
    torch.manual_seed(1)
    expected = as_they_are(backbone, x)
    state = torch.get_rng_state()
    for _ in range(3):  # compared at first, then faster
        torch.manual_seed(1)
        assert torch.equal(frozen_of(backbone, x), expected)
        assert torch.equal(torch.get_rng_state(), state)
    return expected


def all_are_faster(backbone):
    return all(all(p.same.values()) and p.same and p.faster for p in backbone.prepared.values())


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("name", "trained", "size"), NETWORKS)
def test_all_bits_are_those_of_the_blocks_as_they_are(name, trained, size, bf16, mode):
    """Dropout is active in training, and draws as ever; batch statistics do not change."""
    backbone = build_backbone(name, "random", trained, bf16).train(mode)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    features = assert_same(backbone, torch.randn(6, 3, size, size))
    assert features.std() > 0
    assert bool(backbone.prepared) == bf16
    assert all_are_faster(backbone)
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())


def changed(backbone, how):
    if how == "loaded":
        backbone.load_state_dict({name: 2 * tensor for name, tensor in backbone.state_dict().items()})
    elif how == "in place":
        with torch.no_grad():
            backbone.blocks[0][0].weight.mul_(2)
    elif how == "layout":
        backbone.to(memory_format=torch.contiguous_format)
        with torch.no_grad():  # the memory that is free again may be taken anew
            backbone.blocks[0][0].weight.data = 2 * backbone.blocks[0][0].weight
    elif how == "copied":
        backbone = copy.deepcopy(backbone)
        with torch.no_grad():
            backbone.blocks[0][0].weight.mul_(2)
    return backbone


@pytest.mark.parametrize("how", ["loaded", "in place", "layout", "copied"])
def test_changed_weights_are_noticed(how):
    backbone, x = build_backbone("squeezenet1_0", "random", 0, bf16=True).eval(), torch.randn(4, 3, 48, 48)
    before = assert_same(backbone, x)
    other = changed(backbone, how)
    assert not torch.equal(assert_same(other, x), before)
    assert all_are_faster(other)
    if how == "copied":
        assert torch.equal(assert_same(backbone, x), before)


def test_bits_are_compared_again_after_the_weights_changed():
    """Of numbers that overflow, the faster blocks would not tell."""
    backbone, x = build_backbone("squeezenet1_0", "random", 0, bf16=True).eval(), torch.randn(4, 3, 48, 48)
    assert_same(backbone, x)
    with torch.no_grad():
        backbone.blocks[0][0].weight.mul_(1e38)
        backbone.blocks[1].squeeze.weight.mul_(1e38)
    assert [backbone.prefix(x).isnan().any().item() for _ in range(2)] == [True, True]


class TwoUsers(nn.Module):
    """A convolution whose output goes on with and without ReLU."""

    def __init__(self):
        super().__init__()
        self.convolution, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()

    def forward(self, x):
        x = self.convolution(x)
        return torch.cat([self.relu(x), x], 1)


def test_a_convolution_of_two_users_keeps_its_negative_numbers():
    run, x = Prepared([TwoUsers().requires_grad_(False)]), torch.randn(2, 3, 9, 9)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x), run.plain(x))
        assert torch.equal(run(x), run.plain(x))
    assert list(run.same.values()) == [True]


def test_a_network_in_double_precision_is_left_as_it_is():
    backbone = build_backbone("squeezenet1_0", "random", 0, bf16=True).eval().double()
    x = torch.randn(2, 3, 48, 48).double()
    assert torch.equal(backbone.prefix(x), as_they_are(backbone, x))
    assert not any(run.faster for run in backbone.prepared.values())


class Broken:
    def __call__(self, *_):
        raise RuntimeError("unknown argument")


def wrong(x, weight, bias, *_):
    return torch.zeros(1)


@pytest.mark.parametrize("operator", [None, Broken(), wrong])
def test_without_the_private_operator_the_bits_stay(operator, monkeypatch):
    """It is gone, takes other arguments, or computes something else."""
    monkeypatch.setattr(prepared, "convolution_with_relu", lambda: operator)
    backbone, x = build_backbone("squeezenet1_0", "random", 0, bf16=True).eval(), torch.randn(4, 3, 48, 48)
    assert_same(backbone, x)
    assert all_are_faster(backbone) == (operator is None)


def test_an_operator_that_is_gone_is_none(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert prepared.convolution_with_relu() is None


@pytest.mark.parametrize("size", [7, 8, 9, 10, 13])
@pytest.mark.parametrize(("kernel", "stride", "ceil"), [(3, 2, True), (3, 2, False), (2, 2, False), (3, 1, False)])
def test_pooling_of_integers(kernel, stride, ceil, size):
    layer = nn.MaxPool2d(kernel, stride, ceil_mode=ceil)
    x = torch.randn(2, 5, size, size + 3).relu().bfloat16().contiguous(memory_format=torch.channels_last)
    assert torch.equal(Pooling(layer)(x), layer(x))


def test_maps_with_negative_numbers_are_pooled_as_ever():
    blocks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3))]
    net = prepared.faster(blocks)
    assert not any(isinstance(layer, Pooling) for layer in net.modules())
    run, x = Prepared([block.requires_grad_(False) for block in blocks]), torch.randn(2, 3, 16, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = run.plain(x)
        assert [torch.equal(run(x), expected) for _ in range(2)] == [True, True]
    assert list(run.same.values()) == [True]


# ---------------------------------------------------------------- memory


def test_chunks_keep_the_largest_map_below_what_is_kept(monkeypatch):
    """Powers of two up to 32, so that what is filled up to 32 images goes in whole chunks."""
    expected = {("squeezenet1_0", 128): 32, ("squeezenet1_0", 224): 8, ("vgg16", 224): 16, ("resnet18", 224): 16}
    for (name, size), rows in expected.items():  # the thin VGG16 has a quarter of the channels
        assert build_backbone(name, "random", 0, bf16=True).rows(torch.empty(0, 3, size, size)) == rows
    backbone = build_backbone("squeezenet1_0", "random", 0, bf16=False)
    assert backbone.rows(torch.empty(0, 3, 224, 224)) == 4  # float32
    assert backbone.rows(torch.empty(0, 3, 4000, 4000)) == 1


def test_smaller_chunks_give_the_same_bits_and_dropout_draws_for_all(monkeypatch):
    monkeypatch.setattr("methods.backbones.KEPT_BLOCK", 2**17)
    for name in ("squeezenet1_0", "vgg16"):
        backbone = build_backbone(name, "random", 0, bf16=True).train()
        x = torch.randn(7, 3, 48, 48)
        assert backbone.rows(x) < 4
        assert_same(backbone, x)


def test_the_feature_cache_knows_the_chunks(monkeypatch):
    backbone = build_backbone("squeezenet1_0", "random", 0, bf16=True)
    assert feature_cache.chunks(backbone, 128, "cpu") == {}
    assert feature_cache.chunks(backbone, 224, "cpu") == {"rows": 8}
    assert feature_cache.chunks(backbone, 224, "cuda") == {}


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert distributed.use_device("cpu", "bf16") == "bf16"
    assert calls == [(-3, distributed.KEPT_BLOCK), (-1, distributed.KEPT_MEMORY)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    distributed.keep_freed_memory()
