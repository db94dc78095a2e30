"""Drawing: panels of curves, each a mean over seeds with a band from the lowest to the highest."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import use
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils import atomic_write

if TYPE_CHECKING:
    import pandas as pd

use("Agg")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by all


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """An empty figure and its axes `[rows, columns]`; sizes of a panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def band(
    axes: Axes, frame: "pd.DataFrame", columns: tuple[str, str], label: str | None, colour: str, **style: object
) -> None:
    """A curve: the mean of the second column for each value of the first and, if there are several, a band between the
    lowest and the highest. Nothing if there is no value."""
    x, y = columns
    if y not in frame or frame[y].isna().all():
        return
    groups = frame.dropna(subset=[y]).groupby(x)[y]
    mean = groups.mean()
    axes.plot(mean.index, mean, label=label, color=colour, **{"linewidth": 1.5} | style)
    axes.fill_between(mean.index, groups.min(), groups.max(), color=colour, alpha=0.18, linewidth=0)


def finish(axes: Axes, title: str, x: str, y: str, legend: bool = False) -> None:
    """Title, names of the axes, and a legend of its own if asked for."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with one legend for all panels below them."""
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def svg(figure: Figure) -> str:
    """An SVG element for HTML."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
