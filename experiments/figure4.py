#!/usr/bin/env python3
"""Figure 4: how MAP depends on the positive prior rho+ and on the size of the memory.

python -m experiments.figure4 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. A memory of 0 is none. Writes figure4.csv, a row per training, and figure4.png.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import flags, tables
from utils import InputError, run_script

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"pos_prior": "rho+", "queue_size": "memory size"}


def variants(priors: list[float], sizes: list[int]) -> dict[str, dict]:
    """The name of each point of the curves -> its flags."""
    by_prior = {f"pos_prior={p}": {"pos_prior": p, "mode": "debias" if p else "simple"} for p in priors}
    return by_prior | {f"queue_size={n}": {"queue_size": n} if n else {"memory": "none"} for n in sizes}


def draw(frame: "pd.DataFrame", path: Path) -> None:
    """A row of two panels per data set, a curve per code length."""
    from experiments import plots

    datasets = list(dict.fromkeys(frame["dataset"]))
    figure, grid = plots.panels(len(datasets), len(NAMES))
    for dataset, panels in zip(datasets, grid, strict=True):
        for (flag, name), axes in zip(NAMES.items(), panels, strict=True):
            part = frame[(frame["dataset"] == dataset) & (frame["flag"] == flag)]
            for (bits, points), colour in zip(part.groupby("bits"), plots.COLOURS, strict=False):
                plots.band(axes, points, ("value", "map"), f"{bits} bits", colour, marker="o", markersize=4)
            plots.finish(axes, f"{dataset}: MAP and {name}", name, "MAP (%)")
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = flags.build_parser(__doc__)
    add = parser.add_argument
    add("--priors", type=float, nargs="+", default=[0, 0.05, 0.1, 0.15, 0.2, 0.3], help="(default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=[0, 128, 256, 384, 512, 896], help="(default: %(default)s)")
    own, given = flags.parse(parser, argv, "matplotlib")
    if min(own.sizes) < 0 or min(own.priors) < 0:
        raise InputError("--priors and --sizes must not be negative")
    trials = flags.plan(own, given, variants(own.priors, own.sizes))
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    frame[["flag", "value"]] = [point.split("=") for point in frame["method"]]
    frame["value"] = frame["value"].astype(float)
    frame = frame.drop(columns=["result", "method"])
    tables.write_csv(own.results / "figure4.csv", frame)
    draw(frame, own.results / "figure4.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
