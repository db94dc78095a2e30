"""Frozen convolutions in 8-bit integers, for views: against the same sums in float64, and against bfloat16."""

import numpy as np
import pytest
import torch
from helpers import FROZEN, LIVELY, config_of, small_run, thin_vgg
from torch import nn
from torch.nn import functional as F

import config
import engine
import evaluation
import loaders
from methods import int8
from methods.backbones import build_backbone
from methods.int8 import Int8Convolution, Quantize
from methods.prepared import Convolution, Pooling
from utils import InputError

NETWORKS = [
    ("squeezenet1_0", 0, 48),
    ("squeezenet1_0", 3, 48),
    ("squeezenet1_0", 8, 48),
    ("vgg16", 0, 32),
    ("vgg16", 2, 32),
]


@pytest.fixture(autouse=True)
def _small_vgg(monkeypatch):
    thin_vgg(monkeypatch)


def layers_last(*shape):
    return torch.rand(shape).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("inputs", "size", "padding", "stride", "zero", "bias"),
    [(3, 7, 0, 2, 114, True), (3, 3, 1, 1, 114, True), (16, 3, 1, 1, 0, True), (24, 1, 0, 1, 0, False)],
)
def test_a_convolution_is_the_rounded_sum(inputs, size, padding, stride, zero, bias):
    """Padding stands for 0, which is `zero` in integers."""
    layer, step, out_step = nn.Conv2d(inputs, 12, size, stride, padding, bias=bias), 0.02, 0.004
    x = torch.randint(256, (2, inputs, 15, 15)).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    ours = Int8Convolution(Convolution(layer, relu=True), step, zero, out_step)(x)
    weight = layer.weight.detach().bfloat16().float()
    steps = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    weight = (weight / steps).round().double() * steps
    b = layer.bias.detach().bfloat16().double() if bias else None
    exact = F.conv2d((x.double() - zero) * step, weight, b, stride, padding).relu() / out_step
    assert ours.dtype == torch.uint8
    assert 0.2 < ((exact > 0) & (exact < 255)).double().mean() < 1
    assert (ours.double() - exact.clamp(max=255)).abs().max() < 0.51


def test_images_are_rounded_to_steps():
    quantize = Quantize(-2.0, 3.1)
    x = torch.linspace(-2.5, 3.5, 301)
    back = (quantize(x).double() - quantize.zero) * quantize.step
    inside = (x > -2) & (x < 3)
    assert (back - x)[inside].abs().max() < 0.51 * quantize.step
    assert (back[0].item(), back[-1].item()) == pytest.approx((-2, 3.1), abs=quantize.step)
    assert quantize(torch.zeros(1)).item() == quantize.zero


@pytest.mark.parametrize("ceil", [False, True])
def test_maps_are_pooled_as_integers(ceil):
    layer = nn.MaxPool2d(3, 2, ceil_mode=ceil)
    x = torch.randint(256, (2, 5, 14, 17)).to(torch.uint8)
    assert torch.equal(Pooling(layer)(x).double(), layer(x.double()))


def test_a_range_holds_nearly_all_numbers():
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Identity()))
    observer = int8.Observer(net)
    numbers = torch.rand(100000) * 5
    numbers[:3] = 1000
    observer.run(numbers)
    assert list(observer.ranges.values()) == [pytest.approx(5, rel=1e-2)] * len(observer.ranges)
    observer.run(3 * numbers)  # of several batches, the largest
    observer.run(numbers)
    assert list(observer.ranges.values()) == [pytest.approx(15, rel=1e-2)] * len(observer.ranges)


# ---------------------------------------------------------------- networks


def relative(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "trained", "size"), NETWORKS)
def test_only_what_is_trained_on_is_rounded(name, trained, size):
    backbone = build_backbone(name, "random", trained, bf16=True)
    keys = backbone.state_dict().keys()
    x = layers_last(70, 3, size, size)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = backbone.train()(x)
    tested = backbone.eval()(x)
    backbone.quantize_views(x[:40])
    assert torch.equal(backbone(x), tested)
    ours = backbone.train()(x)
    assert 1e-4 < relative(ours, expected) < 0.2
    assert torch.equal(ours[:32], backbone(x[:32]))  # nothing depends on the batch
    assert backbone.state_dict().keys() == keys
    if trained:
        ours.sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())


def test_all_convolutions_of_squeezenet_are_in_integers(monkeypatch):
    backbone, kinds = build_backbone("squeezenet1_0", "random", 0, bf16=True).train(), []
    original = Int8Convolution.forward
    backbone.quantize_views(layers_last(8, 3, 32, 32))
    monkeypatch.setattr(Int8Convolution, "forward", lambda self, x: kinds.append(x.dtype) or original(self, x))
    backbone(layers_last(8, 3, 32, 32))
    assert kinds == [torch.uint8] * 25


def test_features_that_are_too_different_are_refused(monkeypatch):
    backbone = build_backbone("squeezenet1_0", "random", 0, bf16=True)
    original = Int8Convolution.forward
    monkeypatch.setattr(Int8Convolution, "forward", lambda self, x: original(self, x) // 2)
    with pytest.raises(InputError, match=r"--int8_views: features differ by .* %"):
        backbone.quantize_views(layers_last(8, 3, 32, 32))


def test_a_pytorch_without_the_operator_says_so(monkeypatch):
    backbone = build_backbone("squeezenet1_0", "random", 0, bf16=True)
    monkeypatch.setattr(torch.ops, "onednn", object())
    with pytest.raises(InputError, match="--int8_views: this PyTorch does not compute it here"):
        backbone.quantize_views(layers_last(8, 3, 32, 32))


@pytest.mark.parametrize("flags", [["--backbone", "resnet18"], ["--backbone", "convnet"], ["--device", "cuda"]])
def test_where_it_does_not_go_it_is_refused(flags):
    with pytest.raises(InputError, match="--int8_views: of --backbone vgg16 and squeezenet1_0 on a CPU only"):
        config.parse(["--int8_views", *flags])


def test_ranges_come_from_training_images_all_over_the_data_set(weights, monkeypatch):
    monkeypatch.setattr(loaders, "SOME", 7)
    configuration = config_of(*FROZEN, "--weights", weights, "--int8_views")
    splits, method = engine.build(configuration)
    images = loaders.some_images(splits.train, engine.preprocessing(configuration))
    all_of_them = torch.cat(list(loaders.test_batches(splits.train, engine.preprocessing(configuration))))
    rows = [int((all_of_them == image).flatten(1).all(dim=1).nonzero()[0]) for image in images]
    assert rows == np.linspace(0, 59, 7).round().astype(int).tolist()
    assert method.backbone.int8 is not None


def test_a_run_on_photos(photo_root, tmp_path):
    """Its codes are those of the model, computed as ever."""
    flags = [
        "--dataset",
        "Flickr25K",
        "--data_root",
        str(photo_root / "datasets"),
        "--list_root",
        str(photo_root / "data"),
    ]
    flags += ["--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32"]
    flags += [*LIVELY, "--limit", "20", "--epoch_num", "1"]
    found = small_run(tmp_path, *flags, "--int8_views")
    configuration = config_of(*flags)
    splits, method = engine.build(configuration)
    assert method.backbone.int8 is None
    method.load_state_dict(torch.load(found / "model.cpt", weights_only=True))
    features = engine.build_features(configuration, method.eval().backbone, splits.tested)
    codes = evaluation.encode_database(method, features["database"])
    np.testing.assert_array_equal(np.load(found / "db_codes.npy"), codes.numpy())
