"""The optimiser and the learning-rate schedule."""

import math
from dataclasses import dataclass

import torch

from config import Config
from methods.base import Method


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: a linear rise from `start` to `base` whose last warm-up step has reached `base`,
    then half a cosine from `base` towards `final`."""

    epochs: int
    warmup_epochs: int
    start: float
    base: float
    final: float

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of one optimisation step, counted from 0 over all epochs."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.start + (self.base - self.start) * step / max(warmup - 1, 1)
        progress = (step - warmup) / max(self.epochs * steps_per_epoch - warmup, 1)
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
    """Warm-up and cosine, stepped every batch; each group keeps its proportion to `--lr`."""
    schedule = Schedule(config.epoch_num, config.warmup_epoch_num, config.start_lr, config.lr, config.final_lr)

    def factor(step: int) -> float:
        return 1.0 if config.disable_scheduler else schedule.rate(step, steps_per_epoch) / config.lr

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
