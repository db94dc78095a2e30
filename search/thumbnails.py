"""Small JPEGs of indexed images, made from the files on disk when they are asked for and kept for a while."""

import hashlib
import io
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from search.decode import DecodingPool
    from search.store import Store

MOST_KEPT = 4096
QUALITY = 85


class GoneError(Exception):
    """An image whose file is no longer there, or no longer one that can be decoded."""


class Thumbnails:
    """Thumbnails by id; those asked for last are kept. Thread-safe."""

    def __init__(self, store: "Store", decoder: "DecodingPool") -> None:
        self.store, self.decoder = store, decoder
        self.kept: OrderedDict[str, bytes] = OrderedDict()
        self.lock = threading.Lock()

    def tag(self, id: int) -> str:
        """What identifies the file's content: changes if the file, or the index, does. Raises GoneError, and KeyError
        if there is no such id."""
        try:
            found = self.store.path(id).stat()
        except OSError as error:
            raise GoneError from error
        parts = self.store.info["sha256"], id, found.st_size, found.st_mtime_ns
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def jpeg(self, id: int, tag: str) -> bytes:
        """The image as JPEG, upright. Raises GoneError."""
        with self.lock:
            if tag in self.kept:
                self.kept.move_to_end(tag)
                return self.kept[tag]
        decoded = next(iter(self.decoder.paths([self.store.path(id)])))
        if decoded.pixels is None:
            raise GoneError
        file = io.BytesIO()
        Image.fromarray(decoded.pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=QUALITY)
        with self.lock:
            self.kept[tag] = file.getvalue()
            while len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        return file.getvalue()
