#!/usr/bin/env python3
"""How fast is it? Times this project and, in the same process, a plain version of what the release does (naive.py).

python scripts/benchmark.py {views, encode, step, evaluate, run} [--repeats 5] FLAGS

FLAGS are main.py's: data set, backbone, image size, device ... Prints the medians of both sides, their ratio, images a
second, and the share of what the hardware can do: of a matrix product measured here (encode, step), of a copy in memory
(evaluate). Writes benchmark_<what>.json into --results.

  views     both views of all training images
  encode    images to codes: nothing known before, and from the feature cache
  step      an optimisation step on views that are there already
  evaluate  --queries against --database random codes; the plain side ranks --plain_queries of them (its time a query
            does not depend on how many there are)
  run       a whole run of ours against --plain_epochs epochs of the plain side, whose time is then extrapolated
"""

import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import engine
import feature_cache
import main as program
import retrieval
from experiments import naive
from results import Files, device_name, versions
from utils import InputError, Parser, check_writable, logging_to, run_script, write_json


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes, the device's part of it included."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(ours: Callable, theirs: Callable, args: Namespace, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, taken in turns, after one round that does not count."""
    rounds = [(seconds(ours, args.device), seconds(theirs, args.device)) for _ in range(repeats + 1)]
    return tuple(list(side) for side in zip(*rounds[1:], strict=True))


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large matrix product: the median of five."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(6)]
    return 2 * n**3 / statistics.median(times[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy of 256 MB: the median of five."""
    a = torch.zeros(2**26, device=device)
    b = torch.empty_like(a)
    times = [seconds(lambda: b.copy_(a), device) for _ in range(6)]
    return 2 * a.nbytes / statistics.median(times[1:])


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def row(what: str, times: tuple[list[float], list[float]], images: int, plain_images: int | None = None) -> dict:
    """Medians a unit of work, images a second, and the ratio of both sides."""
    ours, theirs = (statistics.median(side) for side in times)
    rates = images / ours, (plain_images or images) / theirs
    return {
        "what": what,
        "ours_seconds": ours,
        "plain_seconds": theirs,
        "ours_per_second": rates[0],
        "plain_per_second": rates[1],
        "ratio": rates[0] / rates[1],
        "repeats": len(times[0]),
        "all_seconds": {"ours": times[0], "plain": times[1]},
    }


# ---------------------------------------------------------------- what is timed


def views(args: Namespace, options: Namespace) -> list[dict]:
    splits, _ = program.build(args)
    ours, theirs = data.train_loader(splits, args), naive.train_loader(splits, args)
    times = compare(lambda: [None for _ in ours], lambda: [None for _ in theirs], args, options.repeats)
    return [row(f"views at {args.image_size} px", times, 2 * len(splits.train))]


def encode(args: Namespace, options: Namespace) -> list[dict]:
    splits, model = program.build(args)
    images = splits.database
    peak = matmul_peak(torch.bfloat16 if args.precision == "bf16" else torch.float32, args.device)
    model.eval()
    one = torch.zeros(1, 3, args.image_size, args.image_size, device=args.device)
    with torch.inference_mode():
        work = flops(lambda: model(one))
    net = naive.strip(program.build_model(args).backbone)
    theirs = lambda: model.quantizer.hard_codes(naive.encode(model, net, images, args))  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        cached = feature_cache.test_features(
            model.backbone, splits, Namespace(**vars(args) | {"feature_cache": folder})
        )
        sides = {"computed": feature_cache.Computed(model.backbone, images, args), "cached": cached["database"]}
        rows = []
        for name, side in sides.items():
            times = compare(lambda side=side: engine.encode(model, side, hard=True), theirs, args, options.repeats)
            rows.append(row(f"encode, {name}", times, len(images)))
    rows[0]["share_of_matmul_peak"] = work * rows[0]["ours_per_second"] / peak
    rows[0]["matmul_peak_flops"] = peak
    return rows


def step(args: Namespace, options: Namespace) -> list[dict]:
    splits, model = program.build(args)
    twin = program.build_model(args)
    net = naive.strip(twin.backbone)
    batch = next(iter(data.train_loader(splits, args)))
    pairs = torch.stack(batch.contiguous().chunk(2), dim=1)
    loader = _Same(batch, 10)
    training, other = engine.start(model, loader, args), engine.build_optimizer(twin, args)
    training.epoch = args.epoch_num
    peak = matmul_peak(torch.bfloat16 if args.precision == "bf16" else torch.float32, args.device)

    def ours() -> None:
        training.step = 0
        engine.train_epoch(training, loader, args)

    memory = twin.memory is not None
    net.train()
    theirs = lambda: [naive.step(twin, net, pairs, other, memory, args) for _ in range(10)]  # noqa: E731
    times = compare(ours, theirs, args, options.repeats)
    result = row("10 steps", times, 10 * len(batch))
    result["share_of_matmul_peak"] = flops(ours) / result["ours_seconds"] / peak
    result["matmul_peak_flops"] = peak
    return [result]


class _Same(list):
    """The same views again and again, as a loader."""

    def __init__(self, batch: Tensor, times: int) -> None:
        super().__init__([batch] * times)
        self.batch_sampler = Namespace(epoch=0)


def evaluate(args: Namespace, options: Namespace) -> list[dict]:
    generator = torch.Generator().manual_seed(args.seed)
    Q, n, D, few = options.queries, options.database, args.feat_dim, min(options.plain_queries, options.queries)
    codewords = torch.nn.functional.normalize(torch.randn(args.M, args.K, D // args.M, generator=generator), dim=-1)
    queries = torch.randn(Q, D, generator=generator)
    db_codes = torch.randint(args.K, (n, args.M), generator=generator).to(torch.uint8 if args.K <= 256 else torch.int32)
    if options.labels:
        labels = [(torch.rand(k, options.labels, generator=generator) < 0.1).to(torch.uint8) for k in (Q, n)]
    else:
        labels = [torch.randint(10, (k,), generator=generator) for k in (Q, n)]
    codewords, queries, db_codes, *labels = (x.to(args.device) for x in (codewords, queries, db_codes, *labels))
    tables = partial(retrieval.lookup_tables, codewords=codewords)
    mine = (tables, queries, db_codes, *labels, args.topK)
    topK = args.topK or n
    database = {"codewords": codewords, "db_codes": db_codes, "db_labels": labels[1]}
    theirs = (queries[:few], labels[0][:few], topK)
    bandwidth = copy_bandwidth(args.device)
    rows = []
    for name, our_side, plain_side in (
        ("MAP, PR and P@K", retrieval.evaluate, naive.evaluate),
        ("MAP alone", retrieval.mean_average_precision, naive.mean_average_precision),
    ):
        work = partial(our_side, *mine), partial(plain_side, *theirs, **database)
        times = compare(*work, args, options.repeats)
        result = row(f"{name}, {Q} queries, {n} codes, top {topK}", times, Q, few)
        # at the least, codes are read once a query, and a score is written and read
        result["share_of_copy_bandwidth"] = result["ours_per_second"] * n * (args.M + 8) / bandwidth
        result["copy_bytes_per_second"] = bandwidth
        rows.append(result)
    return rows


def run(args: Namespace, options: Namespace) -> list[dict]:
    """A whole run: ours from start to end, the plain one by its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder) / "cache") if args.feature_cache != "off" else "off"
        mine = Namespace(**vars(args) | {"output": folder, "feature_cache": cache})
        files = Files(Path(folder), args.notes)
        for needed in (files.checkpoints, files.tensorboard):
            check_writable(needed)
        with logging_to(files.log):
            splits, model = program.build(mine)
            results: dict = {}
            ours = seconds(lambda: results.update(engine.run(model, splits, mine, files)), args.device)
    phases = plain_epochs(splits, args, options.plain_epochs)
    tests = len([epoch for epoch in results["history"] if "val_mAP" in epoch])
    theirs = len(results["history"]) * phases["train"] + tests * phases["validate"] + phases["test"]
    result = row(f"run of {len(results['history'])} epochs, {tests} validations", ([ours], [theirs]), 1)
    return [
        result
        | {
            "ours_phases": results["seconds"],
            "plain_phases_once": phases,
            "plain_epochs_measured": options.plain_epochs,
            "plain_extrapolated": True,
            "map": results["map"],
            "history": results["history"],
        }
    ]


def plain_epochs(splits: data.Splits, args: Namespace, epochs: int) -> dict[str, float]:
    """Mean seconds of a plain epoch's training and its validation (MAP alone), and of one test (all three metrics).

    Every second epoch is trained with the memory; what it takes counts as often as a run of ours would use it.
    """
    model = program.build_model(args)
    net = naive.strip(model.backbone)
    optimizer = engine.build_optimizer(model, args)
    loader = naive.train_loader(splits, args)
    labels = [torch.from_numpy(images.labels).to(args.device) for images in (splits.query, splits.database)]
    topK = args.topK or len(splits.database)

    def train(use_memory: bool) -> None:
        net.train()
        for batch in loader:
            naive.step(model, net, batch, optimizer, use_memory, args)

    def test(metric: Callable) -> object:
        codes = model.quantizer.hard_codes(naive.encode(model, net, splits.database, args))
        queries = naive.encode(model, net, splits.query, args)
        with torch.no_grad():
            words = model.quantizer.codewords()
            return metric(queries, labels[0], topK, codewords=words, db_codes=codes, db_labels=labels[1])

    training, validation = [], []
    for epoch in range(epochs):
        use_memory = model.memory is not None and epoch % 2 == 1
        training.append(seconds(lambda use=use_memory: train(use), args.device))
        validation.append(seconds(lambda: test(naive.mean_average_precision), args.device))
        print(f"plain epoch {epoch}: {training[-1]:.1f} s training, {validation[-1]:.1f} s validation", flush=True)
    last = seconds(lambda: test(naive.evaluate), args.device)
    without, using = statistics.mean(training[::2]), statistics.mean(training[1::2] or training)
    begin = min(args.queue_begin_epoch, args.epoch_num) if model.memory is not None else args.epoch_num
    train_mean = without + (using - without) * (1 - begin / max(args.epoch_num, 1))
    return {"train": train_mean, "validate": statistics.mean(validation), "test": last}


# ---------------------------------------------------------------- the script


def show(rows: list[dict]) -> None:
    for result in rows:
        print(
            f"{result['what']}: ours {result['ours_seconds']:.3f} s ({result['ours_per_second']:.1f}/s), plain "
            f"{result['plain_seconds']:.3f} s ({result['plain_per_second']:.1f}/s): {result['ratio']:.1f} times as "
            f"fast (medians of {result['repeats']})"
        )
        for share in ("share_of_matmul_peak", "share_of_copy_bandwidth"):
            if share in result:
                print(f"  {share.replace('_', ' ')}: {100 * result[share]:.1f} %")
        if "plain_phases_once" in result:
            print(f"  ours: {_phases(result['ours_phases'])}; MAP {result['map']:.4f}")
            print(f"  plain, one epoch and one test, extrapolated: {_phases(result['plain_phases_once'])}")


def _phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in phases.items())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    benchmarks = {"views": views, "encode": encode, "step": step, "evaluate": evaluate, "run": run}
    parser.add_argument("what", choices=benchmarks)
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--queries", type=int, default=10000, help="of evaluate (default: %(default)s)")
    parser.add_argument("--database", type=int, default=50000, help="codes, of evaluate (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=0, help="multi-hot, of evaluate; 0: ten classes (default: 0)")
    parser.add_argument("--plain_queries", type=int, default=200, help="of evaluate (default: %(default)s)")
    parser.add_argument("--plain_epochs", type=int, default=2, help="of run (default: %(default)s)")
    options, flags = parser.parse_known_args(argv)
    for name in ("repeats", "queries", "database", "plain_queries", "plain_epochs"):
        if not 1 <= getattr(options, name) <= 10**7:
            raise InputError(f"--{name} {getattr(options, name)}: must be from 1 to 10,000,000")
    if not 0 <= options.labels <= 1000:
        raise InputError(f"--labels {options.labels}: must be from 0 to 1000")
    args = program.resolve(program.build_parser().parse_args(flags))
    if args.dry_run or args.test_only or args.resume or args.overwrite or args.recipe != "paper":
        raise InputError("--dry_run, --test_only, --resume, --overwrite and --recipe have no place here")
    program.take_device(args)
    check_writable(options.results)
    rows = benchmarks[options.what](args, options)
    show(rows)
    path = options.results / f"benchmark_{options.what}.json"
    write_json(path, {"rows": rows, "device": device_name(args.device), "versions": versions(), "config": vars(args)})
    print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    sys.exit(run_script(main))
