#!/usr/bin/env python3
"""Our MAP beside the paper's (Table 1) and beside the authors' public runs on three GPUs.

python -m experiments.compare_published [--output DIR ...] [--logs FILE ...] [--tables FILE ...]

Reads checkpoints/*/metrics.json below each --output folder, and log files: the authors' or ours, told by their names
(CifarII32bits.log). Runs of one experiment and setting, that is of the same flags but for seed and machine, are
averaged; flags that are not as in the experiment's script are named in the setting. Prints a table, and writes it as
Markdown and CSV beside the first folder's checkpoints. MAP in percent; a spread is the lowest and the highest value.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import config
from experiments import published
from experiments.published import NAMES, script_flags
from packages import need
from utils import InputError, Parser, atomic_write, check_writable, one_line, run_script

if TYPE_CHECKING:
    import pandas as pd

OTHER_IMAGES = "not the published images"


def published_maps() -> "pd.DataFrame":
    """A row per experiment, of 24: `paper`, and `release` with its lowest and highest GPU."""
    import pandas as pd

    paper = {
        f"{short}{bits}bits": published.map_of("paper_table1_map", published.OURS, long, bits)
        for short, long in NAMES.values()
        for bits in published.BITS
    }
    runs = published.read("reference_runs").astype({"test_map": float})
    table = (100 * runs.groupby("notes", sort=False)["test_map"].agg(["mean", "min", "max"])).add_prefix("release_")
    table.insert(0, "paper", pd.Series(paper))  # the paper has no symmetric results
    return table.rename_axis("experiment")


def read_run(path: Path) -> dict | None:
    """Experiment, setting and MAP of a run of ours; None if nothing was published for its like."""
    from results import read_metrics

    metrics = read_metrics(path)
    try:
        experiment, long = published.experiment(metrics["config"], metrics["bits"])
        if not long:
            return None
        return {"experiment": experiment, "setting": setting(experiment, metrics), "map": 100 * metrics["map"]}
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is the metrics.json of another version ({one_line(error)}): move it away") from error


def setting(experiment: str, metrics: dict) -> str:
    """The recipe, and every flag that its script and recipe would have set otherwise."""
    stored = metrics["config"]
    script = config.parse([*script_flags(experiment), "--recipe", stored["recipe"]])
    names = [name for name in config.differing(script, stored, *config.RESULTS, "weights") if name != "seed"]
    defaults = config.rows(script.method)
    others = [f"{name}={stored.get(name, defaults[name].absent_from_keys)}" for name in names]
    others += [] if metrics["canonical_data"] else [OTHER_IMAGES]
    return ", ".join([stored["recipe"], *others])


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


def read_table(path: Path) -> list[dict]:
    """The trainings in table1.csv, table2.csv or table3.csv, each with the MAP that the paper has for its method."""
    import pandas as pd

    try:
        frame = pd.read_csv(path).astype({"map": float, "published": float, "bits": int, "canonical_data": bool})
        frame[["recipe", "flags"]] = frame[["recipe", "flags"]].fillna("")
        short = {long: short for short, long in NAMES.values()}
        return [
            {
                "experiment": f"{short.get(row.dataset, row.dataset)}{row.bits}bits",
                "setting": ", ".join(
                    filter(None, (row.method, row.recipe, row.flags, "" if row.canonical_data else OTHER_IMAGES))
                ),
                "map": row.map,
                "theirs": row.published,
                "of_table": row.method,
            }
            for row in frame.itertuples()
        ]
    except OSError as error:
        raise InputError(f"{path} is not readable ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a table1.csv, table2.csv or table3.csv ({one_line(error)})") from error


def compare(runs: list[dict]) -> "pd.DataFrame":
    """The published numbers, and beside each what we have. Rows of our tables stand beside what the paper has for their
    method (`theirs`), if anything, and but for the full method beside none of the release."""
    import pandas as pd

    frame = pd.DataFrame(runs, columns=["experiment", "setting", "map", "theirs", "of_table"])
    grouped = frame.groupby(["experiment", "setting"])
    ours = grouped["map"].agg(["count", "mean", "min", "max"]).add_prefix("ours_")
    ours[["theirs", "of_table"]] = grouped[["theirs", "of_table"]].first()
    table = published_maps().reset_index().merge(ours.reset_index(), on="experiment", how="left")
    theirs, of_table = table.pop("theirs"), table.pop("of_table")
    table["paper"] = theirs.where(of_table.notna(), table["paper"])
    other = of_table.notna() & ~of_table.isin([published.OURS, "MeCoQ (full)"])
    table.loc[other, ["release_mean", "release_min", "release_max"]] = None
    table["minus_paper"] = table["ours_mean"] - table["paper"]
    table["minus_release"] = table["ours_mean"] - table["release_mean"]
    return table


def markdown(table: "pd.DataFrame") -> str:
    """The comparison as a Markdown table."""
    import pandas as pd

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


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--output", type=Path, nargs="+", default=[Path()], help="of the runs (default: this folder)")
    add("--logs", type=Path, nargs="+", default=[], help="log files, of the release or ours")
    add("--tables", type=Path, nargs="+", default=[], help="table1.csv, table2.csv or table3.csv")
    add("--dry_run", action="store_true", help="check the flags, print what would be read and written")
    return parser


def main(argv: list[str] | None = None) -> None:
    own = build_parser().parse_args(argv)
    need("tabulate")
    folder = own.output[0] / "checkpoints"
    outputs = {output.resolve(): output for output in own.output}.values()  # each once
    if own.dry_run:
        sources = [*(output / "checkpoints/*/metrics.json" for output in outputs), *own.logs, *own.tables]
        print(f"would read {', '.join(map(str, sources))} and write {folder}/compare_published.md and .csv")
        return
    check_writable(folder)
    paths = [path for output in outputs for path in sorted(output.glob("checkpoints/*/metrics.json"))]
    runs = [run for run in map(read_run, paths) if run] + [read_log(path) for path in own.logs]
    runs += [run for path in own.tables for run in read_table(path)]
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
