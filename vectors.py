"""Embeddings that another model made: .npy files -> vectors, their splits, and the pairs that the head learns from.

Files are mapped into memory and read block by block. Imports PyTorch inside the functions that need it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from readers import Digest, read_array
from utils import InputError, progress_bar, sample_seed

if TYPE_CHECKING:
    import torch

FEWEST = 20  # embeddings: two queries, and enough others to learn from
NEIGHBOURS = 10  # of an item, one of which is its positive in an epoch
BLOCK = 2**22  # numbers read at a time
LARGEST = 1e15  # so that squares and their sums stay finite


@dataclass(frozen=True)
class Vectors:
    """Embeddings in files: the `rows` `[n]` of `array` `[N, D]` with their `labels`, as `readers.Images` has them, and,
    if there are any, their `views` `[N, V, D]`."""

    array: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    views: np.ndarray | None = None
    on_disk: ClassVar[bool] = False  # no image file has to be checked

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, part: slice | np.ndarray) -> np.ndarray:
        """Some of the vectors, `[k, D]` float32."""
        return np.ascontiguousarray(self.array[self.rows[part]], dtype=np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors in their order, `[k, D]` float32."""
        step = max(1, BLOCK // self.array.shape[1])
        return (self.read(slice(start, start + step)) for start in range(0, len(self), step))

    def subset(self, indices: np.ndarray) -> "Vectors":
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def update(self, digest: Digest) -> None:
        """Feed the vectors and their views into a fingerprint; labels are not included."""
        for block in self.blocks():
            digest.update(block.tobytes())
        if self.views is not None:
            step = max(1, BLOCK // self.views[0].size)
            for start in range(0, len(self), step):
                digest.update(np.ascontiguousarray(self.views[self.rows[start : start + step]]).tobytes())


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class EmbeddingFiles:
    """Where embeddings are: .npy files of `vectors` `[n, D]`, of their `views` `[n, V, D]` and of `labels`, `[n]` class
    ids or `[n, L]` zeros and ones."""

    vectors: Path
    views: Path | None = None
    labels: Path | None = None


def dimensions(path: Path) -> int:
    """D of the embeddings in a file. Raises InputError if there are none."""
    return _floats(path, "--embeddings", "[n, D]").shape[1]


def read_embeddings(files: EmbeddingFiles) -> Vectors:
    """All embeddings with their views and labels, which are zeros if there are none. Raises InputError naming the flag
    and the file of what is wrong."""
    array, views = _floats(files.vectors, "--embeddings", "[n, D]"), None
    n, D = array.shape
    if n < FEWEST:
        raise InputError(f"--embeddings: {files.vectors} has {n} embeddings, there must be at least {FEWEST}")
    _check_numbers(array, f"--embeddings: {files.vectors}")
    if files.views is not None:
        views = _floats(files.views, "--embedding_views", "[n, V, D]")
        if (len(views), views.shape[2]) != (n, D):
            raise InputError(
                f"--embedding_views: {files.views} is {list(views.shape)}, there must be [{n}, V, {D}]: the views of "
                f"each embedding of {files.vectors}, in its order"
            )
        _check_numbers(views, f"--embedding_views: {files.views}")
    labels = np.zeros(n, dtype=np.int64) if files.labels is None else read_labels(files.labels, n)
    return Vectors(array, np.arange(n), labels, views)


def _floats(path: Path, flag: str, shape: str) -> np.ndarray:
    """The floating-point numbers in a file, mapped into memory; `shape`: what they must be, in words."""
    array = _mapped(path, flag)
    dims = shape.count(",") + 1
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != dims or 0 in array.shape:
        raise InputError(
            f"{flag}: {path} holds {array.dtype} {list(array.shape)}, there must be float16, float32 or float64 {shape}"
        )
    return array


def _mapped(path: Path, flag: str) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{flag}: {path} {'is not a file' if path.exists() else 'does not exist'}")
    return read_array(path, "r", advice=f"{flag} takes what numpy.save writes of an array of plain numbers")


def _check_numbers(array: np.ndarray, named: str) -> None:
    """Raise InputError if a number is not finite, or so large that a length is not."""
    step = max(1, BLOCK // array[0].size)
    for start in progress_bar(range(0, len(array), step), "check embeddings"):
        block = np.asarray(array[start : start + step], dtype=np.float64)
        sound = (np.abs(block) < LARGEST).reshape(len(block), -1).all(axis=1)  # NaN is not
        if not sound.all():
            row = start + int(np.argmin(sound))
            raise InputError(f"{named}: row {row} has a number that is not finite, or beyond {LARGEST:g}")


def read_labels(path: Path, n: int) -> np.ndarray:
    """Labels of n items: `[n]` int64 class ids or `[n, L]` uint8 multi-hot. Raises InputError naming the file if there
    are none."""
    labels = _mapped(path, "--embedding_labels")
    kinds = {1: "iu", 2: "iub"}.get(labels.ndim, "")
    if labels.dtype.kind not in kinds or len(labels) != n or 0 in labels.shape:
        raise InputError(
            f"--embedding_labels: {path} holds {labels.dtype} {list(labels.shape)}, there must be integers [{n}], or "
            f"zeros and ones [{n}, L]"
        )
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        raise InputError(f"--embedding_labels: {path} has rows of other numbers than 0 and 1")
    return np.array(labels, dtype=np.int64 if labels.ndim == 1 else np.uint8)


def resolve_flags(values: dict, backbone: str) -> None:
    """Fill in what flags say if the data set has embeddings and thus no backbone. Raises InputError if they do not go
    together.

    Args:
        backbone: the default.
    """
    if values["dataset"] != "Embeddings":
        given = [name for name in ("embeddings", "embedding_views", "embedding_labels") if values[name] is not None]
        if given:
            raise InputError(f"--{given[0]}: goes with --dataset Embeddings")
        return
    if values["embeddings"] is None:
        raise InputError("--dataset Embeddings: name them, with --embeddings X.npy")
    usual = {"backbone": backbone, "weights": None, "vgg_model_path": None, "trainable_layer_num": 0, "compile": False}
    for name, value in usual.items():
        if values.get(name) not in (value, "none"):
            raise InputError(f"--{name}: --dataset Embeddings has no backbone")
    values |= {"backbone": "none", "weights": None, "normalize_features": True}


# ---------------------------------------------------------------- normalised vectors and their neighbours


def mean_of(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Mean `[D]` float32 of vectors in blocks `[k, D]`."""
    sums = [(block.sum(axis=0, dtype=np.float64), len(block)) for block in blocks]
    return (sum(total for total, _ in sums) / sum(n for _, n in sums)).astype(np.float32)


def unit(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Vectors `[n, D]` centred by a mean, and then of unit length: float32."""
    centred = np.ascontiguousarray(vectors - mean, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def nearest(vectors: Vectors, k: int, device: str) -> np.ndarray:
    """The k others (or as many as there are) that are nearest to each vector by the cosine of centred vectors, nearest
    first: `[n, k]`. By products of whole matrices: n^2 D multiplications."""
    import torch

    n, mean = len(vectors), mean_of(vectors.blocks())
    normalized = torch.cat([torch.from_numpy(unit(block, mean)) for block in vectors.blocks()]).to(device)
    step, found = max(1, BLOCK // n), []
    for start in progress_bar(range(0, n, step), "nearest neighbours"):
        cosine = normalized[start : start + step] @ normalized.T
        rows = torch.arange(len(cosine), device=device)
        cosine[rows, start + rows] = -torch.inf
        found.append(cosine.topk(min(k, n - 1), dim=1).indices.cpu())
    return torch.cat(found).numpy()


# ---------------------------------------------------------------- pairs


class VectorPairs:
    """Batches of two vectors of each item, `[2N, D]` float32, all first ones first: two different views of it; itself
    and its view, if that is the only one; or, without views, itself and one of its nearest neighbours among all of
    them. Which, is drawn for a whole epoch at once.

    Args:
        batches: of (item, seed), see `loaders.ShuffledBatches`.
        device: on which neighbours are found.

    Raises InputError if a vector without views has no neighbour.
    """

    def __init__(self, vectors: Vectors, batches: Iterable[list[tuple[int, int]]], device: str) -> None:
        if vectors.views is None and len(vectors) < 2:
            raise InputError("one embedding without views makes no pair: give --embedding_views, or a larger --limit")
        self.vectors, self.batches = vectors, batches
        self.neighbours = nearest(vectors, NEIGHBOURS, device) if vectors.views is None else None

    def __iter__(self) -> "Iterator[tuple[torch.Tensor]]":
        import torch

        n, vectors = len(self.vectors), self.vectors
        generator = np.random.default_rng(sample_seed(self.batches.seed, self.batches.epoch, n))
        choices = self.neighbours.shape[1] if vectors.views is None else vectors.views.shape[1]
        first = generator.integers(choices, size=n)
        second = (first + generator.integers(1, max(choices, 2), size=n)) % choices
        for batch in self.batches:
            items = np.array([item for item, _ in batch], dtype=int)
            if vectors.views is None:
                pair = [vectors.read(items), vectors.read(self.neighbours[items, first[items]])]
            elif choices == 1:
                pair = [vectors.read(items), vectors.views[vectors.rows[items], 0]]
            else:
                pair = [vectors.views[vectors.rows[items], drawn[items]] for drawn in (first, second)]
            yield (torch.from_numpy(np.concatenate(pair).astype(np.float32)),)
