"""Sweeps: trials, each one training, done once, kept under its key, and shared by all tables."""

import hashlib
import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import config
import engine
import evaluation
from checkpoint import fingerprint, read_state
from config import Config
from distributed import check_device, use_device
from experiments.callbacks import CALLBACKS
from experiments.flags import Trial
from experiments.view_cache import CachedViews, ViewCache, cache_key, can_cache, views_key
from methods.backbones import PassThrough
from results import Files
from utils import (
    LOG,
    InputError,
    NonFiniteError,
    RunError,
    check_writable,
    locked,
    naming_lack_of_memory,
    one_line,
    progress_bar,
    seed_everything,
    write_json,
)

FORMAT = 3  # to be raised if the same flags give another result, or results are kept otherwise


# ---------------------------------------------------------------- what trials share


class Shared:
    """What the trials of one data set and seed share: images, the features of those that are not augmented, by split,
    and the cache of features of views.

    Args:
        view_cache: folder of all view caches.
    """

    def __init__(self, configuration: Config, view_cache: Path) -> None:
        self.splits, method = engine.build(configuration)
        self.backbone = method.backbone.eval()
        self.features = engine.build_features(configuration, self.backbone, self.splits.all)
        self.fingerprint = fingerprint(self.splits, self.backbone)
        self.view_cache = ViewCache(view_cache, cache_key(configuration, self.fingerprint))

    def cached_views(self, configuration: Config) -> CachedViews:
        """The features of the views of `--epoch_num` epochs, from the cache, which is filled first."""
        n = len(self.splits.train)
        loader = engine.build_loader(configuration, self.splits)
        loader.batches.drop_last = False  # trials with other batches may need the last images
        self.view_cache.fill(configuration.epoch_num, loader, self.backbone, n)
        drop_last = configuration.drop_last
        return CachedViews(self.view_cache, n, configuration.batch_size, configuration.device, drop_last)

    def images(self, n: int) -> Tensor:
        """The features of n training images at most, evenly spread, `[n, ...]` float32."""
        chosen = torch.linspace(0, len(self.splits.train) - 1, min(n, len(self.splits.train))).long()
        picked, start = [], 0
        for batch in self.features["train"]:
            picked.append(batch[chosen[(chosen >= start) & (chosen < start + len(batch))] - start].float())
            start += len(batch)
        return torch.cat(picked)


class SharedBySeed:
    """The last `Shared` that was asked for: trials come ordered by data set and seed, and its memory is wanted."""

    def __init__(self, view_cache: Path) -> None:
        self.view_cache = view_cache
        self.key: dict | None = None
        self.last: Shared | None = None

    def of(self, configuration: Config) -> Shared:
        key = views_key(configuration)
        key |= {name: getattr(configuration, name) for name in ("weights", "trainable_layer_num", "device")}
        if key != self.key:
            self.last = None
            self.key, self.last = key, Shared(configuration, self.view_cache)
        return self.last


# ---------------------------------------------------------------- one trial


def train(configuration: Config, shared: Shared, folder: Path, callback: str | None = None) -> dict:
    """Train one model; returns its best validation `map` (a fraction), `history`, the `seconds` it took and, with a
    callback, its `rows`.

    If nothing in front of the projection learns, it trains on cached features, which are those of the views that
    `main.py` would draw. An interrupted training goes on at the last epoch that was saved, unless it has a callback.
    """
    seed_everything(configuration.seed)
    method = engine.build_method(configuration)
    if can_cache(method.backbone):
        loader = shared.cached_views(configuration)
        method.backbone = PassThrough(method.backbone.dim)
    else:
        loader = engine.build_loader(configuration, shared.splits)
    if configuration.normalize_features:
        method.centre_features(shared.features["train"])
    files = Files(folder, configuration.notes)
    files.checkpoints.mkdir(parents=True, exist_ok=True)
    callbacks = [CALLBACKS[callback](shared.images, configuration)] if callback else []
    path = None if callback else files.last
    training = engine.start(configuration, method, loader, path, shared.fingerprint, callbacks)
    if path and path.exists():
        training.restore(state_of(files, configuration))
    measured = evaluation.Measure(configuration.topK, configuration.ties)
    engine.train(
        training, loader, lambda: evaluation.validate(method, shared.features, shared.splits, measured), files.model
    )
    best = max(epoch["val_mAP"] for epoch in training.history if "val_mAP" in epoch)
    result = {"map": best, "history": training.history, "seconds": sum(training.stopwatch.seconds.values())}
    return result | ({"rows": callbacks[0].rows} if callbacks else {})


def state_of(files: Files, configuration: Config) -> dict:
    """The state in `last.cpt` of a trial. Raises InputError, saying what to remove, if it is damaged."""
    try:
        return read_state(files.last, configuration)
    except InputError as error:
        raise InputError(f"{one_line(error)}; or remove {files.checkpoints}") from error


def run_trial(configuration: Config, shared: SharedBySeed, folder: Path, callback: str | None = None) -> dict:
    """`train`, unless that was done before on the same images with the same weights and flags, whichever table it was
    for; the result is kept in `folder`. A training that fails, by a non-finite loss, has `error` and no `map`.

    Args:
        callback: one of `callbacks.CALLBACKS`; there is no early stop with it.
    """
    precision = use_device(configuration.device, configuration.precision)
    configuration = configuration.replace(precision=precision)
    if callback:
        configuration = configuration.replace(monitor_counter=configuration.epoch_num)
    its = shared.of(configuration)
    key = {"format": FORMAT, **config.key(configuration), "sha256": its.fingerprint, "callback": callback}
    configuration = configuration.replace(notes=name_of(key))

    def compute() -> dict:
        try:
            result = train(configuration, its, folder, callback)
        except RunError as error:
            if not isinstance(error.__cause__, NonFiniteError):  # a disk, a worker or an image failed, not the training
                raise
            result = {"map": None, "history": [], "rows": [], "error": one_line(error)}
        return result | {"config": config.recorded(configuration)}

    result = kept(folder, key, compute)
    shutil.rmtree(Files(folder, configuration.notes).checkpoints, ignore_errors=True)
    return result | {"canonical_data": its.splits.canonical}


# ---------------------------------------------------------------- kept results


def name_of(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def kept(folder: Path, key: dict, compute: Callable[[], dict]) -> dict:
    """The result in `folder` under the name of `key`; if there is none, what `compute` gives, with the `seconds` it
    took, which is kept with the key and a checksum. Raises InputError if the file is damaged."""
    path = folder / f"{name_of(key)}.json"
    if not path.exists():
        busy = f"waiting for another process, which makes {path}"
        with locked(path.with_suffix(".lock"), busy, wait=True):
            if not path.exists():
                start = time.perf_counter()
                result = compute()
                result = {"seconds": time.perf_counter() - start} | result
                write_json(path, {"key": key, "sha256": checksum(result), "result": result})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("key") != json.loads(json.dumps(key)):
            fault = "it is of another key"
        elif not isinstance(content.get("result"), dict) or content.get("sha256") != checksum(content["result"]):
            fault = "its content changed"
        else:
            return content["result"]
    except (ValueError, RecursionError, OSError) as error:
        fault = one_line(error)
    raise InputError(f"{path} is damaged ({fault}): remove it to have it made again")


def checksum(result: dict) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- all trials


def check(own: Namespace, device: str) -> None:
    """Raise InputError, before anything is computed, if the device is not there or a folder cannot be written."""
    check_device(device)
    for folder in (own.results, own.trials):
        check_writable(folder)


def run_trials(trials: list[Trial], own: Namespace, callback: str | None = None) -> pd.DataFrame:
    """All trials of a plan, in the order of their seeds: a row each, with its labels, `map` in percent, `seconds`,
    recipe, backbone, whether the images are the published ones, and `result`, see `run_trial`.

    Args:
        own: the flags of `flags.build_parser`.
    """
    check(own, trials[0].config.device)
    shared, rows = SharedBySeed(own.view_cache), []
    trials = sorted(trials, key=lambda trial: (trial.config.dataset, trial.config.protocol, trial.config.seed))
    bar = progress_bar(trials, "trials")
    for trial in bar:
        with naming_lack_of_memory():
            result = run_trial(trial.config, shared, own.trials, callback)
        if "error" in result:
            LOG.warning("WARNING: %s: %s", trial.labels, result["error"])
        value = math.nan if result["map"] is None else 100 * result["map"]
        columns = {"recipe": trial.config.recipe, "backbone": trial.config.backbone}
        columns |= {"canonical_data": result["canonical_data"]}
        rows.append(trial.labels | {"map": value, "seconds": result["seconds"]} | columns | {"result": result})
        bar.set_postfix({name: trial.labels[name] for name in ("method", "bits")} | {"map": f"{value:.2f}"})
    return pd.DataFrame(rows)
