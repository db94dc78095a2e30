#!/usr/bin/env python3
"""Figure 3: why codes are remembered and not features. Feature drift (Eq. 11) of embeddings, soft and hard
reconstructions over several intervals, and the errors of quantization.

python -m experiments.figure3 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. All are mean squared distances of the segments of the same 1,000 training images; the embedding is
normalised segment by segment, as the quantizer does it first. Writes figure3.csv, a row in ten steps, and figure3.png.
"""

import sys
from pathlib import Path

from experiments import sweep
from experiments.callbacks import DriftWatch
from utils import run_script

KINDS = {"embedding": "embeddings", "soft": "soft reconstructions", "hard": "hard reconstructions"}


def draw(frame: "sweep.pd.DataFrame", path: Path) -> None:
    from experiments import plots

    rows = frame.groupby(["dataset", "bits"], sort=False)
    figure, grid = plots.panels(len(rows), len(DriftWatch.INTERVALS) + 1)
    for ((dataset, bits), part), panels in zip(rows, grid, strict=True):
        for interval, axes in zip(DriftWatch.INTERVALS, panels[:-1], strict=True):
            for (kind, label), colour in zip(KINDS.items(), plots.COLOURS, strict=False):
                plots.band(axes, part, "step", f"{kind}_{interval}", label, colour)
            plots.finish(
                axes,
                f"{dataset}, {bits} bits: drift over {interval} step{'s' if interval > 1 else ''}",
                "step",
                "squared distance",
            )
            axes.set_yscale("log")
        for kind, colour in zip(("soft", "hard"), plots.COLOURS[1:], strict=False):
            plots.band(panels[-1], part, "step", f"{kind}_error", KINDS[kind], colour)
        plots.finish(panels[-1], f"{dataset}, {bits} bits: quantization error", "step", "squared distance")
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    own, flags = sweep.parse(sweep.build_parser(__doc__), argv, figure=True)
    frame = sweep.run_cells(sweep.plan(own, flags, {"MeCoQ (full)": {}}), own, DriftWatch)
    frame = sweep.exploded(frame, lambda result: result["rows"])
    sweep.write_csv(own.results / "figure3.csv", frame)
    draw(frame, own.results / "figure3.png")


if __name__ == "__main__":
    sys.exit(run_script(main))
