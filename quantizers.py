"""faiss's product quantizers, and what they reach on embeddings beside a trained head of as many bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np
import torch
from torch import Tensor

import retrieval
from utils import InputError
from vectors import Vectors, mean_of, unit

FIRST = 10  # ranks in which the true nearest neighbour is looked for
FEWEST_TRAINED, MOST_TRAINED = 256, 2**16  # vectors: a centroid needs one, and faiss takes no more for 256 of them
PCA_DIMENSIONS = 64
CHUNK = 2**22  # scores at a time
Encode = Callable[[np.ndarray], np.ndarray]


def product_quantizer(train: np.ndarray, bits: int) -> "faiss.ProductQuantizer":
    """Product quantization (Jegou et al. 2011), faiss's, with a byte per sub-quantizer. Raises InputError if there are
    fewer images than centroids."""
    if len(train) < FEWEST_TRAINED:
        raise InputError(
            f"PQ and OPQ need {FEWEST_TRAINED} training images, there are {len(train)} (is there a --limit?)"
        )
    pq = untrained_quantizer(train.shape[1], bits)
    pq.train(train)
    return pq


def untrained_quantizer(dim: int, bits: int) -> "faiss.ProductQuantizer":
    pq = faiss.ProductQuantizer(dim, bits // 8, 8)
    pq.cp.min_points_per_centroid = 1  # no warning if there are few
    return pq


def rotation(train: np.ndarray, bits: int) -> Encode:
    """The rotation of optimized product quantization (Ge et al. 2013), faiss's."""
    opq = faiss.OPQMatrix(train.shape[1], bits // 8)
    opq.pq = pq = untrained_quantizer(train.shape[1], bits)  # noqa: F841, faiss does not keep it alive
    opq.train(np.tile(train, (-(-train.shape[1] // len(train)), 1)))  # with fewer points than dimensions it crashes
    opq.pq = None
    return opq.apply


def distance_tables(centroids: Tensor, queries: Tensor) -> Tensor:
    """Centroids `[M, K, d]` and queries `[q, M d]` -> tables `[q, M, K]` whose sums are negative squared distances."""
    segments = queries.view(len(queries), *centroids.shape[::2]).transpose(0, 1)  # [M, q, d]
    return -torch.cdist(segments, centroids).square().transpose(0, 1)


def centroids_of(pq: "faiss.ProductQuantizer") -> Tensor:
    """`[M, K, d]`."""
    return torch.from_numpy(faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub))


# ---------------------------------------------------------------- beside a head


@dataclass(frozen=True)
class Ranker:
    """A way to rank a database: `score` gives the similarity of some of the `queries` `[Q, ...]` to all of it,
    `[q, n]`; `width`: numbers that a query needs while it is scored."""

    score: Callable[[Tensor], Tensor]
    queries: Tensor
    width: int = 0


def by_codes(tables: Callable[[Tensor], Tensor], queries: Tensor, codes: Tensor) -> Ranker:
    """The sum of the entries of a query's `tables` `[q, M, K]` that the codes `[n, M]` select."""
    score = lambda part: retrieval.aqs_scores(tables(part), codes)  # noqa: E731
    return Ranker(score, queries, tables(queries[:1]).numel())


def quantized(transform: Encode, parts: dict[str, np.ndarray], bits: int) -> Ranker:
    """faiss's product quantizer behind a transform, learned from `train` and then ranking `database` for `query`, all
    `[n, D]`."""
    train, query, database = (np.ascontiguousarray(transform(parts[name])) for name in ("train", "query", "database"))
    pq = product_quantizer(train, bits)
    codes = torch.from_numpy(pq.compute_codes(database))
    return by_codes(partial(distance_tables, centroids_of(pq)), torch.from_numpy(query), codes)


def rankers(parts: dict[str, np.ndarray], bits: int) -> dict[str, Ranker]:
    """Exact search, and faiss's quantizers of as many bits, on unit vectors by split: name -> ranker."""
    query, database = (torch.from_numpy(parts[name]) for name in ("query", "database"))
    M, D = bits // 8, query.shape[1]
    filled = {name: np.pad(array, ((0, 0), (0, -D % M))) for name, array in parts.items()}  # M equal segments
    turn = rotation(filled["train"], bits)
    found = {
        "exact search": Ranker(lambda part: part @ database.T, query),
        "PQ": quantized(lambda x: x, filled, bits),
        "OPQ": quantized(turn, filled, bits),
    }
    smaller = min(PCA_DIMENSIONS, D // 2) // M * M
    if smaller:
        pca = faiss.PCAMatrix(D, smaller)
        pca.train(parts["train"])
        reduced = {name: pca.apply(array) for name, array in parts.items()}
        found["PCA+OPQ"] = quantized(rotation(reduced["train"], bits), reduced, bits)
    return found


def neighbour_recall(ranker: Ranker, nearest: Tensor) -> float:
    """The share of queries whose true nearest neighbour, number `nearest` `[Q]` of the database, is among the first 10;
    the mean over all orders of equal scores."""
    found, n = [], ranker.score(ranker.queries[:1]).shape[1]
    step = max(1, CHUNK // max(n, ranker.width))
    for queries, target in zip(ranker.queries.split(step), nearest.split(step), strict=True):
        scores = ranker.score(queries)
        its = scores.gather(1, target.to(scores.device)[:, None])
        higher, equal = (scores > its).sum(dim=1), (scores == its).sum(dim=1)
        found.append(((FIRST - higher) / equal).clamp(0, 1).double().cpu())
    return float(torch.cat(found).mean())


def compare(
    ours: dict[str, Ranker],
    splits: dict[str, Vectors],
    bits: int,
    labels: list[Tensor] | None,
    measured: retrieval.Measure,
) -> dict[str, dict[str, float | None]]:
    """MAP (None without labels) and recall of the true nearest neighbour, as fractions, of exact search, faiss's
    quantizers and `ours`, by name. All rank the same database; faiss learns from `MOST_TRAINED` of `train` at most.

    Args:
        bits: of a code, a multiple of 8.
        labels: of queries and database.
    """
    train = splits["train"]
    mean = mean_of(train.blocks())
    chosen = train.subset(np.linspace(0, len(train), min(len(train), MOST_TRAINED), endpoint=False).astype(int))
    used = splits | {"train": chosen}
    parts = {name: np.concatenate([unit(block, mean) for block in part.blocks()]) for name, part in used.items()}
    found = rankers(parts, bits) | ours
    exact, rows = found["exact search"], {}
    step = max(1, CHUNK // len(parts["database"]))
    nearest = torch.cat([exact.score(queries).argmax(dim=1) for queries in exact.queries.split(step)])
    for name, ranker in found.items():
        value = None
        if labels is not None:
            its = [array.to(ranker.queries.device) for array in labels]
            aps = retrieval.average_precisions(ranker.score, ranker.queries, its, measured, width=ranker.width)
            value = float(aps.mean())
        rows[name] = {"map": value, "recall": neighbour_recall(ranker, nearest)}
    return rows


def advice(rows: dict[str, dict[str, float | None]], ours: str) -> str:
    """What a comparison says, in a sentence: which quantizers are better than `ours` and by which measure, and what
    each kind is for."""
    better = {
        measure: [name for name in ("PQ", "OPQ", "PCA+OPQ") if name in rows and rows[name][key] > rows[ours][key]]
        for measure, key in (("MAP", "map"), ("recall", "recall"))
        if rows[ours][key] is not None
    }
    told = [f"{' and '.join(names) or 'none of faiss'} better by {measure}" for measure, names in better.items()]
    return (
        f"{'; '.join(told)}. A head, above all if it learned from views, is for what is alike in meaning; if the "
        "nearest embeddings are wanted, take OPQ, or rerank by the embeddings themselves"
    )
