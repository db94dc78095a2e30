"""The flags that all experiments share, and the trials that they describe. Imports neither PyTorch nor pandas.

Below the user's flags, which are `main.py`'s, stand those of the published script for the data set and code length.
"""

import argparse
import importlib.util
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import config
from config import Config
from data import DATASETS
from experiments import published
from methods import METHODS
from utils import InputError, Parser

# what the paper's tables call a data set -> its flags
NAMES = {
    long: ["--dataset", dataset, *(["--protocol", protocol] if protocol else [])]
    for (dataset, protocol), (_, long) in published.NAMES.items()
} | {f"CIFAR10-{name}": ["--dataset", "CIFAR10", "--protocol", name] for name in ("official", "CIBHash")}
NAMES |= {name: ["--dataset", name] for name, row in DATASETS.items()
          if name not in {dataset for dataset, _ in published.NAMES} and not (row.own or row.vectors)}  # fmt: skip
SHORT = {long: short for short, long in published.NAMES.values()}
REFUSED = ("test_only", "resume", "overwrite", "notes", "output", "symmetric_distance")  # a sweep makes many runs
# what --datasets, --bits and --seeds say
OWN = ("--dataset", "--protocol", "--protocal", "--M", "--K", "--code_length", "--seed")
# of the flags that all methods have, those that another method takes from MeCoQ's run, beside which it stands: images,
# features and views are the same, and so is how long it is trained and how it is tested
SAME = ("images", "features", "views", "weights", "place", "action")
TESTED_ALIKE = ("epoch_num", "topK", "ties", "eval_interval", "monitor_counter", "device", "num_workers")


@dataclass(frozen=True)
class Trial:
    """One training of a sweep: its labels in a table (column -> value) and its configuration."""

    labels: dict[str, object]
    config: Config


# ---------------------------------------------------------------- reading the command line


def build_parser(doc: str, bits: tuple[int, ...] = published.BITS) -> Parser:
    """The parser of the flags that all tables and figures have; `doc` is the help's text."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=sorted(NAMES), default=["CIFAR10-II"], help="(default: %(default)s)")
    add("--bits", type=int, nargs="+", choices=published.BITS, default=list(bits), help="(default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[2021, 2022, 2023], help="(default: %(default)s)")
    add("--results", type=Path, default=Path("docs/results"), help="tables and figures (default: %(default)s)")
    add("--trials", type=Path, default=Path(".cache/trials"), help="finished trainings (default: %(default)s)")
    add("--view_cache", type=Path, default=Path(".cache/views"), help="features of views (default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be trained, touch neither data nor "
        "device")  # fmt: skip
    return parser


def parse(
    parser: Parser, argv: list[str] | None, *packages: str, any_method: bool = False
) -> tuple[Namespace, list[str]]:
    """An experiment's own flags, and those for `main.py`, which `plan` checks further.

    Args:
        packages: those of requirements-extra.txt that it needs.
        any_method: whether it is of other methods than MeCoQ, too.

    Raises InputError if they do not go together or a package is missing.
    """
    need(*packages)
    own, flags = parser.parse_known_args(argv)
    own.datasets, own.seeds, own.bits = (list(dict.fromkeys(values)) for values in (own.datasets, own.seeds, own.bits))
    own.bits.sort()
    given = config.parse_flags(flags)
    for flag in REFUSED:
        if given.get(flag) not in (None, False, "."):
            raise InputError(f"--{flag} has no place here: this script makes many runs")
    for flag in flags:
        if flag.partition("=")[0] in OWN:
            raise InputError(f"{flag}: --datasets, --bits and --seeds say it here")
    if given["method"] != "MeCoQ" and not any_method:
        raise InputError(f"--method {given['method']}: the paper's tables and figures are MeCoQ's")
    if given["epoch_num"] == 0:
        raise InputError("--epoch_num must be at least 1 here")
    return own, flags


def need(*packages: str) -> None:
    """Raise InputError if a package, which not every user needs, is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is needed: pip install -r requirements-extra.txt")


# ---------------------------------------------------------------- flags -> trials


@cache
def script_values(dataset: str, bits: int, flags: tuple[str, ...]) -> dict[str, object]:
    """The flags of the published script, if the method has one, then those given, unresolved. MeCoQ's entropy term,
    which the paper does not have, is off in its recipe unless it is given."""
    given = config.parse_flags(list(flags))
    script = published.script_flags(f"{SHORT.get(dataset)}{bits}bits") if given["method"] == "MeCoQ" else []
    if not script:
        return config.parse_flags([*NAMES[dataset], *flags]) | METHODS[given["method"]].of_bits(bits)
    values = config.parse_flags([*script, *flags])
    if given["recipe"] == "paper":
        values["hp_lambda"] = given["hp_lambda"]
    return values


def configured(dataset: str, bits: int, seed: int, flags: list[str], **change: object) -> Config:
    """The configuration of one training: the published script's flags, those given, and then `change`. Raises
    InputError if they make no sense."""
    return config.resolve(script_values(dataset, bits, tuple(flags)) | {"seed": seed, "notes": "trial"} | change)


def beside(method: str, dataset: str, bits: int, seed: int, flags: list[str], **change: object) -> Config:
    """The configuration of another method's training beside MeCoQ's: the same images, features, views, epochs and
    tests, its own loss and optimiser, and then `change`; a recipe among it decides about the method only."""
    theirs, values = configured(dataset, bits, seed, flags), config.parse_flags(["--method", method])
    values |= {name: getattr(theirs, name) for name in shared()}
    return config.resolve(values | METHODS[method].of_bits(bits) | {"recipe": "paper", "notes": "trial"} | change)


def shared() -> list[str]:
    """The flags that another method beside MeCoQ takes from its run."""
    rows = [flag for table in config.FLAGS.values() for flag in table if flag.name != "vgg_model_path"]
    return [flag.name for flag in rows if flag.affects in SAME or flag.name in TESTED_ALIKE]


def departures(dataset: str, bits: int, flags: list[str], names: list[str] | None = None) -> str:
    """The flags that are not as in the published script, for a table; the recipe has a column of its own.

    Args:
        names: of the flags that count; None: all.
    """
    given = script_values(dataset, bits, tuple(flags))
    script = script_values(dataset, bits, ("--method", given["method"]))
    names = [name for name in told(given["method"]) if names is None or name in names]
    return ", ".join(f"{name}={given[name]}" for name in names if given[name] != script[name])


def told(method: str) -> list[str]:
    """The flags that change results, in a reader's order: data, backbone, the method's own, optimisation, test."""
    headings = list(config.FLAGS)
    start = headings.index("optimisation")
    groups = [config.FLAGS[heading] for heading in headings]
    tables = *groups[:start], *METHODS[method].flags.values(), *groups[start:]
    rows = [flag for table in tables for flag in table]
    return [flag.name for flag in rows if flag.affects in config.RESULTS and flag.name != "recipe"]


def labels(method: object, dataset: str, bits: int, seed: int, flags: list[str]) -> dict[str, object]:
    """A trial's labels in a table: column -> value."""
    changed = departures(dataset, bits, flags)
    return {"method": method, "dataset": dataset, "bits": bits, "seed": seed, "flags": changed}


def plan(own: Namespace, flags: list[str], methods: dict[object, dict]) -> list[Trial]:
    """A trial each for all data sets, seeds, code lengths and methods (name -> flags that it sets). Raises InputError
    if flags make no sense."""
    return [
        Trial(labels(name, dataset, bits, seed, flags), configured(dataset, bits, seed, flags, **change))
        for dataset in own.datasets for seed in own.seeds for bits in own.bits for name, change in methods.items()
    ]  # fmt: skip


def announce(trials: list[Trial], *notes: str) -> None:
    """Print what would be trained (`--dry_run`): the number of trials, then `notes`, then each trial's labels and the
    flags that are not at `main.py`'s defaults."""
    keys = [config.key(trial.config) for trial in trials]
    different = len({str(key) for key in keys})
    print(f"{len(trials)} trials, {different} of them different; what is finished already is not trained again")
    for note in notes:
        print(note)
    for trial, key in zip(trials, keys, strict=True):
        method = trial.labels["method"]
        place = ", ".join(f"{trial.labels[name]}" for name in ("dataset", "bits", "seed"))
        changed = " ".join(f"{name}={value}" for name, value in key.items())
        print(f"{method if isinstance(method, str) else ', '.join(method)}; {place}: {changed}")
