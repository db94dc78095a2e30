"""Search in an index, by codes and by features, against brute force in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_small import NAMES, in_process, write_index

from search import indexing
from search.decode import decode_photo
from search.searcher import Hit, Options, Searcher
from utils import InputError

ALL = Options(k=1000, rerank=1000)
CODES = Options(k=1000, rerank=0)


@pytest.fixture(scope="module")
def run(finished):
    return finished / "checkpoints" / "small"


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """An index of 60 photographs, of which three were removed; tests must not change it."""
    folder = write_index(tmp_path_factory.mktemp("searched"), run, "--shard", "25")
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        indexing.main(["-o", str(folder), "--remove", NAMES[0], NAMES[30], NAMES[59]])
    return folder


@pytest.fixture(scope="module")
def searcher(folder):
    return Searcher(folder)


def pixels_of(searcher, ids):
    paths = [searcher.store.path(image) for image in ids]
    return [decode_photo(path.read_bytes(), searcher.encoder.image_size).pixels for path in paths]


def exact(searcher, vector, feature):
    """id -> (score, cosine), in float64."""
    codewords, codes = searcher.encoder.codewords.astype(np.float64), searcher.store.codes().astype(int)
    M, _, d = codewords.shape
    scores = np.einsum("md,nmd->n", vector.astype(np.float64).reshape(M, d), codewords[np.arange(M), codes])
    features = searcher.store.features(np.arange(len(codes))).astype(np.float64)
    cosines = features @ feature / np.linalg.norm(features, axis=1) / np.linalg.norm(feature)
    return dict(zip(searcher.store.ids.tolist(), zip(scores, cosines, strict=True), strict=True))


def check_order(values):
    """Values `(id, number)` are sorted by (-number, id)."""
    assert values == sorted(values, key=lambda value: (-value[1], value[0]))


@pytest.fixture(scope="module")
def query(searcher):
    """Vector and feature of an image that is not in the index."""
    pixels = np.random.default_rng(5).integers(256, size=(1, 3, 16, 16), dtype=np.uint8)
    encoded = searcher.encoder.encode(pixels)
    return encoded.vectors[0], encoded.features[0]


def test_all_images_by_codes_and_by_features(searcher, query):
    expected = exact(searcher, *query)
    assert len(expected) == 57
    for options, place in ((CODES, 0), (ALL, 1)):
        hits = searcher.search(*query, options)
        assert sorted(hit.id for hit in hits) == list(expected)
        for hit in hits:
            assert hit.score == pytest.approx(expected[hit.id][0], abs=1e-6)
            if place:
                assert hit.cosine == pytest.approx(expected[hit.id][1], abs=1e-6)
            assert hit.name == NAMES[hit.id]
        check_order([(hit.id, (hit.score, hit.cosine)[place]) for hit in hits])
    assert all(hit.cosine is None for hit in searcher.search(*query, CODES))
    assert all(hit.cosine is None for hit in searcher.search(query[0], None, ALL))


@pytest.mark.parametrize(("k", "rerank"), [(5, 20), (10, 10), (20, 3), (1, 1000)])
def test_the_best_by_codes_are_reranked(k, rerank, searcher, query):
    expected = exact(searcher, *query)
    hits = searcher.search(*query, Options(k=k, rerank=rerank))
    assert len(hits) == k
    scores = sorted((score for score, _ in expected.values()), reverse=True)
    bound = scores[min(max(k, rerank), len(scores)) - 1]
    assert all(hit.score >= bound - 1e-6 for hit in hits)
    # of those that surely were reranked, any that is nearer than the last one found was found
    surely = {image: cosine for image, (score, cosine) in expected.items() if score > bound + 1e-6}
    nearer = {image for image, cosine in surely.items() if cosine > hits[-1].cosine + 1e-6}
    assert nearer <= {hit.id for hit in hits}
    check_order([(hit.id, hit.cosine) for hit in hits])


def test_an_image_of_the_index_finds_itself_first(searcher):
    ids = searcher.store.ids.tolist()
    for image, pixels in zip(ids, pixels_of(searcher, ids), strict=True):
        first = searcher.of_pixels(pixels, Options(k=3))[0]
        assert first.id == image
        assert first.cosine > 0.999


def test_an_image_by_its_id_is_not_among_those_like_it(searcher):
    for image in (1, 31, 58):
        for options in (ALL, CODES, Options(k=5, rerank=10), Options(k=5, rerank=0), Options(k=5, under="sea")):
            hits = searcher.of_id(image, options)
            assert image not in {hit.id for hit in hits}
            assert len(hits) == min(options.k, 56)
    feature = searcher.store.features(np.array([searcher.store.position(31)]))[0]
    vector = searcher.encoder.vectors_of(searcher.codes[[searcher.store.position(31)]])[0]
    expected = [hit for hit in searcher.search(vector, feature, ALL) if hit.id != 31]
    assert searcher.of_id(31, ALL) == expected


@pytest.mark.parametrize("image", [0, 30, 59, 60, -1, 2**70])
def test_an_id_that_is_no_image(image, searcher):
    with pytest.raises(KeyError):
        searcher.of_id(image, ALL)


def test_only_images_below_a_folder(searcher, query):
    whole = {options: searcher.search(*query, options) for options in (ALL, CODES)}
    for under in ("sea", "sea/", "sea/deep", "town", "."):
        prefix = "" if under == "." else under.rstrip("/") + "/"
        for options, hits in whole.items():
            found = searcher.search(*query, replace(options, under=under))
            expected = [hit for hit in hits if hit.name.startswith(prefix)]
            assert [hit.id for hit in found] == [hit.id for hit in expected]
            np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-6)
    assert len(searcher.search(*query, Options(k=7, rerank=0, under="sea/deep"))) == 7
    with pytest.raises(InputError, match="no image below mountains"):
        searcher.search(*query, replace(ALL, under="mountains"))


# ---------------------------------------------------------------- other indexes


@pytest.mark.parametrize("flags", [["--features", "none"], ["--features", "half"], ["--kind", "ivf"]])
def test_other_kinds_of_index_find_the_same(flags, folder, run, searcher, query, tmp_path):
    (tmp_path / "photos").symlink_to(folder.parent / "photos")
    other = Searcher(write_index(tmp_path, run, *flags))
    expected = {hit.id: hit for hit in searcher.search(*query, ALL)}
    hits = other.search(*query, ALL)
    assert len(hits) == 60
    for hit in hits:
        if hit.id in expected:
            assert hit.score == pytest.approx(expected[hit.id].score, abs=1e-6)
            assert (hit.cosine is None) == ("none" in flags)
            assert hit.cosine is None or hit.cosine == pytest.approx(expected[hit.id].cosine, abs=0.01)
    if "none" in flags:
        check_order([(hit.id, hit.score) for hit in hits])
        assert all(hit.cosine is None for hit in other.of_id(7, ALL))
    if "ivf" in flags:
        assert other.store.info["index"]["kind"] == "ivf"
        assert 0 < len(other.search(*query, Options(k=60, rerank=0, nprobe=1))) < 60


def test_an_index_of_another_decoder_or_model_is_refused(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transforms.PHOTO_TRANSFORM", "photo 0")
        with pytest.raises(InputError, match="decodes otherwise: index again"):
            Searcher(folder)
    monkeypatch.setattr("search.encoder.sha256", lambda path: "0" * 64)
    with pytest.raises(InputError, match="is not the model"):
        Searcher(folder)


def test_an_index_of_other_images_is_refused(folder, monkeypatch):
    class Other:
        ntotal = 3

    monkeypatch.setattr("search.ann.open_mapped", lambda path: Other())
    with pytest.raises(InputError, match="is of other images"):
        Searcher(folder)


def test_hits_hold_plain_values(searcher, query):
    (hit,) = searcher.search(*query, Options(k=1))
    assert [type(value) for value in vars(hit).values()] == [int, str, float, float, int, int]
    assert isinstance(hit, Hit)
    assert Path(hit.name).suffix == ".jpg"


def test_of_equal_scores_the_lowest_ids_are_found(searcher):
    """A vector of one segment: many images share that codeword, and all others score alike."""
    M, _, d = searcher.encoder.codewords.shape
    for image in range(len(searcher.codes)):
        few = replace(CODES, k=1 + image % 40)
        vector = np.zeros((M, d), np.float32)
        vector[0] = np.sign(searcher.encoder.codewords[0, searcher.codes[image, 0]])
        hits = [(hit.id, hit.score) for hit in searcher.search(vector.ravel(), None, CODES)]
        check_order(hits)
        assert [hit.id for hit in searcher.search(vector.ravel(), None, few)] == [found for found, _ in hits[: few.k]]
