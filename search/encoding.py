"""From files to shards: listed, decoded in processes, encoded in batches, committed a shard at a time."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from photos import list_photos
from search.decode import Decoded, DecodingPool
from search.writing import File, Stretch, Writer, stored_features
from utils import InputError, RunError

if TYPE_CHECKING:
    from search.encoder import Encoder

BATCH = 128  # images that are encoded at once
HELD_BACK = 100  # images that an approximate search is measured by


# ---------------------------------------------------------------- which files


def base_of(source: Path) -> Path:
    """The folder that names are relative to."""
    return source if source.is_dir() else source.parent


def list_files(source: Path) -> list[File]:
    """The images of a folder, or the files that a list names line by line, sorted by the bytes of their names.

    Names in a list are relative to its folder, or absolute; they are kept as they are written. Raises InputError if
    there is none, or the source is neither a folder nor a list.
    """
    names = list_photos(source) if source.is_dir() else read_list(source)
    if not names:
        raise InputError(f"{source}: no images in it")
    base = base_of(source)
    return [_file(base, name) for name in names]


def read_list(source: Path) -> list[str]:
    """The lines of a list, each once, sorted by their bytes. Raises InputError if it is not a readable list."""
    if not source.exists():
        raise InputError(f"{source} does not exist: name a folder of images, or a text file of paths, one per line")
    try:
        content = source.read_bytes() if source.is_file() else b"\0"
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror})") from error
    if b"\0" in content:
        raise InputError(f"{source} is no list: name a folder of images, or a text file of paths, one per line")
    lines = {line.removesuffix(b"\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")}
    return [os.fsdecode(line) for line in sorted(line for line in lines if line.strip())]


def _file(base: Path, name: str) -> File:
    try:
        status = os.stat(os.path.join(base, name))  # noqa: PTH116, PTH118, several times as fast
        return File(name, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        return File(name, -1, -1)


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Machine:
    """What images go through."""

    pool: DecodingPool
    encoder: "Encoder"

    def vectors(self, paths: Iterable[Path]) -> np.ndarray:
        """What a search for each of the files would be made with, `[n, D]`; without those that cannot be used now."""
        pixels = [image.pixels for image in self.pool.paths(paths) if image.pixels is not None]
        S = self.encoder.image_size
        return self.encoder.encode(np.stack(pixels) if pixels else np.empty((0, 3, S, S), np.uint8)).vectors


class Shards:
    """Images on their way into shards of a writer.

    Args:
        base: the folder that names are relative to.
        rows: images per shard.
    """

    def __init__(self, machine: Machine, writer: Writer, base: Path, rows: int) -> None:
        self.machine, self.writer, self.base, self.rows = machine, writer, base, rows
        self.stretch, self.pixels = Stretch(), []

    def encode(self, files: list[File], bar: tqdm) -> None:
        """Encode and commit all files, in their order.

        A batch ends with its shard, so that a run that goes on later has the same batches. Raises RunError if the
        folder of the images is gone.
        """
        bad = 0
        decoded = self.machine.pool.paths(self.base / file.name for file in files)
        for file, image in zip(files, decoded, strict=True):
            bar.update()
            if image.pixels is not None:
                self._add(file, image)
            elif not self._vanished(file):
                self.stretch.skipped.append((file, image.reason))
                bad += 1
                bar.set_postfix(bad=bad, refresh=False)
        self._encode_batch()
        if self.stretch.images or self.stretch.skipped:
            self.writer.commit(self.stretch)

    def _add(self, file: File, image: Decoded) -> None:
        self.stretch.images.append((file, image.size))
        self.pixels.append(image.pixels)
        full = len(self.stretch.images) == self.rows
        if full or len(self.pixels) == BATCH:
            self._encode_batch()
        if full:
            self.writer.commit(self.stretch)
            self.stretch = Stretch()

    def _encode_batch(self) -> None:
        if self.pixels:
            encoded = self.machine.encoder.encode(np.stack(self.pixels))
            self.stretch.codes.append(encoded.codes)
            if self.writer.features != "none":
                self.stretch.features.append(stored_features(encoded.features, self.writer.features))
            self.pixels = []

    def _vanished(self, file: File) -> bool:
        """Whether a file is gone since it was listed; then it is left out. Raises RunError if all are."""
        if file.size < 0 or (self.base / file.name).exists():
            return False
        if not self.base.is_dir() or not any(self.base.iterdir()):
            raise RunError(f"{self.base} is gone; what was written is kept: run the same command again")
        return True
