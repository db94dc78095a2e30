"""A small index without faiss and without a model, for tests of the page and its server."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from helpers import write_photos
from PIL import Image

from search.api import Api, Limits
from search.decode import Decoded, decode_photo
from search.searcher import Hit, Options
from search.thumbnails import Thumbnails, decode_square

S, D, F = 16, 6, 12
MOST_BYTES = 200_000
HOSTS = frozenset({"localhost:8000", "127.0.0.1:8000", "photos.example"})
INFO = {"images": 30, "method": "MeCoQ", "M": 2, "K": 8, "D": D, "F": F, "bits": 6, "features": "int8", "index": {},
        "transform": "photo", "model_sha256": "00", "versions": {}, "sha256": "11", "root": "/secret"}  # fmt: skip


class FakeStore:
    """30 photographs in two folders, with even ids; one has a name that is no UTF-8."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.info, self.ids = folder, dict(INFO), np.arange(0, 60, 2)
        self.all = [f"{('cats', 'dogs/small')[i % 2]}/{i:02d}.jpg" for i in range(29)] + ["cats/\udcff<b>.jpg"]
        if not folder.joinpath("cats").exists():
            write_photos(folder, self.all)

    def position(self, image: int) -> int:
        return self.ids.tolist().index(image) if image in self.ids.tolist() else {}[image]

    def rows(self, ids):
        return [(self.all[self.position(image)], 100, 80) for image in ids]

    def path(self, image: int) -> Path:
        return self.folder / self.all[self.position(image)]

    def under(self, subfolder: str) -> np.ndarray:
        return np.flatnonzero([name.startswith(f"{subfolder}/") for name in self.all])


class FakeSearcher:
    """Scores are inner products with fixed vectors; the first three elements of an image's vector are its colour."""

    def __init__(self, folder: Path) -> None:
        self.store, self.encoder = FakeStore(folder), SimpleNamespace(image_size=S, encode=self.encode)
        generator = np.random.default_rng(0)
        self.vectors = generator.normal(size=(30, D)).astype(np.float32)
        self.features = generator.normal(size=(30, F)).astype(np.float32)
        self.asked: list[Options] = []

    def encode(self, pixels: np.ndarray) -> SimpleNamespace:
        assert pixels.shape[1:] == (3, S, S) and pixels.dtype == np.uint8
        colour = pixels.mean(axis=(2, 3), dtype=np.float32) / 255
        return SimpleNamespace(vectors=np.tile(colour, D // 3), features=np.tile(colour, F // 3))

    def search(self, vector, feature, options):
        self.asked.append(options)
        assert vector.shape == (D,) and vector.dtype == np.float32
        scores = self.vectors @ vector
        order = np.argsort(-scores, kind="stable")
        if options.under is not None:
            order = order[np.isin(order, self.store.under(options.under))]
        cosines = [None] * 30 if feature is None else (self.features @ feature).tolist()
        ids = self.store.ids
        return [Hit(int(ids[i]), self.store.all[i], float(scores[i]), cosines[i], 100, 80) for i in order[: options.k]]

    def of_id(self, image, options):
        position = self.store.position(image)
        hits = self.search(self.vectors[position], self.features[position], replace(options, k=options.k + 1))
        self.asked[-1] = options
        return [hit for hit in hits if hit.id != image][: options.k]


class FakeDecoder:
    """A `DecodingPool` in this process."""

    def __init__(self, image_size: int, decode) -> None:
        self.image_size, self.decode = image_size, decode
        self.may_go = threading.Event()
        self.may_go.set()

    def content(self, data: bytes) -> Decoded:
        assert self.may_go.wait(30)
        return self.decode(data, self.image_size)

    def paths(self, paths):
        for path in paths:
            try:
                yield self.content(path.read_bytes())
            except OSError as error:
                yield Decoded(None, (0, 0), str(error))


def fake_api(folder: Path, most_at_once: int = 4) -> Api:
    searcher = FakeSearcher(folder)
    thumbnails = Thumbnails(searcher.store, FakeDecoder(24, decode_square))
    limits = Limits(MOST_BYTES, most_at_once, HOSTS)
    return Api(searcher, FakeDecoder(S, decode_photo), thumbnails, limits)


def photo(path: Path, size: tuple[int, int] = (60, 40), colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """The content of a picture of one colour, in the format of its name."""
    Image.new("RGB", size, colour).save(path)
    return path.read_bytes()
