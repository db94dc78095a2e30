"""An index on disk, for reading: what is in it, and whether it is whole.

An index is a folder:

index.json     what it was made of, and the SHA-256 of every other file and of itself
model/         the run's `model.cpt` and `config.json`
codes/         `00000.npy` ...: `[rows, M]` uint8, or uint16 if K > 256
features/      `00000.npy` ...: `[rows, F]` int8 or float16, unless the index was made without
names.sqlite   tables images, skipped and shards
search.faiss   a faiss index over the codes of the live images, in the ascending order of their ids
skipped.csv    name and reason of each file that is left out

Row r of a shard is the image with id first_id + r. Ids go up from 0 without a gap and are never used again: the row of
an image that was removed stays, and an image that changed has a new id.
"""

import hashlib
import json
import os
import sqlite3
import threading
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from utils import InputError, one_line, sha256

FORMAT = 1  # to be raised if what is in the folder changes
INDEX, NAMES, SEARCH, SKIPPED = "index.json", "names.sqlite", "search.faiss", "skipped.csv"
CODES, FEATURES, MODEL = "codes", "features", "model"
MODEL_FILES = ("model.cpt", "config.json")
MAPPED_AT_ONCE = 256  # shards: each holds a file descriptor

SCHEMA = """
CREATE TABLE IF NOT EXISTS images(
    id INTEGER PRIMARY KEY, path BLOB NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, status TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS live ON images(path) WHERE status = 'indexed';
CREATE INDEX IF NOT EXISTS removed ON images(id) WHERE status = 'removed';
CREATE TABLE IF NOT EXISTS skipped(
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards(
    number INTEGER PRIMARY KEY, first_id INTEGER NOT NULL, rows INTEGER NOT NULL,
    codes TEXT NOT NULL, features TEXT NOT NULL);
"""


def shard_name(kind: str, number: int) -> str:
    """The file of a shard, relative to the index. `kind`: `CODES` or `FEATURES`."""
    return f"{kind}/{number:05d}.npy"


def printable(name: str) -> str:
    """A name with what is no UTF-8 as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------- index.json and the other files


def rendered(info: dict[str, Any]) -> bytes:
    """The one way to write `index.json`, so that any byte that changed is noticed; its own checksum is the last row."""
    content = {key: value for key, value in info.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content | {"sha256": digest}, indent=1) + "\n").encode()


def read_info(folder: Path) -> dict[str, Any]:
    """What `index.json` says. Raises InputError if it is missing, damaged or of another version."""
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is no index, {INDEX} is missing: python -m search index PHOTOS --model RUN -o {folder} makes one"
        ) from None
    try:
        info = json.loads(content)
        whole = isinstance(info, dict) and rendered(info) == content
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise damaged(folder, INDEX)
    if info["format"] != FORMAT:
        raise InputError(f"{path}: format {info['format']}, this version reads {FORMAT}: delete {folder}, index again")
    return info


def damaged(folder: Path, name: str) -> InputError:
    """The error of a file that is missing or not as it was written."""
    state = "is damaged" if (folder / name).exists() else "is missing"
    if name in (SEARCH, SKIPPED):
        return InputError(f"{folder / name} {state}: python -m search index -o {folder} --update makes it anew")
    return InputError(f"{folder / name} {state}: restore it from a copy, or delete {folder} and index again")


def is_whole(folder: Path, name: str, digest: str) -> bool:
    """Whether a file of the index is there and has this SHA-256."""
    try:
        return sha256(folder / name) == digest
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def verify(folder: Path, files: dict[str, str]) -> None:
    """Raise InputError naming the first of the files that is missing or damaged."""
    for name, digest in files.items():
        if not is_whole(folder, name, digest):
            raise damaged(folder, name)


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """The tables of an index. `mode`: "ro" or "rwc". A transaction lasts from BEGIN to COMMIT."""
    return sqlite3.connect(f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}", uri=True, timeout=60,
                           isolation_level=None, check_same_thread=False)  # fmt: skip


# ---------------------------------------------------------------- reading


class Store:
    """The live images of an index: their ids, names, codes and features. Threads may share it.

    A position is a row of `codes()` and of `search.faiss`: the image with id `ids[position]`.

    Args:
        info: what `index.json` says.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder, self.info = folder, info
        self._tables, self._lock = connect(folder / NAMES, "ro"), threading.Lock()
        shards = self._rows("SELECT first_id, rows FROM shards ORDER BY number")
        self._first = np.array([first for first, _ in shards], np.int64)
        self._next_id = sum(rows for _, rows in shards)
        removed = self._rows("SELECT id FROM images WHERE status = 'removed' ORDER BY id")
        self._removed = np.array(removed, np.int64).reshape(-1)
        self._shard = lru_cache(MAPPED_AT_ONCE)(self._mapped)

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """An index that is whole. Raises InputError naming the file that is missing or damaged, or if the index was
        not finished."""
        info = read_info(folder)
        if not info["complete"]:
            raise InputError(f"{folder} is not finished, indexing was interrupted: run the same command again")
        verify(folder, info["files"])
        try:
            return cls(folder, info)
        except sqlite3.Error as error:
            raise InputError(f"{folder / NAMES} cannot be read ({one_line(error)})") from error

    def close(self) -> None:
        self._tables.close()

    def _rows(self, query: str, values: tuple = ()) -> list[tuple]:
        with self._lock:
            return self._tables.execute(query, values).fetchall()

    def _mapped(self, kind: str, number: int) -> np.ndarray:
        return np.load(self.folder / shard_name(kind, number), mmap_mode="r", allow_pickle=False)

    # ------------------------------------------------------------ ids, codes, features

    @cached_property
    def ids(self) -> np.ndarray:
        """`[n]` int64, ascending."""
        live = np.ones(self._next_id, dtype=bool)
        live[self._removed] = False
        return np.flatnonzero(live)

    def position(self, image: int) -> int:
        """Raises KeyError if there is no live image with this id."""
        position = int(np.searchsorted(self.ids, image)) if 0 <= image < self._next_id else len(self.ids)
        if position == len(self.ids) or self.ids[position] != image:
            raise KeyError(image)
        return position

    def codes(self) -> np.ndarray:
        """The codes of all live images, `[n, M]` uint8 or uint16, read from disk each time."""
        dtype = np.uint8 if self.info["K"] <= 256 else np.uint16
        codes = np.empty((len(self.ids), self.info["M"]), dtype)
        ends = np.searchsorted(self.ids, [*self._first, self._next_id])
        for number, first in enumerate(self._first):
            part = slice(ends[number], ends[number + 1])
            codes[part] = self._shard(CODES, number)[self.ids[part] - first]
        return codes

    @property
    def has_features(self) -> bool:
        return self.info["features"] != "none"

    def features(self, positions: np.ndarray) -> np.ndarray:
        """Features `[k, F]` float32 of unit length. Raises InputError if the index has none."""
        if not self.has_features:
            raise InputError(f"{self.folder} was made with --features none: index again to have features")
        ids = self.ids[positions]
        shards = np.searchsorted(self._first, ids, side="right") - 1
        features = np.empty((len(ids), self.info["F"]), np.float32)
        for number in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == number)
            features[chosen] = self._shard(FEATURES, number)[ids[chosen] - self._first[number]]
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return features / np.maximum(lengths, np.finfo(np.float32).tiny)

    # ------------------------------------------------------------ names

    def rows(self, ids: np.ndarray) -> list[tuple[str, int, int]]:
        """Name, width and height of live images. Raises KeyError if one is none."""
        query = "SELECT path, width, height FROM images WHERE id = ? AND status = 'indexed'"
        found = []
        with self._lock:
            for image in map(int, ids):
                row = self._tables.execute(query, (image,)).fetchone() if 0 <= image < self._next_id else None
                if row is None:
                    raise KeyError(image)
                found.append((os.fsdecode(row[0]), row[1], row[2]))
        return found

    def names(self, ids: np.ndarray) -> list[str]:
        """Names relative to the photo folder, or as they stand in the list."""
        return [name for name, _, _ in self.rows(ids)]

    def name(self, image: int) -> str:
        return self.names([image])[0]

    def path(self, image: int) -> Path:
        """The file of a live image, which may be gone."""
        return Path(self.info["base"]) / self.name(image)

    def under(self, subfolder: str) -> np.ndarray:
        """The positions of the live images below a folder, ascending `[k]` int64; of "" or "." all images."""
        ids = self._rows(*below(subfolder, "SELECT id FROM images"))
        return np.searchsorted(self.ids, np.sort(np.array(ids, np.int64).reshape(-1)))


def below(subfolder: str, statement: str) -> tuple[str, tuple]:
    """An SQL statement about the live images below a folder, with its values."""
    prefix = os.fsencode(subfolder.rstrip("/").removeprefix("./"))
    if prefix in (b"", b"."):
        return f"{statement} WHERE status = 'indexed'", ()
    return f"{statement} WHERE status = 'indexed' AND path > ? AND path < ?", (prefix + b"/", prefix + b"0")
