"""What if nothing in front of the projection learns? Features of views, computed once, shared by runs.

A run draws its views from its seed alone. Where the backbone is frozen and has no dropout, the features of those
views are therefore the same whatever the loss, the quantizer or the memory: kept on disk, they make a run of minutes
out of seconds.
"""

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import data
from checkpoint import fingerprint
from feature_cache import device_name
from methods.mecoq import Backbone
from results import read_array
from utils import InputError, atomic_write, check_writable, locked, progress_bar, write_json

FORMAT = 1  # to be raised with every change of what the values are
KEY = (
    "dataset",
    "protocol",
    "seed",
    "limit",
    "backbone",
    "image_size",
    "precision",
    "compile",
    "views",
)  # what the features depend on


def can_bank(backbone: Backbone) -> bool:
    """Whether the backbone gives the same features whatever is learned behind it: nothing in it learns or drops out."""
    dropout = any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules())
    return backbone.split == len(backbone.blocks) and not dropout


def build_bank(root: Path, splits: data.Splits, backbone: Backbone, args: Namespace) -> Path:
    """Compute what is not there yet: `epoch000.npy` ... `[2, n, F]` float32, both views of the training images in the
    order in which that epoch takes them. Returns their folder below `root`, which is named by all that they depend on.

    Raises InputError where the backbone is not frozen, or there is no room.
    """
    if not can_bank(backbone):
        raise InputError(f"--backbone {args.backbone}: a feature bank needs one without trained blocks and dropout")
    key = {flag: getattr(args, flag) for flag in KEY}
    key |= {"sha256": fingerprint(splits, backbone), "processor": device_name(args.device)}
    key |= {"format": FORMAT, "versions": [torch.__version__, torchvision.__version__]}
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    check_writable(folder)
    with locked(folder / "lock", f"waiting for another process, which computes the features in {folder}", wait=True):
        write_json(folder / "key.json", key)
        backbone.eval()
        loader = data.train_loader(splits, args)
        missing = [epoch for epoch in range(args.epoch_num) if not _path(folder, epoch).exists()]
        size, free = len(missing) * 2 * len(splits.train) * backbone.dim * 4, shutil.disk_usage(folder).free
        if size + 2**20 > free:
            raise InputError(
                f"the features of {len(missing)} epochs' views need {size / 1e9:.2f} GB, {folder} has "
                f"{free / 1e9:.2f}: name another folder with --bank"
            )
        for epoch in missing:
            loader.batch_sampler.epoch = epoch
            bar = progress_bar(loader, f"features of epoch {epoch}'s views")
            pairs = [torch.stack(backbone(views).chunk(2)).cpu() for views in bar]
            with atomic_write(_path(folder, epoch)) as file:
                np.save(file, torch.cat(pairs, dim=1).numpy(), allow_pickle=False)
    return folder


def _path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch{epoch:03d}.npy"


class BankedViews:
    """Features of views batch by batch as `data.train_loader` gives the views; `batch_sampler.epoch` says whose."""

    def __init__(self, folder: Path, n: int, args: Namespace) -> None:
        self.folder, self.n, self.batch_size, self.device = folder, n, args.batch_size, args.device
        self.batch_sampler = Namespace(epoch=0, first=0)  # as data.ShuffledBatches

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        views = read_array(_path(self.folder, self.batch_sampler.epoch), mmap_mode="r")  # [2, n, F]
        for start in range(self.batch_sampler.first * self.batch_size, self.n, self.batch_size):
            batch = np.array(views[:, start : start + self.batch_size])
            yield torch.from_numpy(batch).to(self.device).flatten(0, 1)


class KnownFeatures(nn.Module):
    """Stands where a backbone was: features come in, features go out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.blocks, self.split, self.cut = dim, (), 0, 0

    def forward(self, features: Tensor) -> Tensor:
        return features

    suffix = forward
