"""The files of a run: where they are, how they are written, and how they are read again."""

import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from config import Config, code_bits, recorded
from data import Splits
from distributed import device_name, is_first, processes
from readers import read_array
from retrieval import Metrics
from utils import LOG, InputError, atomic_write, one_line, sha256, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RUN_FILES = (
    "config.json", "last.cpt", "model.cpt", "db_codes.npy", "db_targets.npy", "PR_curve.txt", "P_at_topK_curve.txt",
    "metrics.json",
)  # fmt: skip


@dataclass
class Files:
    """Where a run writes: `logs/<notes>.log`, `logs/<notes>/` and `checkpoints/<notes>/` below the output folder.

    `check_lock` raises RunError if the run is no longer this process's, see `utils.locked`.
    """

    output: Path
    notes: str
    check_lock: Callable[[], None] = lambda: None

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.notes}.log"

    @property
    def tensorboard(self) -> Path:
        return self.output / "logs" / self.notes

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints" / self.notes

    @property
    def model(self) -> Path:
        return self.checkpoints / "model.cpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.cpt"

    @property
    def metrics(self) -> Path:
        return self.checkpoints / "metrics.json"

    @property
    def new_events(self) -> Path:
        """The folder in which TensorBoard's files are written anew."""
        return self.checkpoints / ".events.tmp"

    def present(self) -> list[str]:
        """The names of those files of a run that exist."""
        found = [name for name in RUN_FILES if (self.checkpoints / name).exists()]
        return found + [path.name for path in self.events()]

    def events(self) -> list[Path]:
        """TensorBoard's files, oldest first."""
        return sorted(self.tensorboard.glob("events.out.tfevents.*"))

    def clear(self) -> None:
        """Remove what an earlier run left, but for its log.

        Raises InputError, before anything is removed, if a folder stands in the place of a file.
        """
        paths = [*(self.checkpoints / name for name in RUN_FILES), *self.events()]
        for path in paths:
            if path.is_dir():
                raise InputError(f"{path} is a folder in the place of a run's file: move it away")
        for path in paths:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.new_events, ignore_errors=True)


# ---------------------------------------------------------------- writing


def described(config: Config, splits: Splits) -> dict:
    """What `metrics.json` says of a run's configuration, images and code; to be taken when it begins."""
    flags = {name: getattr(config, name) for name in ("topK", "recipe", "method", "notes", "dataset", "seed", "limit")}
    more = {"bits": code_bits(vars(config)), "canonical_data": splits.canonical, "git_commit": git_commit()}
    where = {"device": device_name(config.device), "processes": processes()}
    return flags | more | where | {"config": recorded(config)}


def save_results(metrics: Metrics | None, db_codes: Tensor, db_labels: np.ndarray, folder: Path) -> None:
    """`db_codes.npy` (uint8, or uint16 for K > 256) and, if there are labels, `db_targets.npy` and the two curves, two
    rows each."""
    codes = db_codes.numpy().astype(np.uint8 if db_codes.dtype == torch.uint8 else np.uint16)
    arrays = {"db_codes.npy": codes} | ({"db_targets.npy": db_labels} if metrics else {})
    for name, array in arrays.items():
        with atomic_write(folder / name) as file:
            np.save(file, array, allow_pickle=False)
    curves = {"PR_curve.txt": metrics.pr, "P_at_topK_curve.txt": metrics.p_at_k} if metrics else {}
    for name, curve in curves.items():
        with atomic_write(folder / name) as file:
            np.savetxt(file, curve.numpy())


def report(
    files: Files, db_labels: np.ndarray, metrics: Metrics | None, db_codes: Tensor, ties: str, told: dict
) -> dict:
    """Log and write every result of a test; of several processes, the first does. Returns what went into
    `metrics.json`.

    Args:
        metrics: None: there are no labels.
        ties: which of `metrics.map_by_ties` is the run's MAP.
        told: what else goes into `metrics.json`; its `config` names the device.
    """
    if not is_first():
        return {}
    maps = None
    if metrics:
        maps = metrics.map_by_ties
        LOG.info("test mAP=%.6f", maps[ties])
        precisions = metrics.p_at_k[1].tolist()
        ranks = [rank for rank in (1, 10, 100, 1000, 5000) if rank <= len(precisions)]
        LOG.info("test %s", ", ".join(f"P@{rank}={precisions[rank - 1]:.6f}" for rank in ranks))
    if "unlabelled" in told:
        measured = {name: value for name, value in told["unlabelled"].items() if value is not None}
        LOG.info("test without labels: %s", ", ".join(f"{name}={value:.4f}" for name, value in measured.items()))
    files.check_lock()
    save_results(metrics, db_codes.cpu(), db_labels, files.checkpoints)
    where = {"peak_memory_mb": peak_memory(told["config"]["device"]), "versions": versions()}
    results = {"map": maps and maps[ties], "map_by_ties": maps} | told | where
    write_json(files.metrics, results)
    return results


class Events:
    """TensorBoard's files. If one cannot be written, that is said once and the run goes on without."""

    def __init__(self, folder: Path) -> None:
        self.writer: SummaryWriter | None = None
        try:
            from torch.utils import tensorboard

            self.writer = tensorboard.SummaryWriter(str(folder))
        except (ImportError, OSError) as error:
            self._give_up(error)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._try(lambda writer: writer.add_scalar(tag, value, step))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def __enter__(self) -> "Events":
        self.hook, threading.excepthook = threading.excepthook, self._leave_to_next_call
        return self

    def __exit__(self, *_: object) -> None:
        self._try(lambda writer: writer.close())
        threading.excepthook = self.hook

    def _leave_to_next_call(self, error: threading.ExceptHookArgs) -> None:
        """Print no traceback of the thread that writes: the next call of the writer raises its error again."""
        if type(error.thread).__name__ != "_AsyncWriterThread":
            self.hook(error)

    def _try(self, action: "Callable[[SummaryWriter], object]") -> None:
        try:
            if self.writer:
                action(self.writer)
        except Exception as error:  # whatever its thread met
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.writer = None
        LOG.warning("WARNING: TensorBoard's files cannot be written (%s): going on without them", one_line(error))


class StepLog:
    """The losses of an epoch's steps, left on the device and read every `interval` steps all at once.

    `last` holds the newest values that were read, by tag.

    Args:
        steps: of the whole epoch.
        done: how many of them were done before.
        note: called with each step and its values, by tag.
    """

    def __init__(self, interval: int, steps: int, done: int, note: Callable[[int, dict[str, float]], object]) -> None:
        self.interval, self.steps, self.done, self.note = interval, steps, done, note
        self.names: list[str] = []
        self.waiting: list[tuple[float, Tensor]] = []
        self.last: dict[str, float] = {}

    def add(self, lr: float, terms: dict[str, Tensor]) -> None:
        """Take a step's terms (scalars by tag)."""
        self.names = ["lr", *terms]
        self.waiting.append((lr, torch.stack([term.detach() for term in terms.values()])))
        if len(self.waiting) == self.interval or self.done + len(self.waiting) == self.steps:
            self.read()

    def read(self) -> None:
        """Read what waits on the device."""
        if self.waiting:
            rates, values = zip(*self.waiting, strict=True)
            self.waiting = []
            for lr, row in zip(rates, torch.stack(values).tolist(), strict=True):
                self.last = dict(zip(self.names, [lr, *row], strict=True))
                self.note(self.done, self.last)
                self.done += 1


# ---------------------------------------------------------------- going on in the files of an earlier run


def take_place(files: Files, log: Path, state: dict | None) -> None:
    """Let a run take its place, now that it has all it needs: what an earlier one left is removed, or, if it goes on
    from a state, what the log and TensorBoard tell beyond that: it will be told again.

    Args:
        log: the file that the run writes its log to until now; it becomes `files.log`.
    """
    files.check_lock()
    kept = []
    if state:
        kept = _log_before(files.log, state["epoch"])
        _cut_events(files, state["epoch"], state["steps"])
    else:
        files.clear()
    if log != files.log:
        log.write_text("".join(kept) + log.read_text(encoding="utf-8"), encoding="utf-8")  # it is open, to append
        log.replace(files.log)


EPOCH_LINE = re.compile(r" - epoch (\d+): avg loss=")
OF_EPOCH = re.compile(r" - (epoch \d+: avg loss=|val mAP=|early stop: )")
OF_TEST = re.compile(r" - (test (mAP=|P@|without labels: )|beside it: )")


def _log_before(path: Path, epoch: int) -> list[str]:
    """The lines of a log but for those of epochs from `epoch` on and of the test."""
    kept, again = [], False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        found = EPOCH_LINE.search(line)
        again = int(found[1]) >= epoch if found else again
        if not (again and OF_EPOCH.search(line)) and not OF_TEST.search(line):
            kept.append(line + "\n")
    return kept


def _cut_events(files: Files, epoch: int, step: int) -> None:
    """Leave TensorBoard's values of earlier steps and epochs, once each; without TensorBoard, all of them."""
    old = files.events()
    if not old or find_spec("tensorboard") is None:
        return
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # keeps values as they are
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    shutil.rmtree(files.new_events, ignore_errors=True)
    writer, seen = EventFileWriter(str(files.new_events)), set()
    for path in old:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                repeated = (value.tag, event.step) in seen
                seen.add((value.tag, event.step))
                if not repeated and event.step < (epoch if value.tag == "val_mAP" else step):
                    writer.add_event(event)
    writer.flush()
    writer.close()
    for path in list(files.new_events.iterdir()):
        shutil.move(path, files.tensorboard / path.name)
    for path in old:
        path.unlink()
    files.new_events.rmdir()


# ---------------------------------------------------------------- reading


def read_metrics(path: Path) -> dict:
    """A run's `metrics.json`; its `map` is None if there were no labels. Raises InputError if it is none."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        measured = metrics["unlabelled"] if metrics["map"] is None else metrics["map"]
        if isinstance(metrics["config"], dict) and isinstance(measured, float | dict):
            if "map_by_ties" not in metrics:  # of a version that knew no other order
                metrics["config"]["ties"] = "database"
            return metrics
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        pass
    raise InputError(f"{path} is not the metrics.json of a run: move it away")


def read_codes(checkpoint: Path, M: int, K: int, db_labels: np.ndarray) -> np.ndarray:
    """The database's codes `[n, M]` beside a checkpoint, in the form that the file has.

    Raises InputError if they are not codes from 0 to K - 1 of images with these labels, or of another model.
    """
    path = checkpoint.with_name("db_codes.npy")
    advice = "move the file away to have the database encoded"
    codes = read_array(path)
    if codes.shape != (len(db_labels), M) or codes.dtype.kind not in "iu":
        raise InputError(f"{path} holds {codes.dtype} {list(codes.shape)}, not a code of {M} numbers for each of "
                         f"{len(db_labels)} images: {advice}")  # fmt: skip
    if codes.min() < 0 or codes.max() >= K:
        raise InputError(f"{path}: a code is {codes.min()} or {codes.max()}, codewords are 0 to {K - 1}: {advice}")
    targets = path.with_name("db_targets.npy")
    labels = read_array(targets) if targets.exists() else db_labels
    if labels.ndim == 2 and labels.size and db_labels.ndim == 1:  # one-hot rows for class ids
        labels = labels.argmax(axis=1)
    if not np.array_equal(labels, db_labels):
        raise InputError(f"{targets}: other labels than those of this data set, split and --seed: {advice}")
    metrics = path.with_name("metrics.json")
    model_of_codes = read_metrics(metrics).get("model_sha256") if metrics.exists() else None
    if model_of_codes not in (None, sha256(checkpoint)):
        raise InputError(f"{path} was made with another model than --checkpoint: {advice}")
    return codes


# ---------------------------------------------------------------- how long it took, and where it ran


class Stopwatch:
    """Seconds spent in each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def peak_memory(device: str) -> dict[str, float | None]:
    """Most memory ever held, in MiB: by this process, by its largest worker, and by tensors on the GPU."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    process, worker = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else None
    return {"process": process, "largest_worker": worker, "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def git_commit() -> str | None:
    """The commit of this project's checkout, with "-dirty" behind it if files were changed; None if it is not one."""
    folder = Path(__file__).resolve().parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
