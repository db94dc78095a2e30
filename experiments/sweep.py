"""How is a table made? Of cells: each is one training, made once, kept under its flags, and shared by all tables."""

import hashlib
import json
import math
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import data
import engine
import main as program
from checkpoint import MOVABLE, fingerprint, read_state
from experiments import published
from experiments.callbacks import Look, Watched
from experiments.published import pd
from experiments.view_cache import BankedViews, KnownFeatures, build_bank, can_bank
from feature_cache import test_features
from results import Files
from utils import (
    LOG,
    InputError,
    Parser,
    RunError,
    atomic_write,
    check_writable,
    locked,
    one_line,
    progress_bar,
    seed_everything,
    write_json,
)

# what the paper's tables call a data set -> flags where it has no script
DATASETS = {long: [] for _, long in published.NAMES.values()} | {"Digits": ["--dataset", "Digits"]}
FORMAT = 1  # of a cell: to be raised where the same flags give another result
UNTOLD = MOVABLE | {"weights", "vgg_model_path", "recipe"}  # recipe has a column of its own
REFUSED = ("dry_run", "test_only", "resume", "overwrite", "notes", "output", "symmetric_distance")


# ---------------------------------------------------------------- what is asked for


def build_parser(doc: str, bits: Iterable[int] = published.BITS) -> Parser:
    """The flags that all tables and figures have; those that it does not know are `main.py`'s."""
    parser = Parser(description=doc.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=sorted(DATASETS), default=["CIFAR10-II"], help="(default: %(default)s)")
    add("--bits", type=int, nargs="+", choices=published.BITS, default=list(bits), help="(default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[2021, 2022, 2023], help="(default: %(default)s)")
    add("--results", type=Path, default=Path("docs/results"), help="tables and figures (default: %(default)s)")
    add("--cells", type=Path, default=Path(".cache/cells"), help="what is done (default: %(default)s)")
    add("--bank", type=Path, default=Path(".cache/views"), help="features of views (default: %(default)s)")
    return parser


def parse(parser: ArgumentParser, argv: list[str] | None, figure: bool = False) -> tuple[Namespace, list[str]]:
    """A script's own flags, and those for `main.py`. Raises InputError where they do not go together."""
    published.need_pandas()
    if figure:
        published.need_matplotlib()
    own, flags = parser.parse_known_args(argv)
    own.datasets, own.seeds, own.bits = (list(dict.fromkeys(x)) for x in (own.datasets, own.seeds, own.bits))
    own.bits.sort()
    given = program.build_parser().parse_args(flags)
    for flag in REFUSED:
        if getattr(given, flag) not in (None, False, "."):
            raise InputError(f"--{flag} has no place here: this script makes many runs")
    for flag in flags:
        if flag.partition("=")[0] in ("--dataset", "--protocol", "--protocal", "--M", "--K", "--seed"):
            raise InputError(f"{flag}: --datasets, --bits and --seeds say it here")
    if given.epoch_num < 1:
        raise InputError("--epoch_num must be at least 1 here")
    program.take_device(options(own.datasets[0], own.bits[0], own.seeds[0], flags))
    for folder in (own.results, own.cells):
        check_writable(folder)
    return own, flags


def options(dataset: str, bits: int, seed: int, flags: list[str], **change: object) -> Namespace:
    """The flags of one run, resolved: those of the published script for this data set and code length, but for the
    entropy term, which the paper does not have; then those given; then `change`."""
    args = parsed(dataset, bits, flags)
    args.seed, args.notes = seed, "cell"
    vars(args).update(change)
    if args.memory == "none":
        args.queue_begin_epoch = -1
    args = program.resolve(args)
    del args.resume, args.overwrite  # they are not what the run is
    return args


def parsed(dataset: str, bits: int, flags: list[str]) -> Namespace:
    """Those of the published script, and those given, as `main.py` reads them."""
    short = {long: short for short, long in published.NAMES.values()}.get(dataset)
    script = published.script_flags(f"{short}{bits}bits") or DATASETS[dataset] + ["--M", str(bits // 8)]
    parser = program.build_parser()
    args, given = parser.parse_args([*script, *flags]), parser.parse_args(flags)
    if given.recipe == "paper":
        args.hp_lambda = given.hp_lambda
    return args


def departures(dataset: str, bits: int, flags: list[str]) -> str:
    """What is not as in the published script: a training's flags in a table, beside its method."""
    given, script = vars(parsed(dataset, bits, flags)), vars(parsed(dataset, bits, []))
    return ", ".join(f"{flag}={value}" for flag, value in given.items() if flag not in UNTOLD and value != script[flag])


def label(method: str, dataset: str, bits: int, seed: int, flags: list[str]) -> dict[str, object]:
    """What a cell is called in a table: column -> value."""
    told = departures(dataset, bits, flags)
    return {"method": method, "dataset": dataset, "bits": bits, "seed": seed, "flags": told}


def plan(own: Namespace, flags: list[str], methods: dict[str, dict]) -> list[tuple[dict, Namespace]]:
    """A cell each for all data sets, seeds, code lengths and methods, which are called by their names and differ in
    some flags; see `run_cells`."""
    return [
        (label(name, dataset, bits, seed, flags), options(dataset, bits, seed, flags, **change))
        for dataset in own.datasets for seed in own.seeds for bits in own.bits for name, change in methods.items()
    ]  # fmt: skip


# ---------------------------------------------------------------- one cell


class Ground:
    """What the cells of one data set and seed share: images, the features of those that are not augmented, by split
    and as `features.test_features` gives them, and where the features of views are kept."""

    def __init__(self, args: Namespace, bank: Path) -> None:
        self.splits, model = program.build(args)
        self.backbone, self.bank = model.backbone.eval(), bank
        self.features = test_features(self.backbone, self.splits, args, ("train", "query", "database"))
        self.fingerprint = fingerprint(self.splits, self.backbone)
        self.views: dict[int, Path] = {}

    def banked_views(self, args: Namespace) -> Path:
        """The folder with the features of the views of `--epoch_num` epochs, computed once."""
        if args.epoch_num not in self.views:
            self.views[args.epoch_num] = build_bank(self.bank, self.splits, self.backbone, args)
        return self.views[args.epoch_num]

    def images(self, n: int) -> Tensor:
        """The features of n training images at most, evenly spread, `[n, ...]` float32."""
        chosen = torch.linspace(0, len(self.splits.train) - 1, min(n, len(self.splits.train))).long()
        picked, start = [], 0
        for batch in self.features["train"]:
            picked.append(batch[chosen[(chosen >= start) & (chosen < start + len(batch))] - start].float())
            start += len(batch)
        return torch.cat(picked)


# flags that the ground depends on
GROUND = (
    "dataset", "protocol", "seed", "limit", "skip_bad_images", "backbone", "weights", "trainable_layer_num",
    "image_size", "precision", "compile", "device",
)  # fmt: skip


class Grounds:
    """The last ground that was asked for: cells come ordered by data set and seed."""

    def __init__(self, bank: Path) -> None:
        self.bank, self.key, self.last = bank, None, None

    def of(self, args: Namespace) -> Ground:
        key = [getattr(args, flag) for flag in GROUND]
        if key != self.key:
            self.last = None  # its memory is wanted
            self.key, self.last = key, Ground(args, self.bank)
        return self.last


def train(args: Namespace, ground: Ground, folder: Path, look: Look | None = None) -> dict:
    """Train one model; returns its best validation `map` (a fraction), `history`, and the `seconds` it took.

    Where nothing in front of the projection learns, it trains on the bank's features, which are those of the views that
    `main.py` would draw. What is interrupted goes on at the last epoch that was saved, unless it is looked at.
    """
    seed_everything(args.seed)
    model = program.build_model(args)
    if can_bank(model.backbone):
        loader = BankedViews(ground.banked_views(args), len(ground.splits.train), args)
        model.backbone = KnownFeatures(model.backbone.dim)
    else:
        loader = data.train_loader(ground.splits, args)
    files = Files(folder, args.notes)
    files.checkpoints.mkdir(parents=True, exist_ok=True)
    training = engine.start(model, loader, args, None if look else files.last, ground.fingerprint)
    if training.path and files.last.exists():
        training.restore(state_of(files, args))
    watched = Watched(loader, model, look) if look else loader

    def validation() -> float:
        return engine.validate(model, ground.features, ground.splits, args)

    stopwatch = engine.Stopwatch()
    stopwatch.seconds = training.seconds
    engine.train(training, watched, validation, args, files, stopwatch)
    best = max(epoch["val_mAP"] for epoch in training.history if "val_mAP" in epoch)
    return {"map": best, "history": training.history, "seconds": sum(stopwatch.seconds.values())}


def state_of(files: Files, args: Namespace) -> dict:
    try:
        return read_state(files.last, args)
    except InputError as error:
        raise InputError(f"{one_line(error)}; or remove {files.checkpoints}") from error


def cell(args: Namespace, grounds: Grounds, folder: Path, watch: type[Look] | None = None) -> dict:
    """`train`, unless that was done before on the same images with the same weights and flags, whichever table it was
    for; the result is kept in `folder`. A training that fails, by a loss that is no number, has `error` and no `map`.

    Args:
        watch: what looks at the model meanwhile, of `watch.py`; its `rows` are kept too. There is no early stop then.
    """
    program.take_device(args)
    if watch:
        args.monitor_counter = args.epoch_num
    ground = grounds.of(args)
    config = {flag: value for flag, value in vars(args).items() if flag not in MOVABLE}
    key = config | {"sha256": ground.fingerprint, "watch": watch.__name__ if watch else None}
    args.notes = name_of(key)

    def compute() -> dict:
        look = watch(ground.images(watch.IMAGES), args) if watch else None
        try:
            result = train(args, ground, folder, look)
        except RunError as error:
            if not isinstance(error.__cause__, RunError):  # a disk or a worker failed, not the training
                raise
            return {"map": None, "history": [], "rows": [], "error": one_line(error)}
        return result | ({"rows": look.rows} if look else {})

    result = kept(folder, key, compute)
    shutil.rmtree(Files(folder, args.notes).checkpoints, ignore_errors=True)
    return result | {"canonical_data": ground.splits.canonical}


def name_of(key: dict) -> str:
    return hashlib.sha256(json.dumps({"format": FORMAT} | key, sort_keys=True).encode()).hexdigest()[:16]


def kept(folder: Path, key: dict, compute: Callable[[], dict]) -> dict:
    """What is in `folder` under the name of `key`; else what `compute` gives, which is kept with the `seconds` it took
    and the key as its `config`. Raises InputError where the file is damaged."""
    path = folder / f"{name_of(key)}.json"
    if not path.exists():
        busy = f"waiting for another process, which makes {path}"
        with locked(path.with_suffix(".lock"), busy, wait=True):
            if not path.exists():
                start = time.perf_counter()
                result = compute()
                write_json(path, {"seconds": time.perf_counter() - start} | result | {"config": key})
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.get("config") == json.loads(json.dumps(key)):
            return result
        fault = "it is of another key"
    except (ValueError, RecursionError, OSError) as error:
        fault = one_line(error)
    raise InputError(f"{path} is damaged ({fault}): remove it to have it made again")


# ---------------------------------------------------------------- all cells, and what becomes of them


def run_cells(plan: list[tuple[dict, Namespace]], own: Namespace, watch: type[Look] | None = None) -> "pd.DataFrame":
    """All cells of a plan, in the order of their seeds: a row each, with its labels, `map` in percent, `seconds`,
    recipe, backbone, whether the images are the published ones, and `result`, what `cell` gives.

    Args:
        plan: what a cell is called in the table (column -> value), and its flags.
    """
    grounds = Grounds(own.bank)
    plan = sorted(plan, key=lambda entry: (entry[1].dataset, entry[1].protocol, entry[1].seed))
    rows = []
    bar = progress_bar(plan, "cells")
    for labels, args in bar:
        with program.naming_lack_of_memory():
            result = cell(args, grounds, own.cells, watch)
        if "error" in result:
            LOG.warning("WARNING: %s: %s", labels, result["error"])
        value = math.nan if result["map"] is None else 100 * result["map"]
        where = {"recipe": args.recipe, "backbone": args.backbone, "canonical_data": result["canonical_data"]}
        rows.append(labels | {"map": value, "seconds": result["seconds"]} | where | {"result": result})
        shown = {name: labels[name] for name in ("method", "bits")}
        bar.set_postfix(shown | {"map": f"{value:.2f}"})
    return pd.DataFrame(rows)


def drops(frame: "pd.DataFrame", dataset: str, published_as: str | None = None) -> "pd.DataFrame":
    """A row each method: for each code length the mean over seeds with its lowest and highest, and the mean drop
    against the first one with the same seed, in points of MAP; beside it the published drop, from the table of that
    name."""
    names = list(dict.fromkeys(frame["method"]))
    columns = {"method": names}
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        by_seed = part.pivot_table(index="method", columns="seed", values="map").reindex(names)
        columns[f"{bits} bits"] = by_seed.apply(spread, axis=1).tolist()
        columns[f"{bits}: drop"] = (by_seed.loc[names[0]] - by_seed).mean(axis=1).tolist()
        if published_as:
            theirs = [published.map_of(published_as, name, dataset, bits) for name in names]
            columns[f"{bits}: published drop"] = [None if x is None else theirs[0] - x for x in theirs]
    return pd.DataFrame(columns)


def heading(frame: "pd.DataFrame", dataset: str) -> str:
    """What a table is of, and with which flags it was made."""
    told = "; ".join(dict.fromkeys(flags for flags in frame[frame["dataset"] == dataset]["flags"] if flags))
    return f"{dataset}, MAP in percent; {f'as published but for {told}' if told else 'flags as published'}"


def exploded(frame: "pd.DataFrame", rows: Callable[[dict], list[dict]]) -> "pd.DataFrame":
    """Each cell's labels with each of the `rows` that its result holds."""
    labels = frame[["method", "dataset", "bits", "seed", "flags"]].to_dict("records")
    pairs = zip(labels, frame["result"], strict=True)
    return pd.DataFrame([label | row for label, result in pairs for row in rows(result)])


def spread(values: "pd.Series") -> str:
    """Mean, and in brackets the lowest and the highest."""
    if len(values) < 2:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ({values.min():.2f}{' to ' if values.min() < 0 else '-'}{values.max():.2f})"


def write_csv(path: Path, frame: "pd.DataFrame") -> None:
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, float_format="%.6g")


def write_markdown(path: Path, *parts: "str | pd.DataFrame") -> None:
    """Paragraphs and tables; what is not there is left empty."""
    texts = [
        part
        if isinstance(part, str)
        else part.astype(object).where(part.notna(), "").to_markdown(index=False, floatfmt=".2f")
        for part in parts
    ]
    with atomic_write(path, "w") as file:
        file.write("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))
