"""One image file: what is wrong with it, and its pixels, by OpenCV or by Pillow."""

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
from PIL import Image

from utils import one_line


class NotRegularFileError(OSError):
    """A folder, FIFO or device in place of a file: opening one may wait for ever."""

    def __init__(self) -> None:
        super().__init__("is not a regular file")


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises NotRegularFileError, or OSError as `open` does."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegularFileError
    return path.open("rb")


class EncodedImage:
    """An image file's content: its `size` (width, height) is read, its pixels are not decoded yet."""

    # what may follow a byte 0xff of a scan: nothing, padding, a restart, the end; between progressive scans also tables
    FOLLOWS = (0x00, 0xFF, 0xD9, *range(0xD0, 0xD8))
    BETWEEN_SCANS = (0xC4, 0xDA)

    def __init__(self, content: bytes) -> None:
        file = io.BytesIO(content)
        self.content, self.header = content, Image.open(file)
        self.scan = file.tell()  # Pillow reads a JPEG up to here
        self.size = self.header.size

    def decoded(self, least: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels `[h, w, 3]` uint8. A JPEG comes at 1, 1/2, 1/4 or 1/8 of its size, the smallest at which width and
        height are at least `least`.

        Whole files with three channels are decoded by OpenCV, all others by Pillow: the same library decodes JPEG in
        both, to the same bytes, but OpenCV is faster and takes damaged files without a word. Pillow raises.
        """
        scale = self.scale(least) if least else 1
        if self.header.format == "JPEG" and self.header.mode == "RGB" and self._whole():
            pixels = _decoded_by_opencv(self.content, scale)
            if pixels is not None and pixels.shape == (-(-self.size[1] // scale), -(-self.size[0] // scale), 3):
                return pixels
        return np.array(self.by_pillow(least))

    def by_pillow(self, least: tuple[int, int] | None = None) -> Image.Image:
        """The same as a picture, of any kind of image, by Pillow alone. Raises nearly anything if it is damaged."""
        if least:
            self.header.draft("RGB", least)
        if self.header.mode.startswith("I"):  # 16 bits: Pillow would clip them to black and white
            high = np.asarray(self.header).clip(0, 65535) >> 8
            return Image.fromarray(high.astype(np.uint8)).convert("RGB")
        return self.header.convert("RGB")

    def scale(self, least: tuple[int, int]) -> int:
        """The reduction that Pillow's draft mode picks: 1, 2, 4 or 8."""
        whole = min(self.size[0] // least[0], self.size[1] // least[1])
        return next((scale for scale in (8, 4, 2) if whole >= scale), 1)

    def _whole(self) -> bool:
        """Whether the content ends as a JPEG does and has no marker inside its scans that does not belong there."""
        scans = np.frombuffer(self.content, np.uint8)[self.scan :]
        counts = np.bincount(scans[np.flatnonzero(scans[:-1] == 0xFF) + 1], minlength=256)
        expected = self.FOLLOWS + (self.BETWEEN_SCANS if "progressive" in self.header.info else ())
        return self.content.endswith(b"\xff\xd9") and counts[0xD9] == 1 and counts.sum() == counts[[*expected]].sum()


@cache
def opencv() -> ModuleType:
    """OpenCV, on one thread: data loaders have a process per core."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def _decoded_by_opencv(content: bytes, scale: int) -> np.ndarray | None:
    """A JPEG's pixels, RGB, as they are stored: no EXIF orientation. None if OpenCV cannot decode it."""
    cv2 = opencv()
    flags = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
             8: cv2.IMREAD_REDUCED_GRAYSCALE_8}[scale] | cv2.IMREAD_IGNORE_ORIENTATION  # fmt: skip
    rgb = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since 4.11
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags | (rgb or cv2.IMREAD_COLOR))
        return pixels if rgb or pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    except cv2.error:
        return None


@contextmanager
def large_images_allowed() -> Iterator[None]:
    """Without Pillow's warning about large images, which is no news to the user; it refuses bombs all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def image_fault(path: Path) -> str:
    """What is wrong with an image file; empty if it decodes."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            image.draft("RGB", (1, 1))  # JPEG at an eighth of its size: cheaper, and damage shows all the same
            image.load()
    except FileNotFoundError:
        return "is missing"
    except NotRegularFileError as error:
        return str(error)
    except Exception as error:  # a damaged image can raise nearly anything
        reason = one_line(error).replace(str(path), "it")
        return f"does not decode ({reason})"
    return ""
