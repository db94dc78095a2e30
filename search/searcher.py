"""Search in an index: by codes first, then the best of them again by the backbone's features."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import transforms
from search import ann
from search.encoder import Encoder
from search.store import MODEL, SEARCH, Store
from utils import InputError

EQUALS = 100  # more images that are asked for: of equal scores, those with the lowest ids are then found


@dataclass(frozen=True)
class Options:
    """How to search.

    Args:
        k: images that are found, or all, if there are fewer.
        rerank: images, the best by their codes, that are sorted by the cosine of features; 0: none.
        nprobe: lists visited, in an index that has some.
        under: a folder below the photos; only images below it are found. None: all.
    """

    k: int = 20
    rerank: int = 1000
    nprobe: int = ann.NPROBE
    under: str | None = None


@dataclass(frozen=True)
class Hit:
    """A found image. `score`: of its code, larger is nearer; `cosine`: of its features with the query's, None if they
    were not compared."""

    id: int
    name: str
    score: float
    cosine: float | None
    width: int
    height: int


class Searcher:
    """An index, opened for searching; threads may share it.

    Images that are reranked come by falling cosine, others by falling score; equals by their ids. If more than `EQUALS`
    images score like the last one by codes, any of them may be left out.

    Raises InputError if the index is damaged or not finished, or of another version.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.store = Store.open(folder)
        info, self.encoder = self.store.info, Encoder(folder / MODEL, device, queries=True)
        if info["transform"] != transforms.PHOTO_TRANSFORM:
            raise InputError(f"{folder} was made by another version, which decodes otherwise: index again")
        if info["model_sha256"] != self.encoder.model_sha256:
            raise InputError(f"{folder / MODEL} is not the model that the index was made with: index again")
        self._index = ann.open_mapped(folder / SEARCH)
        if self._index.ntotal != len(self.store.ids):
            raise InputError(f"{folder / SEARCH} is of other images: python -m search index -o {folder} --update")

    @cached_property
    def codes(self) -> np.ndarray:
        """All live images' codes, `[n, M]`, read when they are first asked for."""
        return self.store.codes()

    def of_pixels(self, pixels: np.ndarray, options: Options) -> list[Hit]:
        """The images like one of `[3, S, S]` uint8."""
        encoded = self.encoder.encode(pixels[None])
        return self.search(encoded.vectors[0], encoded.features[0], options)

    def of_id(self, image: int, options: Options) -> list[Hit]:
        """The images like one of the index, itself left out, by its code and features. Raises KeyError if there is none
        with this id."""
        position = np.array([self.store.position(image)])
        vector = self.encoder.vectors_of(self.codes[position])[0]
        feature = self.store.features(position)[0] if self.store.has_features else None
        return self.search(vector, feature, options, int(position[0]))

    def neighbours(self, positions: np.ndarray, k: int, nprobe: int) -> np.ndarray:
        """Positions of the k images whose codes are nearest to those of some images, themselves among them: `[p, k]`,
        -1 if fewer were found."""
        return ann.search(self._index, self.encoder.vectors_of(self.codes[positions]), k, nprobe)[1]

    def search(
        self, vector: np.ndarray, feature: np.ndarray | None, options: Options, without: int | None = None
    ) -> list[Hit]:
        """The images whose codes score highest for a query vector `[M d]`, reranked if there are features.

        Args:
            feature: the query's, `[F]`, of unit length; None: codes alone decide.
            without: a position that is left out.

        Raises InputError if there is no image below the folder of the options.
        """
        reranked = options.rerank > 0 and feature is not None and self.store.has_features
        wanted = max(options.k, options.rerank) if reranked else options.k
        scores, positions = self._by_codes(vector, wanted + (without is not None), options)
        kept = positions != without if without is not None else slice(None)
        scores, positions = scores[kept][:wanted], positions[kept][:wanted]
        cosines = None
        if reranked:
            cosines = (self.store.features(positions) @ feature).clip(-1, 1)
            order = np.lexsort((positions, -cosines))[: options.k]
            scores, positions, cosines = scores[order], positions[order], cosines[order].tolist()
        ids = self.store.ids[positions].tolist()
        rows = self.store.rows(ids)
        return [
            Hit(ids[i], rows[i][0], float(scores[i]), cosines[i] if cosines else None, *rows[i][1:])
            for i in range(len(ids))
        ]

    def _by_codes(self, vector: np.ndarray, k: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the at most k best images."""
        if options.under is None:
            scores, positions = ann.search(self._index, vector[None], k + EQUALS, options.nprobe)
        else:
            below = self.store.under(options.under)
            if len(below) == 0:
                raise InputError(f"there is no image below {options.under}")
            scores, positions = ann.search_subset(self.encoder.codewords, self.codes, below, vector[None], k)
        found = positions[0] >= 0
        return scores[0][found][:k], positions[0][found][:k]
