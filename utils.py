"""What does everyone need? Errors, seeding, logging, the learning-rate schedule, patience, atomic files."""

import argparse
import atexit
import fcntl
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

LOG = logging.getLogger("mecoq")


class InputError(Exception):
    """The user's input is wrong (a flag, a file, a missing data set): one line, exit code 2."""


class RunError(Exception):
    """The run itself went wrong (a non-finite loss): one line, exit code 1."""


class Stopped(KeyboardInterrupt):
    """A signal ends the run: one line, exit code 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: go on with --resume")
        self.number = number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def run_script(script: Callable[[], int | None]) -> int:
    """Call what a script does; wrong input and failing files end in one line. Returns the exit code: 0, 2 or 1."""
    try:
        return script() or 0
    except (InputError, RunError, OSError) as error:  # OSError: a file failed under a sound run
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, whatever a library's looks like; its type where it has none.

    Of an error that PyTorch passes on from a worker, wrapped into the worker's traceback, the message alone.
    """
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def seed_everything(seed: int) -> None:
    """Seed every global generator (0 <= seed < 2^32). Data order and views do not use them: see `sample_seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sample_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, say (seed, epoch, image): the same on every machine."""
    words = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def learning_rate(
    step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int, start: float, base: float, final: float
) -> float:
    """Learning rate of one optimisation step (0-based): a linear rise from `start` to `base` whose last
    warm-up step has reached `base`, then half a cosine from `base` towards `final`."""
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
    return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2


CPU_CHUNK = 32  # images: about what a CPU's caches hold the activations of


def by_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of tensors with a row an image; on a CPU of `CPU_CHUNK` rows at a time, which is two to three times
    as fast."""
    rows = CPU_CHUNK if tensors[0].device.type == "cpu" else max(len(tensors[0]), 1)
    return torch.cat([function(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])


class Patience:
    """Keeps the best value seen and says when `limit` values in a row were no better."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.best = -math.inf
        self.worse_in_a_row = 0

    def improved(self, value: float) -> bool:
        """Take the next value; True where it is strictly better than all before it."""
        if value > self.best:
            self.best, self.worse_in_a_row = value, 0
            return True
        self.worse_in_a_row += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.worse_in_a_row >= self.limit


def leave_signals(_: int) -> None:
    """For worker processes: signals that a whole group gets are the main one's business, which finishes its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """They would ignore the signal by which Python asks those that are left to end, and waits."""
    for worker in multiprocessing.active_children():
        worker.kill()


def progress_bar(iterable: Any, description: str, total: int | None = None, done: int = 0) -> tqdm:
    """A tqdm bar that is silent where standard error is no terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, desc=description, total=total, initial=done, leave=False, disable=quiet)


class _LogThroughTqdm(logging.StreamHandler):
    """Writes log lines to standard output without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextmanager
def new_log(path: Path, beside: bool) -> Iterator[Path]:
    """Where to write a log: `path`, or a file `beside` it, which the context may rename onto `path`; if it does not,
    the file is removed.

    Raises InputError where `path` can not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        if path.exists():
            with path.open("a"):
                pass
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; name another folder") from error
    try:
        yield temporary if beside else path
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str, wait: bool) -> Iterator[None]:
    """Held by one process at a time (`busy` says who has it now); the system lets go of it when the process dies.

    Raises InputError where another process holds it, if not to `wait` for that.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; name another folder") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit
        except (BlockingIOError, PermissionError):
            if not wait:
                raise InputError(busy) from None
            LOG.warning(busy)  # seen without a log, too
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class _LogFile(logging.FileHandler):
    """Where the file can not be written, that is said once and the run goes on."""

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            print(f"WARNING: cannot write to {self.baseFilename}: {one_line(sys.exc_info()[1])}", file=sys.stderr)
        self.failed = True

    failed = False


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log lines go to the screen and are appended to `path`, at last the error that ends the context, if one does.

    Raises InputError where `path` can not be written.
    """
    formatter = logging.Formatter("%(asctime)s - %(message)s")
    try:
        handlers = [_LogThroughTqdm(sys.stdout), _LogFile(path, encoding="utf-8")]
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; name another folder") from error
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        LOG.addHandler(handler)
    try:
        yield
    except BaseException as error:
        LOG.removeHandler(handlers[0])  # the screen is told by `main`
        LOG.error("%s" if isinstance(error, Stopped) else "stopped: %s", one_line(error))
        raise
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
        with suppress(OSError):
            handlers[1].close()


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it onto `path` once all is written and on disk.

    Whatever happens, `path` holds either its old content or the whole new one. What a killed run leaves is
    overwritten by the next.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain values, on the CPU. The sums in the file are checked, which
    `torch.load` does not do. Raises nearly anything where it is damaged, or holds more."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there.

    Raises InputError with the reason where it can not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; name another folder") from error
