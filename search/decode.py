"""Image files -> pixels, in processes of their own: an image whose decoder hangs or crashes costs no more than itself.

A thread here waits for each process. What comes back are plain bytes, which are never unpickled.
"""

import itertools
import multiprocessing
import os
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from utils import RunError

MOST_BYTES = 2**30  # of a file: its content is read whole
PER_TASK = 8  # files that a process is given at once
IN_FLIGHT = 384  # images decoded ahead, whatever the number of processes: three batches of the encoder
SECONDS_TO_START, SECONDS_TO_END = 120, 5  # a process that waits for a disk cannot be killed
HEADER = struct.Struct("<iiI")  # width, height, bytes of the reason


@dataclass(frozen=True)
class Decoded:
    """An image as the encoder takes it.

    Args:
        pixels: `[3, S, S]` uint8; None if the file cannot be used.
        size: width and height, upright; (0, 0) if they are not known.
        reason: why the file cannot be used, empty if it can.
    """

    pixels: np.ndarray | None
    size: tuple[int, int]
    reason: str


Decode = Callable[[bytes, int], Decoded]


def decode_photo(content: bytes, image_size: int) -> Decoded:
    """A file's content as `transforms.photo_pixels` sees it."""
    from decoding import UprightImage, reason_of
    from transforms import photo_pixels

    size = (0, 0)
    try:
        image = UprightImage(content)
        size = image.size
        return Decoded(photo_pixels(image, image_size).numpy(), size, "")
    except Exception as error:  # a damaged image can raise nearly anything
        return Decoded(None, size, reason_of(error))


# ---------------------------------------------------------------- in the process


def _serve(connection: Connection, decode: Decode, image_size: int, seconds: float) -> None:
    """Decode what comes (paths as str, contents as bytes) until the other end is closed, a message for each image."""
    import torch

    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # C libraries complain there
        os.dup2(nowhere, output)
    try:
        connection.send_bytes(b"ready")
        while True:
            for item in connection.recv():
                signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)  # ends it if nobody is left who could
                connection.send_bytes(_message(_decoded(item, decode, image_size)))
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, OSError):
        return


def _decoded(item: str | bytes, decode: Decode, image_size: int) -> Decoded:
    from decoding import open_regular, reason_of

    try:
        if isinstance(item, str):
            with open_regular(Path(item)) as file:
                item = file.read(MOST_BYTES + 1)
        if len(item) > MOST_BYTES:
            return Decoded(None, (0, 0), f"has more than {MOST_BYTES} bytes")
        return decode(item, image_size)
    except Exception as error:
        return Decoded(None, (0, 0), reason_of(error))


def _message(image: Decoded) -> bytes:
    reason = image.reason.encode("utf-8", "backslashreplace")
    pixels = b"" if image.pixels is None else image.pixels.tobytes()
    return HEADER.pack(*image.size, len(reason)) + reason + pixels


def _read(message: bytes, image_size: int) -> Decoded:
    width, height, length = HEADER.unpack_from(message)
    start = HEADER.size + length
    reason = message[HEADER.size : start].decode()
    pixels = np.frombuffer(message, np.uint8, offset=start).reshape(-1, 3, image_size, image_size)
    return Decoded(pixels[0].copy() if len(pixels) else None, (width, height), reason)  # PyTorch asks for its own


# ---------------------------------------------------------------- the processes, from outside


class _EndedError(Exception):
    """A decoder that had to be ended, or that ended itself."""


class _Decoder:
    """One process, and the connection to it. Raises RunError if the process does not start."""

    def __init__(self, decode: Decode, image_size: int, seconds: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.image_size, self.seconds = image_size, seconds
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, decode, image_size, seconds), daemon=True)
        self.process.start()
        theirs.close()
        try:
            if not self.connection.poll(SECONDS_TO_START):
                raise EOFError
            self.connection.recv_bytes()
        except (EOFError, OSError):
            self.kill()
            raise RunError(f"a decoding process does not start (exit code {self.process.exitcode})") from None

    def send(self, items: list[str | bytes]) -> None:
        try:
            self.connection.send(items)
        except OSError as error:
            self.kill()
            raise _EndedError("its decoder crashed") from error

    def receive(self) -> Decoded:
        """The next image. Raises TimeoutError or _EndedError, and the process is gone, if it takes too long or dies."""
        try:
            if self.connection.poll(self.seconds):
                return _read(self.connection.recv_bytes(), self.image_size)
        except (EOFError, OSError):
            self.kill()
            raise _EndedError(f"its decoder crashed (exit code {self.process.exitcode})") from None
        self.kill()
        raise TimeoutError(f"its decoder took more than {self.seconds:g} s")

    def kill(self) -> None:
        self.process.kill()
        self.process.join(SECONDS_TO_END)
        self.connection.close()


class DecodingPool:
    """Processes that decode images; a context. Threads may share it.

    Args:
        image_size: S of `[3, S, S]`.
        workers: number of processes, at least 1.
        seconds: how long a decoder may take for an image.
        decode: what to do with a file's content, a function of a module.
    """

    def __init__(self, image_size: int, workers: int, seconds: float, decode: Decode = decode_photo) -> None:
        self.image_size, self.seconds, self.decode = image_size, seconds, decode
        self.threads = ThreadPoolExecutor(workers, "decoding")
        self.own = threading.local()  # the decoder of a thread
        self.lock, self.decoders, self.closed = threading.Lock(), [], False
        start_server()

    def __enter__(self) -> "DecodingPool":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            for decoder in self.decoders:
                decoder.process.kill()
        self.threads.shutdown(cancel_futures=True)

    def paths(self, paths: Iterable[Path]) -> Iterator[Decoded]:
        """The images of some files, in their order, some ahead. Raises RunError if no process can be started."""
        files, waiting = iter(paths), deque()
        try:
            while task := [str(path) for path in itertools.islice(files, PER_TASK)]:
                waiting.append(self.threads.submit(self._decode, task))
                if len(waiting) > IN_FLIGHT // PER_TASK:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def content(self, data: bytes) -> Decoded:
        """The image that a file's content holds."""
        return self.threads.submit(self._decode, [data]).result()[0]

    def _decode(self, items: list[str | bytes]) -> list[Decoded]:
        """Decode in this thread's process. A crash is an image's fault only if it crashes a fresh process too."""
        done, crashes = [], 0
        while len(done) < len(items):
            rest = items[len(done) : len(done) + 1] if crashes else items[len(done) :]
            try:
                decoder = self._decoder()
                decoder.send(rest)
                for _ in rest:
                    done.append(decoder.receive())
                    crashes = 0
            except TimeoutError as error:
                done.append(Decoded(None, (0, 0), str(error)))
            except _EndedError as error:
                crashes += 1
                if crashes == 2:
                    done.append(Decoded(None, (0, 0), str(error)))
                    crashes = 0
        return done

    def _decoder(self) -> _Decoder:
        """This thread's process, a new one if it has ended."""
        decoder = getattr(self.own, "decoder", None)
        if decoder is None or decoder.connection.closed:
            fresh = _Decoder(self.decode, self.image_size, self.seconds)
            with self.lock:
                if self.closed:
                    fresh.kill()
                    raise RunError("decoding was ended")
                self.decoders = [one for one in self.decoders if one is not decoder] + [fresh]
            self.own.decoder = fresh
        return self.own.decoder


def start_server() -> None:
    """Start, and do not wait for, the process that others are forked from, with what they import: it takes seconds. The
    signals that a whole group gets are blocked in all of them: who started them ends them."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["search.decode", "decoding", "transforms"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
