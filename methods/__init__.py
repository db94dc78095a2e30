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
        bits: its flags' values -> bits of an image's code.
        flags: its own flags, by the heading under which `--help` shows them.
        resolve: fills in its flags that depend on others, in place; raises InputError if they do not go together.
    """

    build: str
    bits: Callable[[dict], int]
    flags: dict[str, tuple[Flag, ...]] = field(default_factory=dict)
    resolve: Callable[[dict], None] = lambda values: None


@dataclass(frozen=True)
class BackboneRow:
    """A feature extractor.

    Args:
        blocks: "module:function", (network without weights) -> (its blocks, feature size); it cuts off the head.
        trainable: how many of the last blocks `--trainable_layer_num` may name.
        smallest: side of the smallest input image, in pixels.
        pretrained: whether torchvision has ImageNet weights of it; if not, all of it is trained from scratch.
        network: "module:class" of a network that is not torchvision's.
    """

    blocks: str
    trainable: int
    smallest: int = 32
    pretrained: bool = True
    network: str | None = None


METHODS: dict[str, MethodRow] = {
    "MeCoQ": MethodRow("methods.mecoq:build", flags.bits_mecoq, flags.MECOQ, flags.resolve_mecoq),
}

BACKBONES: dict[str, BackboneRow] = {
    "vgg16": BackboneRow("methods.backbones:vgg16", trainable=2),
    "squeezenet1_0": BackboneRow("methods.backbones:squeezenet1_0", trainable=8),
    "resnet18": BackboneRow("methods.backbones:resnet", trainable=8),
    "resnet50": BackboneRow("methods.backbones:resnet", trainable=16),
    "convnet": BackboneRow("methods.backbones:convnet", 1, 8, pretrained=False, network="methods.backbones:ConvNet"),
}
