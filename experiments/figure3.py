#!/usr/bin/env python3
"""Figure 3: why codes are remembered and not features. Feature drift (Eq. 11) of embeddings, soft and hard
reconstructions over several intervals, and the errors of quantization.

python -m experiments.figure3 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. All are mean squared distances of the segments of the same 1,000 training images; the embedding is
normalised segment by segment, as the quantizer does it first. Writes figure3.csv, a row in ten steps, and figure3.png.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import flags, tables
from utils import run_script

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"embedding": "embeddings", "soft": "soft reconstructions", "hard": "hard reconstructions"}


def draw(frame: "pd.DataFrame", path: Path) -> None:
    """A row of panels per data set and code length: a drift each over several intervals, and the errors."""
    from experiments import plots
    from experiments.callbacks import FeatureDrift

    rows = frame.groupby(["dataset", "bits"], sort=False)
    figure, grid = plots.panels(len(rows), len(FeatureDrift.INTERVALS) + 1)
    for ((dataset, bits), part), panels in zip(rows, grid, strict=True):
        name = f"{dataset}, {bits} bits"
        for interval, axes in zip(FeatureDrift.INTERVALS, panels[:-1], strict=True):
            for (kind, label), colour in zip(KINDS.items(), plots.COLOURS, strict=False):
                plots.band(axes, part, ("step", f"{kind}_{interval}"), label, colour)
            title = f"{name}: drift over {interval} step{'s' if interval > 1 else ''}"
            plots.finish(axes, title, "step", "squared distance")
            axes.set_yscale("log")
        for kind, colour in zip(("soft", "hard"), plots.COLOURS[1:], strict=False):
            plots.band(panels[-1], part, ("step", f"{kind}_error"), KINDS[kind], colour)
        plots.finish(panels[-1], f"{name}: quantization error", "step", "squared distance")
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__), argv, "matplotlib")
    trials = flags.plan(own, given, {"MeCoQ (full)": {}})
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = tables.exploded(sweep.run_trials(trials, own, "FeatureDrift"), lambda result: result["rows"])
    tables.write_csv(own.results / "figure3.csv", frame)
    draw(frame, own.results / "figure3.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
