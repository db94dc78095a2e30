"""The plots of a report: what a run learned, how it ranks, and how its codewords are used."""

import warnings
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config
from experiments import published
from utils import InputError

if TYPE_CHECKING:
    import numpy as np

    from results import Files

CURVES = {
    "loss/total_loss": "total loss",
    "loss/simclr_loss": "contrastive loss",
    "loss/codeword_reg_loss": "Omega, codeword diversity",
    "loss/entropy_reg_loss": "entropy of the soft codes",
    "quant_err": "quantization error",
    "val_mAP": "MAP of the test, a fraction",
}


def panel(title: str, axes: tuple[str, str], lines: list[tuple], **style: object) -> str:
    """A plot of lines (x, y, label) as SVG; `axes`: their names."""
    from experiments import plots

    figure, grid = plots.panels(1, 1, 3.8, 2.6)
    for (x, y, label), colour in zip(lines, cycle(plots.COLOURS), strict=False):
        grid[0, 0].plot(x, y, label=label, color=colour, linewidth=1.5, **style)
    plots.finish(grid[0, 0], title, *axes, legend=len(lines) > 1)
    return plots.svg(figure)


def their_maps(configuration: Config, bits: int) -> list[tuple]:
    """MAP by epoch in the authors' runs of the same experiment: lines for `panel`."""
    frame, (name, _) = published.read("reference_curves"), published.experiment(vars(configuration), bits)
    frame = frame[(frame["notes"] == name) & (frame["val_map"] != "")]
    return [
        (part["epoch"].astype(int), part["val_map"].astype(float), f"the authors', VGG16, {gpu}")
        for gpu, part in frame.groupby("gpu", sort=False)
    ]


def training_curves(metrics: dict, configuration: Config) -> str:
    """Losses and MAP by epoch; empty if nothing was trained."""
    learned = []
    for tag, title in CURVES.items():
        entries = [entry for entry in metrics["history"] if tag in entry]
        if entries:
            line = [entry["epoch"] for entry in entries], [entry[tag] for entry in entries]
            theirs = their_maps(configuration, metrics["bits"]) if tag == "val_mAP" else []
            lines = [(*line, "this run" if theirs else None), *theirs]
            learned.append(panel(title, ("epoch", ""), lines, marker="." if len(entries) < 40 else ""))
    return f'<h2>Training</h2><div class="plots">{"".join(learned)}</div>' if learned else ""


def result_curves(files: "Files", codes: "np.ndarray", K: int, labelled: bool) -> str:
    """Precision and recall, precision among the first K, if there are labels, and how often each codeword is used."""
    import numpy as np
    import torch

    from methods.mecoq import used_codewords

    found = []
    if labelled:
        pr, p_at_k = (read_curve(files.checkpoints / name) for name in ("PR_curve.txt", "P_at_topK_curve.txt"))
        thinned = np.unique(np.geomspace(1, pr.shape[1], 400).astype(int)) - 1
        found = [panel("precision and recall", ("recall", "precision"), [(*pr[:, thinned], None)])]
        found.append(panel("precision among the first K", ("K", "precision"), [(*p_at_k, None)]))
    shares = np.stack([np.sort(np.bincount(column, minlength=K))[::-1] for column in codes.T]) / len(codes)
    used, perplexity = used_codewords(torch.from_numpy(codes.astype(np.int64)), K)
    lines = [(np.arange(1, K + 1), share, f"codebook {m + 1}") for m, share in enumerate(shares)]
    found.append(panel("codewords, most used first", ("codeword", "share of the images"), lines))
    return (
        f'<h2>Retrieval and codes</h2><div class="plots">{"".join(found)}</div><p class="note">{used:.1%} of the '
        f"codewords code any image; their use has a perplexity of {perplexity:.1%} of K (100 %: all alike).</p>"
    )


def read_curve(path: Path) -> "np.ndarray":
    """The two rows of a curve. Raises InputError if the file does not hold them."""
    import numpy as np

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's about an empty file; one line says it below
            curve = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable ({error}): test the run again") from error
    if len(curve) != 2 or not curve.size:
        raise InputError(f"{path} has not two rows: test the run again")
    return curve
