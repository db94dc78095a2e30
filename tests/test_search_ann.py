"""The faiss index over codes, against the project's own scores, float64 and brute force."""

import subprocess
import sys
import threading

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, call, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import retrieval
from search import ann
from utils import InputError


def unit_codewords(M, K, d, seed=0):
    numbers = torch.randn(M, K, d, generator=torch.Generator().manual_seed(seed))
    return F.normalize(numbers, dim=-1).numpy()


def unit_queries(Q, M, d, seed=1):
    numbers = torch.randn(Q, M, d, generator=torch.Generator().manual_seed(seed))
    return F.normalize(numbers, dim=-1).flatten(1).numpy()


def codes_of(n, M, K, seed=2):
    return np.random.default_rng(seed).integers(K, size=(n, M)).astype(np.uint8 if K <= 256 else np.uint16)


def brute_force(codewords, codes, vectors):
    """Scores `[q, n]` in float64."""
    M, _, d = codewords.shape
    chosen = codewords.astype(np.float64)[np.arange(M), codes.astype(int)]  # [n, M, d]
    return np.einsum("qmd,nmd->qn", vectors.astype(np.float64).reshape(-1, M, d), chosen)


def check_best(scores, positions, exact, rounding):
    """Each found score is its image's, sorted by (-score, position), and no image left out is better."""
    n = exact.shape[1]
    assert all(len(set(row)) == len(row) for row in positions)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, positions, axis=1), atol=rounding, rtol=0)
    for row, found, all_scores in zip(scores, positions, exact, strict=True):
        assert list(zip(-row, found, strict=True)) == sorted(zip(-row, found, strict=True))
        left = np.setdiff1d(np.arange(n), found)
        assert len(left) == 0 or all_scores[left].max() <= row[-1] + 2 * rounding


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("K", [2, 16, 256, 300, 65536])
@pytest.mark.parametrize("M", [1, 4, 8, 16])
def test_scores_are_those_of_the_tables(M, K):
    codewords, codes, vectors = unit_codewords(M, K, 3), codes_of(2000, M, K), unit_queries(5, M, 3)
    tables = retrieval.lookup_tables(torch.from_numpy(vectors), torch.from_numpy(codewords))
    ours = retrieval.aqs_scores(tables, torch.from_numpy(codes.astype(np.int32))).numpy()
    scores, positions = ann.search(ann.build_flat(codewords, codes), vectors, 100)
    assert scores.shape == (5, 100)
    check_best(scores, positions, ours, 3e-7 * M)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(2, 20), st.integers(1, 3), st.integers(1, 50), st.integers(1, 60),
       st.sampled_from(["flat", "ivf"]))  # fmt: skip
def test_any_shape_against_brute_force(M, K, d, n, k, kind):
    codewords, codes, vectors = unit_codewords(M, K, d), codes_of(n, M, K), unit_queries(3, M, d)
    index = ann.build_flat(codewords, codes) if kind == "flat" else ann.build_ivf(codewords, codes, 4)
    scores, positions = ann.search(index, vectors, k, nprobe=4)
    assert scores.shape == positions.shape == (3, min(k, n))
    check_best(scores, positions, brute_force(codewords, codes, vectors), 1e-6 * M)


@pytest.mark.parametrize(("M", "K", "group"), [(8, 16, 2), (5, 16, 1), (8, 2, 8), (6, 3, 3), (4, 17, 1), (2, 300, 1)])
def test_codebooks_are_joined_to_a_byte(M, K, group):
    index = ann.build_flat(unit_codewords(M, K, 2), codes_of(10, M, K))
    assert M // group == index.pq.M
    assert index.pq.nbits == max(8, (K - 1).bit_length())


def test_equal_scores_come_by_position():
    codewords = unit_codewords(2, 4, 2)
    codes = np.tile(codes_of(5, 2, 4), (20, 1))
    for index in (ann.build_flat(codewords, codes), ann.build_ivf(codewords, codes, 3)):
        scores, positions = ann.search(index, unit_queries(4, 2, 2), 100, nprobe=3)
        check_best(scores, positions, brute_force(codewords, codes, unit_queries(4, 2, 2)), 1e-6)
        assert (np.sort(positions, axis=1) == np.arange(100)).all()


# ---------------------------------------------------------------- lists


@pytest.fixture(scope="module")
def clustered():
    """Codewords, codes of 20,000 images in 200 groups, and query vectors of such groups."""
    generator, codewords = np.random.default_rng(3), unit_codewords(4, 64, 6)
    centres = generator.normal(size=(200, 24))
    points = centres[generator.integers(200, size=20050)] + 0.3 * generator.normal(size=(20050, 24))
    codes = np.einsum("nmd,mkd->nmk", points[50:].reshape(-1, 4, 6), codewords).argmax(axis=2).astype(np.uint8)
    segments = F.normalize(torch.from_numpy(points[:50]).view(-1, 4, 6), dim=-1)
    return codewords, codes, segments.flatten(1).float().numpy()


def test_few_lists_find_nearly_all_and_all_lists_find_all(clustered):
    codewords, codes, vectors = clustered
    flat, ivf = ann.build_flat(codewords, codes), ann.build_ivf(codewords, codes, 128)
    best = ann.search(flat, vectors, 100)[0]
    np.testing.assert_array_equal(ann.search(ivf, vectors, 100, nprobe=128)[0], best)
    found = ann.search(ivf, vectors, 100, nprobe=16)[0]
    assert (found >= best[:, -1:] - 1e-6).mean() > 0.97
    # the nearest list alone holds fewer: the rest of the row says so
    one, positions = ann.search(ivf, vectors, 1000, nprobe=1)
    assert (positions[:, -1] == -1).all()
    assert (positions[:, 0] >= 0).all()
    assert all((np.diff(row < 0) >= 0).all() for row in positions.astype(int))
    assert (one[positions < 0] < -1e30).all()


def test_negative_tables_as_vectors_and_unit_codewords(clustered):
    """Distances, which are no inner products of embeddings: the tables themselves are searched."""
    codewords, codes, vectors = clustered
    M, K, d = codewords.shape
    tables = -np.linalg.norm(vectors.reshape(-1, M, 1, d) - codewords, axis=3)
    expected = tables[:, np.arange(M)[None, :], codes.astype(int)].sum(axis=2)
    vectors, codewords = tables.reshape(len(tables), -1), np.broadcast_to(np.eye(K, dtype=np.float32), (M, K, K))
    flat, ivf = ann.build_flat(codewords, codes), ann.build_ivf(codewords, codes, 128)
    check_best(*ann.search(flat, vectors, 100), expected, 2e-6)
    check_best(*ann.search(ivf, vectors, 100, nprobe=128), expected, 2e-6)
    found, best = ann.search(ivf, vectors, 10, nprobe=8)[0], ann.search(flat, vectors, 10)[0]
    assert (found >= best[:, -1:] - 1e-6).mean() > 0.8


def test_lists_are_the_same_for_any_number_of_threads_and_others_for_another_seed(clustered):
    codewords, codes, vectors = clustered
    threads, built = faiss.omp_get_max_threads(), []
    try:
        for number in (1, 3):
            faiss.omp_set_num_threads(number)
            index = ann.build_ivf(codewords, codes, 64)
            found = b"".join(array.tobytes() for array in ann.search(index, vectors, 50, nprobe=5))
            built.append((faiss.serialize_index(index).tobytes(), found))
    finally:
        faiss.omp_set_num_threads(threads)
    assert built[0] == built[1]
    assert faiss.serialize_index(ann.build_ivf(codewords, codes, 64, seed=1)).tobytes() != built[0][0]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_fewer_images_than_lists_or_results(n):
    codewords, codes, vectors = unit_codewords(2, 8, 3), codes_of(n, 2, 8), unit_queries(2, 2, 3)
    index = ann.build_ivf(codewords, codes, 16)
    assert index.nlist == n
    scores, positions = ann.search(index, vectors, 20)
    assert scores.shape == (2, n)
    check_best(scores, positions, brute_force(codewords, codes, vectors), 1e-6)


@pytest.mark.parametrize("build", [ann.build_flat, lambda *both: ann.build_ivf(*both, 4)])
def test_no_image_is_refused(build):
    with pytest.raises(InputError, match="there is no image"):
        build(unit_codewords(2, 8, 3), codes_of(0, 2, 8))


def test_kind_and_lists_by_the_number_of_images():
    assert [ann.kind_for(n) for n in (0, 1, 2_000_000, 2_000_001, 10**9)] == ["flat", "flat", "flat", "ivf", "ivf"]
    assert [ann.nlist_for(n) for n in (0, 1, 10**4, 10**6, 10**7)] == [1, 1, 128, 1024, 4096]
    assert all(1 <= ann.nlist_for(n) <= n for n in range(1, 300))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_file_is_written_whole_and_searched_where_it_lies(kind, clustered, tmp_path):
    codewords, codes, vectors = clustered
    path = tmp_path / "search.faiss"
    told = ann.build(path, codewords, codes, kind, vectors)
    assert told["kind"] == kind
    assert told["nlist"] == (0 if kind == "flat" else 128)
    if kind == "ivf":
        assert told["recall"] == {"queries": 50, "nprobe": 64, "at_10": 1.0, "at_100": pytest.approx(1, abs=0.01)}
    built = ann.build_flat(codewords, codes) if kind == "flat" else ann.build_ivf(codewords, codes, 128)
    mapped = ann.open_mapped(path)
    for ours, expected in zip(ann.search(mapped, vectors, 100), ann.search(built, vectors, 100), strict=True):
        np.testing.assert_array_equal(ours, expected)
    content = path.read_bytes()
    ann.build(path, codewords, codes, kind, vectors)  # a file that is mapped is replaced, not changed
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["search.faiss"]


def test_an_index_is_read_from_several_threads(clustered, tmp_path):
    codewords, codes, vectors = clustered
    ann.build(tmp_path / "search.faiss", codewords, codes, "ivf", vectors)
    index, wrong = ann.open_mapped(tmp_path / "search.faiss"), []
    expected = {nprobe: ann.search(index, vectors, 30, nprobe) for nprobe in (1, 4, 16, 64)}

    def work(nprobe):
        for i in range(20):
            scores, positions = ann.search(index, vectors[i : i + 1], 30, nprobe)
            same = (scores == expected[nprobe][0][i]).all() and (positions == expected[nprobe][1][i]).all()
            wrong.extend([] if same else [(nprobe, i)])

    threads = [threading.Thread(target=work, args=(nprobe,)) for nprobe in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


OPENING = """
import sys
from pathlib import Path
from search import ann

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

ann.open_mapped(Path(sys.argv[1]))
before = resident()
index = ann.open_mapped(Path(sys.argv[2]))
print(resident() - before, index.ntotal)
"""


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_opening_reads_next_to_nothing(kind, tmp_path):
    codewords, small, large = unit_codewords(4, 256, 4), tmp_path / "small", tmp_path / "large"
    for path, n in ((small, 10), (large, 1_500_000)):
        codes = codes_of(n, 4, 256)
        ann.write(ann.build_flat(codewords, codes) if kind == "flat" else ann.build_ivf(codewords, codes, 16), path)
    run = [sys.executable, "-c", OPENING, small, large]
    megabytes, n = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert large.stat().st_size > 5.9e6
    assert float(megabytes) < 3
    assert int(n) == 1_500_000


@pytest.mark.parametrize("content", [None, b"", b"no index", b"IxPq" + bytes(100)])
def test_a_file_that_is_no_index_is_refused(content, tmp_path):
    path = tmp_path / "search.faiss"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"search\.faiss (does not exist|is not an index)") as refused:
        ann.open_mapped(path)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- some of the images


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(2, 300), st.integers(1, 40), st.integers(0, 2**20), st.integers(1, 50))
def test_some_of_the_images_are_searched_exactly(M, K, n, seed, k):
    generator = np.random.default_rng(seed)
    codewords, codes, vectors = unit_codewords(M, K, 2), codes_of(n, M, K, seed), unit_queries(2, M, 2, seed)
    positions = np.flatnonzero(generator.random(n) < 0.6)
    scores, found = ann.search_subset(codewords, codes, positions, vectors, k)
    assert scores.shape == found.shape == (2, min(k, len(positions)))
    exact = brute_force(codewords, codes, vectors)
    for row, its, all_scores in zip(scores, found, exact, strict=True):
        assert set(its) <= set(positions)
        np.testing.assert_allclose(row, all_scores[its], atol=1e-6 * M)
        best = np.sort(all_scores[positions])[::-1][: len(its)]
        np.testing.assert_allclose(row, best, atol=2e-6 * M)
        assert list(zip(-row, its, strict=True)) == sorted(zip(-row, its, strict=True))


def test_equal_scores_of_some_images_come_by_position():
    codewords, codes = unit_codewords(1, 2, 2), np.zeros((9, 1), dtype=np.uint8)
    _, found = ann.search_subset(codewords, codes, np.array([1, 3, 4, 8]), unit_queries(1, 1, 2), 3)
    assert found.tolist() == [[1, 3, 4]]


# ---------------------------------------------------------------- the benchmark


def test_the_benchmark_compares_the_same_search(finished, capsys):
    run = finished / "checkpoints" / "small"
    assert call("benchmark_search", run, "--images", 3000, "--queries", 7, "--repeats", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3000 codes of 2 numbers, K 64; 7 queries, 100 best each")
    assert lines[0].endswith("medians of 2")
    assert [line.split(":")[0].split("  ")[0] for line in lines[1:3]] == ["flat", "ivf64"]
    assert [line[:20].strip() for line in lines[3:]] == ["aqs_scores + top-k", "flat", "ivf64, nprobe 16",
                                                         "ivf64, nprobe 64"]  # fmt: skip
    assert lines[-1].endswith("recall@100 1.0000")
    assert " x aqs_scores + top-k, " in lines[-1]
    assert call("benchmark_search", run, "--dry_run") == 0
    assert capsys.readouterr().out.startswith("would search 1000000 codes like those of")
    for flags in (["--images", "0"], ["--noise", "-1"], ["--repeats", "x"]):
        assert flags[0][2:] in refused(capsys, "benchmark_search", run, *flags)
    assert "config.json does not exist" in refused(capsys, "benchmark_search", run.parent)
