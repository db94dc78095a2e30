"""The losses of the papers, as pure functions of tensors: MeCoQ's, Eq. 6-9 and 12-14, SPQ's and CIBHash's.

Symbols: N images in the batch, M codebooks of K codewords, d = D / M, tau the temperature (`--T`),
rho the positive prior rho+ (`--pos_prior`). Every function returns a scalar (shape `[]`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_negative_term(
    log_negatives: Tensor,
    log_positive: Tensor,
    *,
    T: float,
    pos_prior: float,
    n: int,
    n_batch: int | None = None,
    debias_memory: bool = True,
    bound: str = "dcl",
) -> Tensor:
    """Logarithm of the debiased negative term of Eq. 7 and 13 (Chuang et al. 2020), `[B]`.

        max( (sum_j exp(s-_j / tau) - n rho exp(s+ / tau)) / (1 - rho),  n exp(-1 / tau) )

    Computed from logarithms only, so that no exponential overflows or vanishes at any tau. Without debiasing
    (rho = 0) it is the sum alone.

    Args:
        log_negatives: `[B, n]` or more columns, s-_j / tau; -inf if a column is no negative of that row.
        log_positive: `[B]`, s+ / tau; or `[B, 1]`, which pairs each positive with every row of negatives: `[B, B]`.
        n: how many negatives a row has. It is not counted here: that would make the host wait for the device.
        n_batch: how many of the n are of the batch, not of the memory; all by default.
        debias_memory: False: the n of the correction is `n_batch`, as in the released code.
        bound: "dcl", as above, or "release": exp(-n_batch / tau), practically 0.
    """
    if n == 0:
        return torch.full_like(log_positive, -math.inf)
    total = log_negatives.logsumexp(dim=1)
    if pos_prior == 0:
        return total
    n_batch = n if n_batch is None else n_batch
    corrected = n if debias_memory else n_batch
    # log(e^a - e^b) = a + log(1 - e^(b-a)); if b >= a there is none, and the bound below takes over
    gap = math.log(corrected * pos_prior) + log_positive - total if corrected else torch.full_like(total, -math.inf)
    least = -torch.finfo(gap.dtype).eps
    difference = total + torch.log(-torch.expm1(gap.clamp(max=least)))  # clamped: a finite gradient everywhere
    debiased = torch.where(gap < least, difference, -math.inf) - math.log1p(-pos_prior)
    return debiased.clamp(min=math.log(n) - 1 / T if bound == "dcl" else -n_batch / T)


def contrastive_loss(
    view1: Tensor,
    view2: Tensor,
    memory: Tensor | None = None,
    *,
    T: float,
    pos_prior: float = 0.0,
    pairing: str = "own",
    debias_memory: bool = True,
    negative_bound: str = "dcl",
    normalize_memory: bool = True,
    anchors: str = "both",
) -> Tensor:
    """Debiased contrastive loss over soft reconstructions, Eq. 6-7; with the code memory, Eq. 12-13.

    Each of the 2N views is a query whose positive is the other view of its image and whose negatives are the
    2N - 2 views of the other images and, if given, all N_M memory entries; similarity is the cosine.

        loss = -mean_q log( exp(s+/tau) / (exp(s+/tau) + negative term) )

    Without debiasing and memory it is NT-Xent. The four arguments from `pairing` to `normalize_memory` are the paper's
    as they stand; their other values are what the released code computes.

    Args:
        view1, view2: `[N, D]` reconstructions of the two views.
        memory: `[N_M, D]` reconstructions of the code memory; no gradient flows to the codes behind them.
        pairing: "own", or "all": the mean over every query's positive with every query's negatives, a 2N x 2N table.
        debias_memory: correct the negative term for the memory's negatives too.
        negative_bound: see `log_negative_term`.
        normalize_memory: False: memory vectors keep their length, so that similarity to them is no cosine.
        anchors: "both", or "first": the mean is over the queries of `view1` alone.
    """
    queries = F.normalize(torch.cat([view1, view2]), dim=1)  # [2N, D]
    positives = queries.roll(len(view1), dims=0)  # [2N, D]: the other view of each image
    log_positive = (queries * positives).sum(dim=1) / T  # [2N]
    same_image = torch.eye(len(view1), dtype=torch.bool, device=queries.device).repeat(2, 2)
    log_negatives = (queries @ queries.T / T).masked_fill(same_image, -math.inf)  # [2N, 2N]
    if memory is not None and len(memory):
        memory = F.normalize(memory, dim=1) if normalize_memory else memory
        log_negatives = torch.cat([log_negatives, queries @ memory.T / T], dim=1)
    if pairing == "all":
        log_positive = log_positive[:, None]  # [2N, 1]: against [2N] negative terms, a table
    n_batch = len(queries) - 2
    n = log_negatives.shape[1] - 2  # without the query itself and its positive
    log_negative = log_negative_term(
        log_negatives,
        log_positive,
        T=T,
        pos_prior=pos_prior,
        n=n,
        n_batch=n_batch,
        debias_memory=debias_memory,
        bound=negative_bound,
    )
    losses = torch.logaddexp(log_positive, log_negative) - log_positive
    return losses.mean() if anchors == "both" else losses[: len(view1)].mean()


def cross_quantized_loss(x: Tensor, z: Tensor, *, T: float, pairs: str, anchors: str) -> Tensor:
    """SPQ's contrastive loss in one direction: embeddings of one view against soft reconstructions of the other.

    A mean of cross-entropies over the anchors; similarity is the cosine / tau, the positive of x_i is z_i, and that of
    z_i is x_i.

        pairs    anchors       an anchor's negatives
        cross    embeddings    x_i: the N - 1 other z (the paper's figure)
        cross    both          the same; z_i: the N - 1 other x
        all      embeddings    x_i: the 2N - 2 other x and z
        all      both          the same; z_i: the 2N - 2 other x and z (the released code)

    Args:
        x: `[N, D]` embeddings of one view.
        z: `[N, D]` soft reconstructions of the other view.
    """
    if pairs == "all":
        return contrastive_loss(x, z, T=T, anchors="both" if anchors == "both" else "first")
    logits = F.normalize(x, dim=1) @ F.normalize(z, dim=1).T / T  # [N, N]
    own = torch.arange(len(x), device=x.device)
    of_embeddings = F.cross_entropy(logits, own)
    if anchors == "embeddings":
        return of_embeddings
    return (of_embeddings + F.cross_entropy(logits.T, own)) / 2


def codeword_diversity(codewords: Tensor) -> Tensor:
    """Omega, Eq. 8: the mean of c_i^m . c_j^m over all m, i, j; `codewords` `[M, K, d]` of unit length.

    The mean over all pairs is the squared length of the mean codeword.
    """
    return codewords.mean(dim=1).square().sum(dim=1).mean()


def code_entropy(soft_codes: Tensor) -> Tensor:
    """Mean entropy (nats) of soft codes `[B, M, K]`: the released code's extra term, absent from the paper."""
    log_codes = soft_codes.clamp(min=torch.finfo(soft_codes.dtype).tiny).log()  # p = 0 has a finite gradient
    return -(soft_codes * log_codes).sum(dim=-1).mean()


def quantization_error(segments: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared difference of segments `[B, M, d]` (MeCoQ's are of unit length) and their reconstructions."""
    return (segments - reconstruction).square().mean()


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of codes whose bits are independent, 1 with the probabilities p and q `[N, B]`; CIBHash.

    A sum over bits and a mean over images; 1e-8 keeps the logarithms finite.
    """
    least = 1e-8
    ones = p * ((p + least).log() - (q + least).log())
    zeros = (1 - p) * ((1 - p + least).log() - (1 - q + least).log())
    return (ones + zeros).sum(dim=1).mean()
