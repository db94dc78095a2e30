"""Expected average precision, against every order of equal scores, random orders, fractions and SciPy."""

import math
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

import retrieval
import ties
from retrieval import Measure


def found(scores, labels, topK, ties="expected"):
    """AP@K of each query, of scores that are given."""
    scores = torch.as_tensor(scores, dtype=torch.float32).to(labels[1].device)
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    return retrieval.average_precisions(lambda rows: scores[rows[:, 0]], rows, labels, Measure(topK, ties))


def evaluated(scores, labels, topK):
    """Metrics of scores that are given, as tables of one codebook with a codeword for each image."""
    scores = torch.as_tensor(scores, dtype=torch.float32).to(labels[1].device)
    codes = torch.arange(scores.shape[1], device=scores.device)[:, None]
    return retrieval.evaluate(lambda tables: tables, scores[:, None], codes, labels, topK)


def average_precision(ranked, topK):
    hits = [rank for rank, hit in enumerate(ranked[:topK], start=1) if hit]
    return sum(Fraction(i, rank) for i, rank in enumerate(hits, start=1)) / max(len(hits), 1)


def over_all_orders(scores, relevant, topK):
    """The mean of AP@K over all permutations within groups of equal scores, as a fraction."""
    groups = [[r for s, r in zip(scores, relevant, strict=True) if s == v] for v in sorted({*scores}, reverse=True)]
    values = [average_precision(sum(order, ()), topK) for order in product(*map(permutations, groups))]
    return sum(values) / len(values)


SCORES = st.sampled_from([0.0, -0.0, 1.5, -2.0, math.inf])


@settings(deadline=None, max_examples=150)
@for_all(st.integers(1, 6), st.integers(1, 3), st.booleans(), st.data())
def test_it_is_the_mean_over_all_orders_of_equal_scores(device, n, Q, multi_label, data):
    scores = [data.draw(st.lists(SCORES, min_size=n, max_size=n)) for _ in range(Q)]
    topK = data.draw(st.one_of(st.none(), st.integers(1, n + 2)))
    if multi_label:
        rows = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=n + Q, max_size=n + Q)
        labels = torch.tensor(data.draw(rows), dtype=torch.uint8)
        relevant = [[bool((q & d).any()) for d in labels[Q:]] for q in labels[:Q]]
    else:
        labels = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n + Q, max_size=n + Q)))
        relevant = [[bool(q == d) for d in labels[Q:]] for q in labels[:Q]]
    labels = labels[:Q].to(device), labels[Q:].to(device)
    expected = [float(over_all_orders(s, r, topK or n)) for s, r in zip(scores, relevant, strict=True)]
    np.testing.assert_allclose(found(scores, labels, topK).cpu(), expected, atol=1e-12)
    assert evaluated(scores, labels, topK).expected_map == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("topK", [1, 2, 7, 99, 100])
def test_rows_of_equal_scores_and_queries_with_all_or_nothing_relevant(topK):
    """One group of 100: of all relevant images AP is 1, of one it is the mean of 1 / rank, of none it is 0."""
    labels = torch.tensor([5, 6, 7]), torch.tensor([5] * 100)
    assert found(torch.zeros(3, 100), labels, topK).tolist() == pytest.approx([1, 0, 0], abs=1e-14)
    single = torch.tensor([5]), torch.tensor([0] * 63 + [5] + [0] * 36)
    expected = sum(1 / rank for rank in range(1, topK + 1)) / 100
    assert found(torch.zeros(1, 100), single, topK).item() == pytest.approx(expected, abs=1e-15)


def hamming_search(Q, n, bits, generator):
    """Negative distances `[Q, n]` of noisy codes of ten classes, and the labels."""
    labels = [np.sort(generator.integers(0, 10, size)) for size in (Q, n)]
    classes = generator.integers(0, 2, (10, bits))
    queries, database = (classes[label] ^ (generator.random((len(label), bits)) < 0.35) for label in labels)
    distances = (queries[:, None] != database[None]).sum(axis=2)
    return -distances.astype(np.float32), labels


@pytest.mark.parametrize("topK", [100, 1500])
def test_it_is_the_mean_over_random_orders(topK):
    """16 bits, 2,000 images, 300 orders; the K-th is in the middle of a group for every query."""
    generator = np.random.default_rng(0)
    scores, labels = hamming_search(20, 2000, 16, generator)
    ordered = np.sort(-scores, axis=1)
    assert (ordered[:, topK - 1] == ordered[:, topK]).all()
    relevant, means = labels[0][:, None] == labels[1][None], []
    for _ in range(300):
        order = np.lexsort((generator.random(scores.shape), -scores), axis=1)[:, :topK]
        hits = np.take_along_axis(relevant, order, axis=1)
        precision = hits.cumsum(axis=1) / np.arange(1, topK + 1)
        means.append(((precision * hits).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)).mean())
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert error < 1e-3
    tensors = [torch.from_numpy(label) for label in labels]
    expected = evaluated(scores, tensors, topK).expected_map
    assert abs(expected - np.mean(means)) < 4 * error
    assert found(scores, tensors, topK).mean().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("topK", [50, 1500, None])
def test_a_database_in_the_order_of_its_classes_flatters_a_class_but_not_in_expectation(topK):
    """Six bits, queries of the first class, a database whose first or last images are of that class."""
    scores, labels = hamming_search(200, 2000, 6, np.random.default_rng(1))
    first = labels[0] == 0
    labels = [torch.from_numpy(labels[0][first]), torch.from_numpy(labels[1])]
    sorted_, backwards = ((scores[first], labels), (scores[first][:, ::-1].copy(), [labels[0], labels[1].flip(0)]))
    best, worst = (found(*each, topK, "database").mean() for each in (sorted_, backwards))
    expected, again = (found(*each, topK) for each in (sorted_, backwards))
    np.testing.assert_allclose(expected, again, atol=1e-13)
    assert worst + 0.02 < expected.mean() < best - 0.02


@pytest.mark.parametrize("topK", [3, 30, None])
def test_without_ties_both_are_the_same_to_the_bit(topK):
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(60, generator=generator) for _ in range(8)]).float() - 30
    labels = [torch.randint(4, (size,), generator=generator) for size in (8, 60)]
    assert torch.equal(found(scores, labels, topK), found(scores, labels, topK, "database"))
    metrics = evaluated(scores, labels, topK)
    assert metrics.map == metrics.expected_map > 0.1


@pytest.mark.parametrize("topK", [1, 2])
def test_both_zeros_are_one_score(topK):
    """A hit and a miss in either order, and worse images: few enough, or so many that the best are found first."""
    for rest in (0, 9):
        scores, labels = [[0.0, -0.0] + [-1.0] * rest], (torch.tensor([1]), torch.tensor([1, 0] + [0] * rest))
        expected = {1: 1 / 2, 2: (1 + 1 / 2) / 2}[topK]
        assert found(scores, labels, topK).item() == expected
        assert evaluated(scores, labels, topK).expected_map == expected


@pytest.mark.parametrize("K", [1, 4, 10, 39])
def test_every_way_to_rank_gives_the_same(K, device, monkeypatch):
    """The partial one of a GPU, the partial one of a CPU, and the complete one."""
    generator = torch.Generator().manual_seed(K)
    scores = torch.randint(-3, 3, (25, 40), generator=generator).float()
    relevant = torch.rand(25, 40, generator=generator) < 0.4
    whole = retrieval.ranking(scores, relevant, 40)
    assert (whole.beyond == 0).all()
    keys = []
    monkeypatch.setattr(retrieval, "_in_threads", lambda _, numbers: keys.append(torch.from_numpy(numbers)))
    retrieval.ranking(scores, relevant, 40)  # left unsorted
    monkeypatch.undo()
    there = vars(retrieval.ranking(scores.to(device), relevant.to(device), K))
    there = retrieval.Ranking(**{name: x.cpu() for name, x in there.items()})
    for other in (there, retrieval._ranking_by_topk(keys[0], K), whole.first(K)):
        assert torch.equal(other.relevant, whole.relevant[:, :K])
        of_last = scores == scores.sort(dim=1, descending=True)[0][:, K - 1 : K]
        counts = [of_last.sum(dim=1), (of_last & relevant).sum(dim=1)]
        mine = other.scores == other.scores[:, -1:]
        within = [mine.sum(dim=1), (mine & other.relevant).sum(dim=1)]
        assert torch.equal(other.beyond, torch.stack(counts) - torch.stack(within))


@settings(deadline=None, max_examples=60)
@for_all(st.integers(0, 50000), st.integers(1, 60), st.integers(0, 5000), st.data())
def test_sums_of_precision_are_exact_far_down_a_ranking(N, k, R, data):
    h, R = data.draw(st.integers(0, k)), min(R, N)
    spread = Fraction(h - 1, max(k - 1, 1))
    exact = Fraction(h, k) * sum((R + 1 + (j - 1) * spread) / (N + j) for j in range(1, k + 1))
    hits = [torch.tensor([value], dtype=torch.float64) for value in (R, h)]
    ours = ties.group_sum(torch.tensor([N]), hits[0], torch.tensor([k]), hits[1], 50060)
    assert ours.item() == pytest.approx(float(exact), rel=2e-15, abs=1e-15 * h)  # of AP, which is divided by h or more


@settings(deadline=None, max_examples=60)
@for_all(st.integers(2, 60000), st.data())
def test_numbers_of_hits_are_hypergeometric(n, data):
    """All that are possible are there, however improbable."""
    k, r = data.draw(st.integers(1, n - 1)), data.draw(st.integers(0, n))
    width = min(k, r) - max(k + r - n, 0) + 1
    numbers = (torch.tensor([[value]]) for value in (n, r, k))
    h, probability = (x[0].numpy() for x in ties.hypergeometric(*numbers, width))
    assert h.tolist() == list(range(max(0, k + r - n), min(k, r) + 1))
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(probability, hypergeom.pmf(h, n, r, k), rtol=1e-8, atol=1e-280)
    assert probability @ h == pytest.approx(k * r / n, rel=1e-11)
