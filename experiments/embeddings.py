#!/usr/bin/env python3
"""Codes for embeddings: MeCoQ's head beside faiss's quantizers of as many bytes, all trained on the same vectors.

python -m experiments.embeddings --datasets CIFAR10-II Digits --bits 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. The vectors are the features of a frozen backbone on CIFAR-10, with those of the augmented images
of some epochs as views; and the pixels of the digits, with those of slightly turned digits as views. The head
learns without views too, from nearest neighbours; its last epoch counts, no label is used. Writes embeddings.csv, a row
per number, and embeddings.md: MAP, and recall of the true nearest neighbour among the first 10; skips what is done.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

import config
from config import Config
from experiments import flags, tables
from experiments.flags import Trial
from utils import InputError, progress_bar, run_script

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from data import Splits
    from experiments.sweep import Shared
    from methods.base import Method

FORMAT = 1  # to be raised with every change of what a trial gives
EVERY = 5  # one of so many queries counts: ranking is most of the time
VIEW_EPOCHS = 8  # of the training's views, two per epoch and image
# the data sets -> flags that differ from those that the head has anyway: the published script's, or main.py's
HEADS: dict[str, dict[str, object]] = {
    "CIFAR10-II": {"epoch_num": 30},
    "Digits": {"epoch_num": 30, "queue_begin_epoch": 15, "T": 0.35, "mode": "debias", "pos_prior": 0.1, "topK": 100},
}


def planned(own: Namespace, given: list[str]) -> list[Trial]:
    """A trial per data set, code length and seed. Raises InputError if a data set is not one of `HEADS`."""
    trials = []
    for dataset in own.datasets:
        if dataset not in HEADS:
            raise InputError(f"--datasets {dataset}: there are {' and '.join(HEADS)} here")
        for seed in own.seeds:
            for bits in own.bits:
                configuration = flags.configured(dataset, bits, seed, given, **HEADS[dataset], normalize_features=True)
                trials.append(Trial(flags.labels("all", dataset, bits, seed, given), configuration))
    return trials


# ---------------------------------------------------------------- vectors


def digits(configuration: Config) -> "Splits":
    """The digits' pixels, `[n, 64]`; views of those that train: `[n, 2 VIEW_EPOCHS, 64]`."""
    import numpy as np

    import engine
    from vectors import Vectors

    def vectors(images) -> Vectors:  # noqa: ANN001, readers.Images
        grey = images.pixels[..., 0].astype(np.float32) / 255
        return Vectors(grey.reshape(len(grey), 64), np.arange(len(grey)), images.labels)

    splits = engine.build_splits(configuration).each(vectors)
    views = turned(splits.train.array, configuration.seed)
    return replace(splits, train=replace(splits.train, views=views))


def turned(pixels: "np.ndarray", seed: int) -> "np.ndarray":
    """Views of digits `[n, 64]`: turned by 10 degrees at most, scaled by a tenth and shifted by half a pixel."""
    import torch
    import torch.nn.functional as F

    n, V, generator = len(pixels), 2 * VIEW_EPOCHS, torch.Generator().manual_seed(seed)
    angle, scale, x, y = 2 * torch.rand(4, n * V, generator=generator) - 1
    angle, scale, x, y = torch.pi / 18 * angle, 1 + 0.1 * scale, x / 8, y / 8  # an image is 2 wide
    across = torch.stack([scale * angle.cos(), -scale * angle.sin(), x], dim=-1)
    down = torch.stack([scale * angle.sin(), scale * angle.cos(), y], dim=-1)
    images = torch.from_numpy(pixels).view(n, 1, 8, 8).repeat_interleave(V, dim=0)
    grid = F.affine_grid(torch.stack([across, down], dim=1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).view(n, V, 64).numpy()


def backbone_features(configuration: Config, shared: "Shared") -> "Splits":
    """The features of images, `[n, F]`; views: those of the augmented training images, `[n, 2 VIEW_EPOCHS, F]`.
    Every fifth query."""
    import numpy as np
    import torch

    from vectors import Vectors

    features = {name: torch.cat(list(batches)).float().cpu().numpy() for name, batches in shared.features.items()}
    parts = {
        name: Vectors(features[name], np.arange(len(images)), images.labels)
        for name, images in shared.splits.all.items()
    }
    parts["train"] = replace(parts["train"], views=cached_views(configuration, shared))
    parts["query"] = parts["query"].subset(np.arange(0, len(parts["query"]), EVERY))
    return replace(shared.splits, **parts)


def cached_views(configuration: Config, shared: "Shared") -> "np.ndarray":
    """The features in a view cache, in the images' order: `[n, 2 VIEW_EPOCHS, F]`."""
    import numpy as np

    import engine
    from readers import read_array

    shared.cached_views(configuration.replace(epoch_num=VIEW_EPOCHS))
    batches, found = engine.build_loader(configuration, shared.splits).batches, []
    for batches.epoch in range(VIEW_EPOCHS):
        order = [image for batch in batches for image, _ in batch]
        pairs = read_array(shared.view_cache.path(batches.epoch))  # [2, n, F], in the epoch's order
        found.append(np.empty_like(pairs))
        found[-1][:, order] = pairs
    return np.concatenate(found).swapaxes(0, 1)


# ---------------------------------------------------------------- trials


def trained(configuration: Config, splits: "Splits") -> "Method":
    """A head, trained on vectors without a label."""
    import tempfile
    from pathlib import Path

    import engine
    from methods import METHODS
    from methods.backbones import PassThrough
    from utils import load_object, seed_everything

    seed_everything(configuration.seed)
    method = load_object(METHODS[configuration.method].build)(PassThrough(splits.train.array.shape[1]), configuration)
    method.normalize_features()
    method = method.to(configuration.device)
    method.centre_features(engine.build_features(configuration, method.backbone, {"train": splits.train})["train"])
    loader = engine.build_loader(configuration, splits)
    once = configuration.replace(eval_interval=configuration.epoch_num)
    with tempfile.TemporaryDirectory() as folder:
        engine.train(engine.start(once, method, loader), loader, lambda: 0.0, Path(folder) / "model.cpt")
    return method.eval()


def compared(configuration: Config, splits: "Splits") -> dict:
    """MAP and recall of faiss's quantizers, and of heads that learned from neighbours and from views, by name."""
    import torch

    import engine
    import evaluation
    import quantizers
    from config import code_bits

    ours = {}
    sources = {"head, neighbours": replace(splits, train=replace(splits.train, views=None)), "head, views": splits}
    for name, its in sources.items():
        method = trained(configuration, its)
        features = engine.build_features(configuration, method.backbone, splits.tested)
        codes = evaluation.encode_database(method, features["database"])
        with torch.inference_mode():
            ours[name] = quantizers.by_codes(method.tables, evaluation.encode_queries(method, features["query"]), codes)
    labels = [torch.from_numpy(images.labels) for images in (splits.query, splits.database)]
    measured = evaluation.Measure(configuration.topK, configuration.ties)
    with torch.inference_mode():
        return quantizers.compare(ours, splits.all, code_bits(vars(configuration)), labels, measured)


def run(trials: list[Trial], own: Namespace) -> "pd.DataFrame":
    """All trials: a row per method, `map` and `recall` in percent."""
    import pandas as pd

    from checkpoint import fingerprint
    from distributed import use_device
    from experiments import sweep
    from methods.backbones import PassThrough

    shared, rows = sweep.SharedBySeed(own.view_cache), []
    for trial in progress_bar(trials, "trials"):
        precision = use_device(trial.config.device, trial.config.precision)
        configuration = trial.config.replace(precision=precision)
        if trial.labels["dataset"] == "Digits":
            splits = digits(configuration)
        else:
            splits = backbone_features(configuration, shared.of(configuration.replace(normalize_features=False)))
        key = {"format": FORMAT, "experiment": "embeddings", **config.key(configuration), "M": configuration.M}
        key["sha256"] = fingerprint(splits, PassThrough(1))
        result = sweep.kept(own.trials, key, lambda its=(configuration, splits): {"rows": compared(*its)})
        for name, row in result["rows"].items():
            values = {measure: 100 * value for measure, value in row.items()}
            rows.append(trial.labels | {"method": name} | values | {"canonical_data": splits.canonical})
    return pd.DataFrame(rows)


def table(frame: "pd.DataFrame", dataset: str) -> "pd.DataFrame":
    """A row per method: means over seeds with lowest and highest, of both measures for each code length."""
    import pandas as pd

    columns = {"method": list(dict.fromkeys(frame["method"]))}
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        grouped = part.groupby("method")
        for measure in ("map", "recall"):
            spreads = [tables.spread(grouped.get_group(name)[measure]) for name in columns["method"]]
            columns[f"{bits // 8} bytes: {measure}"] = spreads
    return pd.DataFrame(columns)


def main(argv: list[str] | None = None) -> None:
    parser = flags.build_parser(__doc__, bits=(32, 64))
    parser.set_defaults(datasets=list(HEADS))
    own, given = flags.parse(parser, argv, "tabulate", "faiss")
    trials = planned(own, given)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    sweep.check(own, trials[0].config.device)
    frame = run(trials, own)
    tables.write(own.results, "embeddings", frame, table)


if __name__ == "__main__":
    sys.exit(run_script(main))
