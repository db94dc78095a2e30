"""Lookup tables, ranking and metrics, as pure functions of tensors.

Q queries, n database images, M codebooks of K codewords. Scores are similarities: larger is nearer. Equal scores
rank in database order, so a result does not depend on the device. Metrics are averaged in float64. The labels of
queries and database are class ids `[Q]`, `[n]`, or multi-hot rows `[Q, L]`, `[n, L]`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# scores, or table entries, held at a time: what a CPU's caches hold, and a GPU needs to be busy; about 0.03 and 1 GB
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}


def lookup_tables(queries: Tensor, codewords: Tensor, normalize_query: bool = True) -> Tensor:
    """Tables of the asymmetric quantized similarity, Eq. 16: `[Q, M, K]` with z_q^m . c_k^m / ||z_q^m||.

    Args:
        queries: `[Q, D]` embeddings.
        codewords: `[M, K, d]`, d = D / M.
        normalize_query: divide each segment by its length, as Eq. 16 does.
    """
    M, _, d = codewords.shape
    segments = queries.view(-1, M, d)
    if normalize_query:
        segments = F.normalize(segments, dim=-1)
    return torch.einsum("qmd,mkd->qmk", segments, codewords)


def symmetric_tables(query_codes: Tensor, codewords: Tensor) -> Tensor:
    """Tables for quantized queries: `[Q, M, K]`, the rows of C^m C^mT that `query_codes` `[Q, M]` select."""
    chosen = torch.stack([codewords[m][query_codes[:, m].long()] for m in range(len(codewords))], dim=1)  # [Q, M, d]
    return torch.einsum("qmd,mkd->qmk", chosen, codewords)


def aqs_scores(tables: Tensor, db_codes: Tensor) -> Tensor:
    """Scores, Eq. 17: `[Q, n]`, the sum over m of `tables[:, m, db_codes[:, m]]`, added in the order of m.

    All M tables are one of M K rows, a column a query: a code picks M rows, whose sum is the scores of its image.
    """
    Q, M, K = tables.shape
    picked = db_codes.int() + K * torch.arange(M, dtype=torch.int32, device=db_codes.device)
    return F.embedding_bag(picked, tables.reshape(Q, M * K).T.contiguous(), mode="sum").T.contiguous()


def relevance(query_labels: Tensor, db_labels: Tensor) -> Tensor:
    """`[Q, n]` bool. Class ids `[n]`: the same class; multi-hot rows `[n, L]`: at least one label shared."""
    if query_labels.dim() == 1:
        return query_labels[:, None] == db_labels[None, :]
    return query_labels.float() @ db_labels.float().T > 0


@dataclass
class Metrics:
    """`map`: MAP@K, a fraction. `pr`: `[2, n]`, recall and precision after 1 ... n images.
    `p_at_k`: `[2, K]`, 1 ... K and the precision there. All are means over queries."""

    map: float
    pr: Tensor
    p_at_k: Tensor


def average_precision(ranked: Tensor) -> Tensor:
    """AP of each row of `ranked` `[Q, K]` (relevant or not, best first): the precision at each hit, averaged
    over the hits in the K; 0 without a hit. `[Q]` float64.

    Eq. 18 as printed divides by all relevant images instead, which cannot give the published values.
    """
    hits = ranked.cumsum(dim=1, dtype=torch.float64)
    ranks = torch.arange(1, ranked.shape[1] + 1, dtype=torch.float64, device=ranked.device)
    return (hits / ranks * ranked).sum(dim=1) / hits[:, -1].clamp(min=1)


def evaluate(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> Metrics:
    """Rank the whole database for every query and measure MAP@K, the PR curve and precision at 1 ... K.

    A query without any relevant image counts with AP, recall and precision 0.

    Args:
        tables: makes the tables of some queries `[q, M, K]`, by `lookup_tables` or `symmetric_tables`.
        queries: `[Q, ...]`, what `tables` takes: embeddings or codes.
        db_codes: `[n, M]` integer codes.
        labels: of queries and database.
        topK: the K of MAP@K; None or anything above n means the whole database.
        on_chunk: called with the number of queries done after each chunk (a progress bar).
    """
    Q, n = len(queries), len(db_codes)
    topK = min(topK or n, n)
    ap_sum = 0.0
    sums = torch.zeros(2, n, dtype=torch.float64, device=db_codes.device)  # by rank: 1 / all relevant, and 1, of a hit
    score = partial(_table_scores, tables, db_codes)
    for scores, relevant in _scored(score, queries, labels, tables(queries[:1]).numel()):
        ranked = ranked_relevance(scores, relevant, n)
        ap_sum += float(average_precision(ranked[:, :topK]).sum())
        share = 1 / ranked.sum(dim=1).clamp(min=1).double()
        sums += torch.stack([share, torch.ones_like(share)]) @ ranked.double()
        on_chunk(len(ranked))
    recall, hits = sums.cumsum(dim=1).cpu() / Q
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    pr = torch.stack([recall, hits / ranks])
    return Metrics(ap_sum / Q, pr, torch.stack([ranks[:topK], pr[1, :topK]]))


def mean_average_precision(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> float:
    """MAP@K alone, the same number as `evaluate` gives: the first K are found without ranking the rest."""
    score = partial(_table_scores, tables, db_codes)
    width = tables(queries[:1]).numel()
    return float(average_precisions(score, queries, labels, topK, on_chunk, width).mean())


def average_precisions(
    score: Callable[[Tensor], Tensor],
    queries: Tensor,
    labels: Sequence[Tensor],
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
    width: int = 0,
) -> Tensor:
    """AP@K of each query, `[Q]` float64, for any similarity: `score` gives that of some queries to the whole
    database, `[q, n]` float32.

    Args:
        width: what else a query needs while it is scored, in numbers.
    """
    n = len(labels[1])
    topK = min(topK or n, n)
    found = []
    for scores, relevant in _scored(score, queries, labels, width):
        found.append(average_precision(ranked_relevance(scores, relevant, topK)))
        on_chunk(len(scores))
    return torch.cat(found)


def ranked_relevance(scores: Tensor, relevant: Tensor, K: int) -> Tensor:
    """`[Q, K]` bool: `relevant` `[Q, n]` of the K highest float32 `scores` `[Q, n]`, highest first, equal scores in
    database order.

    One int64 holds all there is to sort by: the falling score in its upper half, position and relevance in the lower
    one. Bare numbers sort an order of magnitude faster than scores with their indices.
    """
    Q, n = scores.shape
    if not scores.is_cuda and n > 2 * K:
        return _top_relevance(scores.numpy(), relevant.numpy(), K)
    keys = torch.empty(Q, n, dtype=torch.int64, device=scores.device)
    low, high = keys.view(torch.int32).view(Q, n, 2).unbind(dim=2)  # little-endian, as all that PyTorch runs on
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no -0.0, which would rank behind 0.0
    high.copy_(~(bits ^ ((bits >> 31) & 0x7FFFFFFF)))  # floats as integers of the same order, then the order reversed
    torch.add(torch.arange(0, 2 * n, 2, dtype=torch.int32, device=scores.device), relevant, out=low)
    return (_smallest(keys, K) & 1).bool()


def _smallest(keys: Tensor, K: int) -> Tensor:
    """The K smallest of each row of `keys` `[Q, n]`, in their order; on a CPU they are sorted in place."""
    if keys.is_cuda:
        return keys.topk(K, dim=1, largest=False).values if keys.shape[1] > K else keys.sort(dim=1).values

    # NumPy sorts integers with vector instructions, eight times as fast as PyTorch, and lets other threads run
    _in_threads(lambda part: part.sort(axis=1), keys.numpy())
    return keys[:, :K]


def _top_relevance(scores: np.ndarray, relevant: np.ndarray, K: int) -> Tensor:
    """`ranked_relevance` for a K that is small beside n: of the images that score at least as high as the K-th."""

    def rows(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        found = np.empty((len(scores), K), dtype=bool)
        least = np.partition(scores, scores.shape[1] - K, axis=1)[:, -K]
        for row, of_row, bound, hits in zip(scores, relevant, least, found, strict=True):
            candidates = np.flatnonzero(row >= bound)  # in database order, in which a stable sort leaves equals
            hits[:] = of_row[candidates[np.argsort(-row[candidates], kind="stable")[:K]]]
        return found

    return torch.from_numpy(np.concatenate(_in_threads(rows, scores, relevant)))


def _in_threads(work: Callable, *arrays: np.ndarray) -> list:
    """`work` of as many parts of the arrays' rows as there are threads."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, *(np.array_split(array, threads) for array in arrays)))


def _table_scores(tables: Callable[[Tensor], Tensor], db_codes: Tensor, queries: Tensor) -> Tensor:
    return aqs_scores(tables(queries), db_codes)


def _scored(
    score: Callable[[Tensor], Tensor], queries: Tensor, labels: Sequence[Tensor], width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and relevance `[q, n]` of a few queries after the other, so that they keep within `CHUNK_ELEMENTS`."""
    query_labels, db_labels = labels
    chunk = max(1, CHUNK_ELEMENTS[db_labels.device.type] // max(len(db_labels), width))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        yield score(queries[part]), relevance(query_labels[part], db_labels)
