#!/usr/bin/env python3
"""Table 1: MeCoQ beside the shallow methods, all on the same features, and exact search on them as the ceiling.

python -m experiments.table1 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. Shallow methods see the training images' features without augmentation, centred and of unit length,
of the backbone with nothing trained. Writes table1.csv, a row each number, and table1.md, and skips what is done.
"""

import sys
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from experiments import published, sweep
from utils import InputError, progress_bar, run_script

try:
    from experiments import baselines
except ImportError:
    baselines = None

EXACT = "exact search on the features"


def shallow_cell(method: str, args: Namespace, ground: sweep.Ground, folder: Path) -> dict:
    """A shallow method's MAP and seconds, kept beside the trainings'. Code length does not matter to exact search."""
    bits = None if method == "exact" else 8 * args.M
    if ground.backbone.cut == 0:
        raise InputError(
            f"--backbone {args.backbone}: it has no frozen layers, whose features the shallow methods take"
        )
    key = {"method": method, "bits": bits, "seed": args.seed, "topK": args.topK, "sha256": ground.fingerprint}
    key |= {flag: getattr(args, flag) for flag in ("image_size", "precision", "limit")}
    key["shallow"] = baselines.FORMAT

    def compute() -> dict:
        labels = {name: torch.from_numpy(getattr(ground.splits, name).labels) for name in ("query", "database")}
        return {"map": baselines.method_map(method, prepared(ground), labels, bits, args.seed, args.topK)}

    return sweep.kept(folder, key, compute)


@lru_cache(maxsize=1)
def prepared(ground: sweep.Ground) -> dict[str, np.ndarray]:
    """The features of a ground as the shallow methods see them."""
    arrays = {name: torch.cat([batch.float() for batch in batches]) for name, batches in ground.features.items()}
    return baselines.prepared({name: array.flatten(1).cpu().numpy() for name, array in arrays.items()})


def table(frame: "sweep.pd.DataFrame", dataset: str) -> "sweep.pd.DataFrame":
    """A row each method: means over seeds with lowest and highest, and the published number, for each code length."""
    columns = {"method": list(dict.fromkeys(frame["method"]))}
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        grouped = part.groupby("method")
        columns[f"{bits} bits"] = [sweep.spread(grouped.get_group(name)["map"]) for name in columns["method"]]
        columns[f"{bits}: published, VGG16"] = [
            grouped.get_group(name)["published"].iloc[0] for name in columns["method"]
        ]
    return sweep.pd.DataFrame(columns)


def main(argv: list[str] | None = None) -> None:
    own, flags = sweep.parse(sweep.build_parser(__doc__), argv)
    if baselines is None:
        raise InputError("faiss-cpu is needed: pip install -r requirements-extra.txt")
    methods = [*baselines.METHODS, "exact"]
    order = [(dataset, seed, bits) for dataset in own.datasets for seed in own.seeds for bits in own.bits]
    frozen = [
        (sweep.label(EXACT if method == "exact" else method, dataset, bits, seed, flags),
         sweep.options(dataset, bits, seed, flags, trainable_layer_num=0), method)
        for dataset, seed, bits in order for method in methods
    ]  # fmt: skip
    grounds, rows = sweep.Grounds(own.bank), []
    for labels, args, method in progress_bar(frozen, "shallow methods"):
        result = shallow_cell(method, args, grounds.of(args), own.cells)
        rows.append(labels | {"map": 100 * result["map"], "seconds": result["seconds"], "backbone": args.backbone})
        rows[-1]["canonical_data"] = grounds.last.splits.canonical
    frame = sweep.run_cells(sweep.plan(own, flags, {published.OURS: {}}), own)
    frame = sweep.pd.concat([sweep.pd.DataFrame(rows), frame.drop(columns="result")])
    theirs = {**{method: f"{method}+VGG" for method in baselines.METHODS}, published.OURS: published.OURS}
    frame["published"] = [
        published.map_of("paper_table1_map", theirs.get(method, ""), dataset, bits)
        for method, dataset, bits in frame[["method", "dataset", "bits"]].to_numpy()
    ]
    sweep.write_csv(own.results / "table1.csv", frame)
    parts = [part for dataset in own.datasets for part in (sweep.heading(frame, dataset), table(frame, dataset))]
    sweep.write_markdown(own.results / "table1.md", *parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
