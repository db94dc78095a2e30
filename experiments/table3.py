#!/usr/bin/env python3
"""Table 3: what negatives cost, from larger batches or from the memory. Seconds an epoch, peak memory, and MAP.

python -m experiments.table3 --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. Time and memory are those of training on images, views and backbone included, over --steps steps
with all negatives in use, scaled to an epoch; peak memory is the GPU's, or what the process on a CPU holds besides data
and network. Nothing else should run meanwhile. Writes table3.csv, a row each training, and table3.md, and skips what is
done.
"""

import sys
from functools import partial

from experiments import published, sweep
from experiments.profiling import profile
from results import device_name
from utils import InputError, progress_bar, run_script

SIZES = ((128, 0), (256, 0), (128, 128), (128, 384), (128, 896))  # batch, memory
NOTE = "{} bits; the paper's numbers are of CIFAR10-I, 32 bits, VGG16 on a GPU"
PUBLISHED = ("CIFAR10-I", 32)  # what the paper's table is of


def called(batch: int, memory: int) -> str:
    return f"batch {batch}, memory {memory}"


def variant(batch: int, memory: int) -> dict[str, object]:
    return {"batch_size": batch} | ({"queue_size": memory} if memory else {"memory": "none"})


def negatives(batch: int, memory: int) -> int:
    """Of a query: all other views of the batch but its positive, and the memory. (The paper counts N, not 2N - 2.)"""
    return 2 * batch - 2 + memory


def published_row(batch: int, memory: int) -> "sweep.pd.Series":
    return published.read("paper_table3_profile").set_index(["batch_size", "memory_size"]).loc[str(batch), str(memory)]


def published_map(method: str, dataset: str, bits: int) -> float | None:
    """The paper's table is of one data set and code length."""
    sizes = {called(*size): size for size in SIZES}[method]
    return float(published_row(*sizes)["map"]) if (dataset, bits) == PUBLISHED else None


def table(frame: "sweep.pd.DataFrame", dataset: str, bits: int) -> "sweep.pd.DataFrame":
    """A row each pair of sizes, ours and the paper's."""
    rows = []
    by_method = frame[(frame["dataset"] == dataset) & (frame["bits"] == bits)].groupby("method")
    for size in SIZES:
        part, paper = by_method.get_group(called(*size)), published_row(*size)
        rows.append({
            "batch": size[0], "memory": size[1], "negatives": negatives(*size), "MAP": sweep.spread(part["map"]),
            "s an epoch": part["seconds_per_epoch"].iloc[0], "peak MiB": part["peak_mib"].iloc[0],
            "paper: MAP": paper["map"], "paper: s": paper["seconds_per_epoch"], "paper: MB": paper["gpu_memory_mb"],
        })  # fmt: skip
    return sweep.pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    parser = sweep.build_parser(__doc__, bits=[32])
    parser.add_argument("--steps", type=int, default=20, help="that are timed (default: %(default)s)")
    own, flags = sweep.parse(parser, argv)
    if own.steps < 1:
        raise InputError("--steps must be at least 1")
    plan = sweep.plan(own, flags, {called(*size): variant(*size) for size in SIZES})
    frame = sweep.run_cells(plan, own)
    costs = {}
    for labels, args in progress_bar([entry for entry in plan if entry[0]["seed"] == own.seeds[0]], "timing"):
        key = {"profile": own.steps, "device": device_name(args.device)} | vars(args)
        result = sweep.kept(own.cells, key, partial(profile, args, own.steps))
        costs[labels["dataset"], labels["bits"], labels["method"]] = result
    for name in ("seconds_per_epoch", "peak_mib"):
        labels = frame[["dataset", "bits", "method"]].itertuples(index=False, name=None)
        frame[name] = [costs[label][name] for label in labels]
    frame["published"] = [published_map(*row) for row in frame[["method", "dataset", "bits"]].to_numpy()]
    sweep.write_csv(own.results / "table3.csv", frame.drop(columns="result"))
    parts = [
        part for dataset in own.datasets for bits in own.bits
        for part in (sweep.heading(frame, dataset), NOTE.format(bits), table(frame, dataset, bits))
    ]  # fmt: skip
    sweep.write_markdown(own.results / "table3.md", *parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
