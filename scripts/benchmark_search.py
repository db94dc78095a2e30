#!/usr/bin/env python3
"""Benchmark of search by codes: the project's own scores and top-k against faiss, flat and with inverted lists.

python scripts/benchmark_search.py checkpoints/mine [--images 1000000] [--repeats 5]

The codes are made from the embeddings of the run's database, drawn with replacement, with normal noise of --noise
standard deviations per dimension, quantized by the model's own rule; queries are those of the run. Its images must be
where they were when it was trained. Prints, for the 100 best images of each query, medians of queries per second, their
ratio to ours before faiss, recall against the flat index, and what the indexes take to build, to keep and to open.
"""

import argparse
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, Parser, run_script

if TYPE_CHECKING:
    import numpy as np

    from methods.base import Method

BEST = 100
NPROBES = (16, 64)
AT_ONCE = 2**26  # scores of the plain side, with which it is fastest


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a trained model, checkpoints/NAME")
    add("--images", type=int, default=1_000_000, help="codes to search (default: %(default)s)")
    add("--noise", type=float, default=0.3, help="in standard deviations of the embeddings (default: %(default)s)")
    add("--queries", type=int, default=200, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, help="(default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be timed")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Raises InputError."""
    args = build_parser().parse_args(argv)
    for name, most in (("images", 10**9), ("queries", 10**5), ("repeats", 1000)):
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 1 to {most}")
    if not 0 <= args.noise <= 100:
        raise InputError(f"--noise {args.noise:g}: must be from 0 to 100")
    return args


def synthetic(args: Namespace) -> tuple["Method", "np.ndarray", "np.ndarray"]:
    """The method, codes `[images, M]`, and what its `tables` take of the queries. Raises InputError if the run's images
    cannot be had."""
    import torch

    import engine
    import evaluation
    from search.encoder import read_config

    model = args.run / "model.cpt"
    configuration = read_config(args.run).replace(device="cpu", test_only=True, checkpoint=str(model), compile=False)
    splits, method = engine.build(configuration)
    features = engine.build_features(configuration, method.backbone, splits.tested)
    z = evaluation.encode(method, features["database"], lambda z: z, "embed database")
    queries = evaluation.encode_queries(method, features["query"])
    generator = torch.Generator().manual_seed(0)
    spread, parts = args.noise * z.std(dim=0), []
    with torch.inference_mode():
        for start in range(0, args.images, 2**16):
            chosen = torch.randint(len(z), (min(2**16, args.images - start),), generator=generator)
            noise = torch.randn(len(chosen), z.shape[1], generator=generator)
            parts.append(method.codes(z[chosen] + spread * noise))
    order = torch.randperm(len(queries), generator=generator)[: args.queries]
    return method, torch.cat(parts).numpy(), queries[order].numpy()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident() -> float:
    """Memory of this process, MB."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1e3


def plain(method: "Method", codes: "np.ndarray", queries: "np.ndarray") -> None:
    """The project's own search: tables, `aqs_scores` and the best scores."""
    import torch

    import retrieval

    database = torch.from_numpy(codes)
    with torch.inference_mode():
        for part in torch.from_numpy(queries).split(max(1, AT_ONCE // len(codes))):
            retrieval.aqs_scores(method.tables(part), database).topk(min(BEST, len(codes)))


def timed(args: Namespace) -> None:
    """Time all sides in turns and print what was measured."""
    import faiss
    import torch

    from search import ann

    method, codes, queries = synthetic(args)
    with torch.inference_mode():
        vectors = method.vectors(torch.from_numpy(queries)).numpy()
        codewords = method.codewords_for_search().numpy()
    print(f"{len(codes)} codes of {codes.shape[1]} numbers, K {codewords.shape[1]}; {len(queries)} queries, "
          f"{BEST} best each; {torch.get_num_threads()} threads, medians of {args.repeats}")  # fmt: skip
    lists = ann.nlist_for(len(codes))
    sides = {"aqs_scores + top-k": lambda: plain(method, codes, queries)}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in (("flat", lambda: ann.build_flat(codewords, codes)),
                            (f"ivf{lists}", lambda: ann.build_ivf(codewords, codes, lists))):  # fmt: skip
            path = Path(folder) / name
            spent = seconds(lambda build=build, path=path: ann.write(build(), path))
            before = resident()
            index = ann.open_mapped(path)
            print(f"{name}: built and written in {spent:.1f} s, {path.stat().st_size / 1e6:.1f} MB; opening adds "
                  f"{resident() - before:.1f} MB")  # fmt: skip
            for nprobe in NPROBES if isinstance(index, faiss.IndexIVF) else (0,):
                label = f"{name}, nprobe {nprobe}" if nprobe else name
                sides[label] = lambda index=index, nprobe=nprobe: ann.search(index, vectors, BEST, nprobe)
        report(sides, args.repeats, len(queries))


def report(sides: dict[str, Callable], repeats: int, queries: int) -> None:
    """Time each side `repeats` times, in turns, and print a line for each."""
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = sides["flat"]()[0]
    for name, median in medians.items():
        recall = ""
        if name not in ("flat", next(iter(sides))):
            recall = f", recall@{BEST} {(sides[name]()[0] >= best[:, -1:] - 1e-6).mean():.4f}"
        ratios = ", ".join(f"{medians[other] / median:.2f} x {other}" for other in list(sides)[:2] if other != name)
        print(f"{name:<20} {queries / median:9.1f} queries/s: {ratios}{recall}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.dry_run:
        print(f"would search {args.images} codes like those of {args.run} for {args.queries} queries, {args.repeats} "
              "times")  # fmt: skip
        return
    timed(args)


if __name__ == "__main__":
    sys.exit(run_script(main))
