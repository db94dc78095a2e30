"""An index being made: begun with a copy of the model, brought up to date, finished with what is made of all codes."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.store import (
    FORMAT,
    INDEX,
    MODEL,
    MODEL_FILES,
    NAMES,
    SEARCH,
    SKIPPED,
    Store,
    damaged,
    is_whole,
    printable,
    read_info,
)
from search.writing import REMOVED, File, Writer, write_info, write_skipped
from utils import InputError, atomic_write, check_writable, progress_bar, sha256

if TYPE_CHECKING:
    from search.encoder import Encoder
    from search.encoding import Machine

SHARD = 4096  # images
LOCK, PARTS = ".lock", "parts"


@dataclass(frozen=True)
class Request:
    """The index that is asked for. What is None is as it was, or at its default."""

    folder: Path
    photos: Path | None
    model: Path | None
    features: str | None = None
    kind: str | None = None
    shard: int | None = None
    update: bool = False
    remove: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """What images are encoded on: a device, processes that decode, and how long one may take for an image."""

    device: str
    num_workers: int
    decode_seconds: float


# ---------------------------------------------------------------- what is there, and what is asked for


def claim(folder: Path) -> None:
    """Make the index's folder. Raises InputError if it holds something else."""
    check_writable(folder)
    ours = {LOCK, MODEL, f".{INDEX}.tmp"}
    if not (folder / INDEX).exists() and (others := sorted({path.name for path in folder.iterdir()} - ours)):
        raise InputError(f"{folder} is no index, and not empty ({others[0]}): name another folder")


def existing(request: Request) -> dict[str, Any] | None:
    """What `index.json` says; None if there is none.

    Raises InputError if it is finished and the flags do not say what to do with it, or if they do not fit it.
    """
    folder = request.folder
    if not (folder / INDEX).exists():
        if request.photos is None or request.model is None or request.remove:
            raise InputError(f"{folder} is no index yet: give PHOTOS and --model, and no --remove")
        return None
    info = read_info(folder)
    if info["complete"] and not request.update and not request.remove:
        raise InputError(f"{folder} is there already: --update brings it up to date, --remove takes images out; or "
                         "name another folder")  # fmt: skip
    if request.photos is not None and absolute(request.photos) != info["root"]:
        raise InputError(
            f"{request.photos}: {folder} is of {printable(info['root'])}; name another folder for another index"
        )
    for flag in ("features", "shard"):
        if getattr(request, flag) not in (None, info[flag]):
            raise InputError(f"--{flag} {getattr(request, flag)}: {folder} was made with {info[flag]}")
    if request.model is not None and _model_sha256(request.model) != info["model_sha256"]:
        raise InputError(f"--model {request.model}: {folder} was made with another model; name another folder")
    for name, digest in kept_files(info).items():
        if not is_whole(folder, name, digest):
            raise damaged(folder, name)
    return info


def kept_files(info: dict[str, Any]) -> dict[str, str]:
    """Name -> SHA-256 of the files that cannot be made anew, besides the shards."""
    names = [f"{MODEL}/{name}" for name in MODEL_FILES] + [NAMES] * info["complete"]
    return {name: info["files"][name] for name in names}


def _model_sha256(run: Path) -> str:
    try:
        return sha256(run / MODEL_FILES[0])
    except OSError as error:
        raise InputError(f"--model {run}: {MODEL_FILES[0]} cannot be read ({error.strerror})") from error


# ---------------------------------------------------------------- the work


class Making:
    """An index being made by a process that holds its lock. `info`: what goes into `index.json`.

    Raises InputError if what is asked for does not fit what is there.
    """

    def __init__(self, request: Request, hardware: Hardware) -> None:
        claim(request.folder)
        self.request, self.hardware, self.folder = request, hardware, request.folder
        found = existing(request)
        self.files = None if found and found["complete"] and not request.update else self._list(found)
        self.info = found or self._create()
        self.base = Path(self.info["base"])

    def _list(self, found: dict[str, Any] | None) -> list[File]:
        from search.encoding import list_files

        source = Path(found["root"]) if found else self.request.photos
        if source.is_dir() and self.folder.resolve().is_relative_to(source.resolve()):
            raise InputError(f"-o {self.folder} is inside of {source}: name a folder elsewhere")
        return list_files(source)

    def _create(self) -> dict[str, Any]:
        """Copy the model and describe an index without images."""
        run, copy = self.request.model, self.folder / MODEL
        encoder = load_encoder(run, self.hardware.device)
        copy.mkdir(exist_ok=True)
        for name in MODEL_FILES:
            with atomic_write(copy / name) as file:
                file.write((run / name).read_bytes())
        files = {f"{MODEL}/{name}": sha256(copy / name) for name in MODEL_FILES}
        if encoder.model_sha256 != files[f"{MODEL}/{MODEL_FILES[0]}"]:
            raise InputError(f"--model {run}: it changed while it was read; is it still being trained?")
        self.encoder = encoder
        info = described(self.request, encoder) | {"files": files}
        write_info(self.folder, info)
        return info

    @cached_property
    def encoder(self) -> "Encoder":
        """The index's own model. Raises InputError if this version would make other codes by it."""
        if self.info["transform"] != photo_transform():
            raise InputError(f"{self.folder} was made by another version, which decodes otherwise: index again")
        return load_encoder(self.folder / MODEL, self.hardware.device)

    def changes(self, writer: Writer) -> tuple[list[File], list[bytes]]:
        """The files that are new or changed, in their order, and the paths of those that are gone, sorted. What is in a
        folder that cannot be listed for now is not gone."""
        if self.files is None:
            return [], []
        known, pending = writer.known(), []
        for file in self.files:
            path, *state = file.row
            if known.pop(path, None) != state:
                pending.append(file)
        out = {os.fsencode(file.name) for file, reason in writer.skipped() if reason == REMOVED}
        missing = sorted(known.keys() - out)
        unread = {place for place in set(map(folder_of, missing)) if not can_be_listed(self.base, place)}
        return pending, [path for path in missing if folder_of(path) not in unread]

    def is_ready(self) -> bool:
        """Whether the index is finished, of the kind that is asked for, and what can be made anew is whole."""
        if not self.info["complete"] or self.request.kind not in (None, self.info["kind"]):
            return False
        return all(is_whole(self.folder, name, self.info["files"][name]) for name in (SEARCH, SKIPPED))

    def begin(self) -> None:
        """Mark the index as not finished."""
        self.info["kind"] = self.request.kind or self.info["kind"]
        self.info["complete"] = False
        self.info["files"] = kept_files(self.info)
        write_info(self.folder, self.info)

    @contextmanager
    def machine(self) -> "Iterator[Machine]":
        """What images go through, while the context lasts."""
        from search.decode import DecodingPool
        from search.encoding import Machine

        encoder = self.encoder
        with DecodingPool(encoder.image_size, self.hardware.num_workers, self.hardware.decode_seconds) as pool:
            yield Machine(pool, encoder)

    def encode(self, machine: "Machine", writer: Writer, files: list[File]) -> None:
        """Encode files into the writer's shards."""
        from search.encoding import Shards

        with progress_bar(None, "index", total=len(files)) as bar:
            bar.unit = " images"
            Shards(machine, writer, self.base, self.info["shard"]).encode(files, bar)

    def finish(self, machine: "Machine", writer: Writer) -> None:
        """Write `search.faiss`, `skipped.csv` and, last, `index.json`."""
        from search import ann
        from search.encoding import HELD_BACK

        store, info = Store(self.folder, self.info), self.info
        n = len(store.ids)
        write_skipped(self.folder, writer.skipped())
        if n == 0:
            raise InputError(f"{self.folder}: no image is left to search; {SKIPPED} says why files are left out")
        kind = ann.kind_for(n) if info["kind"] == "auto" else info["kind"]
        held = store.ids[:: max(n // HELD_BACK, 1)][:HELD_BACK] if kind == "ivf" else []
        vectors = machine.vectors(store.path(image) for image in held)
        info["index"] = ann.build(self.folder / SEARCH, machine.encoder.codewords, store.codes(), kind, vectors)
        store.close()
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        info |= {"complete": True, "images": n, "next_id": writer.next_id(), "versions": versions()}
        info["files"] |= writer.files() | {name: sha256(self.folder / name) for name in (NAMES, SEARCH, SKIPPED)}
        writer.check_lock()
        write_info(self.folder, info)


def described(request: Request, encoder: "Encoder") -> dict[str, Any]:
    """What `index.json` says of an index without images."""
    from search.encoding import base_of

    return {
        "format": FORMAT,
        "complete": False,
        "model_sha256": encoder.model_sha256,
        "method": encoder.method,
        "M": encoder.M,
        "K": encoder.K,
        "D": encoder.M * encoder.codewords.shape[2],
        "F": encoder.F,
        "bits": encoder.M * (encoder.K - 1).bit_length(),
        "transform": photo_transform(),
        "features": request.features or "int8",
        "root": absolute(request.photos),
        "base": absolute(base_of(request.photos)),
        "shard": request.shard or SHARD,
        "kind": request.kind or "auto",
        "images": 0,
        "next_id": 0,
        "files": {},
        "index": {},
        "versions": {},
    }


def absolute(path: Path) -> str:
    """The path from the root, links as they are."""
    return os.path.abspath(path)  # noqa: PTH100


def can_be_listed(base: Path, place: bytes) -> bool:
    """Whether it can be told what is in a folder below `base`, and in those around it; of one that is gone, it can:
    nothing."""
    try:
        os.scandir(os.path.join(os.fsencode(base), place)).close()  # noqa: PTH118
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return False
    return not place or can_be_listed(base, folder_of(place))


def folder_of(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def photo_transform() -> str:
    """How images become pixels in this version."""
    from transforms import PHOTO_TRANSFORM

    return PHOTO_TRANSFORM


def load_encoder(folder: Path, device: str) -> "Encoder":
    """The model in a folder."""
    from search.decode import start_server

    start_server()  # it imports for seconds, and so does this process
    from search.encoder import Encoder

    return Encoder(folder, device)


def versions() -> dict[str, str]:
    """Those of the packages that codes and their search depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow", "faiss-cpu")}


def say(line: str) -> None:
    """Print a line that may hold names of any kind."""
    print(printable(line))


def report_skipped(writer: Writer) -> int:
    """Say how many files cannot be used, and return it."""
    skipped = sum(reason != REMOVED for _, reason in writer.skipped())
    if skipped:
        say(f"{writer.folder / SKIPPED}: {skipped} files that cannot be used")
    return skipped
