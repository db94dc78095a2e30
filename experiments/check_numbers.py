"""Sections of `check_gpu`: whether a device computes what it should, and whether the host waits for it."""

import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import engine
import evaluation
import retrieval
from config import parse
from experiments import golden
from experiments.benchmarks import Options, random_search
from experiments.check_base import ROOT, Check, Row, Skipped, first_steps, percent
from retrieval import Measure
from utils import RunError, load_tensors, one_line

GOLDEN = Path(os.environ.get("MECOQ_GOLDEN", ROOT / "tests" / "golden"))
MAIN = ROOT / "main.py"
FEW = 100  # queries that are ranked on both devices
KILLED_AFTER = 6  # states that a run has written
LONGEST = 60  # seconds that such a run may take


def without_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def golden_numbers(check: Check) -> Iterator[Row]:
    """The numbers of the authors' programs, without TF32."""
    if not GOLDEN.is_dir():
        raise Skipped(f"{GOLDEN} is not there; MECOQ_GOLDEN names another folder")
    without_tf32()
    try:
        for name, error, allowed in golden.errors(GOLDEN, check.device):
            expected = f"at most {allowed:.0e}"
            yield Row(name, f"largest relative error {error:.1e}", expected, error <= allowed, error)
    except ModuleNotFoundError as error:
        raise Skipped(one_line(error)) from error


# ---------------------------------------------------------------- the CPU and the device


class Run:
    """A training without dropout, whose numbers are each device's own: its `losses`, the database's `codes`, `map`."""

    def __init__(self, check: Check, device: str, *flags: str) -> None:
        argv = check.small_flags("--precision", "fp32", "--epoch_num", "2", *flags, device=device)
        config = check.ready(parse(argv))
        without_tf32()
        splits, method = engine.build(config)
        for module in method.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loader = engine.build_loader(config, splits)
        features = engine.build_features(config, method.backbone, splits.all)
        if config.normalize_features:
            method.centre_features(features["train"])
        training = engine.start(config, method, loader)
        training.events = told = golden.Told()
        for epoch in range(config.epoch_num):
            training.epoch, training.step, training.sums = epoch, 0, {}
            loader.set_epoch(epoch)
            engine.train_epoch(training, loader)
        metrics, codes = evaluation.test(method, features, splits, Measure(config.topK, config.ties))
        self.losses, self.codes, self.map = np.array(told.losses), codes.cpu(), metrics.map


def small_runs(check: Check) -> Iterator[Row]:
    """Small runs on a CPU and on the device. A network that learns from scratch makes much of a rounding: of that, the
    first losses are compared alone."""
    adam = ["--optimizer", "Adam", "--lr", "0.001"]
    for name, flags, most in (
        ("convnet from scratch", ["--backbone", "convnet"], 5),
        ("VGG16, frozen", ["--backbone", "vgg16", "--trainable_layer_num", "0", "--normalize_features"], None),
    ):
        cpu, there = (Run(check, device, *flags, *adam) for device in ("cpu", check.device))
        error = float(np.abs(there.losses[:most] / cpu.losses[:most] - 1).max())
        yield Row(f"{name}: losses of {len(cpu.losses[:most])} steps", f"differ by {error:.1e} at most, relatively",
                  "at most 1e-02", error <= 1e-2, error)  # fmt: skip
    same, different = float((there.codes == cpu.codes).double().mean()), len(cpu.codes.unique(dim=0))
    yield Row(f"{name}: codes", f"{percent(same)} are the same; {different} different ones", "at least 90 %",
              same >= 0.9, same)  # fmt: skip
    yield Row(f"{name}: MAP", f"{there.map:.4f}, on the CPU {cpu.map:.4f}", "within 0.02",
              abs(there.map - cpu.map) <= 0.02, there.map)  # fmt: skip


def ranking(check: Check) -> Iterator[Row]:
    """MAP, the expected one too, and curves of the same tables, on a CPU and on the device."""
    for queries, n, labels, K in check.sizes.searches:
        config = check.config("--device", "cpu")
        codewords, embeddings, codes, its = random_search(config, Options(1, min(queries, FEW), n, labels))
        tables = retrieval.lookup_tables(embeddings, codewords)  # of the CPU: their last bits would differ
        found = []
        for device in ("cpu", check.device):
            there = [x.to(device) for x in (tables, codes, *its)]
            metrics = retrieval.evaluate(lambda part: part, there[0], there[1], there[2:], K)
            alone = retrieval.mean_average_precision(
                lambda part: part, there[0], there[1], there[2:], Measure(K, "expected")
            )
            found.append((metrics, alone))
        (cpu, alone), (ours, ours_alone) = found
        pairs = ((ours.map, cpu.map), (ours.expected_map, cpu.expected_map), (ours_alone, alone))
        error = max(abs(a - b) for a, b in pairs)
        error = max(error, *(float((getattr(ours, x) - getattr(cpu, x)).abs().max()) for x in ("pr", "p_at_k")))
        kind = f"{labels} labels, several each" if labels else "10 classes"
        yield Row(f"{n:,} codes, {kind}: MAP@{K}, curves", f"differ from the CPU's by {error:.0e} at most",
                  "at most 1e-06", error <= 1e-6, error)  # fmt: skip


def same_bits(check: Check) -> Iterator[Row]:
    """Two trainings with the same flags."""
    for precision in ("bf16", "fp32"):
        digests = set()
        for _ in range(2):
            training, loader = check.training("--precision", precision)
            first_steps(training, loader, check.sizes.steps)
            digests.add(digest(training.method))
            del training, loader
        same = len(digests) == 1
        found = "the same weights to the bit" if same else "other weights"
        yield Row(f"{check.sizes.steps} steps twice, --precision {precision}", found, "the same", same)


def digest(method: nn.Module) -> str:
    """SHA-256 of what a method has learned."""
    found = hashlib.sha256()
    for parameter in method.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------- does the host wait?


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Where PyTorch warns that the host waits for the GPU: "file:line" of this project -> how often."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):
            places[_asked_by()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _asked_by() -> str:
    """The line of the project that is being executed, but for this file's and those of tests."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            path = path.relative_to(ROOT)
            if path.parts[0] != "tests" and "site-packages" not in path.parts:
                return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def told(places: Counter[str]) -> str:
    """How often in all, and where."""
    return f"{places.total()}: " + ", ".join(f"{count} in {place}" for place, count in places.most_common())


def waits(check: Check) -> Iterator[Row]:
    """PyTorch's own warnings, within ten training steps and within a ranking."""
    if not check.on_gpu:
        raise Skipped("a CPU does not wait for itself")
    steps = 10
    training, loader = check.training("--log_interval", str(steps))
    first_steps(training, loader, 3)
    with synchronisations() as places:
        first_steps(training, loader, steps)
    ok = places.total() <= 1 and all(place.startswith("results.py") for place in places)
    yield Row(f"{steps} training steps", told(places), "once, in results.py (StepLog.read)", ok, places.total())
    queries, n, labels, K = check.sizes.searches[0]
    codewords, embeddings, codes, its = random_search(check.config(), Options(1, queries, n, labels))
    tables = partial(retrieval.lookup_tables, codewords=codewords)
    for name, metric, more in (
        ("MAP alone", partial(retrieval.mean_average_precision, measured=Measure(K, "database")), 1),
        ("MAP and curves", partial(retrieval.evaluate, topK=K), 2),
    ):
        metric(tables, embeddings[:FEW], codes, [its[0][:FEW], its[1]])  # constants are copied the first time
        chunks: list[int] = []
        with synchronisations() as places:
            metric(tables, embeddings, codes, its, on_chunk=chunks.append)
        expected = f"at most {len(chunks) + more}: one per chunk, and the end"
        yield Row(f"{name} of {queries} queries", told(places), expected, places.total() <= len(chunks) + more)


# ---------------------------------------------------------------- a run that is killed


def resuming(check: Check) -> Iterator[Row]:
    """Runs that are killed in the middle and go on, in processes of their own, and runs that are not killed."""
    squeezenet = ["--backbone", "squeezenet1_0", "--trainable_layer_num"]
    how = ["--epoch_num", "3", "--save_interval", "1", "--log_interval", "5", "--notes", "run"]
    for number, (name, flags) in enumerate({
        "MeCoQ, a block trained": [*squeezenet, "1"],
        "CIBHash, which draws on the device": ["--method", "CIBHash", *squeezenet, "0", "--eval_interval", "1"],
    }.items()):  # fmt: skip
        argv = check.small_flags(*flags, *how)
        whole, parts = (check.folder / f"{side}{number}" for side in ("whole", "parts"))
        with started(argv, whole) as process:
            finish(process)
        with started(argv, parts) as process:
            kill(process, state(parts))
        stopped = load_tensors(state(parts))
        with started([*argv, "--resume"], parts) as process:
            finish(process)
        models = [load_tensors(folder / "checkpoints" / "run" / "model.cpt") for folder in (whole, parts)]
        same = all(torch.equal(models[0][key], models[1][key]) for key in models[0].keys() | models[1].keys())
        found = f"killed in epoch {stopped['epoch']}, step {stopped['step']}: {'the same' if same else 'other'} bits"
        yield Row(f"{name}: kill -9, then --resume; model.cpt", found, "the same bits", same)


def state(folder: Path) -> Path:
    """The file of a run's state."""
    return folder / "checkpoints" / "run" / "last.cpt"


@contextmanager
def started(argv: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """`main.py` in a process of its own, which does not outlive the context. Raises RunError with its last words if
    it failed."""
    command = [sys.executable, str(MAIN), *argv, "--output", str(output)]
    output.mkdir(exist_ok=True)
    errors = output / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)  # noqa: S603
    try:
        yield process
    finally:
        process.kill()
        process.wait()
    if process.returncode > 0:
        lines = errors.read_text(encoding="utf-8", errors="replace").splitlines() or ["no word"]
        raise RunError(f"main.py ended with exit code {process.returncode}: {lines[-1]}")


def finish(process: subprocess.Popen) -> None:
    """Wait for a run. Raises RunError if it takes too long."""
    try:
        process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        raise RunError(f"main.py took more than {LONGEST} s") from None


def kill(process: subprocess.Popen, path: Path) -> None:
    """Kill a run once it has written its state several times. Raises RunError if it finished before."""
    seen, start = set(), time.monotonic()
    while len(seen) < KILLED_AFTER and process.poll() is None:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        if time.monotonic() - start > LONGEST:
            raise RunError(f"main.py wrote {len(seen)} states in {LONGEST} s")
        time.sleep(0.002)
    process.kill()
    if process.wait() == 0:
        raise RunError("main.py ended before it could be killed")
