#!/usr/bin/env python3
"""Figure 2: the codeword diversity term at work. Loss and MAP; learning rate and Omega; with the term and without.

python -m experiments.figure2 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's; --eval_interval says how often MAP is measured. The loss is the vanilla contrastive loss, without
debiasing, memory and regulariser, as in the paper's footnote. Writes figure2.csv, a row per epoch, and figure2.png.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import flags, tables
from utils import run_script

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

VARIANTS = {"with diversity term": {}, "without": {"hp_gamma": 0.0}}


def draw(frame: "pd.DataFrame", path: Path) -> None:
    """A row of panels per data set and code length."""
    from experiments import plots

    rows = frame.groupby(["dataset", "bits"], sort=False)
    figure, grid = plots.panels(len(rows), 3)
    for ((dataset, bits), part), panels in zip(rows, grid, strict=True):
        draw_row(part, panels, f"{dataset}, {bits} bits")
    plots.save(figure, path)


def draw_row(part: "pd.DataFrame", panels: "list[Axes]", name: str) -> None:
    """Loss and MAP; learning rate and Omega; use of the codewords."""
    from experiments import plots

    left, middle, right = panels
    mean_ap, omega = left.twinx(), middle.twinx()
    for (variant, lines), colour in zip(part.groupby("method", sort=False), plots.COLOURS, strict=False):
        plots.band(left, lines, ("epoch", "vanilla_loss"), variant, colour)
        plots.band(mean_ap, lines, ("epoch", "map"), None, colour, linestyle="--", marker=".")
        plots.band(omega, lines, ("epoch", "omega"), None, colour)
        plots.band(right, lines, ("epoch", "used"), None, colour)
        plots.band(right, lines, ("epoch", "perplexity"), None, colour, linestyle="--")
    plots.band(middle, part, ("epoch", "lr"), "learning rate", "#777777", linestyle=":")
    plots.finish(left, f"{name}: loss and MAP", "epoch", "vanilla contrastive loss (solid)")
    plots.finish(mean_ap, "", "", "MAP in percent (dashed)")
    plots.finish(middle, f"{name}: learning rate and Omega", "epoch", "learning rate (dotted)")
    plots.finish(omega, "", "", "Omega (solid)")
    for axes in (mean_ap, omega):
        axes.grid(visible=False)
        axes.spines["right"].set_visible(True)
    plots.finish(right, f"{name}: codewords", "epoch", "of K: used, perplexity (dashed)")
    right.set_ylim(0, 1.05)


def epochs(result: dict) -> list[dict]:
    """A row per epoch of a training; the codewords are those at the epoch's start."""
    return [
        {
            "epoch": entry["epoch"],
            "lr": entry["lr"],
            "omega": entry["loss/codeword_reg_loss"],
            "map": 100 * entry["val_mAP"] if "val_mAP" in entry else None,
        }
        | row
        for entry, row in zip(result["history"], result["rows"], strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__), argv, "matplotlib")
    trials = flags.plan(own, given, VARIANTS)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = tables.exploded(sweep.run_trials(trials, own, "CodebookUse"), epochs)
    tables.write_csv(own.results / "figure2.csv", frame)
    draw(frame, own.results / "figure2.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
