#!/usr/bin/env python3
"""Sets our MAP beside the paper's (Table 1) and beside the authors' public runs on three GPUs.

python scripts/compare_published.py [--output DIR ...] [--logs FILE ...]

Reads checkpoints/*/metrics.json below each --output folder, and log files: the authors' or ours, told by their names
(CifarII32bits.log). Runs of one experiment and setting, that is of the same flags but for seed and machine, are
averaged; what is not as in the experiment's script is named in the setting. Prints a table, and writes it as Markdown
and CSV beside the first folder's checkpoints. MAP in percent; a spread is the lowest and the highest value.
"""

import re
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from main import build_parser, resolve
from results import NEUTRAL, read_metrics
from utils import InputError, Parser, atomic_write, check_writable, one_line, run_script

try:
    import pandas as pd
    import tabulate  # noqa: F401, to_markdown needs it
except ImportError:
    pd = None

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "published"
# data set and protocol -> what the scripts call it, what the paper's table calls it
NAMES = {
    ("Flickr25K", ""): ("Flickr", "Flickr25K"),
    ("CIFAR10", "I"): ("CifarI", "CIFAR10-I"),
    ("CIFAR10", "II"): ("CifarII", "CIFAR10-II"),
    ("NUSWIDE", ""): ("Nuswide", "NUSWIDE"),
}


def published() -> "pd.DataFrame":
    """One row for each of the 24 experiments: `paper`, and `release` with its lowest and highest GPU."""
    table1 = pd.read_csv(PUBLISHED / "paper_table1_map.csv").set_index("method").loc["MeCoQ (Ours)"]
    paper = {
        f"{short}{bits}bits": float(table1[f"{long}/{bits}"]) for short, long in NAMES.values() for bits in (16, 32, 64)
    }
    runs = pd.read_csv(PUBLISHED / "reference_runs.csv")
    table = (100 * runs.groupby("notes", sort=False)["test_map"].agg(["mean", "min", "max"])).add_prefix("release_")
    table.insert(0, "paper", pd.Series(paper))  # the paper has no symmetric results
    return table.rename_axis("experiment")


def read_run(path: Path) -> dict | None:
    """Experiment, setting and MAP of a run of ours; None where nothing was published for its like."""
    metrics = read_metrics(path)
    config = Namespace(**metrics["config"])
    try:
        protocol = config.protocol if config.dataset == "CIFAR10" else ""
        if (config.dataset, protocol) not in NAMES:
            return None
        name = NAMES[config.dataset, protocol][0]
        experiment = f"{name}{metrics['bits']}bits{'Symm' if config.symmetric_distance else ''}"
        return {"experiment": experiment, "setting": setting(experiment, metrics), "map": 100 * metrics["map"]}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is the metrics.json of another version ({one_line(error)}): move it away") from error


def setting(experiment: str, metrics: dict) -> str:
    """The recipe, and every flag that its script and recipe would have set otherwise."""
    config = metrics["config"]
    script = vars(resolve(build_parser().parse_args([*script_flags(experiment), "--recipe", config["recipe"]])))
    others = [
        f"{flag}={config.get(flag)}"
        for flag, value in script.items()
        if flag not in NEUTRAL | {"seed", "data_root"} and config.get(flag) != value
    ]
    others += [] if metrics["canonical_data"] else ["not the published images"]
    return ", ".join([config["recipe"], *others])


@cache
def script_flags(experiment: str) -> list[str]:
    """The flags of the experiment's script."""
    configs = pd.read_csv(PUBLISHED / "run_configs.csv", dtype=str, keep_default_na=False).set_index("notes")
    if experiment not in configs.index:
        return []
    row = configs.loc[experiment].drop("script")
    symmetric = ["--symmetric_distance"] if row.pop("symmetric_distance") == "1" else []
    return [part for flag, value in row.items() if value for part in (f"--{flag}", value)] + symmetric


def read_log(path: Path) -> dict:
    """Experiment and MAP of a log in the release's format."""
    found = re.search(r"(Flickr|CifarII?|Nuswide)(16|32|64)bits(Symm)?", path.name)
    if not found:
        raise InputError(f"{path}: its name does not say which experiment it is of, as CifarII32bits.log does")
    try:
        values = re.findall(r"test mAP=([0-9.]+)", path.read_text(encoding="utf-8", errors="replace"))
        return {"experiment": found[0], "setting": "log", "map": 100 * float(values[-1])}
    except OSError as error:
        raise InputError(f"{path} is not readable ({error.strerror})") from error
    except (IndexError, ValueError):
        raise InputError(f"{path}: there is no line 'test mAP=...' in it: the run did not end") from None


def compare(runs: list[dict]) -> "pd.DataFrame":
    """The published numbers, and beside each what we have."""
    frame = pd.DataFrame(runs, columns=["experiment", "setting", "map"])
    ours = frame.groupby(["experiment", "setting"])["map"].agg(["count", "mean", "min", "max"]).add_prefix("ours_")
    table = published().reset_index().merge(ours.reset_index(), on="experiment", how="left")
    table["minus_paper"] = table["ours_mean"] - table["paper"]
    table["minus_release"] = table["ours_mean"] - table["release_mean"]
    return table


def markdown(table: "pd.DataFrame") -> str:
    def spread(row: "pd.Series", name: str) -> str:
        low, high = row[f"{name}_min"], row[f"{name}_max"]
        return "" if pd.isna(low) else f"{row[f'{name}_mean']:.2f} ({low:.2f}-{high:.2f})"

    columns = {
        "experiment": table["experiment"],
        "setting": table["setting"].fillna(""),
        "runs": table["ours_count"].map(lambda n: "" if pd.isna(n) else f"{n:.0f}"),
        "ours": table.apply(spread, axis=1, name="ours"),
        "paper": table["paper"].map(lambda x: "" if pd.isna(x) else f"{x:.2f}"),
        "release, 3 GPUs": table.apply(spread, axis=1, name="release"),
        "ours - paper": table["minus_paper"].map(lambda x: "" if pd.isna(x) else f"{x:+.2f}"),
        "ours - release": table["minus_release"].map(lambda x: "" if pd.isna(x) else f"{x:+.2f}"),
    }
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, nargs="+", default=[Path()], help="of the runs (default: this folder)")
    parser.add_argument("--logs", type=Path, nargs="+", default=[], help="log files, of the release or ours")
    args = parser.parse_args(argv)
    if pd is None:
        raise InputError("pandas and tabulate are needed: pip install -r requirements-extra.txt")
    folder = args.output[0] / "checkpoints"
    check_writable(folder)
    outputs = {output.resolve(): output for output in args.output}.values()  # each once
    paths = [path for output in outputs for path in sorted(output.glob("checkpoints/*/metrics.json"))]
    runs = [run for run in map(read_run, paths) if run] + [read_log(path) for path in args.logs]
    table = compare(runs)
    unpublished = {run["experiment"] for run in runs} - set(table["experiment"])
    if unpublished:
        print(f"nothing was published for {', '.join(sorted(unpublished))}", file=sys.stderr)
    text = markdown(table)
    with atomic_write(folder / "compare_published.md", "w") as file:
        file.write(text + "\n")
    with atomic_write(folder / "compare_published.csv", "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    print(text)
    print(f"\n{len(runs)} runs read; written to {folder}/compare_published.md and .csv")


if __name__ == "__main__":
    sys.exit(run_script(main))
