"""Timing of the frozen blocks: layer by layer, and as a whole against the same blocks run as they are."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor, fx, nn

import engine
from config import Config
from distributed import CPU_CHUNK, by_chunks, keep_freed_memory
from experiments.benchmarks import Options, flops, matmul_peak, row, seconds
from methods.backbones import Backbone
from methods.prepared import Convolution, Linear, faster
from utils import InputError

IMAGES = 2 * CPU_CHUNK  # of a round


def frozen(config: Config, options: Options) -> list[dict]:
    """The backbone's prefix on random images: ours, with `--int8_views` also in 8-bit integers, and the blocks as they
    are with weights cast at every pass and memory as the C library manages it. As the latter holds for a process, each
    side has its own. On a CPU, all seconds are of one core, see `busy`."""
    if config.device == "cpu":
        torch.set_num_threads(1)
    backbone = engine.build_method(config).backbone.eval()
    if backbone.cut == 0:
        raise InputError(f"--backbone {config.backbone}: has no frozen block to time")
    one = torch.zeros(1, 3, config.image_size, config.image_size, device=config.device)
    work = flops(lambda: as_they_are(backbone, one)) * IMAGES
    times, peaks = {"ours": [], "plain": []} | ({"int8": []} if config.int8_views else {}), []
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side(config, name)) for name in times}
        for _ in range(options.repeats + 1):
            for name, call in sides.items():
                times[name].append(call())
            peaks.append(peak_of_core(config))
    peak, plain, rows = statistics.median(peaks[1:]), times.pop("plain")[1:], []
    for name, ours in times.items():
        how = ", 8-bit integers" if name == "int8" else ""
        result = row(f"frozen blocks at {config.image_size} px{how}", (ours[1:], plain), IMAGES)
        result["share_of_matmul_peak"] = work / result["ours_seconds"] / peak
        result["plain_share_of_matmul_peak"] = work / result["plain_seconds"] / peak
        rows.append(result | {"matmul_peak_flops": peak})
    if config.precision == "bf16":
        rows[0]["layers"] = layers(backbone, config, options.repeats, peak)
    return rows


def busy(work: Callable[[], object], device: str) -> float:
    """How long `work` takes; on a CPU the seconds of the core, to which other processes add little. Of several threads
    the system would count but whole ticks."""
    if device != "cpu":
        return seconds(work, device)
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_of_core(config: Config) -> float:
    """Floating-point operations per second of a large matrix product, the median of five; of a core, if not a GPU's."""
    if config.device != "cpu":
        return matmul_peak(config.precision, config.device)
    a = torch.randn(2048, 2048, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    return 2 * len(a) ** 3 / statistics.median([busy(lambda: a @ a, "cpu") for _ in range(6)][1:])


@torch.inference_mode()
def as_they_are(backbone: Backbone, images: Tensor) -> Tensor:
    """What leaves the prefix, by the blocks under autocast and nothing else."""
    net = nn.Sequential(*backbone.blocks[: backbone.cut])
    with torch.autocast(images.device.type, torch.bfloat16, enabled=backbone.bf16):
        return by_chunks(net, images.contiguous(memory_format=torch.channels_last)).float()


@contextmanager
def side(config: Config, name: str) -> Iterator[Callable[[], float]]:
    """A process of one side, "ours", "int8" or "plain"; a call has it do a round, and returns the seconds that took."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, config, name), daemon=True)
    process.start()
    there.close()

    def call() -> float:
        here.send(True)
        return here.recv()

    try:
        yield call
    finally:
        here.close()
        process.join()


def serve(pipe: Connection, config: Config, name: str) -> None:
    """Do a round whenever asked, until nobody can ask."""
    if config.device == "cpu":
        torch.set_num_threads(1)
        if name != "plain":
            keep_freed_memory()
    backbone = engine.build_method(config).backbone.eval()
    images = torch.randn(IMAGES, 3, config.image_size, config.image_size, device=config.device)
    if name == "int8":
        backbone.quantize_views(images[: backbone.rows(images)])
    works = {"ours": backbone.prefix, "int8": backbone.prefix_of_views, "plain": partial(as_they_are, backbone)}
    try:
        while pipe.recv():
            pipe.send(busy(partial(works[name], images), config.device))
    except (EOFError, OSError):
        pass


# ---------------------------------------------------------------- layer by layer


class Timed(fx.Interpreter):
    """Runs the layers of a network one by one and notes the seconds, operations and bytes of each."""

    def __init__(self, net: fx.GraphModule, device: str) -> None:
        super().__init__(net)
        self.device, self.noted = device, {}

    def run_node(self, node: fx.Node) -> object:
        results = []
        took = busy(lambda: results.append(super(Timed, self).run_node(node)), self.device)
        (result,) = results
        if node.op in ("call_module", "call_function"):
            inputs = [self.env[argument] for argument in node.all_input_nodes]
            layer = self.module.get_submodule(node.target) if node.op == "call_module" else None
            entry = self.noted.setdefault(node.name, {"kind": kind(node, layer), "seconds": [], "flops": 0})
            entry["seconds"].append(took)
            moved = [*inputs, result]
            if isinstance(layer, Convolution | Linear):
                entry["flops"] = 2 * result.numel() * layer.weight[0].numel()
                moved.append(layer.weight)
            entry["output"] = list(result.shape)
            entry["bytes"] = sum(tensor.nbytes for tensor in moved)
        return result


def kind(node: fx.Node, layer: nn.Module | None) -> str:
    """What a layer is, for people."""
    if isinstance(layer, Convolution):
        size = "x".join(str(n) for n in layer.weight.shape[2:])
        return f"convolution {size}" + " and ReLU" * layer.relu
    return type(layer).__name__ if layer else node.target.__name__


@torch.inference_mode()
def layers(backbone: Backbone, config: Config, repeats: int, peak: float) -> list[dict]:
    """Per layer of the prefix, prepared, on as many images as are taken at a time: medians, and the share of `peak`."""
    S, device = config.image_size, config.device
    if device == "cpu":
        keep_freed_memory()
    images = torch.randn(CPU_CHUNK, 3, S, S, device=device).contiguous(memory_format=torch.channels_last)
    images = images[: backbone.rows(images)]
    timed = Timed(faster(backbone.blocks[: backbone.cut]), device)
    with torch.autocast(images.device.type, torch.bfloat16):
        for _ in range(repeats + 1):
            timed.run(images)
    found = []
    for name, entry in timed.noted.items():
        took = statistics.median(entry["seconds"][1:])
        shares = {"share_of_matmul_peak": entry["flops"] / took / peak, "bytes_per_second": entry["bytes"] / took}
        found.append({"layer": name} | entry | {"seconds": took, "images": len(images)} | shares)
    return found


def markdown(result: dict) -> str:
    """The layer table; times are those of as many images as are taken at a time."""
    whole = sum(layer["seconds"] for layer in result["layers"])
    lines = ["| layer | | output | ms | of the time | GFLOP | of a matrix product | GB/s |", "|" + "---|" * 8]
    for layer in result["layers"]:
        work = f"{layer['flops'] / 1e9:.2f} | {100 * layer['share_of_matmul_peak']:.0f} %" if layer["flops"] else " | "
        output = " x ".join(str(n) for n in layer["output"])
        lines.append(
            f"| {layer['layer']} | {layer['kind']} | {output} | {1e3 * layer['seconds']:.2f} | "
            f"{100 * layer['seconds'] / whole:.1f} % | {work} | {layer['bytes_per_second'] / 1e9:.0f} |"
        )
    return "\n".join(lines) + "\n"
