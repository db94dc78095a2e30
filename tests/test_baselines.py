"""Baselines against faiss's own search, brute force, and the definitions in their papers."""

import json
import math
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from helpers import config_of
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from experiments import baselines, table1
from retrieval import Measure
from utils import InputError

F, BITS = 32, (16, 32)


@pytest.fixture(scope="module")
def made():
    """Ten overlapping clusters: features as the methods see them, and labels."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(10, F))
    sizes = {"train": 1500, "query": 300, "database": 3000}
    labels = {name: generator.integers(0, 10, n) for name, n in sizes.items()}
    features = {
        name: (centres[label] + 2 * generator.normal(size=(len(label), F)) + 3).astype(np.float32)
        for name, label in labels.items()
    }
    return baselines.prepared(features), {name: torch.from_numpy(label) for name, label in labels.items()}


def map_of_ranking(ranking, labels):
    """MAP@K of indices `[Q, K]`, best first, in plain loops."""
    found, database = [], labels["database"].numpy()
    for row, query in zip(ranking, labels["query"].numpy(), strict=True):
        hits, precisions = 0, []
        for rank, index in enumerate(row, start=1):
            if database[index] == query:
                hits += 1
                precisions.append(hits / rank)
        found.append(np.mean(precisions) if precisions else 0)
    return np.mean(found)


def ours(method, made, bits, topK=500, ties="database"):
    features, labels = made
    both = [labels["query"], labels["database"]]
    return baselines.method_map(method, features, both, bits, 3, Measure(topK, ties))


def test_features_are_centred_and_of_unit_length(made):
    features, _ = made
    for array in features.values():
        np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5)
    assert np.abs(features["train"].mean(axis=0)).max() < 0.02  # before they were normalised it was 0
    assert np.isfinite(baselines.prepared({"train": np.ones((3, 2))})["train"]).all()


def test_all_splits_are_centred_by_the_mean_of_the_training_features():
    """Splits whose means differ, in float64: what is learned of the others would be learned of the test."""
    generator = np.random.default_rng(0)
    sizes = {"train": (20, 1.0), "query": (5, -2.0), "database": (30, 4.0)}
    raw = {name: (generator.normal(size=(n, 6)) + shift).astype(np.float32) for name, (n, shift) in sizes.items()}
    mean = [sum(float(row[i]) for row in raw["train"]) / 20 for i in range(6)]
    for name, array in baselines.prepared(raw).items():
        for row, ours in zip(raw[name].tolist(), array, strict=True):
            centred = np.array(row) - mean
            np.testing.assert_allclose(ours, centred / math.sqrt(sum(centred**2)), atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["PQ", "OPQ"])
def test_quantizers_find_what_faiss_finds(method, bits, made):
    features, labels = made
    index = faiss.index_factory(F, f"OPQ{bits // 8},PQ{bits // 8}np" if method == "OPQ" else f"PQ{bits // 8}np")
    index.train(features["train"])
    index.add(features["database"])
    ranking = index.search(features["query"], 500)[1]
    assert ours(method, made, bits) == pytest.approx(map_of_ranking(ranking, labels), abs=0.001)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["ITQ", "LSH"])
def test_hashes_find_what_faiss_finds(method, bits, made):
    """By a binary index, whose order among equal distances is its own: the database's order here differs from it."""
    features, labels = made
    encode = baselines.HASHES[method][0](features["train"], bits, 3)
    index = faiss.IndexBinaryFlat(bits)
    if method == "ITQ":
        transform = faiss.ITQTransform(F, bits, True)
        transform.train(features["train"])
        codes = {name: np.packbits(transform.apply(array) > 0, axis=1) for name, array in features.items()}
    else:
        lsh = faiss.IndexLSH(F, bits, True, False)
        lsh.rrot.init(3)
        lsh.is_trained = True
        codes = {name: lsh.sa_encode(array) for name, array in features.items()}
        np.testing.assert_array_equal(np.packbits(encode(features["query"]), axis=1, bitorder="little"), codes["query"])
    index.add(codes["database"])
    distances, ranking = index.search(codes["query"], 3000)
    ranking = np.take_along_axis(ranking, np.lexsort((ranking, distances), axis=1), axis=1)[:, :500]
    assert ours(method, made, bits) == pytest.approx(map_of_ranking(ranking, labels), abs=1e-6)


def test_exact_search_is_cosine_similarity(made):
    features, labels = made
    scores = cosine_similarity(features["query"].astype(float), features["database"].astype(float))
    hits = labels["query"].numpy()[:, None] == labels["database"].numpy()
    expected = np.mean([average_precision_score(hit, score) for hit, score in zip(hits, scores, strict=True)])
    assert ours("exact", made, 0, topK=None) == pytest.approx(expected, abs=1e-5)


def test_table_1_has_them_all():
    assert table1.BASELINES == baselines.METHODS


@pytest.mark.parametrize("ties", ["expected", "database"])
def test_table_1_measures_and_keeps_by_ties(ties, made, tmp_path, monkeypatch):
    """Of LSH at 16 bits, in whose ranking the K-th is one of many equals."""
    features, labels = made
    settings = config_of("--M", "2", "--topK", "500", "--seed", "3").replace(ties=ties)
    images = {name: SimpleNamespace(labels=label.numpy()) for name, label in labels.items()}
    shared = SimpleNamespace(features=None, fingerprint="f", splits=SimpleNamespace(**images))
    monkeypatch.setattr(table1, "prepared", lambda _: features)
    result = table1.run_baseline("LSH", settings, shared, SimpleNamespace(trials=tmp_path))
    values = {each: ours("LSH", made, 16, ties=each) for each in ("expected", "database")}
    assert abs(values["expected"] - values["database"]) > 1e-5
    assert result["map"] == values[ties]
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["key"]["ties"] == ties


def test_codes_find_more_than_chance_and_less_than_exact_search(made):
    exact = ours("exact", made, 0)
    for method in baselines.METHODS:
        values = [ours(method, made, bits) for bits in BITS]
        assert min(values) > 0.2
        assert max(values) < exact


@pytest.mark.parametrize("bits", [1, 8, 40])
def test_spectral_hashing_takes_the_smoothest_eigenfunctions(bits):
    """Weiss et al.: eigenvalue 1 - exp(-eps^2 / 2 |k pi / (b - a)|^2), eigenfunction sin(pi / 2 + k pi x / (b - a))."""
    generator = np.random.default_rng(1)
    x = (generator.uniform(size=(400, 5)) * [9, 5, 3, 2, 1]).astype(np.float32)
    pca = PCA(min(bits, 5), svd_solver="covariance_eigh").fit(x)
    y = pca.transform(x).astype(np.float64)
    functions = []
    for j in range(y.shape[1]):
        a, b = y[:, j].min(), y[:, j].max()
        for k in range(1, bits + 1):
            eigenvalue = 1 - np.exp(-(0.1**2) / 2 * (k * np.pi / (b - a)) ** 2)
            functions.append((eigenvalue, np.sin(np.pi / 2 + k * np.pi * (y[:, j] - a) / (b - a))))
    functions.sort(key=lambda pair: pair[0])
    expected = np.stack([values > 0 for _, values in functions[:bits]], axis=1)
    assert (baselines.spectral_hashing(x, bits, 0)(x) == expected).mean() > 0.999


def test_spherical_hashing_balances_its_spheres(made):
    """Heo et al.: each sphere holds half of the points, every two a quarter, within 10 % on average."""
    train = made[0]["train"]
    bits = baselines.spherical_hashing(train, 16, 0)(train)
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.01)
    both = bits.T.astype(float) @ bits / len(bits)
    pairs = both[~np.eye(16, dtype=bool)]
    assert np.abs(pairs - 0.25).mean() <= 0.1 * 0.25 * 1.05
    assert pairs.std() <= 0.15 * 0.25 * 1.05


def test_spherical_distance_is_the_papers():
    generator = np.random.default_rng(0)
    database, query = generator.random((50, 12)) < 0.5, generator.random((9, 12)) < 0.5
    query[0] = False
    tensors = [torch.from_numpy(2.0 * array - 1).float() for array in (database, query)]
    scores = baselines.spherical_score(*tensors).numpy()
    for i, a in enumerate(query):
        for j, b in enumerate(database):
            common = max(int((a & b).sum()), 0.1)
            assert scores[i, j] == pytest.approx(-int((a ^ b).sum()) / common, rel=1e-5)


def test_too_few_images_are_refused(made):
    with pytest.raises(InputError, match="need 256 training images, there are 255"):
        baselines.product_quantizer(made[0]["train"][:255], 16)


def test_opq_with_fewer_images_than_dimensions():
    train = np.random.default_rng(0).normal(size=(256, 260)).astype(np.float32)
    rotated = baselines.rotation(train, 16)(train)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(train, axis=1), rtol=1e-4)
