"""The shallow baselines of Table 1, on the features of a frozen backbone.

faiss has four of them (LSH, ITQ, PQ, OPQ); spectral and spherical hashing are written from their papers. All see the
same features, centred and of unit length. A baseline is trained by a function of the training features `[n, F]`, the
number of bits and a seed, which returns what encodes `[n, F]`; codes are ranked by the similarity that belongs to them.
ITQ, PQ and OPQ keep faiss's own seeds, so that faiss called by hand finds the same.
"""

from collections.abc import Callable, Sequence
from functools import partial

import faiss
import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import retrieval
from quantizers import Encode, centroids_of, distance_tables, product_quantizer, rotation
from vectors import unit

FORMAT = 3  # to be raised with every change of what a method gives or how it is kept


def prepared(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features `[n, F]` by split, centred by the mean of `train` and then of unit length, float32."""
    mean = features["train"].mean(axis=0, dtype=np.float64).astype(np.float32)
    return {name: unit(array, mean) for name, array in features.items()}


# ---------------------------------------------------------------- binary codes: `[n, bits]` bool


def lsh(train: np.ndarray, bits: int, seed: int) -> Encode:
    """Signs of random projections (Charikar 2002), faiss's."""
    index = faiss.IndexLSH(train.shape[1], bits, True, False)
    index.rrot.init(seed % 2**31)
    index.is_trained = True
    return lambda x: np.unpackbits(index.sa_encode(x), axis=1, bitorder="little")[:, :bits].astype(bool)


def itq(train: np.ndarray, bits: int, _: int) -> Encode:
    """Iterative quantization (Gong and Lazebnik 2011), faiss's: PCA, then the rotation that is nearest to its signs."""
    transform = faiss.ITQTransform(train.shape[1], bits, True)
    transform.train(train)
    return lambda x: transform.apply(x) > 0


def spectral_hashing(train: np.ndarray, bits: int, _: int) -> Encode:
    """Spectral hashing (Weiss, Torralba and Fergus 2008): signs of the smoothest eigenfunctions of a box in the space
    of principal components.

    Along a side [a, b] of the box the eigenfunctions are sin(pi / 2 + k pi (x - a) / (b - a)), k = 1, 2, ..., and the
    smaller k / (b - a), the smoother.
    """
    pca = PCA(min(bits, *train.shape), svd_solver="covariance_eigh").fit(train)
    projected = pca.transform(train)
    low, high = projected.min(axis=0), projected.max(axis=0)
    modes = np.arange(1, bits + 1)
    frequency = modes[:, None] / np.maximum(high - low, 1e-12)  # [k, component], of which the smallest are taken
    chosen = np.argsort(frequency, axis=None, kind="stable")[:bits]
    mode, component = modes[chosen // len(low)], chosen % len(low)

    def encode(x: np.ndarray) -> np.ndarray:
        place = ((pca.transform(x) - low) / np.maximum(high - low, 1e-12))[:, component]  # 0 to 1 within the box
        return np.sin(np.pi / 2 + mode * np.pi * place) > 0

    return encode


def spherical_hashing(train: np.ndarray, bits: int, seed: int) -> Encode:
    """Spherical hashing (Heo et al. 2012): a bit says whether a point lies inside a hypersphere.

    Pivots attract and repel one another until every sphere holds half of the points, and every two share a quarter of
    them: on average within 10 %, with a deviation within 15 %.
    """
    n, generator = len(train), np.random.default_rng(seed)
    pivots = np.stack([train[generator.choice(n, min(n, 10), replace=False)].mean(axis=0) for _ in range(bits)])
    pairs = ~np.eye(bits, dtype=bool)
    for _ in range(100):
        distances, radii = _spheres(train, pivots)
        inside = (distances <= radii).astype(np.float32)
        excess = inside.T @ inside - n / 4  # of points in both spheres
        if np.abs(excess[pairs]).mean() <= 0.10 * n / 4 and excess[pairs].std() <= 0.15 * n / 4:
            break
        push = np.where(pairs, excess / (n / 4) / 2, 0)  # of j on i: half their distance at an excess of n / 4
        pivots = pivots + (push.sum(axis=1, keepdims=True) * pivots - push @ pivots) / bits
    radii = _spheres(train, pivots)[1]
    return lambda x: _distances(x, pivots) <= radii


def _spheres(train: np.ndarray, pivots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances `[n, bits]` of points to pivots, and the radii `[bits]` that enclose half of the points."""
    distances = _distances(train, pivots)
    return distances, np.median(distances, axis=0)


def _distances(x: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(axis=1)[:, None] - 2 * x @ pivots.T + (pivots**2).sum(axis=1)
    return np.sqrt(np.maximum(squares, 0))


def cosine_score(database: Tensor, queries: Tensor) -> Tensor:
    """Unit vectors `[n, F]`, `[q, F]` -> `[q, n]`."""
    return queries @ database.T


def hamming_score(db_bits: Tensor, query_bits: Tensor) -> Tensor:
    """Bits `[n, B]`, `[q, B]` as -1 and 1 -> `[q, n]`, the number of equal bits less that of others."""
    return query_bits @ db_bits.T


def spherical_score(db_bits: Tensor, query_bits: Tensor) -> Tensor:
    """Bits as -1 and 1 -> `[q, n]`, the negative spherical Hamming distance |a xor b| / |a and b|; if no bit is common,
    as if there were a tenth of one."""
    bits = db_bits.shape[1]
    inner = query_bits @ db_bits.T
    ones = query_bits.sum(dim=1)[:, None] + db_bits.sum(dim=1)[None, :]
    common = (inner + ones + bits) / 4  # (1 + a) (1 + b) / 4 is 1 if both are
    return -(bits - inner) / 2 / common.clamp(min=0.1)


# ---------------------------------------------------------------- all of them

HASHES: dict[str, tuple[Callable[[np.ndarray, int, int], Encode], Callable[[Tensor, Tensor], Tensor]]] = {
    "LSH": (lsh, hamming_score),
    "SpeH": (spectral_hashing, hamming_score),
    "SphH": (spherical_hashing, spherical_score),
    "ITQ": (itq, hamming_score),
}
METHODS = (*HASHES, "PQ", "OPQ")  # as Table 1 calls them, with "+VGG" behind


def method_map(
    method: str, features: dict[str, np.ndarray], labels: Sequence[Tensor], bits: int | None, seed: int,
    measured: retrieval.Measure,
) -> float:  # fmt: skip
    """MAP@K of a method (or of "exact", the cosine of the features themselves: compression's ceiling) trained on
    `features["train"]`, a fraction.

    Args:
        features: see `prepared`; train, query and database.
        labels: of queries and database.
    """
    query, database = features["query"], features["database"]
    if method in HASHES:
        train, similarity = HASHES[method]
        encode = train(features["train"], bits, seed)
        query, database = (2 * encode(part).astype(np.float32) - 1 for part in (query, database))
        score = partial(similarity, torch.from_numpy(database))
        return float(retrieval.average_precisions(score, torch.from_numpy(query), labels, measured).mean())
    if method == "exact":
        score = partial(cosine_score, torch.from_numpy(database))
        return float(retrieval.average_precisions(score, torch.from_numpy(query), labels, measured).mean())
    rotate = rotation(features["train"], bits) if method == "OPQ" else lambda x: x
    pq = product_quantizer(rotate(features["train"]), bits)
    codes = torch.from_numpy(pq.compute_codes(rotate(database)))
    tables = partial(distance_tables, centroids_of(pq))
    return retrieval.mean_average_precision(tables, torch.from_numpy(rotate(query)), codes, labels, measured)
