"""A user's own folder of images: which of its files are images."""

import os
from pathlib import Path

from decoding import HEIF_BRANDS, brands_of, open_regular
from utils import LOG, InputError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp",
     ".dib", ".heic", ".heif", ".hif")
)  # fmt: skip
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
DIB_SIZES = frozenset((12, 40, 52, 56, 64, 108, 124))  # of the second header of a BMP


def list_photos(root: Path) -> list[str]:
    """The images below a folder: names from there, as `os.fsdecode` has them, sorted by their bytes.

    An image is a file that has the suffix of a format that is read, or that has no suffix and begins as an image does.
    It may turn out to be damaged, or no regular file: whoever opens it will see. Hidden files and folders are left
    out. Links are followed; a folder that can be reached in several ways is listed once, at its own place if that is
    below `root`. A folder inside that cannot be listed is named in a warning.

    Raises InputError if `root` cannot be listed.
    """
    found: list[str] = []
    folders, links, seen = [Path()], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as listed:
                entries = sorted(listed, key=lambda entry: os.fsencode(entry.name))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if folder == Path():
                raise InputError(f"{root} cannot be listed ({reason}): name a folder of images") from error
            LOG.warning("WARNING: %s cannot be listed (%s): its images are left out", root / folder, reason)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            elif is_photo(Path(entry.path)):
                found.append(str(folder / entry.name))
    return sorted(found, key=os.fsencode)


def shown_name(name: str) -> str:
    """A name in one line that any terminal and file takes: what is not printable stands as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_photo(path: Path) -> bool:
    """Whether a file has an image's suffix, or none and an image's beginning."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (not suffix and _begins_as_image(path))


def _begins_as_image(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            beginning = file.read(256)
    except OSError:
        return False
    webp = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    bmp = beginning[:2] == b"BM" and int.from_bytes(beginning[14:18], "little") in DIB_SIZES
    return beginning.startswith(SIGNATURES) or webp or bmp or bool(brands_of(beginning) & HEIF_BRANDS)
