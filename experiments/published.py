"""What the authors published: their tables, logs and flags, read from `docs/published`. Imports neither PyTorch nor
pandas."""

import csv
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "published"
BITS = (16, 32, 64)
# data set and protocol -> what the scripts call it, what the paper's tables call it
NAMES = {
    ("Flickr25K", ""): ("Flickr", "Flickr25K"),
    ("CIFAR10", "I"): ("CifarI", "CIFAR10-I"),
    ("CIFAR10", "II"): ("CifarII", "CIFAR10-II"),
    ("NUSWIDE", ""): ("Nuswide", "NUSWIDE"),
}
OURS = "MeCoQ (Ours)"  # the method's name in Table 1


@cache
def rows(name: str) -> list[dict[str, str]]:
    """A file of `docs/published`: its rows, column -> text."""
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(name: str) -> "pd.DataFrame":
    """The same as a table, every field as text."""
    import pandas as pd

    return pd.DataFrame(rows(name))


def script_flags(experiment: str) -> list[str]:
    """The flags of an experiment's script ("CifarII32bits"), but for its notes; none if it has no script."""
    for row in rows("run_configs"):
        if row["notes"] == experiment:
            values = {flag: value for flag, value in row.items() if flag not in ("script", "notes")}
            symmetric = ["--symmetric_distance"] if values.pop("symmetric_distance") == "1" else []
            return [part for flag, value in values.items() if value for part in (f"--{flag}", value)] + symmetric
    return []


def experiment(config: dict, bits: int) -> tuple[str, str]:
    """The name that the authors' logs have for a run's data set, code length and search ("CifarII32bitsSymm"), and that
    of its data set in the paper's tables; the latter is empty if nothing was published for it.

    Args:
        config: the run's flags.
    """
    if config.get("method", "MeCoQ") != "MeCoQ":
        return "", ""
    dataset, protocol = config["dataset"], config["protocol"]
    short, long = NAMES.get((dataset, protocol)) or NAMES.get((dataset, ""), ("", ""))
    return f"{short}{bits}bits{'Symm' if config['symmetric_distance'] else ''}", long


def map_of(table: str, row: str, dataset: str, bits: int) -> float | None:
    """MAP in percent from Table 1 ("paper_table1_map") or 2 ("paper_table2_ablation_map"); None if it has none.

    Args:
        row: the method or variant, as the file calls it.
        dataset: as the paper's tables call it, "CIFAR10-II".
    """
    for fields in rows(table):
        name, *_ = fields.values()
        if name == row:
            value = fields.get(f"{dataset}/{bits}")
            return float(value) if value else None
    return None


DATASETS = {"CIFAR10": "CIFAR-10", "Flickr25K": "Flickr25K", "NUSWIDE": "NUS-WIDE"}  # as reports call them


def reported(method: str, dataset: str, bits: int) -> list[tuple[str, str]]:
    """What is published or reported of another method, from `docs/published/<method>_paper.csv`: where it comes from,
    and MAP in percent.

    Args:
        dataset: as `--dataset` calls it.
    """
    if not (FOLDER / f"{method.lower()}_paper.csv").exists():
        return []
    chosen = [row for row in rows(f"{method.lower()}_paper")
              if (row["dataset"], row["bits"]) == (DATASETS.get(dataset), str(bits))]  # fmt: skip
    return [
        (f"{row['method']}, {row['metric']}, {row['protocol']} ({row['source']})", f"{100 * float(row['value']):.2f}")
        for row in chosen
    ]
