"""Small JPEGs of indexed images, made from the files on disk when they are asked for and kept for a while."""

import hashlib
import io
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from search.decode import Decoded, DecodingPool

if TYPE_CHECKING:
    from search.store import Store

SIDE = 240  # pixels
MOST_KEPT = 4096
QUALITY = 85


class GoneError(Exception):
    """An image whose file is no longer there, or no longer one that can be decoded."""


def decode_square(content: bytes, side: int) -> Decoded:
    """The middle of an image, upright: `[3, side, side]` uint8. What a `DecodingPool` does for thumbnails."""
    from decoding import UprightImage, reason_of

    try:
        image = UprightImage(content)
        picture = Image.fromarray(image.decoded((side, side)))
        square = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
        return Decoded(np.asarray(square).transpose(2, 0, 1), image.size, "")
    except Exception as error:  # a damaged image can raise nearly anything
        return Decoded(None, (0, 0), reason_of(error))


class Thumbnails:
    """Thumbnails by id; those asked for last are kept. Thread-safe.

    Args:
        decoder: a pool of `decode_square`.
    """

    def __init__(self, store: "Store", decoder: DecodingPool) -> None:
        self.store, self.decoder = store, decoder
        self.kept: OrderedDict[str, bytes] = OrderedDict()
        self.lock = threading.Lock()

    def tag(self, image: int) -> str:
        """A name for what the file holds: another one if the file, or the index, has changed. Raises GoneError, and
        KeyError if there is no such id."""
        try:
            found = self.store.path(image).stat()
        except OSError as error:
            raise GoneError from error
        parts = self.store.info["sha256"], image, found.st_size, found.st_mtime_ns
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def jpeg(self, image: int, tag: str) -> bytes:
        """The image as JPEG. Raises GoneError."""
        with self.lock:
            if tag in self.kept:
                self.kept.move_to_end(tag)
                return self.kept[tag]
        decoded = next(self.decoder.paths([self.store.path(image)]))
        if decoded.pixels is None:
            raise GoneError
        file = io.BytesIO()
        Image.fromarray(decoded.pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=QUALITY)
        with self.lock:
            self.kept[tag] = file.getvalue()
            while len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        return file.getvalue()
