"""Readers: files on disk -> images and labels. CIFAR-10's batches, split lists, image files, annotation archives."""

import hashlib
import json
import pickle
import re
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar, Protocol

import numpy as np
from PIL import Image

from decoding import (
    EncodedImage,
    NotRegularFileError,
    UprightImage,
    image_fault,
    large_images_allowed,
    open_regular,
    photo_fault,
)
from utils import InputError, RunError, atomic_write, check_writable, one_line, progress_bar

FLICKR25K_CONCEPTS, NUSWIDE_CONCEPTS = 24, 21
MOST_TEXT = 2**28  # bytes of annotations: several times those of NUS-WIDE; an archive that has more is a bomb
PIECE = 2**20  # bytes
CHECKED_AT_ONCE = 64  # image files per task of a thread


# ---------------------------------------------------------------- images and labels


class Digest(Protocol):
    """What hashlib's functions return."""

    def update(self, data: bytes) -> None: ...


@dataclass(frozen=True)
class Images:
    """Images in memory: `pixels` `[n, H, W, 3]` uint8; `labels` `[n]` int64 class ids or `[n, L]` uint8 multi-hot."""

    pixels: np.ndarray
    labels: np.ndarray
    on_disk: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def subset(self, indices: np.ndarray) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])

    def joined(self, other: "Images") -> "Images":
        return Images(np.concatenate([self.pixels, other.pixels]), np.concatenate([self.labels, other.labels]))

    def identities(self) -> np.ndarray:
        """A digest of each image's pixels, `[n]` str: the same in whatever split it is."""
        return np.array([hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in self.pixels])

    def state(self, names: np.ndarray) -> str:
        """Empty: the identities say all."""
        return ""

    def update(self, digest: Digest) -> None:
        """Feed the pixels into a fingerprint; labels are not included."""
        digest.update(np.ascontiguousarray(self.pixels).tobytes())

    def faults(self, workers: int) -> dict[str, str]:
        """Empty: nothing is left to decode."""
        return {}


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk: `names` `[n]`, paths below `root`; `labels` as those of `Images`. `upright`: whether they are a
    user's own, decoded as `UprightImage` does; else as they are stored."""

    root: Path
    names: np.ndarray
    labels: np.ndarray
    upright: bool = False
    on_disk: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def opened(self, index: int) -> Iterator[EncodedImage]:
        """An image, not decoded yet. Raises RunError naming the file if it became unreadable since the run began."""
        path = self.root / self.names[index]
        try:
            with open_regular(path) as file:
                content = file.read()
            with large_images_allowed():
                yield UprightImage(content) if self.upright else EncodedImage(content)
        except Exception as error:  # a damaged image can raise nearly anything
            raise RunError(f"{path} became unreadable during the run ({one_line(error)})") from error

    def picture(self, index: int) -> Image.Image:
        """The whole image as Pillow has it: a copy of OpenCV's array would take longer than decoding by Pillow does."""
        with self.opened(index) as image:
            return image.by_pillow()

    def subset(self, indices: np.ndarray) -> "ImageFiles":
        return replace(self, names=self.names[indices], labels=self.labels[indices])

    def joined(self, other: "ImageFiles") -> "ImageFiles":
        names, labels = (np.concatenate(pair) for pair in ((self.names, other.names), (self.labels, other.labels)))
        return replace(self, names=names, labels=labels)

    def identities(self) -> np.ndarray:
        """The names of the files, `[n]` str."""
        return self.names

    def state(self, names: np.ndarray) -> str:
        """Sizes and times of change of the files with these names, as JSON: they tell whether a file changed."""
        stats = ((self.root / name).stat() for name in names)
        return json.dumps([(stat.st_size, stat.st_mtime_ns) for stat in stats])

    def update(self, digest: Digest) -> None:
        """Feed names and sizes of the files into a fingerprint; labels are not included."""
        sizes = [(self.root / name).stat().st_size for name in self.names]
        digest.update(json.dumps([self.names.tolist(), sizes]).encode())

    def faults(self, workers: int) -> dict[str, str]:
        """Name -> what is wrong with it, for each file that is missing or does not decode. Threads are enough, for
        Pillow releases the interpreter's lock while it decodes."""
        fault_of = photo_fault if self.upright else image_fault
        blocks = [self.names[start : start + CHECKED_AT_ONCE] for start in range(0, len(self), CHECKED_AT_ONCE)]

        def check(block: np.ndarray) -> dict[str, str]:
            return {str(name): fault for name in block if (fault := fault_of(self.root / name))}

        bad: dict[str, str] = {}
        bar = progress_bar(None, "check images", total=len(self))
        with large_images_allowed(), bar, _mapping(workers) as mapped:
            for block, found in zip(blocks, mapped(check, blocks), strict=True):
                bad |= found
                bar.update(len(block))
                bar.set_postfix(bad=len(bad))
        return bad


@contextmanager
def _mapping(workers: int) -> Iterator[Callable]:
    """`map`, by that many threads if there are any; what has not begun when the context ends is left out."""
    if workers == 0:
        yield map
        return
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- arrays


def read_array(path: Path, mmap_mode: str | None = None, advice: str = "move it away") -> np.ndarray:
    """The array in a .npy file. Raises InputError if there is none."""
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable .npy file ({one_line(error)[:200]}): {advice}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is not a .npy file but an archive of them: {advice}")
    return array


# ---------------------------------------------------------------- CIFAR-10


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR-10's batches are made of, NumPy arrays and plain containers, and nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_cifar10_batch(path: Path) -> Images:
    """One file of CIFAR-10's python version: 10,000 images.

    Raises InputError naming the file if it is missing, damaged, unsafe or mislabelled.
    """
    advice = "delete the folder and run with --download_cifar10"
    try:
        with open_regular(path) as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {advice}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"{path} is not a readable CIFAR-10 batch ({one_line(error)}): {advice}") from error
    fault = _batch_fault(batch, path.name)
    if fault:
        raise InputError(f"{path}: {fault}; {advice}")
    pixels = batch["data"].reshape(10000, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(pixels, np.asarray(batch["labels"], dtype=np.int64))


def _batch_fault(batch: object, name: str) -> str | None:
    """What is wrong with an unpickled batch, or None."""
    if not isinstance(batch, dict) or not {"data", "labels", "batch_label"} <= batch.keys():
        return "not a CIFAR-10 batch (no data, labels and batch_label in it)"
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (10000, 3072):
        return "data is not an array of 10000 x 3072 bytes"
    if not isinstance(labels, list) or len(labels) != 10000:
        return "there are not 10000 labels"
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        return "mislabelled, a label is not a whole number from 0 to 9"
    title = "testing batch 1 of 1" if name == "test_batch" else f"training batch {name[-1]} of 5"
    found = batch["batch_label"]
    if not isinstance(found, str) or found != title:
        return f"mislabelled, the file says it is {str(found)[:40]!r} instead of {title!r}"
    return None


def download_cifar10(folder: Path) -> None:
    """Let torchvision download and unpack CIFAR-10 into `folder`. Raises InputError if that fails."""
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(folder), download=True)
    except Exception as error:  # network, proxy, checksum, disk
        raise InputError(
            f"--download_cifar10 failed ({one_line(error)}): check the network, or fetch cifar-10-python.tar.gz "
            f"elsewhere and unpack it into {folder}"
        ) from error


# ---------------------------------------------------------------- lists


def read_flickr25k(folder: Path, root: Path) -> ImageFiles:
    """Flickr25K's lists: `img.txt` has a file name per line, `targets.txt` 24 zeros and ones.

    Raises InputError naming file and line of what is wrong.
    """
    names_path, labels_path = folder / "img.txt", folder / "targets.txt"
    names, labels = (read_lines(path, "prepare_flickr25k.py") for path in (names_path, labels_path))
    if len(names) != len(labels):
        raise InputError(f"{names_path} has {len(names)} lines but {labels_path} {len(labels)}: one of them is cut off")
    rows = [_labels(line.split(), FLICKR25K_CONCEPTS, f"{labels_path}:{i}") for i, line in enumerate(labels, start=1)]
    return ImageFiles(root, checked_names(names, names_path), np.array(rows, dtype=np.uint8))


def read_nuswide(path: Path, root: Path) -> ImageFiles:
    """One of NUS-WIDE's lists: `concept/file.jpg` and 21 zeros and ones per line.

    Raises InputError naming file and line of what is wrong.
    """
    fields = [line.split() for line in read_lines(path, "prepare_nuswide.py")]
    rows = [_labels(row[1:], NUSWIDE_CONCEPTS, f"{path}:{i}") for i, row in enumerate(fields, start=1)]
    return ImageFiles(root, checked_names([row[0] for row in fields], path), np.array(rows, dtype=np.uint8))


def read_lines(path: Path, script: str) -> list[str]:
    """The lines of a list. Raises InputError if it is missing (naming the script that makes it), empty, has an empty
    line or is not text."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: scripts/{script} makes it from the annotations of its makers") from None
    except NotRegularFileError as error:
        raise InputError(f"{path} {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable text file ({one_line(error)})") from error
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}:{i}: the line is empty" if len(lines) > 1 else f"{path} is empty")
    return [line.strip() for line in lines]


def _labels(fields: list[str], width: int, place: str) -> list[int]:
    if len(fields) != width:
        raise InputError(f"{place}: {len(fields)} labels instead of {width}")
    for field in fields:
        if field not in ("0", "1"):
            raise InputError(f"{place}: a label is {field[:20]!r} instead of 0 or 1")
    return [int(field) for field in fields]


def checked_names(names: list[str], place: Path | str, spaces: bool = True) -> np.ndarray:
    """Names of images in their shortest form, `[n]` str. Raises InputError naming `place` and line if one stands there
    twice, is outside the image folder or, unless `spaces` are allowed, has one."""
    first: dict[str, int] = {}
    for i, name in enumerate(names, start=1):
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise InputError(f"{place}:{i}: {name[:80]!r} is no path below the image folder")
        if not spaces and len(name.split()) != 1:
            raise InputError(f"{place}:{i}: {name[:80]!r} has a space, which ends a name in a list")
        if first.setdefault(str(path), i) != i:
            raise InputError(f"{place}:{i}: {name[:80]!r} stands in line {first[str(path)]} already")
    return np.array(list(first))


# ---------------------------------------------------------------- the makers' annotations


def read_texts(source: Path, pattern: str) -> dict[str, str]:
    """The text files whose path ends like the regular expression `pattern`, of a folder or a zip archive: name of the
    file -> content. Raises InputError if there is no such source, it is damaged or has more than `MOST_TEXT`."""
    wanted = re.compile(rf"(.*/)?{pattern}")
    contents, left, place = {}, MOST_TEXT, str(source)
    try:
        with _text_files(source) as files:
            for name in filter(wanted.fullmatch, sorted(files)):
                place = f"{source}, {name}"
                content = bytearray()
                with files[name]() as file:
                    while piece := file.read(PIECE):  # what an archive says of its sizes may be a lie
                        content += piece
                        left -= len(piece)
                        if left < 0:
                            raise InputError(f"{place}: more than {MOST_TEXT >> 20} MiB of text, no annotations")
                contents[PurePosixPath(name).name] = content.decode("utf-8")
        return contents
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{place} does not exist: it must be a folder or a zip archive of annotations") from None
    except NotRegularFileError as error:
        raise InputError(f"{place} {error}") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        raise InputError(f"{place} is not a readable zip archive of annotations ({one_line(error)})") from error


def claim_folder(folder: Path, names: list[str]) -> None:
    """Make the folder that lists of these names will go to. Raises InputError if none could be written."""
    if any((folder / name).is_dir() for name in names):
        raise InputError(f"{folder}: a folder is in the way of a list")
    check_writable(folder)


def write_lists(folder: Path, contents: dict[str, list[str]], force: bool) -> None:
    """Write text files of one line per entry. Raises InputError, before anything is written, if one is there with other
    content, unless `force`."""
    texts = {folder / name: "".join(f"{line}\n" for line in lines) for name, lines in contents.items()}
    new = {path: text for path, text in texts.items() if not (path.is_file() and path.read_bytes() == text.encode())}
    there = [str(path) for path in new if path.exists()]
    if there and not force:
        raise InputError(f"{', '.join(there)}: there already; --force writes over it")
    for path, text in new.items():
        with atomic_write(path, "w") as file:
            file.write(text)


@contextmanager
def _text_files(source: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """Name of each text file of a folder or a zip archive -> what opens it."""
    if source.is_dir():
        paths = {path.relative_to(source.parent).as_posix(): path for path in source.rglob("*.txt")}
        yield {name: partial(open_regular, path) for name, path in paths.items()}
    else:
        with open_regular(source) as file, zipfile.ZipFile(file) as archive:
            yield {name: partial(archive.open, name) for name in archive.namelist()}
