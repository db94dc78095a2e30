"""Batch normalisation that sees the whole batch, whatever part of it each of the run's processes has."""

import torch
from torch import Tensor, nn

from distributed import in_row, processes, summed


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the whole batch, on any device and with any number of images per
    process; PyTorch's own knows GPUs only, and lets the host wait for them."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count, C = x.numel() // x.shape[1], x.shape[1]
        mean = x.sum(dim=(0, 2, 3), keepdim=True) / max(count, 1)
        variance = (x - mean).square().sum(dim=(0, 2, 3)) / max(count, 1)
        own = torch.cat([mean.flatten(), variance, variance.new_full((1,), count)])
        means, variances, counts = summed(in_row(own)).split([C, C, 1], dim=1)  # a row per process
        shares, n = counts / counts.sum(), counts.sum()
        mean = (shares * means).sum(dim=0)
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


def synchronize_batch_norm(net: nn.Module) -> None:
    """Let all batch normalisation of a network see the whole batch, if several processes share it."""
    if processes() > 1:
        for module in net.modules():
            if type(module) is nn.BatchNorm2d and module.weight.requires_grad:  # not of frozen blocks
                module.__class__ = SynchronizedBatchNorm  # the same parameters and statistics
