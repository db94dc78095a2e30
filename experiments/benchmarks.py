"""Timing of this project and, in the same process, of a plain version of what the release does (`naive.py`)."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import engine
import evaluation
import retrieval
from config import Config
from data import Splits
from decoding import EncodedImage
from experiments import naive
from feature_cache import Computed
from methods.mecoq import MeCoQ
from optimizer import build_optimizer
from results import Files
from utils import check_writable, logging_to

PHOTO = (480, 640)  # pixels of a photo that is decoded: height, width


@dataclass(frozen=True)
class Options:
    """How often and on what is timed: `queries`, `database` and `labels` (0: ten classes) of `evaluate`, of which the
    plain side ranks `plain_queries`; `plain_epochs` of `run`; `photos` of `decode`."""

    repeats: int = 5
    queries: int = 10000
    database: int = 50000
    labels: int = 0
    plain_queries: int = 200
    plain_epochs: int = 2
    photos: int = 50


Sides = tuple[list[float], list[float]]  # seconds of each round, ours and the plain version's


# ---------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes, the device's part of it included."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(ours: Callable, theirs: Callable, device: str, repeats: int) -> Sides:
    """Seconds of both sides, taken in turns, after one round that does not count."""
    rounds = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats + 1)]
    return tuple(list(side) for side in zip(*rounds[1:], strict=True))


def matmul_peak(precision: str, device: str) -> float:
    """Floating-point operations per second of a large matrix product: the median of five."""
    n, dtype = 2048 if device == "cpu" else 8192, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(6)]
    return 2 * n**3 / statistics.median(times[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy of 256 MB: the median of five."""
    a = torch.zeros(2**26, device=device)
    b = torch.empty_like(a)
    times = [seconds(lambda: b.copy_(a), device) for _ in range(6)]
    return 2 * a.nbytes / statistics.median(times[1:])


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def row(what: str, times: Sides, images: int, plain_images: int | None = None) -> dict:
    """Medians per unit of work, images per second, and the ratio of both sides."""
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


# ---------------------------------------------------------------- images


def decode(config: Config, options: Options) -> list[dict]:
    """JPEG files of 640 x 480, whole and reduced, by OpenCV and by Pillow."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), options.photos)
        rows = []
        for scale in (1, 2, 4, 8):
            least = None if scale == 1 else (PHOTO[1] // scale, PHOTO[0] // scale)
            ours, theirs = (partial(decode_all, paths, opencv, least) for opencv in (True, False))
            times = compare(ours, theirs, "cpu", options.repeats)
            rows.append(row(f"JPEG at 1/{scale} of its size, OpenCV and Pillow", times, len(paths)))
    return rows


def write_photos(folder: Path, n: int) -> list[Path]:
    """n JPEG files, of scikit-learn's two photographs turned a little, of two qualities and kinds of colour."""
    from sklearn.datasets import load_sample_images

    photos, paths = load_sample_images().images, [folder / f"{i}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        image = Image.fromarray(photos[i % 2]).resize((PHOTO[1], PHOTO[0])).rotate(i)
        image.save(path, quality=90 if i % 3 else 75, subsampling=2 * (i % 2))
    return paths


def decode_all(paths: list[Path], opencv: bool, least: tuple[int, int] | None) -> None:
    """Files to pixels `[h, w, 3]`, as views are made of them."""
    for path in paths:
        image = EncodedImage(path.read_bytes())
        _ = image.decoded(least) if opencv else np.array(image.by_pillow(least))


def views(config: Config, options: Options) -> list[dict]:
    """Both views of all training images."""
    splits = engine.build_splits(config)
    ours = engine.build_loader(config, splits)
    theirs = naive.train_loader(splits, engine.view_options(config), config.num_workers)
    times = compare(lambda: [None for _ in ours], lambda: [None for _ in theirs], config.device, options.repeats)
    return [row(f"views at {config.image_size} px", times, 2 * len(splits.train))]


# ---------------------------------------------------------------- the network


def encode(config: Config, options: Options) -> list[dict]:
    """Images to codes: nothing computed before, and from the feature cache."""
    splits, method = engine.build(config)
    images, how = splits.database, engine.preprocessing(config)
    peak = matmul_peak(config.precision, config.device)
    method.eval()
    one = torch.zeros(1, 3, config.image_size, config.image_size, device=config.device)
    with torch.inference_mode():
        work = flops(lambda: method(one))
    net = naive.strip(engine.build_method(config).backbone)

    def theirs() -> Tensor:
        return method.codes(naive.encode(method, net, images, how, config.batch_size))

    with tempfile.TemporaryDirectory() as folder:
        cached = config.replace(feature_cache=folder)
        features = engine.build_features(cached, method.backbone, splits.tested)["database"]
        rows = []
        for name, side in {"computed": Computed(method.backbone, images, how), "cached": features}.items():
            times = compare(partial(evaluation.encode_database, method, side), theirs, config.device, options.repeats)
            rows.append(row(f"encode, {name}", times, len(images)))
    rows[0]["share_of_matmul_peak"] = work * rows[0]["ours_per_second"] / peak
    rows[0]["matmul_peak_flops"] = peak
    return rows


def step(config: Config, options: Options) -> list[dict]:
    """An optimisation step on views that are there already."""
    splits, method = engine.build(config)
    twin = engine.build_method(config)
    net = naive.strip(twin.backbone)
    batch = next(iter(engine.build_loader(config, splits)))
    pairs = torch.stack(batch.contiguous().chunk(2), dim=1)
    batches = [batch] * 10
    training, other = engine.start(config, method, batches), build_optimizer(twin, config)
    training.epoch = config.epoch_num
    peak = matmul_peak(config.precision, config.device)

    def ours() -> None:
        training.step = 0
        engine.train_epoch(training, batches)

    def theirs() -> None:
        for _ in batches:
            naive.step(twin, net, pairs, other, twin.memory is not None)

    net.train()
    result = row("10 steps", compare(ours, theirs, config.device, options.repeats), 10 * len(batch))
    result["share_of_matmul_peak"] = flops(ours) / result["ours_seconds"] / peak
    result["matmul_peak_flops"] = peak
    return [result]


# ---------------------------------------------------------------- ranking


def evaluate(config: Config, options: Options) -> list[dict]:
    """Random queries against random codes; the plain side ranks few of them, as its time per query does not depend on
    how many there are. In the last row both are ours: MAP over all orders of equal scores, and in database order."""
    Q, n, few = options.queries, options.database, min(options.plain_queries, options.queries)
    codewords, queries, db_codes, labels = random_search(config, options)
    topK = config.topK or n
    mine = partial(retrieval.lookup_tables, codewords=codewords), queries, db_codes, labels
    alone = {ties: partial(retrieval.mean_average_precision, *mine, retrieval.Measure(config.topK, ties))
             for ties in ("database", "expected")}  # fmt: skip
    database = {"codewords": codewords, "db_codes": db_codes, "db_labels": labels[1]}
    theirs = queries[:few], labels[0][:few], topK
    bandwidth = copy_bandwidth(config.device)
    rows = []
    for name, our_side, plain_side, plain_queries in (
        ("MAP, PR and P@K", partial(retrieval.evaluate, *mine, config.topK),
         partial(naive.evaluate, *theirs, **database), few),
        ("MAP alone", alone["database"], partial(naive.mean_average_precision, *theirs, **database), few),
        ("MAP alone, expected and in database order", alone["expected"], alone["database"], Q),
    ):  # fmt: skip
        times = compare(our_side, plain_side, config.device, options.repeats)
        result = row(f"{name}, {Q} queries, {n} codes, top {topK}", times, Q, plain_queries)
        # at the least, codes are read once per query, and a score is written and read
        result["share_of_copy_bandwidth"] = result["ours_per_second"] * n * (config.M + 8) / bandwidth
        result["copy_bytes_per_second"] = bandwidth
        rows.append(result)
    return rows


def random_search(config: Config, options: Options) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Codewords `[M, K, d]`, queries `[Q, D]`, codes `[n, M]`, and the labels of queries and database."""
    M, K, D = config.M, config.K, config.feat_dim
    generator = torch.Generator().manual_seed(config.seed)
    codewords = torch.nn.functional.normalize(torch.randn(M, K, D // M, generator=generator), dim=-1)
    queries = torch.randn(options.queries, D, generator=generator)
    codes = torch.randint(K, (options.database, M), generator=generator).to(torch.uint8 if K <= 256 else torch.int32)
    sizes = options.queries, options.database
    if options.labels:
        labels = [(torch.rand(k, options.labels, generator=generator) < 0.1).to(torch.uint8) for k in sizes]
    else:
        labels = [torch.randint(10, (k,), generator=generator) for k in sizes]
    codewords, queries, codes, *labels = (x.to(config.device) for x in (codewords, queries, codes, *labels))
    return codewords, queries, codes, labels


# ---------------------------------------------------------------- a whole run


def run(config: Config, options: Options) -> list[dict]:
    """A whole run, but for loading data and network: ours from start to end, the plain one by its epochs, whose time is
    then extrapolated."""
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder) / "cache") if config.feature_cache != "off" else "off"
        files = Files(Path(folder), config.notes)
        for needed in (files.checkpoints, files.tensorboard):
            check_writable(needed)
        mine, results = config.replace(output=folder, feature_cache=cache), {}
        with logging_to(files.log):
            ours = seconds(lambda: results.update(engine.run(mine, files, files.log)), config.device)
    built = []
    ours -= seconds(lambda: built.extend(engine.build(config)), config.device)  # the plain side is built already, too
    splits, method = built
    phases = plain_epochs(method, splits, config, options.plain_epochs)
    history = results["history"]
    tests = len([epoch for epoch in history if "val_mAP" in epoch])
    theirs = len(history) * phases["train"] + tests * phases["validate"] + phases["test"]
    result = row(f"run of {len(history)} epochs, {tests} validations", ([ours], [theirs]), 1)
    return [
        result
        | {
            "ours_phases": results["seconds"],
            "plain_phases_once": phases,
            "plain_epochs_measured": options.plain_epochs,
            "plain_extrapolated": True,
            "map": results["map"],
            "history": history,
        }
    ]


def plain_epochs(method: MeCoQ, splits: Splits, config: Config, epochs: int) -> dict[str, float]:
    """Mean seconds of a plain epoch's training and its validation (MAP alone), and of one test (all three metrics).

    Every second epoch is trained with the memory; what it takes counts as often as a run of ours would use it.
    """
    net, optimizer = naive.strip(method.backbone), build_optimizer(method, config)
    loader = naive.train_loader(splits, engine.view_options(config), config.num_workers)
    training, validation = [], []

    def train(use_memory: bool) -> None:
        net.train()
        for batch in loader:
            naive.step(method, net, batch, optimizer, use_memory)

    test = partial(plain_test, method, net, splits, config)
    for epoch in range(epochs):
        use_memory = method.memory is not None and epoch % 2 == 1
        training.append(seconds(lambda use=use_memory: train(use), config.device))
        validation.append(seconds(lambda: test(naive.mean_average_precision), config.device))
        print(f"plain epoch {epoch}: {training[-1]:.1f} s training, {validation[-1]:.1f} s validation", flush=True)
    last = seconds(lambda: test(naive.evaluate), config.device)
    without, using = statistics.mean(training[::2]), statistics.mean(training[1::2] or training)
    begin = min(config.queue_begin_epoch, config.epoch_num) if method.memory is not None else config.epoch_num
    mean = without + (using - without) * (1 - begin / max(config.epoch_num, 1))
    return {"train": mean, "validate": statistics.mean(validation), "test": last}


def plain_test(method: MeCoQ, net: torch.nn.Module, splits: Splits, config: Config, metric: Callable) -> object:
    """A metric of `naive.py` on a database that is encoded anew."""
    how, size = engine.preprocessing(config), config.batch_size
    labels = [torch.from_numpy(images.labels).to(config.device) for images in splits.tested.values()]
    codes = method.codes(naive.encode(method, net, splits.database, how, size))
    queries = naive.encode(method, net, splits.query, how, size)
    with torch.no_grad():
        database = {"codewords": method.quantizer.codewords(), "db_codes": codes, "db_labels": labels[1]}
        return metric(queries, labels[0], config.topK or len(splits.database), **database)
