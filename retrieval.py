"""How good is it? Lookup tables, ranking and metrics, as pure functions of tensors.

Q queries, n database images, M codebooks of K codewords. Scores are similarities: larger is nearer. Equal scores
rank in database order, so a result does not depend on the device. Metrics are averaged in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**23  # scores, or table entries, held at a time: bounds memory at about 0.4 GB whatever the sizes


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
    """Scores, Eq. 17: `[Q, n]`, the sum over m of `tables[:, m, db_codes[:, m]]`, added in the order of m."""
    codes = db_codes.long()
    scores = tables[:, 0].index_select(1, codes[:, 0])
    for m in range(1, tables.shape[1]):
        scores += tables[:, m].index_select(1, codes[:, m])
    return scores


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
    query_labels: Tensor,
    db_labels: Tensor,
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> Metrics:
    """Rank the whole database for every query and measure MAP@K, the PR curve and precision at 1 ... K.

    A query without any relevant image counts with AP, recall and precision 0.

    Args:
        tables: makes some of the queries' tables `[q, M, K]`, by `lookup_tables` or `symmetric_tables`.
        queries: `[Q, ...]`, what `tables` takes: embeddings or codes.
        db_codes: `[n, M]` integer codes.
        query_labels, db_labels: class ids `[Q]`, `[n]`, or multi-hot `[Q, L]`, `[n, L]`.
        topK: the K of MAP@K; None or anything above n means the whole database.
        on_chunk: called with the number of queries done after each chunk (a progress bar).
    """
    Q, n = len(queries), len(db_codes)
    topK = min(topK or n, n)
    ap_sum = torch.zeros((), dtype=torch.float64, device=db_codes.device)
    recall_sum = torch.zeros(n, dtype=torch.float64, device=db_codes.device)
    precision_sum = torch.zeros(n, dtype=torch.float64, device=db_codes.device)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=db_codes.device)
    for part in _chunks(tables, queries, n):
        order = aqs_scores(tables(queries[part]), db_codes).argsort(dim=1, descending=True, stable=True)
        ranked = relevance(query_labels[part], db_labels).gather(1, order)
        ap_sum += average_precision(ranked[:, :topK]).sum()
        hits = ranked.cumsum(dim=1, dtype=torch.float64)
        precision_sum += hits.sum(dim=0) / ranks
        recall_sum += (hits / hits[:, -1:].clamp(min=1)).sum(dim=0)
        on_chunk(len(order))
    pr = torch.stack([recall_sum, precision_sum]).cpu() / Q
    return Metrics(float(ap_sum / Q), pr, torch.stack([ranks[:topK].cpu(), pr[1, :topK]]))


def mean_average_precision(
    tables: Callable[[Tensor], Tensor],
    queries: Tensor,
    db_codes: Tensor,
    query_labels: Tensor,
    db_labels: Tensor,
    topK: int | None = None,
    on_chunk: Callable[[int], object] = lambda queries: None,
) -> float:
    """MAP@K alone, the same number as `evaluate` gives: the first K are found without ranking the rest."""
    Q, n = len(queries), len(db_codes)
    topK = min(topK or n, n)
    ap_sum = torch.zeros((), dtype=torch.float64, device=db_codes.device)
    for part in _chunks(tables, queries, n):
        nearest = first(aqs_scores(tables(queries[part]), db_codes), topK)
        ranked = relevance(query_labels[part], db_labels).gather(1, nearest)
        ap_sum += average_precision(ranked).sum()
        on_chunk(len(nearest))
    return float(ap_sum / Q)


def first(scores: Tensor, K: int) -> Tensor:
    """Indices `[Q, K]` of the K highest float32 scores `[Q, n]`, highest first, equal ones in database order."""
    n = scores.shape[1]
    # the bits of a float32 without its sign grow with it: as integers, with the position behind them, none are equal
    keys = scores.view(torch.int32).long()
    keys = torch.where(keys < 0, -(keys & 0x7FFFFFFF), keys)
    return (keys * n + torch.arange(n - 1, -1, -1, device=scores.device)).topk(K, dim=1).indices


def _chunks(tables: Callable[[Tensor], Tensor], queries: Tensor, n: int) -> Iterator[slice]:
    """Parts of the queries that keep scores and tables within `CHUNK_ELEMENTS`."""
    chunk = max(1, CHUNK_ELEMENTS // max(n, tables(queries[:1]).numel()))
    for start in range(0, len(queries), chunk):
        yield slice(start, start + chunk)
