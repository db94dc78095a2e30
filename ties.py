"""Expected average precision over random orders of equal scores (McSherry and Najork 2008), in closed form.

Equal scores form a group. Among the k ranks behind the N-th, h hits in random order, behind R earlier ones: rank N + j
holds a hit with probability h / k, whose precision is then on average (R + 1 + (j - 1) (h - 1) / (k - 1)) / (N + j).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Ranking:
    """The first K images for each of Q queries, and how many more have the same score as the K-th.

    Args:
        relevant: `[Q, K]` bool, best first.
        scores: `[Q, K]`, of any type: only whether neighbours are equal counts.
        beyond: `[2, Q]` int64, images behind the K-th with its score, and the relevant ones of them.
    """

    relevant: Tensor
    scores: Tensor
    beyond: Tensor

    def first(self, K: int) -> "Ranking":
        """The first K of a ranking of all images."""
        best, score = self.relevant[:, :K], self.scores[:, :K]
        return Ranking(best, score, count_equal(score[:, -1:], self.scores[:, K:], self.relevant[:, K:]))


def count_equal(score: Tensor, scores: Tensor, relevant: Tensor) -> Tensor:
    """How many `scores` `[Q, n]` equal `score` `[Q, 1]`, and how many of those are of `relevant` images: `[2, Q]`."""
    same = scores == score
    return torch.stack([same.sum(dim=1), (same & relevant).sum(dim=1)])


def expected_average_precision(ranking: Ranking, hits: Tensor, precision: Tensor) -> Tensor:
    """AP@K, averaged over all orders of images of equal scores: `[Q]` float64. AP@K is divided by the hits among the
    first K, as in `retrieval.average_precision`.

    Args:
        hits: `[Q, K]` float64, up to each rank in the order of `ranking`.
        precision: `[Q, K]` float64, at each hit; 0 elsewhere.
    """
    K = hits.shape[1]
    tied = F.pad(ranking.scores[:, 1:] == ranking.scores[:, :-1], (1, 1))  # [Q, K + 1]: each image with the one before
    edges = tied[:, 1:] != tied[:, :-1]  # the first and last of each group in turns
    # the last group, of one image or more, may go on behind the K-th
    start = torch.arange(K, device=hits.device).masked_fill(tied[:, :K], 0).amax(dim=1, keepdim=True)
    before = (hits.gather(1, start) - ranking.relevant.gather(1, start).double())[:, 0]
    start = start[:, 0]
    group = torch.stack([K - start, hits[:, -1] - before]) + ranking.beyond
    least, most = _possible(*group, K - start)
    cut = ranking.beyond[0] > 0
    # all that the host must know of the device's numbers, in one word
    edge_count, cut_count, width = torch.stack([edges.sum(), cut.sum(), ((most - least) * cut).max()]).long().tolist()

    places = _places(edges.flatten(), edge_count)
    row, first, last = places[::2] // K, places[::2] % K, places[1::2] % K
    hits_before = hits[row, first] - ranking.relevant[row, first].double()
    sums = precision.masked_fill(tied[:, 1:] | tied[:, :-1], 0)
    sums[row, first] = group_sum(first, hits_before, last - first + 1, hits[row, last] - hits_before, K)

    cut = _places(cut, cut_count)
    start = start[cut]
    sums[cut, start] = sums.new_zeros(())  # a number of the host's would be waited for
    total = sums.sum(dim=1)
    expected = total / hits[:, -1].clamp(min=1)
    expected[cut] = _cut_group(total[cut], start, before[cut], group[:, cut], K, width + 1)
    return expected


def _places(flags: Tensor, count: int) -> Tensor:
    """The places of the `count` flags `[n]` that are set, in their order. A GPU's `nonzero` would let the host wait for
    the number that it knows."""
    if not flags.is_cuda:
        return flags.nonzero()[:, 0]
    return flags.to(torch.uint8).sort(stable=True, descending=True).indices[:count]


def group_sum(N: Tensor, R: Tensor, k: Tensor, h: Tensor, K: int) -> Tensor:
    """Expected sum of the precision at h hits in random order among the ranks N + 1 ... N + k, behind R hits.

    Args:
        N, k: integers; R, h: whole numbers in float64.
        K: at least N + k.
    """
    harmonic = harmonic_numbers(K, N.device)
    high, low = harmonic[:, N + k] - harmonic[:, N]
    A = high + low  # the sum of 1 / (N + j)
    B = k - (N + 1) * A  # the sum of (j - 1) / (N + j)
    return h / k * ((R + 1) * A + (h - 1) / (k - 1).clamp(min=1) * B)


def _cut_group(total: Tensor, N: Tensor, R: Tensor, group: Tensor, K: int, width: int) -> Tensor:
    """Expected AP@K `[C]` if ranks N + 1 ... K hold some of the n images, r of them relevant, of a `group` `[2, C]`.

    Args:
        total: expected sum of the precision at the R hits of the first N ranks.
        width: see `hypergeometric`.
    """
    n, r = group[:, :, None]
    total, N, R = total[:, None], N[:, None], R[:, None]
    k = K - N
    h, probability = hypergeometric(n, r, k, width)
    return (probability * (total + group_sum(N, R, k, h, K)) / (R + h).clamp(min=1)).sum(dim=1)


def _possible(n: Tensor, r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most relevant images that k of n can hold if r of the n are relevant."""
    return (k + r - n).clamp(min=0), torch.minimum(k, r)


def hypergeometric(n: Tensor, r: Tensor, k: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How many relevant images k of n can hold if r of the n are relevant, and the probability of each number:
    `[C, 1]` each -> `[C, width]` float64 both, of probability 0 where fewer are possible. The width is the largest
    count of possible numbers.

    By the ratio of each probability to the one before, which rounds less than factorials do.
    """
    least, _ = _possible(n, r, k)
    h = least + torch.arange(width, dtype=torch.float64, device=n.device)
    ratio = (r - h).clamp(min=0) * (k - h).clamp(min=0) / ((h + 1) * (n - r - k + h + 1))  # of h + 1 to h
    log = F.pad(ratio.log().cumsum(dim=1)[:, :-1], (1, 0))
    return h, log.softmax(dim=1)


@lru_cache(maxsize=4)
def harmonic_numbers(K: int, device: torch.device) -> Tensor:
    """1 + 1/2 + ... + 1/i for i = 0 ... K, as the sum of two float64: `[2, K + 1]`, rounded values and what the
    rounding left, so that differences of them are as exact as float64 can be."""
    terms = 1 / np.arange(1, K + 1)
    values = np.cumsum(terms)
    before = np.concatenate([[0.0], values[:-1]])
    added = values - before
    left = (before - (values - added)) + (terms - added)  # Knuth's two-sum
    table = np.stack([values, np.cumsum(left)])
    return F.pad(torch.from_numpy(table), (1, 0)).to(device)
