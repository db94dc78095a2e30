"""Which image files, with which labels? The split lists of Flickr25K and NUS-WIDE, and the images they name."""

import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from utils import InputError, RunError, atomic_write, check_writable, leave_signals, one_line, progress_bar

FLICKR25K_CONCEPTS, NUSWIDE_CONCEPTS = 24, 21


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk: `names` `[n]`, paths below `root`; `labels` `[n, L]` uint8 multi-hot rows."""

    root: Path
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """An image that is not decoded yet. Raises RunError naming the file where it can no longer be read: it could
        when the run began."""
        path = self.root / self.names[index]
        try:
            with _opened(path) as image:
                yield image
        except Exception as error:  # a damaged image can raise nearly anything
            raise RunError(f"{path} became unreadable during the run ({one_line(error)})") from error

    def picture(self, index: int) -> Image.Image:
        with self.opened(index) as image:
            return image.convert("RGB")

    def subset(self, indices: np.ndarray) -> "ImageFiles":
        return ImageFiles(self.root, self.names[indices], self.labels[indices])

    def joined(self, other: "ImageFiles") -> "ImageFiles":
        both = (np.concatenate(pair) for pair in ((self.names, other.names), (self.labels, other.labels)))
        return ImageFiles(self.root, *both)


# ---------------------------------------------------------------- lists


def read_flickr25k(folder: Path, root: Path) -> ImageFiles:
    """Flickr25K's lists: `img.txt` has a file name a line, `targets.txt` 24 zeros and ones.

    Raises InputError naming file and line of what is wrong.
    """
    names_path, labels_path = folder / "img.txt", folder / "targets.txt"
    names, labels = (read_lines(path, "prepare_flickr25k.py") for path in (names_path, labels_path))
    if len(names) != len(labels):
        raise InputError(f"{names_path} has {len(names)} lines but {labels_path} {len(labels)}: one of them is cut off")
    rows = [_labels(line.split(), FLICKR25K_CONCEPTS, f"{labels_path}:{i}") for i, line in enumerate(labels, start=1)]
    return ImageFiles(root, _names(names, names_path), np.array(rows, dtype=np.uint8))


def read_nuswide(path: Path, root: Path) -> ImageFiles:
    """One of NUS-WIDE's lists: `concept/file.jpg` and 21 zeros and ones a line.

    Raises InputError naming file and line of what is wrong.
    """
    fields = [line.split() for line in read_lines(path, "prepare_nuswide.py")]
    rows = [_labels(row[1:], NUSWIDE_CONCEPTS, f"{path}:{i}") for i, row in enumerate(fields, start=1)]
    return ImageFiles(root, _names([row[0] for row in fields], path), np.array(rows, dtype=np.uint8))


def read_lines(path: Path, script: str) -> list[str]:
    """The lines of a list. Raises InputError where it is missing (naming the script that makes it), empty, has an empty
    line or is no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: scripts/{script} makes it from the annotations of its makers") from None
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


def _names(names: list[str], path: Path) -> np.ndarray:
    """The names as an array, none of them twice, none of them outside the image folder."""
    first: dict[str, int] = {}
    for i, name in enumerate(names, start=1):
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
            raise InputError(f"{path}:{i}: {name[:80]!r} is no path below the image folder")
        if first.setdefault(name, i) != i:
            raise InputError(f"{path}:{i}: {name[:80]!r} stands in line {first[name]} already")
    return np.array(names)


# ---------------------------------------------------------------- the makers' annotations


def read_texts(source: Path, pattern: str) -> dict[str, str]:
    """The text files whose path ends like the regular expression `pattern`, of a folder or a zip archive: name of the
    file -> content. Raises InputError where there is no such source or it is damaged."""
    wanted = re.compile(rf"(.*/)?{pattern}")
    try:
        if source.is_dir():
            files = {path.relative_to(source.parent).as_posix(): path for path in sorted(source.rglob("*.txt"))}
            found = {name: path.read_bytes() for name, path in files.items() if wanted.fullmatch(name)}
        else:
            with zipfile.ZipFile(source) as archive:
                found = {name: archive.read(name) for name in archive.namelist() if wanted.fullmatch(name)}
        return {PurePosixPath(name).name: content.decode("utf-8") for name, content in found.items()}
    except FileNotFoundError:
        raise InputError(f"{source} does not exist: it must be a folder or a zip archive of annotations") from None
    except (zipfile.BadZipFile, zlib.error, OSError, UnicodeDecodeError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{source} is not a readable zip archive of annotations ({one_line(error)})") from error


def claim_folder(folder: Path, names: list[str], force: bool) -> None:
    """Make the folder that lists of these names will go to. Raises InputError where one is there already, unless
    `force`, or where none could be written."""
    there = [str(folder / name) for name in names if (folder / name).exists()]
    if there and not force:
        raise InputError(f"{', '.join(there)}: there already; --force writes over it")
    if any(Path(path).is_dir() for path in there):
        raise InputError(f"{folder}: a folder stands where a list should go")
    check_writable(folder)


def write_lists(folder: Path, contents: dict[str, list[str]]) -> None:
    """Write text files of one line an entry."""
    for name, lines in contents.items():
        with atomic_write(folder / name, "w") as file:
            file.writelines(f"{line}\n" for line in lines)


# ---------------------------------------------------------------- images


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file. Pillow refuses bombs; its warning about merely large ones is no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def image_fault(path: Path) -> str:
    """What is wrong with an image file; empty where it decodes."""
    try:
        with _opened(path) as image:
            image.draft("RGB", (1, 1))  # JPEG at an eighth of its size: cheaper, and damage shows all the same
            image.load()
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # a damaged image can raise nearly anything
        reason = one_line(error).replace(str(path), "it")
        return f"does not decode ({reason})"
    return ""


class _Faults(Dataset):
    def __init__(self, root: Path, names: np.ndarray) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return image_fault(self.root / self.names[index])


def find_bad_images(root: Path, names: np.ndarray, workers: int) -> dict[str, str]:
    """Name -> what is wrong with it, for each of `names` that is missing below `root` or does not decode."""
    options = {"generator": torch.Generator(), "worker_init_fn": leave_signals}
    loader = DataLoader(_Faults(root, names), batch_size=64, num_workers=workers, collate_fn=list, **options)
    bad: dict[str, str] = {}
    with progress_bar(None, "check images", total=len(names)) as bar:
        for start, faults in zip(range(0, len(names), 64), loader, strict=True):
            bad |= {str(name): fault for name, fault in zip(names[start : start + 64], faults, strict=True) if fault}
            bar.update(len(faults))
            bar.set_postfix(bad=len(bad))
    return bad
