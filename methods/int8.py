"""Frozen convolutions in 8-bit integers, on a CPU: for views, of which many small differences are averaged."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from methods.prepared import Convolution, Pooling, faster
from utils import InputError, one_line

STEPS = 255  # of a map, from 0 to the end of its range
WEIGHT_STEPS = 127  # of a weight, to each side of 0
WITHIN = 0.9999  # of the numbers of a map are in its range; what is larger is cut off
SAMPLED = 2**20  # numbers of a map from which its range is taken
MOST_DIFFERENT = 0.3  # relative difference of what leaves the convolutions; measured: 0.08 of SqueezeNet


class Quantize(nn.Module):
    """Float images -> uint8, `step` apart, in which `zero` stands for 0."""

    def __init__(self, lowest: float, highest: float) -> None:
        super().__init__()
        self.step = (highest - lowest) / STEPS
        self.zero = round(-lowest / self.step)

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.step).add_(self.zero + 0.5).clamp_(0, STEPS).to(torch.uint8)  # which cuts off fractions


class Dequantize(nn.Module):
    """uint8 -> float32."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.step


class Int8Convolution(nn.Module):
    """A convolution and the ReLU behind it, uint8 -> uint8: oneDNN's kernel, by a private operator that PyTorch's
    compiler uses. Weights are rounded to integers of a step per output channel.

    Args:
        step, zero: of the input.
        out_step: of the output.
    """

    def __init__(self, layer: Convolution, step: float, zero: int, out_step: float) -> None:
        super().__init__()
        weight = layer.weight.float()
        self.steps = weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-12) / WEIGHT_STEPS
        integers = (weight / self.steps[:, None, None, None]).round().to(torch.int8)
        padding, stride, dilation, groups = layer.geometry
        self.geometry = list(stride), list(padding), list(dilation), groups
        self.input, self.out_step = (step, zero), out_step
        self.weight = torch.ops.onednn.qconv_prepack(integers, self.steps, *self.input, *self.geometry)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if layer.bias is None else layer.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weight, self.steps, self.zeros, self.bias
        to = self.out_step, 0, torch.uint8, "relu", [], ""
        return torch.ops.onednn.qconv2d_pointwise(x, *self.input, *weights, *self.geometry, *to)


class Observer(fx.Interpreter):
    """Notes of each layer's output, by the node's name, in which range from 0 nearly all numbers are."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.ranges: dict[str, float] = {}

    def run_node(self, node: fx.Node) -> Tensor:
        result = super().run_node(node)
        numbers = result.flatten()
        numbers = numbers[:: max(len(numbers) // SAMPLED, 1)].float()
        beyond = max(round(len(numbers) * (1 - WITHIN)), 1)
        self.ranges[node.name] = max(self.ranges.get(node.name, 1e-12), numbers.topk(beyond).values[-1].item())
        return result


@torch.inference_mode()
def quantized(blocks: Sequence[nn.Module], batches: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The blocks with all layers in 8-bit integers from the first one on, up to the first that is no convolution with
    ReLU, no pooling and no joining of such maps; the others in bfloat16.

    Args:
        batches: images `[b, 3, S, S]`, from which ranges are taken.

    Raises InputError if there is no such layer, or this PyTorch, or this CPU, does not compute them.
    """
    net = faster(blocks)
    observer = Observer(net)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([observer.run(batch) for batch in batches]).float()
    try:
        replace_layers(net, observer.ranges, min(x.min().item() for x in batches), max(x.max().item() for x in batches))
        with torch.autocast("cpu", torch.bfloat16):
            ours = torch.cat([net(batch) for batch in batches]).float()
    except (AttributeError, RuntimeError) as error:  # a private operator
        raise InputError(f"--int8_views: this PyTorch does not compute it here ({one_line(error)[:200]})") from error
    different = float((ours - expected).norm() / expected.norm())
    if not different <= MOST_DIFFERENT:
        raise InputError(
            f"--int8_views: features differ by {100 * different:.0f} % from those in bfloat16: this CPU or PyTorch "
            "computes 8-bit convolutions otherwise, or these weights do not bear rounding; leave the flag out"
        )
    return net.forward  # no module: no part of a state dict


def replace_layers(net: fx.GraphModule, ranges: dict[str, float], lowest: float, highest: float) -> None:
    """Replace layers of `faster` blocks by those of integers; images are between `lowest` and `highest`.

    Raises InputError if there are none.
    """
    layers, graph = dict(net.named_modules()), net.graph
    steps = {name: most / STEPS for name, most in ranges.items()}
    for node in graph.nodes:
        if node.target is torch.cat:  # maps that are joined have one step
            steps |= dict.fromkeys((part.name for part in node.all_input_nodes), steps[node.name])
    images = next(iter(graph.nodes))
    net.add_submodule("quantize", quantize := Quantize(lowest, highest))
    with graph.inserting_after(images):
        first = graph.call_module("quantize", (images,))
    images.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    inputs = {first: (quantize.step, quantize.zero)}  # what comes in integers -> its step and zero
    for node in list(graph.nodes):
        layer = layers.get(node.target) if node.op == "call_module" else None
        sources = node.all_input_nodes
        if not sources or node is first or not inputs.keys() >= set(sources):
            continue
        if isinstance(layer, Convolution) and layer.relu:
            net.add_submodule(node.target, Int8Convolution(layer, *inputs[sources[0]], steps[node.name]))
            inputs[node] = steps[node.name], 0
        elif isinstance(layer, Pooling):
            inputs[node] = inputs[sources[0]]
        elif node.target is torch.cat:
            inputs[node] = steps[node.name], 0
        else:
            if sources == [first]:
                raise InputError("--int8_views: the backbone does not begin with a convolution and ReLU")
            name = f"dequantize_{node.name}"
            net.add_submodule(name, Dequantize(inputs[sources[0]][0]))
            with graph.inserting_before(node):
                node.replace_input_with(sources[0], graph.call_module(name, (sources[0],)))
    net.recompile()
