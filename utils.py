"""Errors, seeding, logging, progress bars, locks and atomic files.

PyTorch is imported inside the functions that need it: `--help`, `--dry_run` and a wrong flag must not wait for it.
"""

import argparse
import atexit
import errno
import fcntl
import hashlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import random
import select
import signal
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from tqdm import tqdm

LOG = logging.getLogger("mecoq")


# ---------------------------------------------------------------- errors and how a program ends


class InputError(Exception):
    """Wrong input (a flag, a file, a missing data set): one line, exit code 2."""


class RunError(Exception):
    """A run that failed (a non-finite loss, a full disk): one line, exit code 1."""


class NonFiniteError(RunError):
    """A training that came to numbers that are not finite."""


class Stopped(KeyboardInterrupt):
    """A signal that ends the run: one line, exit code 128 + its number."""

    def __init__(self, number: int, advice: str = "go on with --resume") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {advice}")
        self.number = number


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def run_script(script: Callable[[], int | None]) -> int:
    """Call a script's main function; wrong input and failing files end in one line.

    Returns the exit code: 0; 2 for wrong input, 1 for a failed run, 128 + number for a signal, 141 if the reader of
    standard output went away.
    """
    try:
        code = script() or 0
        if sys.stdout:
            sys.stdout.flush()
        return code
    except (InputError, RunError, OSError, ModuleNotFoundError) as error:  # OSError: a file failed under a sound run
        if _output_is_closed() and isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        missing = isinstance(error, ModuleNotFoundError)
        _say(f"error: {one_line(error)}{': pip install -r requirements.txt' * missing}")
        return 2 if missing or isinstance(error, InputError) else 1
    except Stopped as error:
        _say(str(error))
        return 128 + error.number
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _say(line: str) -> None:
    """Print to standard error, if there is one."""
    with suppress(OSError, ValueError):
        if sys.stderr:
            print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _output_is_closed() -> bool:
    """Whether standard output can no longer be written; then Python's last flush goes to nowhere."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        closed = any(event & select.POLLERR for _, event in pipe.poll(0))  # a pipe without a reader
    except (OSError, ValueError):
        closed = True
    if closed:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its type if it has none.

    Of an error that PyTorch passes on from a worker, wrapped into the worker's traceback, the message alone.
    """
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


# PyTorch's words on a GPU, on a CPU, and when the shared memory of its workers is full
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",
                 "can't allocate memory", "bus error", "Bus error", "killed by signal: Killed")  # fmt: skip


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Raise RunError in one line if memory runs out or a worker dies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error) and OUT_OF_MEMORY[-1] not in str(error):
            raise RunError(one_line(error)) from error
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = one_line(error)[:200]
        raise RunError(f"out of memory ({reason}): try a smaller --batch_size, --num_workers or code") from error


def load_object(path: str) -> Any:
    """The object that a registry row names as "module:name"; its module is imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------- seeding, workers


def seed_everything(seed: int) -> None:
    """Seed every global generator (0 <= seed < 2^32). Data order and views do not use them: see `sample_seed`."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sample_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, say (seed, epoch, image): the same on every machine."""
    words = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def worker_count(num_workers: int) -> int:
    """`num_workers`, but never more than there are cores: they would only wait for each other."""
    return min(num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def leave_signals(_: int) -> None:
    """Ignore, in a worker process, the signals that a whole group gets: the main process finishes its step first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill what workers are left: they ignore the signal by which Python asks them to end."""
    for worker in multiprocessing.active_children():
        worker.kill()


# ---------------------------------------------------------------- progress and logging


def progress_bar(iterable: Any, description: str, total: int | None = None, done: int = 0) -> tqdm:
    """A tqdm bar that is silent if standard error is not a terminal, or the log is (of a run's later processes)."""
    quiet = LOG.disabled or sys.stderr is None or not sys.stderr.isatty()
    return tqdm(iterable, desc=description, total=total, initial=done, leave=False, disable=quiet)


class _Screen(logging.StreamHandler):
    """Log lines on standard output that do not tear a progress bar; a closed output is given up without a word."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None:
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        try:
            if isinstance(sys.exc_info()[1], UnicodeError):
                self.stream.write(ascii(self.format(record))[1:-1] + self.terminator)
                self.flush()
        except (OSError, ValueError):
            pass
        if _output_is_closed():
            self.stream = None


class _LogFile(logging.FileHandler):
    """A log file that says once that it cannot be written; a log never ends a run."""

    failed = False

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            _say(f"WARNING: cannot write to {self.baseFilename}: {one_line(sys.exc_info()[1])}")
        self.failed = True


@contextmanager
def new_log(path: Path, beside: bool) -> Iterator[Path]:
    """The file to write a log to: `path`, or a file `beside` it, which the context may rename onto `path`; if it does
    not, the file is removed.

    Raises InputError if `path` cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        if path.exists():
            check_regular(path)
            with path.open("a"):
                pass
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; name another folder") from error
    try:
        yield temporary if beside else path
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Show log lines on the screen and append them to `path`; the last is the error that ends the context, if any.

    Raises InputError if `path` cannot be written.
    """
    formatter = logging.Formatter("%(asctime)s - %(message)s")
    try:
        handlers = [_Screen(sys.stdout), _LogFile(path, encoding="utf-8")]
        handlers[0].stream = sys.stdout  # None, if it is closed; StreamHandler would take standard error then
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
        LOG.removeHandler(handlers[0])  # the screen is told by `run_script`
        LOG.error("%s" if isinstance(error, Stopped) else "stopped: %s", one_line(error))
        raise
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
        with suppress(OSError):
            handlers[1].close()


# ---------------------------------------------------------------- files


@contextmanager
def locked(path: Path, busy: str, wait: bool) -> Iterator[Callable[[], None]]:
    """A lock held by one process at a time (`busy` says who has it now); the system frees it when the process dies.

    Gives a function that raises RunError if the lock's file was removed or replaced: another process may hold it then.
    Raises InputError if another process holds the lock and `wait` is False.
    """
    check_regular(path)
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
            LOG.warning(busy)  # shown without a log, too
            fcntl.lockf(file, fcntl.LOCK_EX)

        def check() -> None:
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise RunError(f"{path} was removed: another process may be at this run, which therefore ends here")

        yield check


def check_regular(path: Path) -> None:
    """Raise InputError if `path` is there and is not a regular file: a folder, a device, a pipe, a link to itself."""
    if (path.exists() and not stat.S_ISREG(path.stat().st_mode)) or Path(os.path.realpath(path)).is_symlink():
        raise InputError(f"{path} is not a regular file: name another one")


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it onto `path` once all is written and on disk.

    Whatever happens, `path` holds either its old content or the whole new one. What a killed run leaves is overwritten
    by the next. Of a link, the target is written. Raises InputError if `path` is there and is not a regular file.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_regular(path)
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


def write_tensors(content: dict, path: Path) -> None:
    """`torch.save`, atomically; the old file is replaced only once the new one has been read back. Raises OSError."""
    import torch

    buffer = io.BytesIO()  # torch.save itself does not end well on a full disk
    try:
        torch.save(content, buffer)
    except RuntimeError as error:
        if "inline_container" in str(error):  # its zip writer, if the buffer cannot grow
            raise MemoryError(one_line(error)) from error
        raise
    with atomic_write(path, "w+b") as file:
        file.write(buffer.getbuffer())
        file.flush()
        file.seek(0)
        buffer.seek(0)
        while part := buffer.read(2**24):
            if file.read(2**24) != part:
                raise OSError(errno.EIO, "what was written does not read back")


def load_tensors(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, tensors and plain values, on the CPU.

    The checksums in the file are checked, which `torch.load` does not do. Raises nearly anything if it is damaged or
    holds more.
    """
    import torch

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there.

    Raises InputError with the reason if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "its name is not UTF-8"
        raise InputError(f"cannot write to {folder}: {reason}; name another folder") from error
