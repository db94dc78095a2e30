"""A small index of photographs by a real model, decoded in this process, for tests of search."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from helpers import write_photos

import search.decode
from decoding import reason_of
from search import indexing
from search.decode import Decode, Decoded, decode_photo

NAMES = sorted(f"{('sea', 'sea/deep', 'town')[i % 3]}/{i:02d}.jpg" for i in range(60))  # places are ids


class InProcess:
    """A `DecodingPool` without processes."""

    def __init__(self, image_size: int, workers: int, seconds: float, decode: Decode = decode_photo) -> None:
        self.image_size, self.decode = image_size, decode

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def paths(self, paths: Iterable[Path]) -> Iterator[Decoded]:
        for path in paths:
            try:
                yield self.decode(path.read_bytes(), self.image_size)
            except OSError as error:
                yield Decoded(None, (0, 0), reason_of(error))


def in_process(patch: pytest.MonkeyPatch) -> None:
    """Decode in this process from now on."""
    patch.setattr(search.decode, "DecodingPool", InProcess)
    patch.setattr(search.decode, "start_server", lambda: None)


def write_index(folder: Path, run: Path, *flags: str, names: list[str] = NAMES) -> Path:
    """Photographs below `folder/photos`, unless they are there, and their index."""
    if not (folder / "photos").exists():
        write_photos(folder / "photos", names)
    index = folder / "index"
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        indexing.main([str(folder / "photos"), "--model", str(run), "-o", str(index), *flags])
    return index
