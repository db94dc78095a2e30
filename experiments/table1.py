#!/usr/bin/env python3
"""Table 1: MeCoQ beside CIBHash, SPQ's head and the shallow baselines, all on the same features, and exact search on
them as the ceiling.

python -m experiments.table1 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. CIBHash and SPQ's head are trained on the same views for as many epochs, each with its own loss and
optimiser, and validated as often. Shallow baselines see the training images' features without augmentation, centred and
of unit length, of the backbone with nothing trained. Writes table1.csv, a row per number, and table1.md, and skips what
is done.
"""

import sys
from argparse import Namespace
from functools import lru_cache
from typing import TYPE_CHECKING

import config
from config import Config
from experiments import flags, published, tables
from experiments.flags import Trial
from methods import BACKBONES
from utils import InputError, progress_bar, run_script

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from experiments.sweep import Shared

BASELINES = ("LSH", "SpeH", "SphH", "ITQ", "PQ", "OPQ")  # as Table 1 calls them, with "+VGG" behind
# rows of other methods: name -> method, its flags
OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "CIBHash": ("CIBHash", {}),
    "CIBHash, released": ("CIBHash", {"recipe": "release"}),
    "SPQ head": ("SPQ", {"head_only": True}),
    "SPQ head, released": ("SPQ", {"head_only": True, "recipe": "release"}),
}
EXACT = "exact search on the features"


def baseline_trials(own: Namespace, given: list[str]) -> list[Trial]:
    """A trial per baseline, and of exact search; ordered by data set and seed."""
    return [
        Trial(flags.labels(name, dataset, bits, seed, given),
              flags.configured(dataset, bits, seed, given, trainable_layer_num=0))
        for dataset in own.datasets for seed in own.seeds for bits in own.bits for name in (*BASELINES, EXACT)
    ]  # fmt: skip


def other_trials(own: Namespace, given: list[str]) -> list[Trial]:
    """A trial per other method."""

    def trial(name: str, dataset: str, bits: int, seed: int) -> Trial:
        method, change = OTHERS[name]
        changed = flags.departures(dataset, bits, given, flags.shared())
        labels = flags.labels(name, dataset, bits, seed, given) | {"flags": changed}
        return Trial(labels, flags.beside(method, dataset, bits, seed, given, **change))

    return [
        trial(name, dataset, bits, seed)
        for dataset in own.datasets for seed in own.seeds for bits in own.bits for name in OTHERS
    ]  # fmt: skip


def baseline_key(name: str, configuration: Config, fingerprint: str) -> dict[str, object]:
    """All that a baseline's MAP depends on. Code length does not matter to exact search."""
    from experiments import baselines

    return {
        "format": baselines.FORMAT,
        "baseline": name,
        "bits": None if name == EXACT else 8 * configuration.M,
        **config.key(configuration, "images", "features"),
        "topK": configuration.topK,
        "ties": configuration.ties,
        "sha256": fingerprint,
    }


@lru_cache(maxsize=1)
def prepared(shared: "Shared") -> "dict[str, np.ndarray]":
    """The features of images by split, as the baselines see them."""
    import torch

    from experiments import baselines

    arrays = {name: torch.cat([batch.float() for batch in batches]) for name, batches in shared.features.items()}
    return baselines.prepared({name: array.flatten(1).cpu().numpy() for name, array in arrays.items()})


def run_baseline(name: str, configuration: Config, shared: "Shared", own: Namespace) -> dict:
    """A baseline's MAP and seconds, kept beside the trainings'."""
    import torch

    from experiments import baselines, sweep
    from retrieval import Measure

    key = baseline_key(name, configuration, shared.fingerprint)

    def compute() -> dict:
        labels = [torch.from_numpy(images.labels) for images in (shared.splits.query, shared.splits.database)]
        method = "exact" if name == EXACT else name
        measured = Measure(key["topK"], key["ties"])
        value = baselines.method_map(method, prepared(shared), labels, key["bits"], configuration.seed, measured)
        return {"map": value}

    return sweep.kept(own.trials, key, compute)


def run_baselines(trials: list[Trial], own: Namespace) -> "pd.DataFrame":
    """All baselines: a row each, as `sweep.run_trials` gives them."""
    import pandas as pd

    from distributed import use_device
    from experiments import sweep

    shared, rows = sweep.SharedBySeed(own.view_cache), []
    for trial in progress_bar(trials, "baselines"):
        configuration = trial.config
        configuration = configuration.replace(precision=use_device(configuration.device, configuration.precision))
        its = shared.of(configuration)
        result = run_baseline(trial.labels["method"], configuration, its, own)
        rows.append(trial.labels | {"map": 100 * result["map"], "seconds": result["seconds"]})
        rows[-1] |= {"backbone": configuration.backbone, "canonical_data": its.splits.canonical}
    return pd.DataFrame(rows)


def table(frame: "pd.DataFrame", dataset: str) -> "pd.DataFrame":
    """A row per method: means over seeds with lowest and highest, and the published number, for each code length."""
    import pandas as pd

    columns = {"method": list(dict.fromkeys(frame["method"]))}
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        grouped = part.groupby("method")
        columns[f"{bits} bits"] = [tables.spread(grouped.get_group(name)["map"]) for name in columns["method"]]
        columns[f"{bits}: published, VGG16"] = [
            grouped.get_group(name)["published"].iloc[0] for name in columns["method"]
        ]
    return pd.DataFrame(columns)


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__), argv, "tabulate", "faiss")
    frozen, trials = baseline_trials(own, given), flags.plan(own, given, {published.OURS: {}})
    backbone = trials[0].config.backbone
    if not BACKBONES[backbone].pretrained:
        raise InputError(f"--backbone {backbone}: it has no frozen layers, whose features the baselines take")
    trials = other_trials(own, given) + trials
    if own.dry_run:
        flags.announce(trials, f"and {len(frozen)} baselines: {', '.join((*BASELINES, EXACT))}")
        return
    import pandas as pd

    from experiments import sweep

    sweep.check(own, trials[0].config.device)
    frame = run_baselines(frozen, own)
    prepared.cache_clear()  # its memory is wanted
    frame = pd.concat([frame, sweep.run_trials(trials, own).drop(columns="result")])
    theirs = {method: f"{method}+VGG" for method in BASELINES} | {published.OURS: published.OURS}
    theirs |= {name: name.removesuffix(", released") for name in OTHERS}
    frame["published"] = [
        published.map_of("paper_table1_map", theirs.get(method, ""), dataset, bits)
        for method, dataset, bits in frame[["method", "dataset", "bits"]].to_numpy()
    ]
    tables.write(own.results, "table1", frame, table)


if __name__ == "__main__":
    sys.exit(run_script(main))
