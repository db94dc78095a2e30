"""The optimiser and the learning-rate schedule."""

import math
from dataclasses import dataclass

import torch

from config import Config
from methods.base import Method


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: a linear rise from `start` to `base` whose last warm-up step has reached `base`,
    then half a cosine from `base` towards `final`.

    `kind`: the cosine is stepped every "batch", or once an "epoch"; "returning": once an epoch, too, but it falls for
    as many epochs as an epoch has steps and then rises again, as in SPQ's released code.
    """

    epochs: int
    warmup_epochs: int
    start: float
    base: float
    final: float
    kind: str = "batch"

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of one optimisation step, counted from 0 over all epochs."""
        warmup, end = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.start + (self.base - self.start) * step / max(warmup - 1, 1)
        done = step if self.kind == "batch" else step // steps_per_epoch * steps_per_epoch
        falling = steps_per_epoch**2 if self.kind == "returning" else end - warmup
        progress = (done - warmup) / max(falling, 1)
        return self.final + (self.base - self.final) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(method: Method, config: Config) -> torch.optim.Optimizer:
    """SGD or Adam: the head learns at `--lr`, trained blocks at `--lr` times `--lr_scaling`; beta decays all (Eq. 14).

    Without `--keep_lr_scaling` the scheduler, if there is one, overwrites the scaled rate: all learn at `--lr`.
    """
    scaling = config.lr_scaling if config.keep_lr_scaling or config.disable_scheduler else 1.0
    groups = method.parameter_groups(config.lr, config.lr * scaling)
    if config.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.hp_beta)
    return torch.optim.Adam(groups, weight_decay=config.hp_beta)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up and cosine; each group keeps its proportion to `--lr`."""
    rates = config.start_lr, config.lr, config.final_lr
    schedule = Schedule(config.epoch_num, config.warmup_epoch_num, *rates, config.schedule)

    def factor(step: int) -> float:
        return 1.0 if config.disable_scheduler else schedule.rate(step, steps_per_epoch) / config.lr

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
