"""What if nothing in front of the projection learns? Features of views and test images, computed once, shared by runs.

A run draws its views from its seed alone. Where the backbone is frozen and has no dropout, the features of those
views are therefore the same whatever the loss, the quantizer or the memory: kept on disk, they make a run of minutes
out of seconds.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import engine
import retrieval
from features import Computed, device_name
from network import Backbone, MeCoQ
from results import Files, read_array
from resume import fingerprint
from utils import InputError, atomic_write, progress_bar, write_json

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


def build_bank(folder: Path, splits: data.Splits, backbone: Backbone, args: Namespace) -> None:
    """Compute what is not in `folder` yet: `epoch000.npy` ... `[2, n, F]`, both views of the training images in the
    order in which that epoch takes them, `query.npy` and `database.npy` `[n, F]`; all float32.

    Raises InputError where the backbone is not frozen, or the folder is of other data or another backbone.
    """
    if backbone.split < len(backbone.blocks) or any(isinstance(m, nn.Dropout) and m.p for m in backbone.modules()):
        raise InputError(f"--backbone {args.backbone}: a feature bank needs one without trained blocks and dropout")
    key = {flag: getattr(args, flag) for flag in KEY}
    key |= {"sha256": fingerprint(splits, backbone), "processor": device_name(args.device)}
    _claim(folder, key)
    backbone.eval()
    loader = data.train_loader(splits, args)
    for epoch in range(args.epoch_num):
        if not _path(folder, epoch).exists():
            loader.batch_sampler.epoch = epoch
            bar = progress_bar(loader, f"features of epoch {epoch}'s views")
            pairs = [torch.stack(backbone(views).chunk(2)).cpu() for views in bar]
            _save(_path(folder, epoch), torch.cat(pairs, dim=1))
    for name in ("query", "database"):
        if not (folder / f"{name}.npy").exists():
            bar = progress_bar(Computed(backbone, getattr(splits, name), args), f"features of the {name}")
            _save(folder / f"{name}.npy", torch.cat([batch.float().cpu() for batch in bar]))


def _claim(folder: Path, key: dict) -> None:
    path = folder / "key.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and no feature bank: name another folder")
        write_json(path, key)
    elif path.read_bytes() != (json.dumps(key, indent=2) + "\n").encode():
        raise InputError(f"{folder} is the feature bank of other data, flags or weights: name another folder")


def _path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch{epoch:03d}.npy"


def _save(path: Path, features: Tensor) -> None:
    with atomic_write(path) as file:
        np.save(file, features.numpy(), allow_pickle=False)


class BankedViews:
    """Features of views batch by batch as `data.train_loader` gives the views; `batch_sampler.epoch` says whose."""

    def __init__(self, folder: Path, n: int, args: Namespace) -> None:
        self.folder, self.n, self.batch_size, self.device = folder, n, args.batch_size, args.device
        self.batch_sampler = Namespace(epoch=0)

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        views = torch.from_numpy(read_array(_path(self.folder, self.batch_sampler.epoch))).to(self.device)  # [2, n, F]
        return (batch.flatten(0, 1) for batch in views.split(self.batch_size, dim=1))


def train_on_bank(folder: Path, splits: data.Splits, model: MeCoQ, args: Namespace, output: Path) -> list[dict]:
    """Train `model` without its backbone on the features in `folder`; returns the history, whose highest `val_mAP` is
    the MAP of the run. Files of the run go below `output`."""
    model.backbone = nn.Identity()
    query, database = (torch.from_numpy(read_array(folder / f"{name}.npy")) for name in ("query", "database"))

    @torch.inference_mode()
    def validation() -> float:
        model.eval()
        z = model(query.to(args.device))
        queries = model.quantizer.hard_codes(z) if args.symmetric_distance else z
        db_codes = model.quantizer.hard_codes(model(database.to(args.device)))
        return engine.measure(retrieval.mean_average_precision, model.quantizer, queries, db_codes, splits, args)

    views = BankedViews(folder, len(splits.train), args)
    files = Files(output, args.notes)
    files.checkpoints.mkdir(parents=True, exist_ok=True)
    training = engine.start(model, views, args)
    engine.train(training, views, validation, args, files, engine.Stopwatch())
    return training.history
