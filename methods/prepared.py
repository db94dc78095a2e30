"""Frozen blocks prepared for bfloat16: the same bits with fewer passes over memory."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def convolution_with_relu() -> Callable[..., Tensor] | None:
    """What PyTorch's compiler takes for a convolution and its ReLU on a CPU: one kernel of oneDNN. It is a private
    operator; None if this version of PyTorch has none."""
    try:
        return torch.ops.mkldnn._convolution_pointwise.default
    except AttributeError:
        return None


class Convolution(nn.Module):
    """A convolution in bfloat16, whose weights are cast once, and the ReLU behind it, if there is one."""

    def __init__(self, layer: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias = (None if p is None else p.detach().bfloat16() for p in (layer.weight, layer.bias))
        self.geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        self.relu = relu
        self.fused = convolution_with_relu() if relu and not layer.weight.is_cuda else None

    def forward(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        x = x.bfloat16()
        if self.fused:
            return self.fused(x, self.weight, self.bias, padding, stride, dilation, groups, "relu", [], "")
        x = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return x.relu_() if self.relu else x


class Linear(nn.Module):
    """A linear layer in bfloat16, whose weights are cast once."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = (None if p is None else p.detach().bfloat16() for p in (layer.weight, layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias)


class Pooling(nn.Module):
    """Max pooling of bfloat16 maps that hold no negative numbers, on a CPU: their bits, read as integers, are in the
    same order, and the CPU has an instruction for the maximum of those. First over the height, then over the width.
    Maps of integers are pooled as they are."""

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        self.kernel, self.stride, self.ceil = layer.kernel_size, layer.stride, layer.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
        for dim in (2, 3):
            bits = self.pooled(bits, dim)
        return bits.view(x.dtype)

    def pooled(self, bits: Tensor, dim: int) -> Tensor:
        beyond = bits.shape[dim] - self.kernel
        windows = (-(-beyond // self.stride) if self.ceil else beyond // self.stride) + 1
        shifted = (bits[(slice(None),) * dim + (slice(j, None, self.stride),)] for j in range(self.kernel))
        first, second, *others = (part.narrow(dim, 0, min(windows, part.shape[dim])) for part in shifted)
        largest = torch.maximum(first, second)
        for part in others:  # the last window may lack some
            inside = largest.narrow(dim, 0, part.shape[dim])
            torch.maximum(inside, part, out=inside)
        return largest


def faster(blocks: Sequence[nn.Module]) -> fx.GraphModule:
    """The blocks with weights cast to bfloat16; on a CPU also with ReLU in the convolution's kernel, and with
    `Pooling`. Layers that stay are shared, so that dropout follows its own mode."""
    net = fx.symbolic_trace(nn.Sequential(*blocks))
    layers = dict(net.named_modules())
    positive: set[fx.Node] = set()  # maps without negative numbers
    for node in list(net.graph.nodes):
        layer = layers.get(node.target) if node.op == "call_module" else None
        users = [layers.get(user.target) for user in node.users]
        if isinstance(layer, nn.Conv2d):
            relu = len(users) == 1 and isinstance(users[0], nn.ReLU)
            net.add_submodule(node.target, Convolution(layer, relu))
            if relu:
                (user,) = node.users
                user.replace_all_uses_with(node)
                net.graph.erase_node(user)
                positive.add(node)
        elif isinstance(layer, nn.Linear):
            net.add_submodule(node.target, Linear(layer))
        elif isinstance(layer, nn.ReLU) or (node.target is torch.cat and positive.issuperset(node.all_input_nodes)):
            positive.add(node)
        elif isinstance(layer, nn.MaxPool2d) and positive.issuperset(node.all_input_nodes):
            positive.add(node)
            if layer.padding == 0 and layer.dilation == 1 and not on_gpu(blocks):
                net.add_submodule(node.target, Pooling(layer))
    net.recompile()
    return net


def on_gpu(blocks: Sequence[nn.Module]) -> bool:
    return any(p.is_cuda for block in blocks for p in block.parameters())


class Prepared:
    """Frozen blocks under autocast to bfloat16, in inference mode: x -> what they give, to the bit.

    `faster` blocks are made of them when the weights have changed: in place, or by others in their place (not what is
    written through `.data`). On a CPU, the first input of each shape goes through both; if not all bits are the same,
    because numbers are not finite or this PyTorch computes otherwise, the blocks themselves serve that shape.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = tuple(blocks)
        self.weights: list[tuple[int, int]] | None = None
        self.faster: nn.Module | None = None
        self.same: dict[torch.Size, bool] = {}

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared(copy.deepcopy(self.blocks, memo))

    def plain(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        parameters = [p for block in self.blocks for p in block.parameters()]
        if x.dtype == torch.float64 or any(p.dtype != torch.float32 or p.is_inference() for p in parameters):
            return self.plain(x)
        weights = [(p.data_ptr(), p._version) for p in parameters]
        if weights != self.weights:
            with torch.inference_mode(False), torch.no_grad():
                self.faster = faster(self.blocks)
            self.weights, self.same = weights, {}
        if x.is_cuda:
            return self.faster(x)  # the same kernels, and a comparison would wait for the GPU
        if x.shape not in self.same:
            return self._compared(x)
        return self.faster(x) if self.same[x.shape] else self.plain(x)

    def _compared(self, x: Tensor) -> Tensor:
        """What the blocks give; whether the faster ones give the same is noted. Dropout draws once."""
        before = torch.get_rng_state()
        expected = self.plain(x)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        try:
            self.same[x.shape] = torch.equal(self.faster(x), expected)
        except Exception:  # a private operator may do anything in another version
            self.same[x.shape] = False
        torch.set_rng_state(after)
        return expected
