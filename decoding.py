"""One image file: what is wrong with it, and its pixels, by OpenCV or by Pillow; as it is stored, or upright."""

import io
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

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
        self.content, self.header = content, self.opened(file)
        self.scan = file.tell()  # Pillow reads a JPEG up to here
        self.size = self.stored = self.header.size

    @staticmethod
    def opened(file: IO[bytes]) -> ImageFile.ImageFile:
        """The image, its header read."""
        return Image.open(file)

    def decoded(self, least: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels `[h, w, 3]` uint8. A JPEG comes at 1, 1/2, 1/4 or 1/8 of its size, the smallest at which width and
        height are at least `least`.

        Whole files with three channels are decoded by OpenCV, all others by Pillow: the same library decodes JPEG in
        both, to the same bytes, but OpenCV is faster and takes damaged files without a word. Pillow raises.
        """
        pixels = self._by_opencv(self.scale(least) if least else 1)
        return np.array(self.by_pillow(least)) if pixels is None else pixels

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
        whole = min(self.stored[0] // least[0], self.stored[1] // least[1])
        return next((scale for scale in (8, 4, 2) if whole >= scale), 1)

    def _by_opencv(self, scale: int) -> np.ndarray | None:
        """The pixels of a JPEG that is sound, as they are stored; None if Pillow is to decode the image."""
        if self.header.format != "JPEG" or self.header.mode != "RGB" or not self._whole():
            return None
        pixels = _decoded_by_opencv(self.content, scale)
        whole = pixels is not None and pixels.shape == (-(-self.stored[1] // scale), -(-self.stored[0] // scale), 3)
        return pixels if whole else None

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


# ---------------------------------------------------------------- a user's own images, upright


MOST_PIXELS = 2**27  # 134 million: larger images are refused before anything of them is decoded
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "TIFF", "BMP")  # Pillow's names
ORIENTATION = 0x0112  # EXIF's and TIFF's tag
WIDTH, HEIGHT = 256, 257  # TIFF's tags: of the image as it is stored
HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
AVIF_BRANDS = frozenset((b"avif", b"avis"))
HEIF_BRANDS = HEIC_BRANDS | AVIF_BRANDS


class UnusableImageError(ValueError):
    """An image that cannot be used; its message is the reason."""


class UprightImage(EncodedImage):
    """An image as a viewer shows it: of one of `FORMATS`, its first frame, turned as EXIF says, in RGB.

    `size` (width, height) is that of the upright image; no pixel is decoded for it. Values of 16 bits and of floats are
    scaled to bytes, transparency is laid over white, colour profiles are not applied.

    Raises UnusableImageError if the image is too large, or of a format that cannot be read here; nearly anything,
    here or when it is decoded, if the content is damaged. `reason_of` says it in a line.
    """

    def __init__(self, content: bytes) -> None:
        with quietly():
            super().__init__(content)
            self.orientation = self._orientation()
            if self.header.format == "TIFF":  # Pillow may have turned its size already, depending on the version
                self.size = tuple(int(self.header.tag_v2[tag]) for tag in (WIDTH, HEIGHT))
        if self.orientation >= 5:  # stored lying on its side
            self.size = self.size[::-1]
        if self.size[0] * self.size[1] > MOST_PIXELS:
            raise UnusableImageError(f"has {self.size[0]} x {self.size[1]} pixels, more than {MOST_PIXELS}")

    @staticmethod
    def opened(file: io.BytesIO) -> ImageFile.ImageFile:
        beginning = file.getvalue()[:256]
        if not beginning:
            raise UnusableImageError("is empty")
        return Image.open(file, formats=readable_formats(beginning))

    def decoded(self, least: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels `[h, w, 3]` uint8, upright; see `EncodedImage.decoded`."""
        stored = least[::-1] if least and self.orientation >= 5 else least
        pixels = self._by_opencv(self.scale(stored) if stored else 1)
        return np.array(self.by_pillow(least)) if pixels is None else turned(pixels, self.orientation)

    def by_pillow(self, least: tuple[int, int] | None = None) -> Image.Image:
        """The same as a picture, by Pillow alone."""
        with quietly():
            if least:
                self.header.draft("RGB", least[::-1] if self.orientation >= 5 else least)
            self.header.load()
            picture = as_rgb(self.header)
            orientation = self._orientation()  # none is left where Pillow turned the image itself
        return picture if orientation == 1 else Image.fromarray(turned(np.asarray(picture), orientation))

    def _orientation(self) -> int:
        """EXIF's number, 1 to 8; 1 if there is none or it cannot be read."""
        try:
            exif = Image.Image.getexif(self.header)  # PNG's own decodes the image first
            late = self.content.rfind(b"eXIf") if self.header.format == "PNG" and not exif else -1
            if late >= 0:  # behind the pixels
                exif.load(self.content[late + 4 :])
            found = exif.get(ORIENTATION, 1)
        except Exception:  # a damaged block can raise nearly anything, and is no reason to lose the image
            return 1
        return found if isinstance(found, int) and 1 <= found <= 8 else 1


def readable_formats(beginning: bytes) -> list[str]:
    """Those of `FORMATS` that Pillow can read here. Raises UnusableImageError if the file, which begins so, needs
    another version or package."""
    brands = brands_of(beginning)
    if brands & AVIF_BRANDS:
        if not features.check("avif"):
            raise UnusableImageError("AVIF needs Pillow >= 11.3: pip install -U pillow")
    elif brands & HEIC_BRANDS and not _heic_registered():
        raise UnusableImageError("HEIC needs pillow-heif: pip install -r requirements-extra.txt")
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def brands_of(beginning: bytes) -> set[bytes]:
    """What a HEIC or AVIF file says it is, four letters each; empty for others."""
    length = min(int.from_bytes(beginning[:4], "big"), len(beginning))
    box = beginning[8:length] if beginning[4:8] == b"ftyp" else b""
    return {box[start : start + 4] for start in range(0, len(box), 4)}


@cache
def _heic_registered() -> bool:
    """Whether Pillow can read HEIC from now on."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels `[h, w, 3]` as they are stored -> upright, by EXIF's number."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB: what is transparent lies over white, levels that are no bytes are scaled."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(as_bytes(np.asarray(image)))
    if {"A", "a"} & {*image.getbands()} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def as_bytes(levels: np.ndarray) -> np.ndarray:
    """Grey levels `[h, w]` as uint8: integers of 16 bits by their upper half; floats in [0, 1] or [0, 255] by these
    ranges; all others stretched from the least to the greatest."""
    whole = levels.dtype.kind in "iu"
    values = np.nan_to_num(levels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    top = next((top for top in ((65535,) if whole else (1, 255, 65535)) if low >= 0 and high <= top), None)
    if top == 65535:
        return (values // 256).astype(np.uint8)
    low, top = (low, high - low) if top is None else (0, top)
    return np.rint((values - low) * (255 / top)).astype(np.uint8)


@contextmanager
def quietly() -> Iterator[None]:
    """Without Pillow's warnings about large images and odd metadata: what it can read is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reason_of(error: BaseException) -> str:
    """One line, the same on every machine, on why a file could not be read or decoded."""
    if isinstance(error, UnusableImageError | NotRegularFileError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, PermissionError):
        return "must not be read"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that can be read (JPEG, PNG, WebP, AVIF, HEIC, GIF, TIFF, BMP)"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {MOST_PIXELS} pixels"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    reason = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "it", one_line(error))
    return f"does not decode ({reason.encode('ascii', 'backslashreplace').decode()[:160]})"


def photo_fault(path: Path) -> str:
    """What is wrong with one of a user's own images; empty if it decodes."""
    try:
        with open_regular(path) as file:
            content = file.read()
        UprightImage(content).decoded(least=(1, 1))  # JPEG at an eighth of its size
    except Exception as error:  # a damaged image can raise nearly anything
        return reason_of(error)
    return ""
