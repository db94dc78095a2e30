"""What does training cost? Seconds an epoch and peak memory, of training on images, in a process of its own."""

import multiprocessing
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import data
import engine
import main as program


def profile(args: Namespace, steps: int) -> dict[str, float]:
    """`seconds_per_epoch` and `peak_mib` of some steps with a memory that is full, measured in a new process, which
    holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(measured, (args, steps))
        pool.close()
        pool.join()  # it ends by itself, and cleans up
    return result


def measured(args: Namespace, steps: int) -> dict[str, float]:
    """The same, in this process. Memory is the GPU's, or what a CPU's process holds besides data and network."""
    program.take_device(args)
    splits, model = program.build(args)
    loader = data.train_loader(splits, args)
    training = engine.start(model, loader, args)
    if model.memory:
        model.memory.filled = model.memory.size  # as in the epochs that use it
    training.epoch = max(args.queue_begin_epoch, 0)
    before = forget_peak(args.device)
    engine.train_epoch(training, Some(loader, 2), args)  # warm-up
    training.step, training.sums = 0, {}
    some, start = Some(loader, steps), time.perf_counter()
    engine.train_epoch(training, some, args)
    seconds = time.perf_counter() - start
    return {"seconds_per_epoch": seconds / len(some) * len(loader), "peak_mib": peak(args.device) - before}


class Some:
    """The first batches of a loader."""

    def __init__(self, loader: data.TwoViews, steps: int) -> None:
        self.loader, self.steps, self.batch_sampler = loader, min(steps, len(loader)), loader.batch_sampler

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        return islice(iter(self.loader), self.steps)


def forget_peak(device: str) -> float:
    """Begin to measure the peak anew. Returns what a CPU's process held before, in MiB: data, not training; where the
    system can not tell (no Linux) all is NaN."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), float("nan"))
