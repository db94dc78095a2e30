"""The cost of training: seconds per epoch and peak memory, of training on images, in a process of its own."""

import multiprocessing
import time
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import engine
from config import Config
from distributed import use_device


def profile(configuration: Config, steps: int) -> dict[str, float]:
    """`seconds_per_epoch` and `peak_mib` of several steps with a memory that is full, measured in a new process, which
    holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(measured, (configuration, steps))
        pool.close()
        pool.join()  # it ends by itself, and cleans up
    return result


def measured(configuration: Config, steps: int) -> dict[str, float]:
    """The same, in this process. Memory is the GPU's, or what a CPU's process holds besides data and network."""
    device = configuration.device
    configuration = configuration.replace(precision=use_device(device, configuration.precision))
    splits, method = engine.build(configuration)
    loader = engine.build_loader(configuration, splits)
    training = engine.start(configuration, method, loader)
    if method.memory:
        method.memory.written.fill_(True)  # as in the epochs that use it
    training.epoch = max(configuration.queue_begin_epoch, 0)
    loader.set_epoch(training.epoch)
    before = forget_peak(device)
    engine.train_epoch(training, FirstBatches(loader, 2))  # warm-up
    training.step, training.sums = 0, {}
    batches, start = FirstBatches(loader, steps), time.perf_counter()
    engine.train_epoch(training, batches)
    seconds = time.perf_counter() - start
    return {"seconds_per_epoch": seconds / len(batches) * len(loader), "peak_mib": peak(device) - before}


class FirstBatches:
    """The first batches of a loader, as a shorter epoch."""

    def __init__(self, loader: Collection[Tensor], steps: int) -> None:
        self.loader, self.steps = loader, min(steps, len(loader))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        return islice(iter(self.loader), self.steps)


def forget_peak(device: str) -> float:
    """Begin to measure the peak anew. Returns what a CPU's process held before, in MiB: data, not training; NaN if the
    system cannot tell (it is not Linux)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> float:
    """Most memory held since `forget_peak`, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), float("nan"))
