"""An index being written: a shard's files first, then in one transaction the rows that make it count."""

import csv
import io
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from search.store import (  # fmt: skip
    CODES,
    FEATURES,
    INDEX,
    NAMES,
    SCHEMA,
    SKIPPED,
    below,
    connect,
    damaged,
    is_whole,
    printable,
    rendered,
    shard_name,
)
from utils import InputError, RunError, atomic_write, one_line

REMOVED = "was removed by --remove"  # why a file is left out


@dataclass(frozen=True)
class File:
    """A file as it was listed: its name, bytes, and time of change in ns; -1 for both if it cannot be asked."""

    name: str
    size: int
    mtime: int

    @property
    def row(self) -> tuple[bytes, int, int]:
        return os.fsencode(self.name), self.size, self.mtime


@dataclass
class Stretch:
    """What a transaction adds: images, row by row of `codes` `[rows, M]` and `features` `[rows, F]`, with their width
    and height; and files that cannot be used, with the reason."""

    images: list[tuple[File, tuple[int, int]]] = field(default_factory=list)
    skipped: list[tuple[File, str]] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)


def stored_features(features: np.ndarray, kind: str) -> np.ndarray:
    """Features `[rows, F]` float32 as they are kept: "half", or "int8", by which a row's largest becomes 127."""
    if kind == "half":
        return features.astype(np.float16)
    largest = np.abs(features).max(axis=1, keepdims=True)
    return np.rint(features * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)


class Writer:
    """The shards and tables of an index, or of a part of one; a context.

    Args:
        features: how they are kept, "int8", "half" or "none".
        check_lock: raises RunError if another process may write here.

    Raises InputError if a shard that counts is missing or damaged.
    """

    def __init__(self, folder: Path, features: str, check_lock: Callable[[], None]) -> None:
        self.folder, self.features, self.check_lock = folder, features, check_lock
        for kind in (CODES, FEATURES)[: 1 if features == "none" else 2]:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        with self._naming_errors():
            self.tables = connect(folder / NAMES, "rwc")
            self.tables.executescript(f"PRAGMA synchronous = FULL; BEGIN; {SCHEMA} COMMIT")
        for name, digest in self.files().items():
            if not is_whole(folder, name, digest):
                raise damaged(folder, name)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.tables.close()

    # ------------------------------------------------------------ what is there

    def files(self) -> dict[str, str]:
        """The SHA-256 of each shard's files by their names."""
        found = {}
        for number, *digests in self._rows("SELECT number, codes, features FROM shards ORDER BY number"):
            kinds = zip((CODES, FEATURES), digests, strict=True)
            found |= {shard_name(kind, number): digest for kind, digest in kinds if digest}
        return found

    def next_id(self) -> int:
        return self._rows("SELECT coalesce(sum(rows), 0) FROM shards")[0][0]

    def count(self) -> int:
        """The number of live images."""
        return self._rows("SELECT count(*) FROM images WHERE status = 'indexed'")[0][0]

    def known(self) -> dict[bytes, tuple[int, int]]:
        """Size and time of change of each file that is indexed, or left out for a reason, when that was found."""
        tables = "SELECT path, size, mtime FROM images WHERE status = 'indexed' UNION ALL SELECT path, size, mtime "
        return {path: state for path, *state in self._rows(f"{tables} FROM skipped")}

    def skipped(self) -> list[tuple[File, str]]:
        """The files that are left out, sorted by their names, and the reasons."""
        rows = self._rows("SELECT path, size, mtime, reason FROM skipped ORDER BY path")
        return [(File(os.fsdecode(path), size, mtime), reason) for path, size, mtime, reason in rows]

    def shards(self) -> Iterator[Stretch]:
        """What was committed, shard by shard, features as they are kept."""
        query = "SELECT path, size, mtime, width, height FROM images WHERE id >= ? AND id < ? ORDER BY id"
        for number, first, rows in self._rows("SELECT number, first_id, rows FROM shards ORDER BY number"):
            images = [
                (File(os.fsdecode(path), size, mtime), (width, height))
                for path, size, mtime, width, height in self._rows(query, (first, first + rows))
            ]
            kinds = (CODES, FEATURES)[: 1 if self.features == "none" else 2]
            arrays = [[np.load(self.folder / shard_name(kind, number), allow_pickle=False)] for kind in kinds]
            yield Stretch(images, [], *arrays)

    def holds(self, file: File) -> bool:
        """Whether a file is indexed as it was listed."""
        query = "SELECT 1 FROM images WHERE path = ? AND size = ? AND mtime = ? AND status = 'indexed'"
        return bool(self._rows(query, file.row))

    def _rows(self, query: str, values: tuple = ()) -> list[tuple]:
        with self._naming_errors():
            return self.tables.execute(query, values).fetchall()

    # ------------------------------------------------------------ changes

    def commit(self, stretch: Stretch) -> None:
        """Add a shard of the stretch's images, if there are any, and its rows. Images of the same names are removed."""
        self.check_lock()
        number, first = self._rows("SELECT count(*), coalesce(sum(rows), 0) FROM shards")[0]
        digests = {CODES: "", FEATURES: ""}
        if stretch.images:
            arrays = {CODES: stretch.codes} | ({} if self.features == "none" else {FEATURES: stretch.features})
            for kind, parts in arrays.items():
                digests[kind] = write_array(self.folder / shard_name(kind, number), np.concatenate(parts))
        rows = [(first + i, *file.row, *size, "indexed") for i, (file, size) in enumerate(stretch.images)]
        skipped = [(*file.row, reason) for file, reason in stretch.skipped]
        paths = [(row[1],) for row in rows]
        with self.transaction():
            self._remove(paths + [(path,) for path, *_ in skipped])
            self.tables.executemany("DELETE FROM skipped WHERE path = ?", paths)
            self.tables.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self.tables.executemany("INSERT OR REPLACE INTO skipped VALUES (?, ?, ?, ?)", skipped)
            if rows:
                self.tables.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?)",
                                    (number, first, len(rows), *digests.values()))  # fmt: skip

    def forget(self, paths: Iterable[bytes]) -> None:
        """Remove files that are gone, from the images and from those that cannot be used."""
        gone = [(path,) for path in paths]
        with self.transaction():
            self._remove(gone)
            self.tables.executemany("DELETE FROM skipped WHERE path = ?", gone)

    def leave_out(self, paths: Iterable[bytes]) -> None:
        """Remove live images for good: their files are left out until they change."""
        chosen = [(path,) for path in paths]
        copy = f"SELECT path, size, mtime, '{REMOVED}' FROM images WHERE path = ? AND status = 'indexed'"  # noqa: S608
        with self.transaction():
            self.tables.executemany(f"INSERT OR REPLACE INTO skipped {copy}", chosen)
            self._remove(chosen)

    def _remove(self, paths: list[tuple[bytes]]) -> None:
        self.tables.executemany("UPDATE images SET status = 'removed' WHERE path = ? AND status = 'indexed'", paths)

    def chosen(self, names: list[str]) -> list[bytes]:
        """The live images that are named; a name ending in / is that of a folder. Raises InputError if there is none of
        a name, unless it was removed before."""
        found: dict[bytes, None] = {}
        for name in names:
            path = os.fsencode(name)
            if name.endswith("/"):
                rows = self._rows(*below(name, "SELECT path FROM images"))
                before = "SELECT 1 FROM skipped WHERE path > ? AND path < ? AND reason = ?"
                removed = self._rows(before, (path, path[:-1] + b"0", REMOVED))
            else:
                rows = self._rows("SELECT path FROM images WHERE path = ? AND status = 'indexed'", (path,))
                removed = self._rows("SELECT 1 FROM skipped WHERE path = ? AND reason = ?", (path, REMOVED))
            if not rows and not removed:
                raise InputError(f"--remove {printable(name)}: the index has no such image; names are relative to the "
                                 "photos, a folder's ends in /")  # fmt: skip
            found |= {path: None for (path,) in rows}
        return sorted(found)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Raises RunError if the tables cannot be written."""
        with self._naming_errors():
            self.tables.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.tables.execute("COMMIT")
            except BaseException:
                if self.tables.in_transaction:
                    self.tables.execute("ROLLBACK")
                raise

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        path = self.folder / NAMES
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, a folder that is gone
            raise RunError(
                f"{path}: {one_line(error)}; what was committed is kept, the same command goes on"
            ) from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is damaged ({one_line(error)}): delete {self.folder} and index again") from error


# ---------------------------------------------------------------- files


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file atomically. Returns its SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
    return sha256(buffer.getbuffer()).hexdigest()


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write `index.json` atomically."""
    with atomic_write(folder / INDEX) as file:
        file.write(rendered(info))


def write_skipped(folder: Path, skipped: list[tuple[File, str]]) -> None:
    """Write `skipped.csv`: name and reason of each file, sorted by name."""
    with atomic_write(folder / SKIPPED, "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("name", "reason"))
        rows.writerows((printable(file.name), reason) for file, reason in skipped)
