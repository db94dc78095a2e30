"""What did the authors get, and with which flags? Their tables, read from `docs/published`."""

import importlib.util
from functools import cache
from pathlib import Path

try:
    import pandas as pd
    import tabulate  # noqa: F401, to_markdown needs it
except ImportError:
    pd = None

from utils import InputError

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


def need_pandas() -> None:
    """Raise InputError where pandas, which all tables are made with, is not installed."""
    if pd is None:
        raise InputError("pandas and tabulate are needed: pip install -r requirements-extra.txt")


def need_matplotlib() -> None:
    """Raise InputError where matplotlib, which draws, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is needed: pip install -r requirements-extra.txt")


@cache
def read(name: str) -> "pd.DataFrame":
    """A file of `docs/published`, every field as text."""
    return pd.read_csv(FOLDER / f"{name}.csv", dtype=str, keep_default_na=False)


def script_flags(experiment: str) -> list[str]:
    """The flags of an experiment's script ("CifarII32bits"), but for its notes; none where it has no script."""
    configs = read("run_configs").set_index("notes")
    if experiment not in configs.index:
        return []
    row = configs.loc[experiment].drop("script")
    symmetric = ["--symmetric_distance"] if row.pop("symmetric_distance") == "1" else []
    return [part for flag, value in row.items() if value for part in (f"--{flag}", value)] + symmetric


def experiment(config: dict, bits: int) -> tuple[str, str]:
    """What the authors' logs call a run's data set, code length and search ("CifarII32bitsSymm"), and what the paper's
    tables call its data set; the latter is empty where they have none of it.

    Args:
        config: the run's flags.
    """
    protocol = config["protocol"] if config["dataset"] == "CIFAR10" else ""
    short, long = NAMES.get((config["dataset"], protocol), ("", ""))
    return f"{short}{bits}bits{'Symm' if config['symmetric_distance'] else ''}", long


def map_of(table: str, row: str, dataset: str, bits: int) -> float | None:
    """MAP in percent from Table 1 ("paper_table1_map") or 2 ("paper_table2_ablation_map"); None where it has none.

    Args:
        row: the method or variant, as the file calls it.
        dataset: as the paper's tables call it, "CIFAR10-II".
    """
    frame = read(table).set_index(read(table).columns[0])
    column = f"{dataset}/{bits}"
    value = frame.loc[row, column] if row in frame.index and column in frame.columns else ""
    return float(value) if value else None
