#!/usr/bin/env python3
"""One HTML file about a run: its flags, curves, codewords, and what it finds; the published numbers beside.

python -m experiments.report NOTES [--output DIR] [--data_root DIR] [--html FILE]

Reads `checkpoints/NOTES/` below --output and, for the gallery, the images and the feature cache, in the folders of
the run unless flags name others. Writes `checkpoints/NOTES/report.html`, which needs no network and no other file. Of
the queries it shows the best, the worst, and those in the middle.
"""

import argparse
import html
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import config
from config import Config
from data import DATASETS
from experiments import flags, published
from experiments.curves import result_curves, training_curves
from methods import BACKBONES, METHODS
from utils import (
    InputError,
    Parser,
    atomic_write,
    check_regular,
    check_writable,
    naming_lack_of_memory,
    one_line,
    run_script,
    sha256,
)

if TYPE_CHECKING:
    import numpy as np

    from results import Files

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


PLACES = ("data_root", "list_root", "images", "feature_cache", "device")  # flags that may differ from the run's


# ---------------------------------------------------------------- what a run wrote, checked before it is used


def _number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30  # False for NaN


def _whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and low <= value <= high


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _one_of(values: object) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in values


# fields of metrics.json, and flags in its `config`, that the page computes with -> whether a value makes sense
FIELDS: dict[str, Callable[[object], bool]] = {
    "map": lambda value: value is None or (_number(value) and 0 <= value <= 1),
    "bits": _whole(1, 2**20),
    "epochs_run": _whole(0, 2**32),
    "history": lambda value: isinstance(value, list) and all(_numbers(entry) and "epoch" in entry for entry in value),
    "seconds": _numbers,
    "versions": lambda value: isinstance(value, dict),
}
FLAGS: dict[str, Callable[[object], bool]] = {
    "method": _one_of(METHODS),
    "recipe": _one_of(("paper", "release")),
    "dataset": _one_of(DATASETS),
    "backbone": _one_of(BACKBONES),
    "protocol": lambda value: isinstance(value, str),
    "test_only": lambda value: isinstance(value, bool),
    "symmetric_distance": lambda value: isinstance(value, bool),
    "M": _whole(1, 2**16),
    "K": _whole(2, 2**16),
    "feat_dim": _whole(1, 2**16),
    "L": _whole(1, 2**16),
    "code_length": _whole(8, 2**16),
    "image_size": _whole(1, 2**12),
}


def checked(metrics: dict, path: Path) -> Config:
    """The configuration of the run that wrote `metrics.json`; flags that it does not have are at their defaults. Raises
    InputError if a field that is used here has a value that no run writes."""
    method = metrics["config"].get("method", "MeCoQ")
    method = method if isinstance(method, str) and method in METHODS else "MeCoQ"  # the rules below refuse it
    values = vars(config.parse(["--method", method])) | metrics["config"]
    flags = {name: rule for name, rule in FLAGS.items() if name in config.rows(method)}
    for content, rules in ((metrics, FIELDS), (values, flags)):
        for name, rule in rules.items():
            if name not in content or not rule(content[name]):
                value = one_line(ValueError(content.get(name, "missing")))[:60]
                raise InputError(f"{path}: no run writes {name} = {value}: move the file away")
    return Config(values)


def for_gallery(configuration: Config, checkpoint: Path, own: Namespace) -> Config:
    """The configuration of a test of the run's model, with the places that the user gave. Raises InputError if its
    flags do not go together."""
    given = {name: getattr(own, name) for name in PLACES}
    values = vars(configuration) | {name: value for name, value in given.items() if value is not None}
    values |= {"test_only": True, "checkpoint": str(checkpoint), "download_cifar10": False}
    if values["method"] == "MeCoQ":
        values |= {"memory": "none", "queue_begin_epoch": -1}  # of training only
    values["device"] = "cuda:0" if values["device"] == "cuda" else values["device"]
    config.check(values)
    return Config(values)


# ---------------------------------------------------------------- parts of the page


def escaped(value: object) -> str:
    return html.escape(str(value))


def table(pairs: list[tuple], kind: str = "") -> str:
    rows = "".join(f'<tr><td class="{kind}">{escaped(a)}</td><td>{escaped(b)}</td></tr>' for a, b in pairs)
    return f'<div class="wide"><table>{rows}</table></div>'


def beside(configuration: Config, bits: int) -> list[tuple[str, str]]:
    """What was published for the run's method, data set and code length: name and MAP in percent."""
    if configuration.method != "MeCoQ":
        return published.reported(configuration.method, configuration.dataset, bits)
    name, long = published.experiment(vars(configuration), bits)
    theirs = [100 * float(row["test_map"]) for row in published.rows("reference_runs") if row["notes"] == name]
    if not theirs:
        return []
    mean = sum(theirs) / len(theirs)
    found = [("the authors' runs on three GPUs", f"{mean:.2f} ({min(theirs):.2f}-{max(theirs):.2f})")]
    if not configuration.symmetric_distance:  # the paper has no such results
        paper = published.map_of("paper_table1_map", published.OURS, long, bits)
        found.insert(0, ("the paper", f"{paper:.2f}"))
    return found


def ties(metrics: dict) -> str:
    """How equal scores count in the run's MAP, and what it is if they count otherwise."""
    maps = metrics.get("map_by_ties")
    if not isinstance(maps, dict) or not _numbers(maps) or maps.keys() != {"expected", "database"}:
        return ""
    return f"; equal scores: expected {100 * maps['expected']:.2f}, in database order {100 * maps['database']:.2f}"


def without_labels(measured: dict) -> list[tuple[str, str]]:
    """What was measured without labels: figures for `head`. Raises TypeError if they are none that a run writes."""
    if not _numbers({name: value for name, value in measured.items() if value is not None}):
        raise TypeError("what was measured without labels is not numbers")
    found = [
        (f"{measured['views_found']:.1%}", "of the held-back images: one view finds the other before all others'"),
        (f"{measured['codewords_used']:.1%}", "of the codewords code any image"),
    ]
    if measured["quantization_error"] is not None:
        found.append((f"{measured['quantization_error']:.4f}", "quantization error of the held-back images"))
    return found


def head(metrics: dict, configuration: Config) -> str:
    """Title, the main figures, the published ones, and what to mind when comparing them."""
    protocol = f" ({configuration.protocol})" if DATASETS[configuration.dataset].protocols else ""
    kept = "the last one kept" if "unlabelled" in metrics else f"the best one {metrics['best_epoch']}"
    epochs = f"epochs, {kept}" if metrics["epochs_run"] else "epochs: tested only"
    figures = [(metrics["bits"], "bits per image"), (metrics["epochs_run"], epochs)]
    if metrics["map"] is not None:
        mean = f"{100 * metrics['map']:.2f}"
        figures.insert(0, (mean, f"MAP@{metrics['topK'] or 'all'} in percent{ties(metrics)}"))
    if "unlabelled" in metrics:
        figures += without_labels(metrics["unlabelled"])
    notes = [] if metrics["canonical_data"] else ["The images are not the published ones."]
    notes += [f"Only {metrics['limit']} images a split were used: the MAP means nothing."] if metrics["limit"] else []
    backbone = configuration.backbone
    published_one = config.rows(configuration.method)["backbone"].default
    if backbone != published_one and not DATASETS[configuration.dataset].own:
        notes.append(f"The backbone is {backbone}, the published one {published_one}: the numbers do not compare.")
    what = f"{configuration.method}, {configuration.dataset}{protocol}, {backbone}, "
    what += f"recipe {metrics['recipe']}, seed {metrics['seed']}"
    shown = "".join(f'<div><div class="big">{escaped(value)}</div>{escaped(name)}</div>' for value, name in figures)
    theirs = beside(configuration, metrics["bits"])
    return (
        f"<h1>{escaped(metrics['notes'])}</h1><p>{escaped(what)}</p><div class='figures'>{shown}</div>"
        + (f"<h2>Published</h2>{table(theirs)}" if theirs else "")
        + f"<p class='note'>{escaped(' '.join(notes))}</p>"
    )


def described(metrics: dict, configuration: Config) -> str:
    """The recipe, what the run took and ran on, and all flags."""
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in metrics["seconds"].items())
    ran = [("took", seconds), ("on", metrics["device"]), *metrics["versions"].items()]
    all_flags = [(f"--{flag}", value) for flag, value in sorted(metrics["config"].items())]
    return (
        f"<h2>Configuration</h2><p>{escaped(config.recipe_line(configuration))}</p>{table(ran)}<details><summary>all "
        f"flags</summary>{table(all_flags, 'flag')}</details>"
    )


# ---------------------------------------------------------------- the page


def database_codes(files: "Files", configuration: Config, labelled: bool) -> "tuple[np.ndarray, np.ndarray | None]":
    """The database's codes `[n, M]` and labels, if there are any. Raises InputError if no such codebooks made them."""
    from readers import read_array

    M, K = config.code_shape(vars(configuration))
    codes = read_array(files.checkpoints / "db_codes.npy")
    labels = read_array(files.checkpoints / "db_targets.npy") if labelled else codes[:, 0]
    whole = labels.ndim in (1, 2) and codes.size and codes.shape == (len(labels), M) and codes.dtype.kind in "iu"
    if not whole or codes.min() < 0 or codes.max() >= K:
        raise InputError(f"{files.checkpoints / 'db_codes.npy'} does not hold the run's codes: test the run again")
    return codes, labels if labelled else None


def gallery(metrics: dict, configuration: Config, files: "Files", own: Namespace) -> str:
    """Queries and what they find. Raises InputError if the model, the images or the weights are not to be had, or are
    others than the run's."""
    from distributed import use_device
    from experiments.gallery import Search, shown

    path = Path(configuration.checkpoint) if configuration.test_only else files.model
    check_regular(path)
    if not path.exists() or sha256(path) != metrics["model_sha256"]:
        raise InputError(f"{path} is not the model that the run's metrics.json is of; --queries 0: no gallery")
    configuration = for_gallery(configuration, path, own)
    precision = use_device(configuration.device, configuration.precision)
    codes, labels = database_codes(files, configuration, metrics["map"] is not None)
    search = Search(configuration.replace(precision=precision), codes, labels)
    return shown(search, own.queries)


def page(metrics: dict, configuration: Config, files: "Files", own: Namespace) -> str:
    """The whole HTML. Raises InputError if the run's files do not belong together."""
    labelled = metrics["map"] is not None
    codes, _ = database_codes(files, configuration, labelled)
    body = head(metrics, configuration) + training_curves(metrics, configuration)
    body += result_curves(files, codes, config.code_shape(vars(configuration))[1], labelled)
    if own.queries and not DATASETS[configuration.dataset].vectors:
        body += gallery(metrics, configuration, files, own)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escaped(metrics["notes"])}</title><style>{STYLE}</style></head><body>{body}'
        f"{described(metrics, configuration)}</body></html>\n"
    )


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("notes", help="name of the run")
    add("--output", type=Path, default=Path(), help="of the run (default: this folder)")
    add("--html", type=Path, help="the file to write (default: report.html beside the run's metrics.json)")
    add("--queries", type=int, default=8, help="shown in each part of the gallery; 0: no gallery (default: "
        "%(default)s)")  # fmt: skip
    for name in PLACES:
        add(f"--{name}", help="(default: as in the run)")
    add("--dry_run", action="store_true", help="check the flags, print what would be read and written")
    return parser


def main(argv: list[str] | None = None) -> None:
    own = build_parser().parse_args(argv)
    flags.need("matplotlib")
    if own.queries < 0:
        raise InputError("--queries must not be negative")
    folder = own.output / "checkpoints" / own.notes
    path, target = folder / "metrics.json", own.html or folder / "report.html"
    if own.dry_run:
        print(f"would read {path} and what is beside it, show {3 * own.queries} queries, and write {target}")
        return
    from results import Files, read_metrics

    if not path.exists():
        raise InputError(f"{folder}: there is no finished run of this name; --output names the folder of runs")
    check_writable(target.parent)
    check_regular(target)
    metrics = read_metrics(path)
    try:
        with naming_lack_of_memory():
            content = page(metrics, checked(metrics, path), Files(own.output, own.notes), own)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is the metrics.json of another version ({one_line(error)}): move it away") from error
    with atomic_write(target, "w") as file:
        file.write(content)
    print(f"written to {target}")


if __name__ == "__main__":
    sys.exit(run_script(main))
