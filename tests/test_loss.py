import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import loss
from config import recipe_defaults
from methods.mecoq import CodebookAttention, Codebooks

LOSS_FLAGS = ("pairing", "debias_memory", "negative_bound", "normalize_memory")


def slow_contrastive_loss(view1, view2, memory, T, rho):
    """Eq. 6-7 and 13, term by term in Python floats."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    N = len(view1)
    queries = view1 + view2
    total = 0.0
    for q in range(2 * N):
        positive = math.exp(cosine(queries[q], queries[(q + N) % (2 * N)]) / T)
        others = [queries[j] for j in range(2 * N) if j % N != q % N] + memory
        negative = sum(math.exp(cosine(queries[q], other) / T) - rho * positive for other in others) / (1 - rho)
        negative = max(negative, len(others) * math.exp(-1 / T))
        total -= math.log(positive / (positive + negative))
    return total / (2 * N)


def correlated(generator, shape, common):
    return torch.randn(shape, generator=generator, dtype=torch.float64) + common


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 6), st.integers(2, 7), st.integers(0, 9), st.sampled_from([0.05, 0.1, 0.35, 1.0]),
    st.sampled_from([0.0, 0.1, 0.15, 0.6]), st.sampled_from([0.0, 1.0, 5.0]), st.integers(0, 2**30),
)  # fmt: skip
def test_contrastive_loss_is_its_equation(N, D, memory_size, T, rho, common, seed):
    g = torch.Generator().manual_seed(seed)
    view1, view2, memory = (correlated(g, (n, D), common) for n in (N, N, memory_size))
    expected = slow_contrastive_loss(view1.tolist(), view2.tolist(), memory.tolist(), T, rho)
    ours = loss.contrastive_loss(view1, view2, memory, T=T, pos_prior=rho)
    assert float(ours) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    single = loss.contrastive_loss(view1.float(), view2.float(), memory.float(), T=T, pos_prior=rho)
    assert float(single) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_lower_bound_takes_over_if_debiasing_would_go_below_zero():
    """Two views alike, negatives opposite: the corrected sum is negative, its logarithm would not exist."""
    view = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    T, rho = 0.5, 0.3
    positive, bound = math.exp(1 / T), 2 * math.exp(-1 / T)
    assert 2 * math.exp(-1 / T) - 2 * rho * positive < 0
    ours = loss.contrastive_loss(view, view, T=T, pos_prior=rho)
    assert float(ours) == pytest.approx(-math.log(positive / (positive + bound)), rel=1e-12)


def test_negative_term_in_float32_at_a_low_temperature():
    """200 negatives at s- = 0.86, s+ = 1, tau = 0.05: the corrected sum is below the bound, which must hold."""
    log_negatives, log_positive = torch.full((1, 200), 0.86 / 0.05), torch.tensor([1 / 0.05])
    ours = loss.log_negative_term(log_negatives, log_positive, T=0.05, pos_prior=0.2, n=200)
    assert math.exp(0.86 / 0.05) < 0.2 * math.exp(1 / 0.05)
    assert float(ours) == pytest.approx(math.log(200) - 1 / 0.05, rel=1e-6)


def test_negatives_that_the_correction_cancels_leave_the_bound_and_a_finite_gradient():
    """Two negatives at s- = 0 and n rho exp(s+ / tau) = 2: nothing is left, and its logarithm has no slope."""
    log_negatives = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_positive = log_negatives.detach().logsumexp(dim=1).requires_grad_()
    value = loss.log_negative_term(log_negatives, log_positive, T=0.5, pos_prior=0.5, n=2)
    assert value.item() == pytest.approx(math.log(2) - 1 / 0.5, rel=1e-12)
    value.backward()
    assert log_negatives.grad.isfinite().all()
    assert log_positive.grad.isfinite().all()


def test_without_debiasing_it_is_the_cross_entropy_of_simclr():
    view1, view2 = torch.randn(2, 9, 5, dtype=torch.float64)
    z = F.normalize(torch.cat([view1, view2]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(18).roll(9))
    torch.testing.assert_close(loss.contrastive_loss(view1, view2, T=0.2), expected)


def test_an_empty_memory_changes_nothing():
    view1, view2 = torch.randn(2, 4, 6)
    kwargs = {"T": 0.3, "pos_prior": 0.1}
    empty = loss.contrastive_loss(view1, view2, torch.empty(0, 6), **kwargs)
    assert float(empty) == float(loss.contrastive_loss(view1, view2, **kwargs))


@pytest.mark.parametrize("T", [0.01, 0.05, 0.35])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("N", [1, 2, 32])
@pytest.mark.parametrize("kind", ["random", "alike", "opposite", "zero"])
def test_contrastive_loss_and_gradient_stay_finite(T, rho, N, kind, device):
    """16 codebooks, low temperature, degenerate batches, and a last batch of one image."""
    view1 = torch.randn(N, 16 * 8, device=device)
    view2 = torch.randn(N, 16 * 8, device=device)
    if kind == "alike":
        view1 = view2 = torch.ones(N, 16 * 8, device=device)
    elif kind == "opposite":
        view2 = -view1
    elif kind == "zero":
        view1 = view2 = torch.zeros(N, 16 * 8, device=device)
    for memory in (None, view2[:1].clone()):
        leaf = view1.clone().requires_grad_()
        value = loss.contrastive_loss(leaf, view2, memory, T=T, pos_prior=rho)
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_contrastive_gradient_against_finite_differences(rho):
    view1, view2 = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    memory = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    f = lambda a, b, m: loss.contrastive_loss(a, b, m, T=0.4, pos_prior=rho)  # noqa: E731
    assert torch.autograd.gradcheck(f, (view1, view2, memory))


def test_regularisers_are_their_equations():
    M, K, d, B = 3, 5, 4, 6
    codewords = F.normalize(torch.randn(M, K, d, dtype=torch.float64), dim=-1)
    pairs = [
        sum(float(codewords[m, i, t] * codewords[m, j, t]) for t in range(d))
        for m in range(M) for i in range(K) for j in range(K)
    ]  # fmt: skip
    assert float(loss.codeword_diversity(codewords)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    p = torch.randn(B, M, K, dtype=torch.float64).softmax(-1)
    entropies = [-sum(x * math.log(x) for x in row) for row in p.reshape(-1, K).tolist()]
    assert float(loss.code_entropy(p)) == pytest.approx(sum(entropies) / len(entropies), rel=1e-12)


def test_entropy_of_a_hard_code_is_zero_with_a_finite_gradient_beside_it():
    p = torch.tensor([[[1.0, 0.0, 0.0]]])
    assert float(loss.code_entropy(p)) == 0
    logits = torch.tensor([[[500.0, 0.0, -500.0]]], requires_grad=True)
    loss.code_entropy(logits.softmax(-1)).backward()
    assert logits.grad.isfinite().all()


def test_regulariser_gradients_against_finite_differences():
    codewords = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss.codeword_diversity, codewords)
    assert torch.autograd.gradcheck(lambda x: loss.code_entropy(x.softmax(-1)), logits)


def test_golden_regularisers_and_quantization_error(golden, device):
    numbers = golden("release_loss")
    for i, c in enumerate(json.loads(str(numbers["config"]))):
        x, C, p, h = (torch.from_numpy(numbers[f"{i}/{name}"]).to(device) for name in ("x1", "C", "p1", "h1"))
        segments = F.normalize(x.view(-1, c["M"], c["D"]), dim=-1)
        ours = [
            loss.code_entropy(p),
            loss.codeword_diversity(C),
            loss.quantization_error(segments, h.view_as(segments)),
        ]
        expected = [numbers[f"{i}/{name}"] for name in ("entropy", "diversity", "err1")]
        np.testing.assert_allclose([float(term) for term in ours], expected, rtol=1e-5)


def relative_error(ours, expected):
    ours = ours.cpu().numpy()
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def test_golden_release_losses_and_gradients(golden, device):
    """Total, its terms and the gradients of both embeddings, as the released code computes them in five settings."""
    numbers = golden("release_loss")
    release = {flag: recipe_defaults("release")[flag] for flag in LOSS_FLAGS}
    for i, c in enumerate(json.loads(str(numbers["config"]))):
        x1, x2 = (torch.from_numpy(numbers[f"{i}/{name}"]).to(device).requires_grad_() for name in ("x1", "x2"))
        quantizer = CodebookAttention(Codebooks(c["M"], c["K"], c["M"] * c["D"], alpha=10.0, trained=False)).to(device)
        quantizer.codebooks.data = torch.from_numpy(numbers[f"{i}/C"]).to(device)
        p, h = quantizer(torch.cat([x1, x2]))
        memory = None
        if c["q"]:
            codes = torch.from_numpy(numbers[f"{i}/queue_codes"]).to(device)
            memory = quantizer.reconstruct(codes, quantizer.codewords()).flatten(1)
            assert relative_error(memory, numbers[f"{i}/queue_feats"]) < 1e-5
        contrastive = loss.contrastive_loss(
            *h.flatten(1).chunk(2), memory, T=c["T"], pos_prior=c["rho"] if c["mode"] == "debias" else 0.0, **release
        )
        diversity = loss.codeword_diversity(quantizer.codewords())
        total = contrastive + c["lam"] * loss.code_entropy(p) + c["gam"] * diversity
        total.backward()
        ours = {"contrastive": contrastive, "entropy": loss.code_entropy(p.chunk(2)[0]), "diversity": diversity,
                "loss": total}  # fmt: skip
        for name, value in ours.items():
            assert float(value.detach()) == pytest.approx(float(numbers[f"{i}/{name}"]), rel=1e-5), (i, name)
        for name, x in (("gx1", x1), ("gx2", x2)):
            assert relative_error(x.grad, numbers[f"{i}/{name}"]) < 1e-5, (i, name)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.integers(0, 6), st.sampled_from([0.1, 0.5]), st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from(["own", "all"]), st.booleans(), st.sampled_from(["dcl", "release"]), st.booleans(),
    st.integers(0, 2**30),
)  # fmt: skip
def test_every_combination_of_flags_is_its_sum_in_plain_loops(
    device, N, memory_size, T, rho, pairing, debias_memory, bound, normalize, seed
):
    g = torch.Generator().manual_seed(seed)
    view1, view2 = torch.randn(2, N, 4, generator=g, dtype=torch.float64) + 0.5
    memory = torch.randn(memory_size, 4, generator=g, dtype=torch.float64)
    q = [row / row.norm() for row in torch.cat([view1, view2])]
    entries = [row / row.norm() if normalize else row for row in memory]
    n_batch = 2 * N - 2
    n = n_batch + memory_size
    if n_batch == 0:
        return  # no negatives in the batch: nothing the released code could train on
    sums = [
        sum(math.exp(float(q[j] @ q[k]) / T) for k in range(2 * N) if k % N != j % N)
        + sum(math.exp(float(q[j] @ e) / T) for e in entries)
        for j in range(2 * N)
    ]
    least = n * math.exp(-1 / T) if bound == "dcl" else math.exp(-n_batch / T)
    terms = []
    for i in range(2 * N):
        positive = math.exp(float(q[i] @ q[(i + N) % (2 * N)]) / T)
        for j in range(2 * N) if pairing == "all" else [i]:
            negative = sums[j]
            if rho:
                negative = max((negative - rho * (n if debias_memory else n_batch) * positive) / (1 - rho), least)
            terms.append(-math.log(positive / (positive + negative)))
    ours = loss.contrastive_loss(
        *(x.to(device) for x in (view1, view2, memory)), T=T, pos_prior=rho, pairing=pairing,
        debias_memory=debias_memory, negative_bound=bound, normalize_memory=normalize,
    )  # fmt: skip
    assert float(ours) == pytest.approx(sum(terms) / len(terms), rel=1e-9, abs=1e-12)
