"""`python -m search index` on an index that is there: what is refused leaves it as it was, what failed is tried again,
and who reads it meanwhile sees what it was opened with."""

import os
import shutil
from importlib import metadata

import faiss
import index_forks
import numpy as np
import pytest
from helpers import Killed
from index_forks import fake_decode, found, index, left_out, write_files, write_place

import decoding
import search.making
from search.decode import Decoded
from search.store import Store, read_info
from search.writing import Writer
from utils import InputError, sha256


@pytest.fixture
def place(tmp_path):
    return write_place(tmp_path)


def digests(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- what is refused


def refusing(monkeypatch, what):
    """The model cannot be used: by this version, or on this machine."""

    def refuse(*_):
        raise InputError("no such device")

    if what == "transform":
        monkeypatch.setattr(index_forks, "TRANSFORM", "other")
    else:
        monkeypatch.setattr(index_forks, "FakeEncoder", refuse)


@pytest.mark.parametrize("flags", [["--update"], ["--remove", "a/00.jpg"], ["--update", "--rank", 0, "--world", 2]])
@pytest.mark.parametrize("what", ["transform", "device"])
def test_what_is_refused_leaves_the_index_as_it_was(what, flags, place, monkeypatch):
    index(place)
    write_files(place / "photos", {"new.jpg": b"new"})
    before = digests(place / "index")
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"another version|no such device"):
        refusing(patch, what)
        index(place, *flags)
    assert digests(place / "index") == before
    assert len(found(place)) == 30
    assert index(place, "--update") == ["new.jpg"]


@pytest.mark.parametrize("name", ["/", "./", "//", ".//"])
def test_the_folder_of_all_images_is_not_removed(name, place):
    index(place)
    before = digests(place / "index")
    with pytest.raises(InputError, match=f"--remove {name}: that is every image"):
        index(place, "--remove", "a/00.jpg", name)
    assert digests(place / "index") == before


def test_the_last_images_are_not_removed(place):
    index(place)
    index(place, "--remove", "a/")
    write_files(place / "photos", {"c/bad.jpg": b"broken"})
    index(place, "--update")
    before = digests(place / "index")
    names = [f"b/{i:02d}.jpg" for i in range(1, 30, 2)]
    for flags in (["--remove", "b/"], ["--remove", "a/", *names, "b/"], ["--update", "--remove", "b/"]):
        with pytest.raises(InputError, match="no image would be left"):
            index(place, *flags)
    shutil.rmtree(place / "photos" / "b")
    for flags in (["--update"], ["--update", "--remove", "b/"]):  # what is gone, and is to be removed as well
        with pytest.raises(InputError, match="no image would be left"):
            index(place, *flags)
    assert digests(place / "index") == before
    assert len(found(place)) == 15


@pytest.mark.parametrize("name", ["./c/", "c//"])
def test_a_folder_is_removed_once_however_it_is_named(name, place):
    write_files(place / "photos", {"c/1.jpg": b"1"})
    index(place)
    assert index(place, "--remove", name) == []
    assert index(place, "--remove", name) == []
    assert len(found(place)) == 30


# ---------------------------------------------------------------- what was interrupted


def interrupted(place, *flags):
    """Call the verb, and end it before the index is complete."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):

        def end(*_):
            raise Killed

        patch.setattr(search.making, "write_skipped", end)
        index(place, *flags)
    assert not read_info(place / "index")["complete"]


def test_a_removal_that_was_interrupted_does_not_become_an_update(place):
    index(place)
    before = found(place)
    write_files(place / "photos", {"new.jpg": b"new"})
    (place / "photos" / "b" / "01.jpg").unlink()
    interrupted(place, "--remove", "a/00.jpg")
    (place / "photos").rename(place / "unplugged")
    assert index(place, "--remove", "a/00.jpg") == []
    assert found(place).keys() == before.keys() - {"a/00.jpg"}
    (place / "unplugged").rename(place / "photos")
    assert index(place, "--update") == ["new.jpg"]
    assert "listing" not in read_info(place / "index")


def test_an_update_that_was_interrupted_is_finished_by_a_removal(place):
    index(place)
    (place / "photos" / "a" / "02.jpg").unlink()
    write_files(place / "photos", {"new.jpg": b"new"})
    interrupted(place, "--update")
    interrupted(place, "--remove", "a/00.jpg")
    write_files(place / "photos", {"later.jpg": b"later"})
    assert index(place, "--remove", "a/00.jpg") == ["later.jpg"]
    assert {"new.jpg", "later.jpg"} < found(place).keys()
    assert not {"a/00.jpg", "a/02.jpg"} & found(place).keys()


# ---------------------------------------------------------------- what is not there for now


def test_what_is_behind_a_link_to_nowhere_is_not_gone(place):
    write_files(place / "drive", {"1.jpg": b"1", "deep/2.jpg": b"2"})
    (place / "photos" / "ext").symlink_to(place / "drive")
    index(place)
    before = found(place)
    (place / "drive").rename(place / "unplugged")
    (place / "photos" / "a" / "00.jpg").unlink()
    assert index(place, "--update") == []
    assert found(place).keys() == before.keys() - {"a/00.jpg"}
    (place / "photos" / "ext").unlink()
    assert index(place, "--update") == []
    assert not {"ext/1.jpg", "ext/deep/2.jpg"} & found(place).keys()


def decoding_as(reasons, monkeypatch):
    """A decoder that gives these contents up for these reasons."""

    def decode(content, size):
        reason = reasons.get(content)
        return Decoded(None, (0, 0), reason) if reason else fake_decode(content, size)

    monkeypatch.setattr(index_forks, "fake_decode", decode)


CONTENTS = {"heic.jpg": b"heic", "avif.jpg": b"avif", "large.jpg": b"large", "locked.jpg": b"locked",
            "slow.jpg": b"slow", "bad.jpg": b"broken", "crash.jpg": b"crash"}  # fmt: skip
REASONS = {b"heic": decoding.NO_HEIC, b"avif": decoding.NO_AVIF, b"large": decoding.reason_of(MemoryError()),
           b"locked": decoding.reason_of(PermissionError(13, "Permission denied")),
           b"slow": "its decoder took more than 30 s", b"crash": "its decoder crashed (exit code -11)"}  # fmt: skip


@pytest.fixture
def poor(place, monkeypatch):
    """A machine that can read neither HEIC nor AVIF nor a file, and its index."""
    monkeypatch.setattr(decoding, "_heic_registered", lambda: False)
    monkeypatch.setattr(decoding.features, "check", lambda name: False)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked.jpg"))
    decoding_as(REASONS, monkeypatch)
    write_files(place / "photos", CONTENTS)
    index(place)
    assert left_out(place).keys() == CONTENTS.keys()
    return place


def test_what_failed_for_a_reason_outside_of_the_file_is_tried_again(poor, monkeypatch):
    assert index(poor, "--update") == ["large.jpg"]
    monkeypatch.setattr(decoding, "_heic_registered", lambda: True)
    decoding_as({**REASONS, b"heic": None}, monkeypatch)
    assert index(poor, "--update") == ["heic.jpg", "large.jpg"]
    assert "heic.jpg" in found(poor)
    monkeypatch.setattr(decoding.features, "check", lambda name: name == "avif")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    decoding_as({}, monkeypatch)
    assert index(poor, "--update", "--decode_seconds", 30) == ["avif.jpg", "large.jpg", "locked.jpg"]
    assert index(poor, "--update", "--decode_seconds", 30.5) == ["slow.jpg"]
    assert left_out(poor).keys() == {"bad.jpg", "crash.jpg"}
    assert index(poor, "--update", "--decode_seconds", 99) == []


def test_what_fails_again_leaves_the_same_bytes(poor):
    before = digests(poor / "index")
    assert index(poor, "--update") == ["large.jpg"]
    assert digests(poor / "index") == before


def test_a_run_that_goes_on_tries_again_and_leaves_the_same_bytes(poor, monkeypatch):
    before = digests(poor / "index")
    shutil.rmtree(poor / "index")
    commit = Writer.commit

    def last(writer, stretch):
        commit(writer, stretch)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Writer, "commit", last)
        index(poor)
    assert index(poor) == ["large.jpg"]
    assert digests(poor / "index") == before


# ---------------------------------------------------------------- who reads meanwhile


def told(store):
    rows, everything = store.rows(store.ids), np.arange(len(store.ids))
    below = [store.under(name).tolist() for name in ("", "a", "b", "c")]
    return rows, below, store.codes().tolist(), store.features(everything).tolist()


def test_an_index_that_is_open_answers_as_before_while_it_changes(place):
    index(place, "--shard", 8)
    index(place, "--remove", "a/02.jpg")
    store = Store.open(place / "index")
    expected = told(store)
    asked_late = Store.open(place / "index")
    write_files(place / "photos", {"a/04.jpg": b"other", "a/99.jpg": b"new", "c/1.jpg": b"1"})
    (place / "photos" / "b" / "01.jpg").unlink()
    for flags in (["--remove", "a/00.jpg", "b/29.jpg"], ["--update"]):
        index(place, *flags)
        assert told(store) == expected
    assert told(asked_late) == expected
    now = Store.open(place / "index")
    assert len(now.ids) == 28
    for image in {*now.ids.tolist()} - {*store.ids.tolist()}:
        with pytest.raises(KeyError):
            store.name(image)


# ---------------------------------------------------------------- versions


def test_versions_are_said_whatever_package_faiss_is_of(monkeypatch):
    version = metadata.version

    def without(name):
        if name.startswith("faiss"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    assert search.making.versions()["faiss"] == faiss.__version__
