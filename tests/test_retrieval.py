import re

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

import retrieval


def given(tables):
    """Queries that are their own tables."""
    return tables


def brute_force(scores, relevant, topK):
    """MAP@K, recall and precision at every rank, by sorting Python tuples: best score first, then database order."""
    aps, recalls, precisions = [], [], []
    for row, hits_of in zip(scores, relevant, strict=True):
        ranked = [hits_of[j] for _, j in sorted((-s, j) for j, s in enumerate(row))]
        found, precision_at_hits, recall, precision = 0, [], [], []
        for rank, hit in enumerate(ranked, start=1):
            found += hit
            recall.append(found / max(sum(ranked), 1))
            precision.append(found / rank)
            if hit and rank <= topK:
                precision_at_hits.append(found / rank)
        aps.append(sum(precision_at_hits) / max(len(precision_at_hits), 1))
        recalls.append(recall)
        precisions.append(precision)
    return np.mean(aps), np.mean(recalls, axis=0), np.mean(precisions, axis=0)


@settings(deadline=None, max_examples=60)
@for_all(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 2**30), st.data())
def test_metrics_against_brute_force_with_many_ties(device, Q, n, M, multi_label, seed, draw):
    g = torch.Generator().manual_seed(seed)
    K = 4
    tables = torch.randint(-2, 3, (Q, M, K), generator=g).float()  # few values: ties everywhere
    codes = torch.randint(K, (n, M), generator=g)
    if multi_label:
        labels = [torch.randint(2, (count, 3), generator=g).to(torch.uint8) for count in (Q, n)]
        relevant = [[bool((q & d).any()) for d in labels[1]] for q in labels[0]]
    else:
        labels = [torch.randint(3, (count,), generator=g) for count in (Q, n)]
        relevant = [[bool(q == d) for d in labels[1]] for q in labels[0]]
    topK = draw.draw(st.one_of(st.none(), st.integers(1, n + 3)))
    scores = [[sum(float(tables[q, m, codes[j, m]]) for m in range(M)) for j in range(n)] for q in range(Q)]
    expected_map, recall, precision = brute_force(scores, relevant, topK or n)
    tables, codes, *labels = (x.to(device) for x in (tables, codes.to(torch.uint8), *labels))
    ours = retrieval.evaluate(given, tables, codes, labels, topK)
    assert ours.map == pytest.approx(expected_map, abs=1e-12)
    for ties, value in ours.map_by_ties.items():
        measured = retrieval.Measure(topK, ties)
        alone = retrieval.mean_average_precision(given, tables, codes, labels, measured)
        assert alone == (value if device == "cpu" else pytest.approx(value, abs=1e-12))
    np.testing.assert_allclose(ours.pr, [recall, precision], atol=1e-12)
    cut = min(topK or n, n)
    np.testing.assert_allclose(ours.p_at_k, [np.arange(1, cut + 1), precision[:cut]], atol=1e-12)


def test_average_precision_over_all_is_scikit_learns():
    scores = torch.randn(20, 200)
    relevant = torch.rand(20, 200) < 0.1
    ranked = relevant.gather(1, scores.argsort(dim=1, descending=True))
    ours = retrieval.average_precision(ranked)
    expected = [average_precision_score(r, s) for r, s in zip(relevant.numpy(), scores.numpy(), strict=True)]
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_average_precision_by_hand():
    ranked = torch.tensor([[True, False, True, False], [False, False, False, False]])
    assert retrieval.average_precision(ranked).tolist() == [(1 / 1 + 2 / 3) / 2, 0.0]


def test_scores_are_inner_products_with_the_reconstructed_database(device):
    """Against faiss' exact inner-product search over the decoded vectors."""
    M, K, d, n, Q = 4, 16, 6, 500, 20
    codewords = F.normalize(torch.randn(M, K, d), dim=-1)
    codes = torch.randint(K, (n, M)).to(torch.uint8)
    queries = torch.randn(Q, M * d)
    decoded = torch.cat([codewords[m][codes[:, m].long()] for m in range(M)], dim=1)
    index = faiss.IndexFlatIP(M * d)
    index.add(decoded.numpy())
    for normalize in (True, False):
        asked = F.normalize(queries.view(Q, M, d), dim=-1).flatten(1) if normalize else queries
        expected, ids = index.search(asked.numpy(), n)
        tables = retrieval.lookup_tables(queries.to(device), codewords.to(device), normalize_query=normalize)
        scores = retrieval.aqs_scores(tables, codes.to(device)).cpu()
        np.testing.assert_allclose(scores.gather(1, torch.from_numpy(ids)), expected, atol=1e-5)


def test_paper_similarity_ignores_the_length_of_query_segments():
    codewords = F.normalize(torch.randn(3, 8, 4), dim=-1)
    queries = torch.randn(5, 12)
    stretched = (queries.view(5, 3, 4) * torch.tensor([0.1, 1.0, 30.0])[None, :, None]).reshape(5, 12)
    torch.testing.assert_close(
        retrieval.lookup_tables(stretched, codewords), retrieval.lookup_tables(queries, codewords)
    )


def test_symmetric_similarity_is_that_of_both_reconstructions():
    codewords = F.normalize(torch.randn(3, 8, 4), dim=-1)
    query_codes, db_codes = (torch.randint(8, (n, 3)).to(torch.uint8) for n in (5, 30))
    decode = lambda codes: torch.cat([codewords[m][codes[:, m].long()] for m in range(3)], dim=1)  # noqa: E731
    ours = retrieval.aqs_scores(retrieval.symmetric_tables(query_codes, codewords), db_codes)
    torch.testing.assert_close(ours, decode(query_codes) @ decode(db_codes).T)


@settings(deadline=None)
@for_all(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_ranking_is_by_score_and_then_by_position(device, scores, draw):
    """All floats, infinite, denormal and both zeros among them, in rows whose relevance tells the order."""
    n = len(scores)
    K = draw.draw(st.integers(1, n))
    row = st.lists(st.booleans(), min_size=n, max_size=n)
    relevant = torch.tensor(draw.draw(st.lists(row, min_size=1, max_size=3)))
    expected = sorted(range(n), key=lambda i: (-scores[i], i))[:K]
    ours = retrieval.ranking(torch.tensor([scores] * len(relevant)).to(device), relevant.to(device), K).relevant
    assert ours.tolist() == relevant[:, expected].tolist()


def test_codes_of_two_bytes():
    codewords = F.normalize(torch.randn(1, 300, 4), dim=-1)
    codes = torch.tensor([[299], [0], [256]], dtype=torch.int32)
    tables = retrieval.lookup_tables(torch.randn(2, 4), codewords)
    torch.testing.assert_close(retrieval.aqs_scores(tables, codes), tables[:, 0][:, [299, 0, 256]])


def test_result_does_not_depend_on_the_chunks(monkeypatch):
    tables, codes = torch.randn(23, 2, 8), torch.randint(8, (50, 2))
    labels = torch.randint(4, (23,)), torch.randint(4, (50,))
    seen = []
    whole = retrieval.evaluate(given, tables, codes, labels, 10, on_chunk=seen.append)
    monkeypatch.setitem(retrieval.CHUNK_ELEMENTS, "cpu", 200)
    parts = retrieval.evaluate(given, tables, codes, labels, 10, on_chunk=seen.append)
    assert list(whole.map_by_ties.values()) == pytest.approx(list(parts.map_by_ties.values()), abs=1e-14)
    torch.testing.assert_close(whole.pr, parts.pr)
    assert seen == [23, 4, 4, 4, 4, 4, 3]


def curves_if_ties_fell(scores, relevant, luck):
    """Mean precision and recall at every rank if scores within rounding of each other fell for the relevant images
    (luck 1) or against them (luck -1)."""
    rounding = 1e-6 * np.abs(scores).max()
    order = np.argsort(-(scores + luck * rounding * relevant), axis=1)
    hits = np.take_along_axis(relevant, order, axis=1).cumsum(axis=1)
    precision, recall = hits / np.arange(1, hits.shape[1] + 1), hits / np.maximum(hits[:, -1:], 1)
    return np.stack([recall.mean(axis=0), precision.mean(axis=0)])


@pytest.mark.parametrize("distance", ["asym", "sym"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_golden_metrics(golden, kind, distance, device):
    """The golden curves break ties in no fixed order: there they may differ, within what the ties allow."""
    numbers = golden("retrieval")
    there = lambda name: torch.from_numpy(numbers[name]).to(device)  # noqa: E731
    C, codes, query, query_codes = map(there, ("C", "db_codes", "query", "query_codes"))
    labels = [there(f"{kind}/{side}_labels") for side in ("query", "db")]
    if distance == "asym":
        tables = retrieval.lookup_tables(query, C, normalize_query=False)
    else:
        tables = retrieval.symmetric_tables(query_codes, C)
    prefix = f"{kind}/{distance}/"
    keys = [key for key in numbers.files if key.startswith(prefix)]
    for key in (key for key in keys if "MAP@" in key):
        topK = re.search(r"MAP@(\w+)", key)[1]
        ours = retrieval.evaluate(given, tables, codes, labels, None if topK == "None" else int(topK))
        # scores that nearly are equal may change places on a device that rounds otherwise
        assert ours.map == pytest.approx(float(numbers[key]), abs=1e-6 if device == "cpu" else 1e-4)
    scores = retrieval.aqs_scores(tables, codes).double().cpu().numpy()
    relevant = retrieval.relevance(*labels).cpu().numpy()
    low, high = (curves_if_ties_fell(scores, relevant, luck) for luck in (-1, 1))
    certain = low == high
    assert certain.any()
    for curve in (numbers[prefix + "PR"], ours.pr.numpy()):
        assert (curve >= low - 1e-6).all()
        assert (curve <= high + 1e-6).all()
    np.testing.assert_allclose(ours.pr.numpy()[certain], numbers[prefix + "PR"][certain], atol=1e-6)
    for key in (key for key in keys if re.search(r"/P@", key)):
        topK = int(key.rpartition("@")[2])
        p_at_k = retrieval.evaluate(given, tables, codes, labels, topK).p_at_k.numpy()
        np.testing.assert_array_equal(p_at_k[0], numbers[key][0])
        settled = certain[1][:topK]
        np.testing.assert_allclose(p_at_k[1][settled], numbers[key][1][settled], atol=1e-6)
