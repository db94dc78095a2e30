#!/usr/bin/env python3
"""Table 3: what negatives cost, from larger batches or from the memory. Seconds per epoch, peak memory, and MAP.

python -m experiments.table3 --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. Time and memory are those of training on images, views and backbone included, over --steps steps
with all negatives in use, scaled to an epoch; peak memory is the GPU's, or what the process on a CPU holds besides data
and network. Nothing else should run meanwhile. Writes table3.csv, a row per training, and table3.md, and skips what is
done.
"""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import config
from experiments import flags, published, tables
from experiments.flags import Trial
from utils import InputError, progress_bar, run_script

if TYPE_CHECKING:
    import pandas as pd

SIZES = ((128, 0), (256, 0), (128, 128), (128, 384), (128, 896))  # batch, memory
NOTE = "{} bits; the paper's numbers are of CIFAR10-I, 32 bits, VGG16 on a GPU"
PUBLISHED = ("CIFAR10-I", 32)  # what the paper's table is of
PROFILE = 2  # to be raised if profiling measures otherwise


def called(batch: int, memory: int) -> str:
    return f"batch {batch}, memory {memory}"


def variant(batch: int, memory: int) -> dict[str, object]:
    return {"batch_size": batch} | ({"queue_size": memory} if memory else {"memory": "none"})


def negatives(batch: int, memory: int) -> int:
    """Negatives of a query: all other views of the batch but its positive, and the memory. (The paper counts N, not
    2N - 2.)"""
    return 2 * batch - 2 + memory


def published_row(batch: int, memory: int) -> dict[str, str]:
    size = {"batch_size": str(batch), "memory_size": str(memory)}
    return next(row for row in published.rows("paper_table3_profile") if size.items() <= row.items())


def published_map(method: str, dataset: str, bits: int) -> float | None:
    """MAP in the paper's table, which is of one data set and code length."""
    sizes = {called(*size): size for size in SIZES}[method]
    return float(published_row(*sizes)["map"]) if (dataset, bits) == PUBLISHED else None


def table(frame: "pd.DataFrame", dataset: str, bits: int) -> "pd.DataFrame":
    """A row per pair of sizes, ours and the paper's."""
    import pandas as pd

    rows = []
    by_method = frame[(frame["dataset"] == dataset) & (frame["bits"] == bits)].groupby("method")
    for size in SIZES:
        part, paper = by_method.get_group(called(*size)), published_row(*size)
        rows.append({
            "batch": size[0], "memory": size[1], "negatives": negatives(*size), "MAP": tables.spread(part["map"]),
            "s per epoch": part["seconds_per_epoch"].iloc[0], "peak MiB": part["peak_mib"].iloc[0],
            "paper: MAP": paper["map"], "paper: s": paper["seconds_per_epoch"], "paper: MB": paper["gpu_memory_mb"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def costs(trials: list[Trial], own: Namespace) -> dict[tuple, dict[str, float]]:
    """What trials of the first seed cost, by data set, bits and method; see `profiling.profile`."""
    from distributed import device_name
    from experiments import sweep
    from experiments.profiling import profile

    measured = {}
    for trial in progress_bar([trial for trial in trials if trial.labels["seed"] == own.seeds[0]], "profiling"):
        key = {"format": PROFILE, "profile": own.steps, **config.key(trial.config), **config.key(trial.config, "speed")}
        key |= {"device": device_name(trial.config.device)}
        name = tuple(trial.labels[column] for column in ("dataset", "bits", "method"))
        configuration = trial.config
        measured[name] = sweep.kept(own.trials, key, lambda c=configuration: profile(c, own.steps))
    return measured


def main(argv: list[str] | None = None) -> None:
    parser = flags.build_parser(__doc__, bits=(32,))
    parser.add_argument("--steps", type=int, default=20, help="that are timed (default: %(default)s)")
    own, given = flags.parse(parser, argv, "tabulate")
    if own.steps < 1:
        raise InputError("--steps must be at least 1")
    trials = flags.plan(own, given, {called(*size): variant(*size) for size in SIZES})
    if own.dry_run:
        flags.announce(trials, f"those of seed {own.seeds[0]} are timed too, for {own.steps} steps each")
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    measured = costs(trials, own)
    for name in ("seconds_per_epoch", "peak_mib"):
        labels = frame[["dataset", "bits", "method"]].itertuples(index=False, name=None)
        frame[name] = [measured[label][name] for label in labels]
    frame["published"] = [published_map(*row) for row in frame[["method", "dataset", "bits"]].to_numpy()]
    tables.write_csv(own.results / "table3.csv", frame)
    parts = [
        part for dataset in own.datasets for bits in own.bits
        for part in (tables.heading(frame, dataset), NOTE.format(bits), table(frame, dataset, bits))
    ]  # fmt: skip
    tables.write_markdown(own.results / "table3.md", parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
