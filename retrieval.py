"""Lookup tables, ranking and metrics, as pure functions of tensors.

Q queries, n database images, M codebooks of K codewords. Scores are similarities: larger is nearer. Equal scores
rank in database order, so a result does not depend on the device; MAP is to be had averaged over all their orders, too.
Metrics are averaged in float64. The labels of queries and database are class ids `[Q]`, `[n]`, or multi-hot rows
`[Q, L]`, `[n, L]`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ties import Ranking, count_equal, expected_average_precision

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


def reconstruction(codes: Tensor, codewords: Tensor) -> Tensor:
    """Codes `[n, M]` -> the codewords that they select of `[M, K, d]`: `[n, M, d]`."""
    return torch.stack([codewords[m][codes[:, m].long()] for m in range(len(codewords))], dim=1)


def symmetric_tables(query_codes: Tensor, codewords: Tensor) -> Tensor:
    """Tables for quantized queries: `[Q, M, K]`, the rows of C^m C^mT that `query_codes` `[Q, M]` select."""
    return torch.einsum("qmd,mkd->qmk", reconstruction(query_codes, codewords), codewords)


def codeword_distances(x: Tensor, codewords: Tensor) -> Tensor:
    """`[B, M, K]`, ||x_m - c_mk|| of embeddings `[B, M L]` and codewords `[M, K, L]`; neither is normalised."""
    M, _, L = codewords.shape
    segments = x.view(-1, M, L).transpose(0, 1)
    exact = "donot_use_mm_for_euclid_dist"  # |x|^2 - 2xc + |c|^2 loses the small differences that codes hang on
    return torch.cdist(segments, codewords, compute_mode=exact).transpose(0, 1)


def pack_bits(bits: Tensor) -> Tensor:
    """Bits `[n, B]`, bool or 0 and 1 -> bytes, uint8 `[n, B / 8]`, the first bit highest, as `np.packbits` has them."""
    octets = bits.unflatten(1, (-1, 8)).to(torch.uint8)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (octets << places).sum(dim=-1).to(torch.uint8)


def hamming_tables(query_codes: Tensor) -> Tensor:
    """Tables `[q, B / 8, 256]` of packed codes `[q, B / 8]`: the bits of a byte in common less those that differ, so
    that a score is B - 2 Hamming, exactly."""
    signs = byte_signs(query_codes.device)
    return signs[query_codes.long()] @ signs.T


def byte_signs(device: torch.device) -> Tensor:
    """Bits of each byte as signs, the highest bit first: `[256, 8]`, -1 and 1."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(7, -1, -1, device=device) & 1
    return 2.0 * bits - 1


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


@dataclass(frozen=True)
class Measure:
    """A kind of MAP@K. `topK`: the K; None or anything above n means the whole database. `ties`: "database", equal
    scores rank in database order, or "expected", the mean over all their orders."""

    topK: int | None  # noqa: N815
    ties: str


@dataclass
class Metrics:
    """`map`: MAP@K with equal scores in database order, a fraction; `expected_map`: its mean over all their orders.
    `pr`: `[2, n]`, recall and precision after 1 ... n images. `p_at_k`: `[2, K]`, 1 ... K and the precision there. Both
    with equal scores in database order. All are means over queries."""

    map: float
    expected_map: float
    pr: Tensor
    p_at_k: Tensor

    @property
    def map_by_ties(self) -> dict[str, float]:
        """MAP@K by `Measure.ties`."""
        return {"expected": self.expected_map, "database": self.map}


def average_precision(ranked: Tensor) -> Tensor:
    """AP of each row of `ranked` `[Q, K]` (relevant or not, bool, best first): the precision at each hit, averaged
    over the hits in the K; 0 without a hit. `[Q]` float64.

    Eq. 18 as printed divides by all relevant images instead, which cannot give the published values.
    """
    return _average(*precision_at_hits(ranked.double()))


def precision_at_hits(ranked: Tensor) -> tuple[Tensor, Tensor]:
    """Hits up to each rank, and the precision at each hit (0 elsewhere), `[Q, K]` each, of `ranked` `[Q, K]`: float64,
    1 for relevant and 0 for not."""
    hits = ranked.cumsum(dim=1)
    ranks = torch.arange(1, ranked.shape[1] + 1, dtype=torch.float64, device=ranked.device)
    return hits, (hits / ranks).mul_(ranked)


def _average(hits: Tensor, precision: Tensor) -> Tensor:
    return precision.sum(dim=1) / hits[:, -1].clamp(min=1)


def evaluate(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> Metrics:
    """`metrics_of` what `ranking_sums` finds: MAP@K, both kinds, the PR curve and precision at 1 ... K."""
    sums = ranking_sums(tables, queries, db_codes, labels, topK, on_chunk)
    return metrics_of(sums, len(queries), topK)


def ranking_sums(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    topK: int | None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> Tensor:
    """Rank the whole database for every query, and add up over queries, `[2, 1 + n]` float64: AP@K, of both kinds, in
    the first column; then, by rank, the share of all relevant images that stands there, and how many do.

    A query without any relevant image counts with AP, recall and precision 0.

    Args:
        tables: makes the tables of some queries `[q, M, K]`, by `lookup_tables` or `symmetric_tables`.
        queries: `[Q, ...]`, what `tables` takes: embeddings or codes.
        db_codes: `[n, M]` integer codes.
        labels: of queries and database.
        topK: the K of MAP@K; None or anything above n means the whole database.
        on_chunk: called with the number of queries done after each chunk (a progress bar).
    """
    n = len(db_codes)
    topK = min(topK or n, n)
    maps = torch.zeros(2, dtype=torch.float64, device=db_codes.device)  # sums of AP, both kinds
    sums = torch.zeros(2, n, dtype=torch.float64, device=db_codes.device)  # by rank: 1 / all relevant, and 1, of a hit
    score = partial(_table_scores, tables, db_codes)
    for scores, relevant in _scored(score, queries, labels, tables(queries[:1]).numel()):
        whole = ranking(scores, relevant, n)
        first, ranked = whole.first(topK), whole.relevant.double()
        hits, precision = precision_at_hits(ranked[:, :topK])
        maps += torch.stack([_average(hits, precision).sum(), expected_average_precision(first, hits, precision).sum()])
        share = 1 / ranked.sum(dim=1).clamp(min=1)
        sums += torch.stack([share, torch.ones_like(share)]) @ ranked
        on_chunk(len(ranked))
    return torch.cat([maps[:, None], sums], dim=1)


def metrics_of(sums: Tensor, Q: int, topK: int | None) -> Metrics:
    """The metrics of Q queries with the sums of `ranking_sums`."""
    n = sums.shape[1] - 1
    topK = min(topK or n, n)
    recall, hits = sums[:, 1:].cumsum(dim=1).cpu() / Q
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    pr = torch.stack([recall, hits / ranks])
    ap_sum, expected_sum = sums[:, 0].tolist()
    return Metrics(ap_sum / Q, expected_sum / Q, pr, torch.stack([ranks[:topK], pr[1, :topK]]))


def mean_average_precision(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    measured: Measure,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> float:
    """MAP@K alone, the same number as `evaluate` gives: the first K are found without ranking the rest."""
    return float(table_average_precisions(tables, queries, db_codes, labels, measured, on_chunk).mean())


def table_average_precisions(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    labels: Sequence[Tensor],
    measured: Measure,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> Tensor:
    """`average_precisions` of the similarity that `tables` and codes give."""
    score = partial(_table_scores, tables, db_codes)
    width = tables(queries[:1]).numel()
    return average_precisions(score, queries, labels, measured, on_chunk, width)


def average_precisions(
    score: Callable[[Tensor], Tensor],
    queries: Tensor,
    labels: Sequence[Tensor],
    measured: Measure,
    on_chunk: Callable[[int], object] = lambda queries: None,
    width: int = 0,
) -> Tensor:
    """AP@K of each query, `[Q]` float64, for any similarity: `score` gives that of some queries to the whole
    database, `[q, n]` float32.

    Args:
        width: what else a query needs while it is scored, in numbers.
    """
    n = len(labels[1])
    topK = min(measured.topK or n, n)
    found = []
    for scores, relevant in _scored(score, queries, labels, width):
        best = ranking(scores, relevant, topK)
        hits, precision = precision_at_hits(best.relevant.double())
        if measured.ties == "expected":
            found.append(expected_average_precision(best, hits, precision))
        else:
            found.append(_average(hits, precision))
        on_chunk(len(scores))
    return torch.cat(found)


def ranking(scores: Tensor, relevant: Tensor, K: int) -> Ranking:
    """The K highest of float32 `scores` `[Q, n]` of images that are `relevant` `[Q, n]` or not, highest first, equal
    scores in database order.

    One int64 holds all there is to sort by: the falling score in its upper half, position and relevance in the lower
    one. Bare numbers sort an order of magnitude faster than scores with their indices.
    """
    Q, n = scores.shape
    if not scores.is_cuda and n > 2 * K:
        return _top_ranking(scores.numpy(), relevant.numpy(), K)
    keys = torch.empty(Q, n, dtype=torch.int64, device=scores.device)
    low, high = keys.view(torch.int32).view(Q, n, 2).unbind(dim=2)  # little-endian, as all that PyTorch runs on
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no -0.0, which would rank behind 0.0
    high.copy_(~(bits ^ ((bits >> 31) & 0x7FFFFFFF)))  # floats as integers of the same order, then the order reversed
    torch.add(torch.arange(0, 2 * n, 2, dtype=torch.int32, device=scores.device), relevant, out=low)
    if keys.is_cuda and n > K:
        return _ranking_by_topk(keys, K)
    if keys.is_cuda:
        keys = keys.sort(dim=1).values
    else:  # NumPy sorts integers with vector instructions, eight times as fast as PyTorch, and lets other threads run
        _in_threads(lambda part: part.sort(axis=1), keys.numpy())
    relevant, scores = _split(keys)
    return Ranking(relevant, scores, relevant.new_zeros(2, Q, dtype=torch.int64)).first(K)


def _ranking_by_topk(keys: Tensor, K: int) -> Ranking:
    """`ranking` of the K smallest keys `[Q, n]`, which come in any order."""
    relevant, scores = _split(keys)
    best, its = _split(keys.topk(K, dim=1, largest=False).values)
    last = its[:, -1:]
    return Ranking(best, its, count_equal(last, scores, relevant) - count_equal(last, its, best))


def _split(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance and score, as an integer, in the keys `[Q, K]` of `ranking`."""
    return (keys & 1).bool(), keys.view(torch.int32)[:, 1::2]


def _top_ranking(scores: np.ndarray, relevant: np.ndarray, K: int) -> Ranking:
    """`ranking` for a K that is small beside n: of the images that score at least as high as the K-th."""

    def rows(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, ...]:
        best, its = np.empty((len(scores), K), dtype=bool), np.empty((len(scores), K), dtype=np.float32)
        beyond = np.empty((2, len(scores)), dtype=np.int64)
        least = np.partition(scores, scores.shape[1] - K, axis=1)[:, -K]
        for i, row in enumerate(scores):
            candidates = np.flatnonzero(row >= least[i])  # in database order, in which a stable sort leaves equals
            candidates = candidates[np.argsort(-row[candidates], kind="stable")]
            hits = relevant[i, candidates]
            best[i], its[i] = hits[:K], row[candidates[:K]]
            beyond[:, i] = len(candidates) - K, np.count_nonzero(hits[K:])
        return best, its, beyond

    best, its, beyond = zip(*_in_threads(rows, scores, relevant), strict=True)
    joined = np.concatenate(best), np.concatenate(its), np.concatenate(beyond, axis=1)
    return Ranking(*map(torch.from_numpy, joined))


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
