"""Sections of `check_gpu`: how long a run takes, where its time goes, and what might help."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, supported_activities

import engine
import evaluation
import retrieval
from checkpoint import Training
from experiments.benchmarks import Options, copy_bandwidth, flops, matmul_peak, random_search, seconds
from experiments.check_base import Check, Row, Skipped, first_steps, percent
from feature_cache import Computed
from loaders import TwoViews
from methods.backbones import Backbone
from results import Files, peak_memory
from retrieval import Measure
from utils import check_writable, one_line

ROOM = 8e9  # bytes that must be free for features to be cached: 3 GB of VGG16 with fc6 and fc7 trained, and checkpoints
EPOCHS = 2
KERNELS = 10  # that are listed


# ---------------------------------------------------------------- a step


def step(check: Check) -> Iterator[Row]:
    """run0015's step, its parts timed alone, and what a profiler sees of several steps."""
    training, loader = check.training()
    config, method, n = check.config(), training.method, check.sizes.steps
    first_steps(training, loader, 3)
    n = min(n, len(loader))
    whole = check.median(lambda: first_steps(training, loader, n)) / n
    rate = config.batch_size / whole
    yield Row(f"a step of {config.batch_size} images, two views each", f"{1e3 * whole:.2f} ms", value=whole)
    yield Row("training", f"{rate:.1f} images/s", value=rate)
    timed = parts(check, training, loader, n)
    for name, part in (timed | {"all else, less what overlaps": whole - sum(timed.values())}).items():
        yield Row(f"of it, {name}", f"{1e3 * part:.2f} ms, {percent(part / whole)}", value=part / whole)
    batch = next(iter(loader))
    share = flops(lambda: method.loss(batch, 0)["loss/total_loss"].backward()) / whole
    share /= matmul_peak(config.precision, check.device)
    yield Row("the step's operations", f"{percent(share)} of a {config.precision} matrix product", value=share)
    yield from profiled(check, training, loader, n, whole * n)


def parts(check: Check, training: Training, loader: TwoViews, n: int) -> dict[str, float]:
    """Seconds per step of what a step consists of, each timed alone."""
    method, batch = training.method, next(iter(loader))

    def forward_and_backward() -> None:
        training.optimizer.zero_grad()
        method.loss(batch, 0)["loss/total_loss"].backward()

    def views() -> None:
        loader.set_epoch(0)
        for _, _ in zip(range(n), loader, strict=False):
            pass

    method.train()
    frozen = check.median(lambda: method.backbone.prefix(batch))
    both = check.median(forward_and_backward)
    return {
        "views": check.median(views) / n,
        "frozen part of the backbone": frozen,
        "trained part, forward and backward": both - frozen,
        "optimiser": check.median(training.optimizer.step),
    }


def profiled(check: Check, training: Training, loader: TwoViews, n: int, wall: float) -> Iterator[Row]:
    """The share of n steps in which the device is idle, and the kernels that take longest.

    Args:
        wall: seconds of these steps without a profiler, which would slow the host down.
    """
    wanted = (ProfilerActivity.CPU, ProfilerActivity.CUDA) if check.on_gpu else (ProfilerActivity.CPU,)
    with profile(activities=[activity for activity in wanted if activity in supported_activities()]) as profiler:
        seconds(lambda: first_steps(training, loader, n), check.device)
    events = profiler.key_averages()
    if check.on_gpu:
        ours = [event for event in events if event.device_type.name == "CUDA" and not annotation(event)]
        times = [(event.self_device_time_total / 1e6, event) for event in ours]
        if not times:
            yield Row("kernels", "skipped: the profiler sees none here")
            return
        busy = sum(time for time, _ in times)
        idle = max(1 - busy / wall, 0.0)
        yield Row(f"{n} steps: waiting, the device is idle", percent(idle), value=idle)
    else:
        times = [(event.self_cpu_time_total / 1e6, event) for event in events if not annotation(event)]
        busy = sum(time for time, _ in times)
    for time, event in sorted(times, key=lambda pair: -pair[0])[:KERNELS]:
        found = f"{1e3 * time / n:.3f} ms and {event.count / n:.1f} calls a step, {percent(time / busy)}"
        yield Row(event.key, found, value=time / n)


def annotation(event: object) -> bool:
    """Whether an event is a range of kernels with a name, which would count them twice."""
    return getattr(event, "is_user_annotation", False) or event.key.startswith(("Optimizer.", "ProfilerStep"))


# ---------------------------------------------------------------- a run


def run(check: Check) -> Iterator[Row]:
    """A run of two epochs, each validated, and its test; what it would take with run0015's epochs."""
    room = shutil.disk_usage(check.folder).free
    cache = str(check.folder / "features") if room > ROOM else "off"
    asked = check.config()
    config = check.config(
        "--epoch_num", str(EPOCHS), "--queue_begin_epoch", "0", "--output", str(check.folder), "--feature_cache", cache
    )
    files = Files(check.folder, config.notes)
    for folder in (files.checkpoints, files.log.parent):
        check_writable(folder)
    result = {}
    whole = seconds(lambda: result.update(engine.run(config, files, files.log)), check.device)
    times = result["seconds"] | {"all": whole}
    if cache == "off":
        yield Row("feature cache", f"off: {room / 1e9:.1f} GB are free in {check.folder}, {ROOM / 1e9:.0f} needed")
    for name, took in times.items():
        yield Row(f"{name}, {EPOCHS} epochs" if name in ("train", "validate") else name, f"{took:.2f} s", value=took)
    rest = whole - times["train"] - times["validate"]
    every = rest + (times["train"] + times["validate"]) / EPOCHS * asked.epoch_num
    yield Row(f"{asked.epoch_num} epochs of this", f"{every / 60:.2f} minutes, extrapolated", value=every)
    yield Row("MAP, of random weights", f"{result['map']:.4f}", value=result["map"])


# ---------------------------------------------------------------- encoding and ranking


def encoding(check: Check) -> Iterator[Row]:
    """Images to codes, nothing computed before."""
    config = check.config()
    splits, method = engine.build(config)
    images = splits.database.subset(torch.arange(min(check.sizes.encoded, len(splits.database))).numpy())
    method.eval()
    one = torch.zeros(1, 3, config.image_size, config.image_size, device=check.device)
    with torch.inference_mode():
        work = flops(lambda: method(one))
    computed = Computed(method.backbone, images, engine.preprocessing(config))
    took = check.median(lambda: evaluation.encode_database(method, computed))
    rate, peak = len(images) / took, matmul_peak(config.precision, check.device)
    yield Row(f"{len(images)} images to codes", f"{rate:.1f} images/s", value=rate)
    yield Row(f"matrix product, {config.precision}", f"{peak / 1e12:.2f} Tflop/s", value=peak)
    yield Row("encoding", f"{percent(rate * work / peak)} of the matrix product", value=rate * work / peak)


def ranking_speed(check: Check) -> Iterator[Row]:
    """Queries per second, and the share of a copy in memory: a code is read, and a score written and read."""
    bandwidth = copy_bandwidth(check.device)
    yield Row("copy in memory", f"{bandwidth / 1e9:.1f} GB/s", value=bandwidth)
    config = check.config()
    for queries, n, labels, K in check.sizes.searches:
        codewords, embeddings, codes, its = random_search(config, Options(1, queries, n, labels))
        what = partial(retrieval.lookup_tables, codewords=codewords), embeddings, codes, its
        kind = f"{labels} labels" if labels else "10 classes"
        for name, metric in (
            ("MAP alone", partial(retrieval.mean_average_precision, measured=Measure(K, "expected"))),
            ("MAP and curves", partial(retrieval.evaluate, topK=K)),
        ):
            rate = queries / check.median(lambda metric=metric, what=what: metric(*what))
            share = rate * n * (config.M + 8) / bandwidth
            found = f"{rate:.0f} queries/s, {percent(share)} of the copy"
            yield Row(f"{name}: {queries} queries, {n:,} codes, {kind}, top {K}", found, value=rate)


def memory(check: Check) -> Iterator[Row]:
    """The most that the sections before have held."""
    for name, peak in check.peaks.items():
        yield Row(f"GPU, {name}", f"{peak:.0f} MiB", value=peak)
    host = peak_memory("cpu")["process"]
    yield Row("host, all of it", f"{host:.0f} MiB", value=host)


# ---------------------------------------------------------------- what might help


def candidates(check: Check) -> Iterator[Row]:
    """What the project does not do, timed. What is not possible here is no failure."""
    if not check.on_gpu:
        raise Skipped("they are of a GPU")
    training, loader = check.training()
    backbone, batch = training.method.backbone, next(iter(loader))
    first_steps(training, loader, 3)
    with torch.inference_mode():
        expected = backbone.prefix(batch)
    base = check.median(lambda: backbone.prefix(batch))
    yield Row("frozen part, as it is", f"{1e3 * base:.2f} ms", value=base)
    for name, prepare in {
        "torch.cudnn_convolution_relu": fused_prefix,
        "torch.backends.cudnn.benchmark": benchmarked_prefix,
        "--compile": compiled_prefix,
    }.items():
        yield tried(check, f"frozen part, {name}", base, lambda prepare=prepare: prepare(backbone, batch), expected)
    yield from whole_steps(check, training, loader)


def tried(check: Check, name: str, base: float, prepare: Callable[[], Callable[[], Tensor]], expected: Tensor) -> Row:
    """What another way to compute the frozen part takes, and how far its features are from those `expected`."""
    try:
        compute = prepare()
        took = check.median(compute)
        error = float((compute() - expected).norm() / expected.norm())
    except Exception as error:  # whatever this GPU, or the compiler, does not have
        return Row(name, f"not possible here: {one_line(error)}")
    finally:
        torch.backends.cudnn.benchmark = False
    return Row(
        name, f"{1e3 * took:.2f} ms, {base / took:.2f} times as fast, features differ by {error:.0e}", value=took
    )


def fused_prefix(backbone: Backbone, batch: Tensor) -> Callable[[], Tensor]:
    """Convolutions of VGG16 with their ReLU in one kernel, bfloat16 weights cast once."""
    layers = list(backbone.net.features)
    kind = torch.nn.Conv2d
    cast = {id(m): (m.weight.bfloat16(), m.bias.bfloat16()) for m in layers if isinstance(m, kind)}

    @torch.inference_mode()
    def through() -> Tensor:
        x = batch.contiguous(memory_format=torch.channels_last).bfloat16()
        for m in layers:
            if isinstance(m, kind):
                x = torch.cudnn_convolution_relu(x, *cast[id(m)], m.stride, m.padding, m.dilation, m.groups)
            elif not isinstance(m, torch.nn.ReLU):
                x = m(x)
        return backbone.net.avgpool(x).flatten(1).float()

    return through


def benchmarked_prefix(backbone: Backbone, batch: Tensor) -> Callable[[], Tensor]:
    """cuDNN tries its algorithms the first time."""
    torch.backends.cudnn.benchmark = True
    return lambda: backbone.prefix(batch)


def compiled_prefix(backbone: Backbone, batch: Tensor) -> Callable[[], Tensor]:
    """As `--compile` has it."""
    backbone.compile_frozen(batch.shape[-1], str(batch.device), (len(batch),))

    def through() -> Tensor:
        return backbone.prefix(batch)

    return through


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 round to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def whole_steps(check: Check, training: Training, loader: TwoViews) -> Iterator[Row]:
    """Steps as they are (but compiled, if that went), with TF32 in matrix products, and with fused SGD."""
    training.method.backbone.compiled = None
    n = min(check.sizes.steps, len(loader))
    base = check.median(lambda: first_steps(training, loader, n)) / n
    yield Row("a step, as it is", f"{1e3 * base:.2f} ms", value=base)
    with tf32():
        took = check.median(lambda: first_steps(training, loader, n)) / n
    yield Row("a step, TF32 in matrix products", f"{1e3 * took:.2f} ms, {base / took:.2f} times as fast", value=took)
    for group in training.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    try:
        took = check.median(lambda: first_steps(training, loader, n)) / n
        found = f"{1e3 * took:.2f} ms, {base / took:.2f} times as fast"
    except RuntimeError as error:
        took, found = None, f"not possible here: {one_line(error)}"
    yield Row("a step, fused SGD", found, value=took)
