"""Registries of methods and backbones. Imports no PyTorch: a row names the function that needs it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from methods import flags
from methods.flags import Flag


@dataclass(frozen=True)
class MethodRow:
    """A method.

    Args:
        build: "module:function", (backbone, config) -> `methods.base.Method`.
        shape: its flags' values -> (M, K): an image's code is M numbers from 0 to K - 1.
        of_bits: bits of a code -> the values of its flags that give such codes.
        flags: its own flags, by the heading under which `--help` shows them.
        resolve: fills in the values of its flags that depend on others, in place, given whether the backbone is a
            pretrained one; raises InputError if they do not go together.
        defaults: its own defaults of the flags that all methods have; a pair, if its recipes `paper` and `release` have
            different ones, or `flags.Depends`.
    """

    build: str
    shape: Callable[[dict], tuple[int, int]]
    of_bits: Callable[[int], dict[str, object]]
    flags: dict[str, tuple[Flag, ...]] = field(default_factory=dict)
    resolve: Callable[[dict, bool], None] = lambda values, pretrained: None
    defaults: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class BackboneRow:
    """A feature extractor.

    Args:
        blocks: "module:function", (network without weights) -> (its blocks, feature size); it cuts off the head.
        trainable: how many of the last blocks `--trainable_layer_num` may name.
        smallest: side of the smallest input image, in pixels.
        pretrained: whether torchvision has ImageNet weights of it; if not, all of it is trained from scratch.
        network: "module:class" of a network that is not torchvision's.
        normalized: whether its input is normalised by ImageNet's mean and deviation; if not, it is in [0, 1].
    """

    blocks: str
    trainable: int
    smallest: int = 32
    pretrained: bool = True
    network: str | None = None
    normalized: bool = True


METHODS: dict[str, MethodRow] = {
    "MeCoQ": MethodRow(
        "methods.mecoq:build", flags.code_shape, lambda bits: {"M": bits // 8}, flags.MECOQ, flags.resolve_mecoq
    ),
    "SPQ": MethodRow(
        "methods.spq:build", flags.code_shape, lambda bits: {"M": bits // 4}, flags.SPQ, flags.resolve_spq,
        flags.SPQ_DEFAULTS,
    ),
    "CIBHash": MethodRow(
        "methods.cibhash:build", lambda values: (values["code_length"] // 8, 256), lambda bits: {"code_length": bits},
        flags.CIBHASH, flags.resolve_cibhash, flags.CIBHASH_DEFAULTS,
    ),
}  # fmt: skip

BACKBONES: dict[str, BackboneRow] = {
    "vgg16": BackboneRow("methods.backbones:vgg16", trainable=2),
    "squeezenet1_0": BackboneRow("methods.backbones:squeezenet1_0", trainable=8),
    "resnet18": BackboneRow("methods.backbones:resnet", trainable=8),
    "resnet50": BackboneRow("methods.backbones:resnet", trainable=16),
    "convnet": BackboneRow("methods.backbones:convnet", 1, 8, pretrained=False, network="methods.backbones:ConvNet"),
    "resnet18_small": BackboneRow(
        "methods.backbones:small_resnet",
        1,
        9,
        pretrained=False,
        network="methods.backbones:resnet18_small",
        normalized=False,
    ),
    "none": BackboneRow("methods.backbones:PassThrough", trainable=0, smallest=1),  # what comes in is features
    "resnet18_tiny": BackboneRow(
        "methods.backbones:small_resnet",
        1,
        9,
        pretrained=False,
        network="methods.backbones:resnet18_tiny",
        normalized=False,
    ),
}
