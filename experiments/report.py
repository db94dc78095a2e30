#!/usr/bin/env python3
"""One HTML file about a run: its flags, curves, codewords, and what it finds; the published numbers beside.

python -m experiments.report NOTES [--output DIR] [--data_root DIR] [--html FILE]

Reads `checkpoints/NOTES/` below --output and, for the gallery, the images and the feature cache, from where the run had
them if not said otherwise. Writes `checkpoints/NOTES/report.html`, which needs no network and no other file. Of the
queries it shows the best, the worst, and some between.
"""

import base64
import html
import io
import sys
from argparse import Namespace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import engine
import main as program
import retrieval
from experiments import published
from experiments.callbacks import used_codewords
from feature_cache import test_features
from results import Files, read_array, read_metrics
from utils import InputError, Parser, atomic_write, check_writable, one_line, run_script, sha256

CLASSES = {
    "CIFAR10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "Digits": tuple("0123456789"),
}
CURVES = {
    "loss/total_loss": "total loss",
    "loss/simclr_loss": "contrastive loss",
    "loss/codeword_reg_loss": "Omega, codeword diversity",
    "loss/entropy_reg_loss": "entropy of the soft codes",
    "quant_err": "quantization error",
    "val_mAP": "MAP of the test, a fraction",
}
STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --hit: #1a7f37; --miss: #b42318; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .2em 0; } h2 { font-size: 1.2rem; margin: 2em 0 .5em; border-top: 1px solid var(--line);
  padding-top: 1em; } p.note { color: var(--soft); font-size: .9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; } .figures > div { flex: 0 1 30%; font-size: .9rem; }
.big { font-size: 1.8rem; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
.plots svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 10px 4px 0; text-align: left; vertical-align: top; }
td.flag { font-family: ui-monospace, monospace; } details { margin: .5em 0; } summary { cursor: pointer; }
.query { display: grid; grid-template-columns: repeat(11, 1fr); gap: 6px; margin: 0 0 18px; }
.query h3 { grid-column: 1 / -1; font-size: .95rem; margin: 0; font-weight: 600; }
figure { margin: 0; font-size: .75rem; line-height: 1.25; } figure img { width: 100%; aspect-ratio: 1; display: block;
  object-fit: cover; border: 3px solid var(--line); border-radius: 4px; } .small img { image-rendering: pixelated; }
.hit img { border-color: var(--hit); } .miss img { border-color: var(--miss); border-style: dashed; }
.hit b { color: var(--hit); } .miss b { color: var(--miss); } .asked img { border-color: var(--ink); }
@media (max-width: 700px) { .figures > div { flex-basis: 45%; } .query { grid-template-columns: repeat(5, 1fr); }
  .query .asked { grid-column: 1 / -1; width: calc(20% - 4px); } }
"""


# ---------------------------------------------------------------- parts of the page


def escaped(value: object) -> str:
    return html.escape(str(value))


def rows(pairs: list[tuple], kind: str = "") -> str:
    cells = "".join(f'<tr><td class="{kind}">{escaped(a)}</td><td>{escaped(b)}</td></tr>' for a, b in pairs)
    return f'<div class="wide"><table>{cells}</table></div>'


def beside(metrics: dict) -> list[tuple[str, str]]:
    """What was published for the run's data set and code length: name and MAP in percent."""
    name, long = published.experiment(metrics["config"], metrics["bits"])
    runs = published.read("reference_runs").astype({"test_map": float})
    theirs = 100 * runs[runs["notes"] == name]["test_map"]
    if theirs.empty:
        return []
    found = [("the authors' runs on three GPUs", f"{theirs.mean():.2f} ({theirs.min():.2f}-{theirs.max():.2f})")]
    if not metrics["config"]["symmetric_distance"]:  # the paper has no such results
        paper = published.map_of("paper_table1_map", published.OURS, long, metrics["bits"])
        found.insert(0, ("the paper", f"{paper:.2f}"))
    return found


def head(metrics: dict) -> str:
    config = metrics["config"]
    protocol = f" ({config['protocol']})" if config["dataset"] == "CIFAR10" else ""
    epochs = f"epochs, the best one {metrics['best_epoch']}" if metrics["epochs_run"] else "epochs: tested only"
    figures = [
        (f"{100 * metrics['map']:.2f}", f"MAP@{metrics['topK'] or 'all'} in percent"),
        (metrics["bits"], "bits an image"),
        (metrics["epochs_run"], epochs),
    ]
    notes = [] if metrics["canonical_data"] else ["The images are not the published ones."]
    notes += [f"Only {metrics['limit']} images a split were used: the MAP means nothing."] if metrics["limit"] else []
    if config["backbone"] != "vgg16":
        notes.append(f"The backbone is {config['backbone']}, the published one VGG16: the numbers do not compare.")
    what = f"{config['dataset']}{protocol}, {config['backbone']}, recipe {metrics['recipe']}, seed {metrics['seed']}"
    shown = "".join(f'<div><div class="big">{escaped(value)}</div>{escaped(name)}</div>' for value, name in figures)
    return (
        f"<h1>{escaped(metrics['notes'])}</h1><p>{escaped(what)}</p><div class='figures'>{shown}</div>"
        + (f"<h2>Published</h2>{rows(beside(metrics))}" if beside(metrics) else "")
        + f"<p class='note'>{escaped(' '.join(notes))}</p>"
    )


def configuration(metrics: dict) -> str:
    args = Namespace(**metrics["config"])
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in metrics["seconds"].items())
    ran = [("took", seconds), ("on", metrics["device"]), *metrics["versions"].items()]
    return (
        f"<h2>Configuration</h2><p>{escaped(program.recipe_line(args))}</p>{rows(ran)}<details><summary>all flags"
        f"</summary>{rows([(f'--{flag}', value) for flag, value in sorted(vars(args).items())], 'flag')}</details>"
    )


def their_maps(metrics: dict) -> list[tuple]:
    """MAP by epoch in the authors' runs of the same experiment: lines for `panel`."""
    frame, (name, _) = published.read("reference_curves"), published.experiment(metrics["config"], metrics["bits"])
    frame = frame[(frame["notes"] == name) & (frame["val_map"] != "")]
    return [
        (part["epoch"].astype(int), part["val_map"].astype(float), f"the authors', VGG16, {gpu}")
        for gpu, part in frame.groupby("gpu", sort=False)
    ]


def curves(metrics: dict, pr: np.ndarray, p_at_k: np.ndarray, codes: np.ndarray, K: int) -> str:
    """Plots: the training's curves, precision and recall, P@K, and how often each codeword is used."""
    from experiments import plots

    def panel(title: str, x: str, y: str, *lines: tuple, **style: object) -> str:
        figure, grid = plots.panels(1, 1, 3.8, 2.6)
        for (horizontal, vertical, label), colour in zip(lines, cycle(plots.COLOURS), strict=False):
            grid[0, 0].plot(horizontal, vertical, label=label, color=colour, linewidth=1.5, **style)
        plots.finish(grid[0, 0], title, x, y, legend=len(lines) > 1)
        return plots.svg(figure)

    history = metrics["history"]
    learned = []
    for tag, title in CURVES.items():
        entries = [entry for entry in history if tag in entry]
        if entries:
            line = [entry["epoch"] for entry in entries], [entry[tag] for entry in entries], None
            theirs = their_maps(metrics) if tag == "val_mAP" else []
            if theirs:
                line = (*line[:2], "this run")
            learned.append(panel(title, "epoch", "", line, *theirs, marker="." if len(entries) < 40 else ""))
    thinned = np.unique(np.geomspace(1, pr.shape[1], 400).astype(int)) - 1
    found = [panel("precision and recall", "recall", "precision", (*pr[:, thinned], None))]
    found.append(panel("precision among the first K", "K", "precision", (*p_at_k, None)))
    shares = np.stack([np.sort(np.bincount(column, minlength=K))[::-1] for column in codes.T]) / len(codes)
    used, perplexity = used_codewords(torch.from_numpy(codes.astype(np.int64)), K)
    lines = [(np.arange(1, K + 1), share, f"codebook {m + 1}") for m, share in enumerate(shares)]
    found.append(panel("codewords, most used first", "codeword", "share of the images", *lines))
    return (
        (f'<h2>Training</h2><div class="plots">{"".join(learned)}</div>' if learned else "")
        + f'<h2>Retrieval and codes</h2><div class="plots">{"".join(found)}</div><p class="note">{used:.1%} of the '
        f"codewords code some image; their use has a perplexity of {perplexity:.1%} of K (100 %: all alike).</p>"
    )


# ---------------------------------------------------------------- the gallery


def thumbnail(image: Image.Image) -> str:
    """As a data URL: small images as they are, others at most 128 pixels high or wide."""
    image = image.convert("RGB")
    small = max(image.size) <= 64
    image.thumbnail((128, 128))
    content = io.BytesIO()
    image.save(content, format="PNG" if small else "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def labels_of(label: np.ndarray, dataset: str) -> str:
    if label.ndim:
        return "labels " + " ".join(str(index + 1) for index in np.flatnonzero(label))
    return CLASSES[dataset][int(label)] if dataset in CLASSES else f"label {int(label)}"


class Search:
    """The run's queries and codes, ranked again.

    Raises InputError where data or weights are not to be had, or are others than the run's.
    """

    def __init__(self, metrics: dict, files: Files, codes: np.ndarray, own: Namespace) -> None:
        config = metrics["config"]
        path = Path(config["checkpoint"]) if config["test_only"] else files.model
        if not path.exists() or sha256(path) != metrics["model_sha256"]:
            raise InputError(f"{path} is not the model that the run's metrics.json is of; --queries 0: no gallery")
        given = {name: getattr(own, name) for name in ("data_root", "list_root", "feature_cache", "device")}
        given = {name: value for name, value in given.items() if value is not None}
        args = Namespace(**config | given | {"test_only": True, "checkpoint": str(path), "download_cifar10": False})
        program.check(args)
        program.take_device(args)
        self.splits, model = program.build(args)
        if not np.array_equal(read_array(files.checkpoints / "db_targets.npy"), self.splits.database.labels):
            raise InputError(
                f"the images of {args.dataset} are not those of the run: say with --data_root where they are"
            )
        self.args = args
        known = {"query": test_features(model.backbone, self.splits, args)["query"]}
        z = engine.encode(model, known["query"], hard=args.symmetric_distance)
        self.codes = torch.from_numpy(codes.astype(np.int32)).to(args.device)
        self.queries = z
        with torch.inference_mode():
            labels = (
                torch.from_numpy(part.labels).to(args.device) for part in (self.splits.query, self.splits.database)
            )
            self.tables = engine.tables(model.quantizer, args)
            self.ap = (
                retrieval.average_precisions(self.score, z, *labels, args.topK, width=args.M * args.K).cpu().numpy()
            )

    def score(self, queries: Tensor) -> Tensor:
        """Similarity of queries to all of the database, `[q, n]`, Eq. 17."""
        return retrieval.aqs_scores(self.tables(queries), self.codes)

    @torch.inference_mode()
    def first(self, query: int, k: int) -> np.ndarray:
        """The k nearest database images, equals in their order."""
        return (
            torch.sort(self.score(self.queries[query : query + 1])[0], descending=True, stable=True)[1][:k]
            .cpu()
            .numpy()
        )


def picture(images: data.Images, index: int, kind: str, text: str, mark: str = "") -> str:
    photo = images.picture(index)
    small = " small" if max(photo.size) <= 64 else ""
    label = escaped(text)
    return f'<figure class="{kind}{small}"><img src="{thumbnail(photo)}" alt="{label}"><b>{mark}</b> {label}</figure>'


def gallery(search: Search, n: int) -> str:
    """Queries with their ten nearest: the best, those in the middle and the worst, hits and misses marked."""
    splits, dataset = search.splits, search.args.dataset
    order = np.argsort(-search.ap, kind="stable")
    middle = len(order) // 2
    groups = {"Best": order[:n], "Worst": order[::-1][:n], "In the middle": order[middle : middle + n]}
    text = f"<h2>Gallery</h2><p class='note'>Of {len(order)} queries, by average precision. ✓ and a full frame: "
    text += "a label is shared; ✗ and a dashed frame: none is.</p>"
    for name, chosen in groups.items():
        text += f"<h2>{name}</h2>"
        for query in chosen:
            label = splits.query.labels[query]
            found = search.first(query, 10)
            relevant = retrieval.relevance(
                *(torch.from_numpy(np.asarray(x)) for x in (label[None], splits.database.labels[found]))
            )
            text += f'<div class="query"><h3>AP {search.ap[query]:.3f}, {int(relevant.sum())} of the first ten</h3>'
            text += picture(splits.query, query, "asked", labels_of(label, dataset), "query:")
            for index, hit in zip(found, relevant[0].tolist(), strict=True):
                shown = labels_of(splits.database.labels[index], dataset)
                text += picture(splits.database, index, "hit" if hit else "miss", shown, "✓" if hit else "✗")
            text += "</div>"
    return text


# ---------------------------------------------------------------- the page


def page(metrics: dict, files: Files, own: Namespace) -> str:
    """Raises InputError where the run's files do not belong together."""
    K, codes = metrics["config"]["K"], read_array(files.checkpoints / "db_codes.npy")
    labels = read_array(files.checkpoints / "db_targets.npy")
    shape = len(labels), metrics["config"]["M"]
    if codes.shape != shape or codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= K:
        raise InputError(f"{files.checkpoints / 'db_codes.npy'} does not hold the run's codes: test the run again")
    pr, p_at_k = (read_curve(files.checkpoints / name) for name in ("PR_curve.txt", "P_at_topK_curve.txt"))
    body = head(metrics) + curves(metrics, pr, p_at_k, codes, K)
    if own.queries:
        body += gallery(Search(metrics, files, codes, own), own.queries)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escaped(metrics["notes"])}</title><style>{STYLE}</style></head><body>{body}'
        f"{configuration(metrics)}</body></html>\n"
    )


def read_curve(path: Path) -> np.ndarray:
    try:
        curve = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable ({error}): test the run again") from error
    if len(curve) != 2 or not curve.size:
        raise InputError(f"{path} has not two rows: test the run again")
    return curve


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("notes", help="name of the run")
    add("--output", type=Path, default=Path(), help="of the run (default: this folder)")
    add("--html", type=Path, help="where to write (default: report.html beside the run's metrics.json)")
    add(
        "--queries", type=int, default=8, help="shown in each part of the gallery; 0: no gallery (default: %(default)s)"
    )
    for name in ("data_root", "list_root", "feature_cache", "device"):
        add(f"--{name}", help="(default: as in the run)")
    own = parser.parse_args(argv)
    published.need_pandas()
    published.need_matplotlib()
    files = Files(own.output, own.notes)
    path = files.checkpoints / "metrics.json"
    if not path.exists():
        raise InputError(f"{files.checkpoints}: there is no finished run of this name; --output says where runs are")
    if own.queries < 0:
        raise InputError("--queries must not be negative")
    target = own.html or files.checkpoints / "report.html"
    check_writable(target.parent)
    metrics = read_metrics(path)
    try:
        content = page(metrics, files, own)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is the metrics.json of another version ({one_line(error)}): move it away") from error
    with atomic_write(target, "w") as file:
        file.write(content)
    print(f"written to {target}")


if __name__ == "__main__":
    sys.exit(run_script(main))
