"""Backbones: networks cut into blocks, of which the last may be trained, and their weights."""

import itertools
import math
import pickle
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as Dropout

from distributed import CPU_CHUNK, KEPT_BLOCK, by_chunks
from methods import BACKBONES
from methods.int8 import quantized
from methods.prepared import Prepared
from utils import InputError, load_object, load_tensors, one_line


class Backbone(nn.Module):
    """Images `[B, 3, S, S]` -> features `[B, dim]`: frozen blocks, then the trained ones.

    `net` keeps the names that torchvision gives its parameters. The frozen blocks run without gradients, in bfloat16
    if asked; their dropout is active in training mode, their batch statistics never change. The first of them are the
    prefix, whose output for a test image can be kept (`feature_cache.py`): all of the frozen blocks, but for VGG16 with
    one trained layer, which shares its prefix, the convolutions, with two.

    Args:
        trained: how many of the last blocks learn.
        bf16: run the frozen blocks in bfloat16.
    """

    def __init__(self, net: nn.Module, blocks: list[nn.Module], dim: int, trained: int, bf16: bool) -> None:
        super().__init__()
        self.net, self.dim, self.bf16 = net, dim, bf16
        self.split = len(blocks) - trained
        self.cut = min(self.split, 1) if isinstance(net, torchvision.models.VGG) and trained else self.split
        self.blocks = tuple(blocks)  # a tuple: they are registered in `net` already
        self.compiled: Callable | None = None
        dropout = (any(isinstance(module, Dropout) for module in block.modules()) for block in blocks)
        self.maps = [*dropout, True].index(True)  # blocks in front of any dropout, which draws for CPU_CHUNK images
        self.prepared: dict[tuple[int, int], Prepared] = {}
        self.int8: Callable[[Tensor], Tensor] | None = None
        self.net.requires_grad_(False)
        for block in self.blocks[self.split :]:
            block.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for block in self.blocks[: self.split]:
            for module in block.modules():
                module.training = mode and isinstance(module, Dropout)
        return self

    def compile_frozen(self, image_size: int, device: str, sizes: Sequence[int]) -> None:
        """Let PyTorch compile the frozen blocks (`--compile`). Raises InputError if it cannot.

        Args:
            sizes: of the batches that it is to be ready for on a GPU; on a CPU all have `CPU_CHUNK` rows.
        """
        self.compiled = torch.compile(self._through)
        try:
            for rows in (CPU_CHUNK,) if device == "cpu" else sizes:
                self.prefix(torch.zeros(rows, 3, image_size, image_size, device=device))
        except Exception as error:  # whatever the compiler met
            raise InputError(
                f"--compile: PyTorch cannot compile the backbone here ({one_line(error)[:200]}): it needs a C++ "
                "compiler, or leave the flag out"
            ) from error

    @torch.inference_mode()
    def quantize_views(self, images: Tensor) -> None:
        """Run the frozen convolutions in 8-bit integers in training, on a CPU (`--int8_views`).

        Args:
            images: `[B, 3, S, S]`, from which the ranges of the integers are taken.

        Raises InputError if that does not go.
        """
        x = images.contiguous(memory_format=torch.channels_last)
        self.int8 = quantized(self.blocks[: min(self.maps, self.cut)], x.split(self.rows(x)))

    def _through(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            x = block(x)
        return x

    def rows(self, x: Tensor) -> int:
        """Of images `[B, 3, H, W]`, how many a CPU takes at a time: their largest map, which is the first, is to be no
        larger than memory that the process keeps."""
        first = next(module for module in self.modules() if isinstance(module, nn.Conv2d))
        size = first.out_channels * (2 if self.bf16 else 4) * math.prod(x.shape[2:]) // math.prod(first.stride)
        rows = CPU_CHUNK
        while rows > 1 and rows * size > KEPT_BLOCK:
            rows //= 2
        return rows

    @torch.inference_mode()
    def _frozen(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Through frozen blocks; float32."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            whole = x.device.type != "cpu" or len(x) == CPU_CHUNK  # each other size would be compiled anew
            if self.compiled and whole:
                x = self.compiled(x, start, stop)
            else:
                maps = max(start, min(self.maps, stop))
                if start < maps:
                    x = by_chunks(lambda part: self._run(part, start, maps), x, rows=self.rows(x))
                x = self._run(x, maps, stop)
        return x.float()

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Through some frozen blocks as they are, or as prepared for bfloat16."""
        if not self.bf16 or start == stop:
            return self._through(x, start, stop)
        if (start, stop) not in self.prepared:
            self.prepared[start, stop] = Prepared(self.blocks[start:stop])
        return self.prepared[start, stop](x)

    def prefix(self, x: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` -> what leaves the prefix `[B, ...]`, float32."""
        return by_chunks(lambda part: self._frozen(part, 0, self.cut), x)  # a copy, which autograd may keep

    @torch.inference_mode()
    def _integers(self, x: Tensor) -> Tensor:
        """What leaves the convolutions in 8-bit integers; float32."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.int8(x.contiguous(memory_format=torch.channels_last)).float()

    def prefix_of_views(self, x: Tensor) -> Tensor:
        """`prefix` with convolutions in 8-bit integers."""
        maps = min(self.maps, self.cut)
        x = by_chunks(self._integers, x, rows=self.rows(x))
        return by_chunks(lambda part: self._frozen(part, maps, self.cut), x) if maps < self.cut else x

    def suffix(self, x: Tensor) -> Tensor:
        """What leaves the prefix `[B, ...]` -> features `[B, dim]`."""
        if self.cut < self.split:
            x = self._frozen(x, self.cut, self.split).clone()
        for block in self.blocks[self.split :]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.suffix(self.prefix_of_views(x) if self.training and self.int8 else self.prefix(x))


class PassThrough(nn.Module):
    """A stand-in for a backbone: features `[B, dim]` come in, features go out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.blocks, self.split, self.cut = dim, (), 0, 0

    def forward(self, features: Tensor) -> Tensor:
        return features

    prefix = suffix = forward


def vgg16(net: nn.Module) -> tuple[list[nn.Module], int]:
    """conv1 ... fc7; the blocks that may be trained are fc6 and fc7, each with its ReLU and dropout."""
    fc = net.classifier
    net.classifier = nn.Sequential(*fc[:6])
    return [nn.Sequential(net.features, net.avgpool, nn.Flatten()), fc[:3], fc[3:6]], 4096


def squeezenet1_0(net: nn.Module) -> tuple[list[nn.Module], int]:
    """Pooled output of the last of eight Fire modules, each a block."""
    net.classifier = nn.Identity()
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    f = net.features
    blocks = [f[:3], f[3], f[4], f[5:7], f[7], f[8], f[9], f[10:12], nn.Sequential(f[12], pool)]
    return blocks, 512


def resnet(net: nn.Module) -> tuple[list[nn.Module], int]:
    """Pooled output of the last residual block; every residual block is a block."""
    dim = net.fc.in_features
    net.fc = nn.Identity()
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    residual = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
    last = nn.Sequential(residual[-1], net.avgpool, nn.Flatten())
    return [stem, *residual[:-1], last], dim


class ConvNet(nn.Sequential):
    """A small network for small images, trained from scratch: three blocks of two 3x3 convolutions."""

    def __init__(self) -> None:
        widths = (3, 32, 64, 128)
        super().__init__(
            *(self.block(i, o) for i, o in itertools.pairwise(widths)),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        def convolution(i: int) -> list[nn.Module]:
            return [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        return nn.Sequential(*convolution(inputs), *convolution(outputs), nn.MaxPool2d(2))


def convnet(net: nn.Module) -> tuple[list[nn.Module], int]:
    """All of it is trained, whatever `--trainable_layer_num`: it has no pretrained weights to keep."""
    return [net], 512


class SmallResNet(nn.Sequential):
    """ResNet-18 for small images, trained from scratch, as SPQ has it: a 3x3 convolution of stride 1 without pooling,
    four stages of two basic blocks, the mean over the map, a linear layer and ReLU.

    Args:
        widths: channels of the stages.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        first, last = widths[0], widths[-1]
        stages = [self.stage(i, o) for i, o in itertools.pairwise((first, *widths))]
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, first, 3, padding=1, bias=False),
                bn1=nn.BatchNorm2d(first),
                relu=nn.ReLU(inplace=True),
                **{f"layer{number}": stage for number, stage in enumerate(stages, start=1)},
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(last, last),
                fc_relu=nn.ReLU(),
            )
        )

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        """Two basic blocks; the first halves the map if it widens it."""
        block = torchvision.models.resnet.BasicBlock
        if inputs == outputs:
            return nn.Sequential(block(inputs, outputs), block(outputs, outputs))
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(block(inputs, outputs, 2, shortcut), block(outputs, outputs))


def resnet18_small() -> SmallResNet:
    """ResNet-18 for small images, of 11,431,488 parameters."""
    return SmallResNet((64, 128, 256, 512))


def resnet18_tiny() -> SmallResNet:
    """The same at a quarter of the widths."""
    return SmallResNet((16, 32, 64, 128))


def small_resnet(net: nn.Module) -> tuple[list[nn.Module], int]:
    """All of it is trained, its linear layer too: 512 features, or 128 of `resnet18_tiny`."""
    return [net], net.fc.out_features


def build_backbone(name: str, weights: str, trainable_layer_num: int, bf16: bool) -> Backbone:
    """A backbone of `methods.BACKBONES` with its weights.

    Args:
        weights: "imagenet" (torchvision downloads them), "random", or the path of a state dict with torchvision's keys.
        trainable_layer_num: blocks trained, counted from the end; all, if there are no pretrained ones.
        bf16: run the frozen blocks in bfloat16.

    Raises InputError if the weights cannot be had or do not fit.
    """
    row = BACKBONES[name]
    net = load_object(row.network)() if row.network else torchvision.models.get_model(name, weights=None)
    keys = set(net.state_dict())
    blocks, dim = load_object(row.blocks)(net)
    if weights != "random":
        state = _imagenet_state(name) if weights == "imagenet" else read_state_dict(Path(weights), "--weights")
        load_weights(net, state, keys, f"--weights {weights}: do not fit {name}")
    trained = trainable_layer_num if row.pretrained else len(blocks)
    return Backbone(net.to(memory_format=torch.channels_last), blocks, dim, trained, bf16)


def _imagenet_state(name: str) -> dict[str, Tensor]:
    try:
        return torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(
            progress=bool(sys.stderr and sys.stderr.isatty()), check_hash=True, weights_only=True
        )
    except Exception as error:  # network, proxy, hash, or a damaged file in torch's cache
        raise InputError(
            f"--weights imagenet: {name} could not be downloaded ({error}): check the network, or fetch its "
            "torchvision state dict elsewhere and pass --weights PATH"
        ) from error


def read_state_dict(path: Path, flag: str) -> dict[str, Tensor]:
    """The state dict in a file. Raises InputError naming `flag` and the file if there is none in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one line below says it
            state = load_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{flag}: {path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = one_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to switch the safety off
            reason = "damaged, or it holds more than tensors: save model.state_dict()"
        raise InputError(f"{flag}: {path} is not a readable PyTorch state dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{flag}: {path} is not a state dict (names -> tensors)")
    return state


def load_weights(net: nn.Module, state: dict[str, Tensor], keys: set[str], fault: str) -> None:
    """Load a state dict into a network without its head.

    Args:
        keys: of the network with its head; those of the head are passed over.
        fault: how the error begins.

    Raises InputError on the first key that is missing, foreign, of another shape or not of plain finite numbers.
    """
    for key, value in net.state_dict().items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise InputError(f"{fault}: {key} is missing")
        if key in state and state[key].shape != value.shape:
            raise InputError(f"{fault}: {key} is {list(state[key].shape)} instead of {list(value.shape)}")
        if key in state and not plain_numbers(state[key], value.dtype):
            raise InputError(f"{fault}: {key} does not hold plain finite numbers")
    for key in state:
        if key not in keys:
            raise InputError(f"{fault}: {key} is not part of it")
    net.load_state_dict({k: v for k, v in state.items() if k in net.state_dict()}, strict=False)


def plain_numbers(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor holds finite numbers, and floating-point ones if the network's are."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.is_floating_point() == dtype.is_floating_point and bool(tensor.float().isfinite().all())
