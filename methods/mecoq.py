"""What is learned? Backbones, codebook attention (the quantizer), the code memory, and MeCoQ made of them."""

import itertools
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from utils import CPU_CHUNK, InputError, by_chunks, load_tensors, one_line

# ---------------------------------------------------------------- backbones


class Backbone(nn.Module):
    """Images `[B, 3, S, S]` -> features `[B, dim]`: frozen blocks, then the trained ones.

    `net` keeps the names that torchvision gives its parameters. The frozen blocks run without gradients, in bfloat16
    if asked; their dropout is active in training mode, their batch statistics never change. The first of them are the
    prefix, whose output for a test image can be kept (`features.py`): all of the frozen blocks, but for VGG16 with one
    trained layer, which shares its prefix, the convolutions, with two.
    """

    def __init__(self, net: nn.Module, blocks: list[nn.Module], dim: int, trained: int, bf16: bool) -> None:
        super().__init__()
        self.net, self.dim, self.bf16 = net, dim, bf16
        self.split = len(blocks) - trained
        self.cut = min(self.split, 1) if isinstance(net, torchvision.models.VGG) and trained else self.split
        self.blocks = tuple(blocks)  # a tuple: they are registered in `net` already
        self.compiled: Callable | None = None
        self.net.requires_grad_(False)
        for block in self.blocks[self.split :]:
            block.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for block in self.blocks[: self.split]:
            for module in block.modules():
                module.training = mode and isinstance(module, nn.modules.dropout._DropoutNd)
        return self

    def compile_frozen(self, image_size: int, device: str) -> None:
        """Let PyTorch compile the frozen blocks (`--compile`). Raises InputError where it can not."""
        self.compiled = torch.compile(self._through)
        try:
            self.prefix(torch.zeros(CPU_CHUNK, 3, image_size, image_size, device=device))
        except Exception as error:  # whatever the compiler met
            raise InputError(
                f"--compile: PyTorch can not compile the backbone here ({one_line(error)[:200]}): it needs a C++ "
                "compiler, or leave the flag out"
            ) from error

    def _through(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            x = block(x)
        return x

    @torch.inference_mode()
    def _frozen(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Through frozen blocks; float32."""
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            whole = x.device.type != "cpu" or len(x) == CPU_CHUNK  # each other size would be compiled anew
            x = (self.compiled if self.compiled and whole else self._through)(x, start, stop)
        return x.float()

    def prefix(self, x: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` -> what leaves the prefix `[B, ...]`, float32."""
        x = x.contiguous(memory_format=torch.channels_last)
        return by_chunks(lambda part: self._frozen(part, 0, self.cut), x)  # a copy, which autograd may keep

    def suffix(self, x: Tensor) -> Tensor:
        """What leaves the prefix `[B, ...]` -> features `[B, dim]`."""
        if self.cut < self.split:
            x = self._frozen(x, self.cut, self.split).clone()
        for block in self.blocks[self.split :]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.suffix(self.prefix(x))


def _vgg16(net: nn.Module) -> tuple[list[nn.Module], int]:
    """conv1 ... fc7; the blocks that may be trained are fc6 and fc7, each with its ReLU and dropout."""
    fc = net.classifier
    net.classifier = nn.Sequential(*fc[:6])
    return [nn.Sequential(net.features, net.avgpool, nn.Flatten()), fc[:3], fc[3:6]], 4096


def _squeezenet1_0(net: nn.Module) -> tuple[list[nn.Module], int]:
    """Pooled output of the last of eight Fire modules, each a block."""
    net.classifier = nn.Identity()
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    f = net.features
    blocks = [f[:3], f[3], f[4], f[5:7], f[7], f[8], f[9], f[10:12], nn.Sequential(f[12], pool)]
    return blocks, 512


def _resnet(net: nn.Module) -> tuple[list[nn.Module], int]:
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


def _convnet(net: nn.Module) -> tuple[list[nn.Module], int]:
    """All of it is trained, whatever `--trainable_layer_num`: it has no pretrained weights to keep."""
    return [net], 512


# name -> how its head is cut off and its body into blocks, (network) -> (blocks, feature size);
#         and how many of the last blocks `--trainable_layer_num` may name
BACKBONES: dict[str, tuple[Callable, int]] = {
    "vgg16": (_vgg16, 2),
    "squeezenet1_0": (_squeezenet1_0, 8),
    "resnet18": (_resnet, 8),
    "resnet50": (_resnet, 16),
    "convnet": (_convnet, 1),
}


def build_backbone(name: str, weights: str, trainable_layer_num: int, bf16: bool) -> Backbone:
    """A backbone of `BACKBONES` with its weights.

    Args:
        weights: "imagenet" (torchvision downloads them), "random", or the path of a state dict with torchvision's keys.
        trainable_layer_num: blocks trained, counted from the end.
        bf16: run the frozen prefix in bfloat16.

    Raises InputError where weights can not be had or do not fit.
    """
    net = ConvNet() if name == "convnet" else torchvision.models.get_model(name, weights=None)
    known = set(net.state_dict())
    blocks, dim = BACKBONES[name][0](net)
    if weights != "random":
        state = _imagenet_state(name) if weights == "imagenet" else read_state_dict(Path(weights), "--weights")
        _load_weights(net, state, known, f"--weights {weights}: do not fit {name}")
    trained = len(blocks) if name == "convnet" else trainable_layer_num
    return Backbone(net.to(memory_format=torch.channels_last), blocks, dim, trained, bf16)


def _imagenet_state(name: str) -> dict[str, Tensor]:
    try:
        return torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except Exception as error:  # network, proxy, hash, or a damaged file in torch's cache
        raise InputError(
            f"--weights imagenet: {name} could not be downloaded ({error}): check the network, or fetch its "
            "torchvision state dict elsewhere and pass --weights PATH"
        ) from error


def read_state_dict(path: Path, flag: str) -> dict[str, Tensor]:
    """A state dict from a file. Raises InputError naming `flag` and the file where there is none in it."""
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{flag}: {path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to switch the safety off
            reason = "damaged, or it holds more than tensors: save model.state_dict()"
        raise InputError(f"{flag}: {path} is not a readable PyTorch state dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{flag}: {path} is not a state dict (names -> tensors)")
    return state


def _load_weights(net: nn.Module, state: dict[str, Tensor], known: set[str], fault: str) -> None:
    """Load a torchvision state dict into a network without its head, whose keys (in `known`) are passed over."""
    for key, value in net.state_dict().items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise InputError(f"{fault}: {key} is missing")
        if key in state and state[key].shape != value.shape:
            raise InputError(f"{fault}: {key} is {list(state[key].shape)} instead of {list(value.shape)}")
        if key in state and not _plain_numbers(state[key]):
            raise InputError(f"{fault}: {key} does not hold plain finite numbers")
    for key in state:
        if key not in known:
            raise InputError(f"{fault}: {key} is not part of it")
    net.load_state_dict({k: v for k, v in state.items() if k in net.state_dict()}, strict=False)


def _plain_numbers(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    return bool(tensor.float().isfinite().all())


# ---------------------------------------------------------------- quantizer and memory


class CodebookAttention(nn.Module):
    """The quantizer: M codebooks of K codewords of d = D / M dimensions, Eq. 1-5 and 15.

    Codewords are stored with a small norm and normalised where they are used: their direction alone matters, and
    a short vector turns further for the same gradient, which lets them keep up with the projection. `trained` False
    leaves them as they were drawn, as the released code does.
    """

    INITIAL_NORM = 0.1

    def __init__(self, M: int, K: int, D: int, alpha: float, trained: bool = True) -> None:
        super().__init__()
        self.M, self.K, self.d, self.alpha = M, K, D // M, alpha
        codebooks = self.INITIAL_NORM * F.normalize(torch.randn(M, K, self.d), dim=-1)
        self.codebooks = nn.Parameter(codebooks, requires_grad=trained)

    def codewords(self) -> Tensor:
        """Unit codewords `[M, K, d]`."""
        return F.normalize(self.codebooks, dim=-1)

    def segments(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> unit segments `[B, M, d]`."""
        return F.normalize(z.view(-1, self.M, self.d), dim=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, D]` -> soft codes p `[B, M, K]` (Eq. 2-5) and soft reconstruction `[B, M, d]` (Eq. 1)."""
        codewords = self.codewords()
        similarity = torch.einsum("bmd,mkd->bmk", self.segments(z), codewords)
        soft_codes = (self.alpha * similarity).softmax(dim=-1)
        return soft_codes, self.reconstruct(soft_codes, codewords)

    @staticmethod
    def reconstruct(soft_codes: Tensor, codewords: Tensor) -> Tensor:
        """Soft codes `[B, M, K]` and codewords `[M, K, d]` -> `[B, M, d]`, Eq. 1."""
        return torch.einsum("bmk,mkd->bmd", soft_codes, codewords)

    def hard_codes(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> codes `[B, M]`, the nearest codeword of each codebook, Eq. 15.

        uint8 (one byte a codebook) for K <= 256, else int32.
        """
        nearest = torch.einsum("bmd,mkd->bmk", self.segments(z), self.codewords()).argmax(dim=-1)
        return nearest.to(torch.uint8 if self.K <= 256 else torch.int32)


class CodeMemory(nn.Module):
    """A queue of the last `size` entries, `[size, *shape]`; the oldest leave first. Slots never filled stay out."""

    def __init__(self, size: int, *shape: int) -> None:
        super().__init__()
        self.size = size
        self.next = 0  # the slot that is written next: the oldest one once the queue is full
        self.filled = 0
        self.register_buffer("codes", torch.zeros(size, *shape), persistent=False)

    @torch.no_grad()
    def enqueue(self, entries: Tensor) -> None:
        """Append entries `[B, *shape]`, in their order; any B."""
        entries = entries[-self.size :].detach()
        slots = (self.next + torch.arange(len(entries), device=self.codes.device)) % self.size
        self.codes[slots] = entries
        self.next = (self.next + len(entries)) % self.size
        self.filled = min(self.filled + len(entries), self.size)

    def entries(self) -> Tensor:
        """What is held, `[filled, *shape]`, in no particular order."""
        return self.codes[: self.filled]


class MeCoQ(nn.Module):
    """Backbone, linear projection to D dimensions, quantizer, and (in training) the code memory.

    Args:
        queue_size: entries of the memory; None: no memory.
        memory: what it keeps (paper, Table 2): "soft" codes, "hard" codes (as one-hot rows), or the "feature", the
            embedding before quantization.
        trained_codebooks: whether the codebooks learn.
    """

    def __init__(
        self,
        backbone: Backbone,
        D: int,
        M: int,
        K: int,
        alpha: float,
        queue_size: int | None,
        memory: str = "soft",
        trained_codebooks: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Linear(backbone.dim, D)
        self.quantizer = CodebookAttention(M, K, D, alpha, trained_codebooks)
        self.memory_kind = memory
        self.memory = CodeMemory(queue_size, M, D // M if memory == "feature" else K) if queue_size else None

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` -> embeddings z `[B, D]`."""
        return self.projection(self.backbone(x))

    def embed(self, x: Tensor) -> Tensor:
        """What leaves the backbone's prefix `[B, ...]` -> embeddings z `[B, D]`."""
        return self.projection(self.backbone.suffix(x))

    def remember(self, z: Tensor, soft_codes: Tensor) -> None:
        """Enqueue embeddings `[B, D]` with their soft codes `[B, M, K]`, in the form that the memory keeps."""
        if self.memory_kind == "feature":
            self.memory.enqueue(self.quantizer.segments(z))
        elif self.memory_kind == "hard":
            self.memory.enqueue(F.one_hot(soft_codes.argmax(dim=-1), self.quantizer.K).to(soft_codes.dtype))
        else:
            self.memory.enqueue(soft_codes)

    def recall(self, codewords: Tensor) -> Tensor:
        """The memory's vectors `[filled, M, d]`: codes are reconstructed with today's codewords, Eq. 12."""
        entries = self.memory.entries()
        return entries if self.memory_kind == "feature" else self.quantizer.reconstruct(entries, codewords)


def load_checkpoint(model: MeCoQ, path: Path) -> None:
    """Load `model.cpt` of a run, or of the authors' release, whose keys are `vgg.*`, `projection.*`, `pq_layer._C`.

    Raises InputError where it is no such file or does not fit the model.
    """
    state = read_state_dict(path, "--checkpoint")
    released = {"vgg.": "backbone.net.", "pq_layer._C": "quantizer.codebooks"}
    for old, new in released.items():
        state = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in state.items()}
    codebooks = state.get("quantizer.codebooks")
    if codebooks is None or codebooks.dim() != 3:
        raise InputError(f"--checkpoint {path}: there are no codebooks [M, K, D / M] in it")
    M, K, d = codebooks.shape
    quantizer = model.quantizer
    if (M, K, d) != (quantizer.M, quantizer.K, quantizer.d):
        raise InputError(f"--checkpoint {path}: made with other codebooks; give --M {M} --K {K} --feat_dim {M * d}")
    known = set(model.state_dict()) | {"backbone.net.classifier.6.weight", "backbone.net.classifier.6.bias"}
    _load_weights(model, state, known, f"--checkpoint {path}: does not fit this --backbone")
