"""An index on disk: what is written is read, and what is not as it was written is found."""

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import HOSTILE, written_below
from hypothesis import given, settings
from hypothesis import strategies as st
from index_forks import fakes, write_run

from search import indexing, store
from search.store import Store
from search.writing import File, Stretch, Writer, stored_features
from utils import InputError

M, F = 3, 5


def stretch_of(names, generator, K=256, kind="int8"):
    """Random codes and features of images with these names."""
    images = [(File(name, 1, 2), tuple(generator.integers(1, 9, 2).tolist())) for name in names]
    codes = generator.integers(0, K, (len(names), M)).astype(np.uint8 if K <= 256 else np.uint16)
    features = generator.standard_normal((len(names), F)).astype(np.float32)
    kept = [] if kind == "none" else [stored_features(features, kind)]
    return Stretch(images, [], [codes], kept), codes, features


NAME = st.sampled_from([f"{folder}{i}" for folder in ("", "a/", "a/b/", "a0/", "b\udcff/") for i in range(4)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(NAME, unique=True, max_size=9)),
        st.tuples(st.sampled_from(["forget", "leave_out"]), st.lists(NAME, unique=True, max_size=4)),
    ),
    max_size=8,
)


@settings(max_examples=400 if HOSTILE else 12, deadline=None)
@given(STEPS, st.sampled_from(["int8", "half", "none"]), st.sampled_from([256, 65536]), st.integers(0, 9))
def test_what_is_written_is_read(steps, kind, K, seed):
    generator, live, count = np.random.default_rng(seed), {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Writer(folder, kind, lambda: None) as writer:
            for step, names in steps:
                if step == "commit":
                    stretch, codes, features = stretch_of(names, generator, K, kind)
                    writer.commit(stretch)
                    for i, (image, size) in enumerate(stretch.images):
                        live[image.name] = count + i, size, codes[i], features[i] / np.linalg.norm(features[i])
                    count += len(names)
                else:
                    getattr(writer, step)([os.fsencode(name) for name in names])
                    live = {name: row for name, row in live.items() if name not in names}
            assert (writer.count(), writer.next_id()) == (len(live), count)
        check_read(Store(folder, {"M": M, "K": K, "F": F, "features": kind, "base": "/x"}), live, count)


def check_read(read, live, count):
    rows = sorted((image, name, *row) for name, (image, *row) in live.items())
    ids = [row[0] for row in rows]
    assert read.ids.tolist() == ids
    assert read.ids.dtype == np.int64
    assert read.names(ids) == [row[1] for row in rows]
    assert read.rows(ids) == [(row[1], *row[2]) for row in rows]
    codes = read.codes()
    assert codes.shape == (len(rows), M)
    assert codes.dtype == (np.uint8 if read.info["K"] <= 256 else np.uint16)
    assert codes.tolist() == [row[3].tolist() for row in rows]
    positions = np.arange(len(rows))[::-1]
    if read.has_features:
        expected = np.array([row[4] for row in rows], np.float32).reshape(-1, F)[::-1]
        np.testing.assert_allclose(read.features(positions), expected, atol=0.01)
        np.testing.assert_allclose(np.linalg.norm(read.features(positions), axis=1), 1, atol=1e-6)
    else:
        with pytest.raises(InputError, match="--features none"):
            read.features(positions)
    for folder in ("a", "a/b", "a0", "b\udcff", "c", "a/"):
        below = [i for i, row in enumerate(rows) if row[1].startswith(folder.rstrip("/") + "/")]
        assert read.under(folder).tolist() == below
    assert read.under("").tolist() == read.under(".").tolist() == list(range(len(rows)))
    for image in [*range(-1, count + 1), 10**30]:
        if image in ids:
            assert read.position(image) == ids.index(image)
            assert read.path(image) == Path("/x") / rows[ids.index(image)][1]
        else:
            for method in (read.position, read.name, read.path):
                with pytest.raises(KeyError):
                    method(image)


# ---------------------------------------------------------------- whole or not


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished index of 8 images in 3 shards, and a file that cannot be used."""
    root = tmp_path_factory.mktemp("small")
    (root / "photos").mkdir()
    for i in range(9):
        (root / "photos" / f"{i}.jpg").write_bytes(b"broken" if i == 4 else bytes([i] * (i + 1)))
    flags = ["--model", str(write_run(root / "run")), "-o", str(root / "index"), "--shard", "3"]
    with fakes():
        indexing.main([str(root / "photos"), *flags])
    return root / "index"


@pytest.fixture
def copy(small, tmp_path):
    shutil.copytree(small, tmp_path / "index")
    return tmp_path / "index"


FILES = {
    "index.json", "names.sqlite", "search.faiss", "skipped.csv", "model/model.cpt", "model/config.json",
    *(f"{kind}/0000{i}.npy" for kind in ("codes", "features") for i in range(3)),
}  # fmt: skip


def test_the_files_of_an_index(small):
    assert {*written_below(small)} == FILES | {".lock"}
    read = Store.open(small)
    assert {*read.info["files"]} == FILES - {"index.json"}
    assert read.info["images"] == read.info["next_id"] == len(read.ids) == 8
    assert (small / "skipped.csv").read_text() == "name,reason\n4.jpg,is broken\n"
    assert np.load(small / "codes" / "00002.npy").shape == (2, 4)


def refused(folder, name):
    with pytest.raises(InputError) as error:
        Store.open(folder)
    assert str(folder / name) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_byte_that_changed_is_found(name, copy):
    path = copy / name
    content = path.read_bytes()
    generator = np.random.default_rng(2022)
    every = range(len(content)) if name == "index.json" and HOSTILE else generator.integers(0, len(content), 8)
    for at in [0, len(content) - 1, *every]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        line = refused(copy, name)
        assert "is damaged" in line
    for damaged in (b"", content[:-1], content + b"\0", content + b"\n"):
        path.write_bytes(damaged)
        refused(copy, name)
    path.unlink()
    line = refused(copy, name) if name != "index.json" else refused(copy, "")
    assert "is missing" in line
    rebuilt = name in ("search.faiss", "skipped.csv")
    assert ("--update makes it anew" in line) == rebuilt
    path.write_bytes(content)
    Store.open(copy)


def test_white_space_in_index_json_counts(copy):
    path = copy / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "is damaged" in refused(copy, "index.json")


def test_files_of_others_are_no_matter(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "codes" / "00003.npy").write_text("left by a killed run")
    assert len(Store.open(copy).ids) == 8


def test_an_unfinished_index_is_refused(copy):
    info = store.read_info(copy)
    (copy / "index.json").write_bytes(store.rendered(info | {"complete": False}))
    with pytest.raises(InputError, match="run the same command again"):
        Store.open(copy)
    (copy / "index.json").write_bytes(store.rendered(info | {"format": 2}))
    with pytest.raises(InputError, match="format 2"):
        Store.open(copy)


def test_no_index(tmp_path):
    for folder in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(InputError, match="is no index"):
            Store.open(folder)


@pytest.mark.parametrize("name", ["search.faiss", "skipped.csv"])
def test_what_is_made_of_the_rest_is_made_anew(name, copy):
    before = {file: (copy / file).read_bytes() for file in FILES}
    for damage in (lambda: (copy / name).write_bytes(b"damaged"), (copy / name).unlink):
        damage()
        with fakes() as pool:
            indexing.main(["-o", str(copy), "--update"])
            assert not pool.opened
        assert {file: (copy / file).read_bytes() for file in FILES} == before


@pytest.mark.parametrize("name", sorted(FILES - {"search.faiss", "skipped.csv"}))
def test_what_cannot_be_made_anew_is_not_written_over(name, copy):
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"\1")
    before = {file: (copy / file).read_bytes() for file in FILES}
    with fakes(), pytest.raises(InputError, match=name.replace(".", "[.]")):
        indexing.main(["-o", str(copy), "--update"])
    assert {file: (copy / file).read_bytes() for file in FILES} == before


def test_threads_may_share_it(small):
    read = Store.open(small)
    expected = read.rows(read.ids), read.features(np.arange(8)).tolist(), read.under(".").tolist()

    def ask(_):
        return read.rows(read.ids), read.features(np.arange(8)).tolist(), read.under(".").tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(answer == expected for answer in pool.map(ask, range(200)))


def test_int8_features_keep_a_row_of_zeros():
    assert not stored_features(np.zeros((1, 4), np.float32), "int8").any()
    assert stored_features(np.float32([[0.5, -1, 0.25]]), "int8").tolist() == [[64, -127, 32]]
