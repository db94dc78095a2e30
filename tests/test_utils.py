"""Errors, logs, seeds, and files that are written and read whole or not at all."""

import importlib
import io
import logging
import zipfile

import pytest
import torch
from helpers import written_below
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import (
    InputError,
    atomic_write,
    check_writable,
    load_object,
    load_tensors,
    logging_to,
    sample_seed,
    write_tensors,
)

# ---------------------------------------------------------------- files


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as file:
        file.write("new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_check_writable_names_the_folder(tmp_path):
    (tmp_path / "a-file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*a-file"):
        check_writable(tmp_path / "a-file" / "below")
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


class Changing(io.BytesIO):
    """As if the disk had changed a byte."""

    def read(self, size=-1):
        return super().read(size).replace(b"b", b"x")


def test_a_file_that_does_not_read_back_is_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "x.cpt"
    write_tensors({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    monkeypatch.setattr("torch.save", lambda content, buffer: buffer.write(b"abc"))
    monkeypatch.setattr("utils.io.BytesIO", Changing)
    with pytest.raises(OSError, match="does not read back"):
        write_tensors({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert written_below(tmp_path) == ["x.cpt"]


def test_tensors_come_back_as_they_were(tmp_path):
    content = {"a": torch.randn(3, 4), "b": {"c": torch.arange(5), "d": [1, 2.5, "text", None]}}
    write_tensors(content, tmp_path / "x.cpt")
    back = load_tensors(tmp_path / "x.cpt")
    assert torch.equal(back["a"], content["a"])
    assert torch.equal(back["b"]["c"], content["b"]["c"])
    assert back["b"]["d"] == content["b"]["d"]
    assert written_below(tmp_path) == ["x.cpt"]


@pytest.mark.parametrize("member", ["data/0", "data/1"])
def test_a_changed_bit_of_any_member_is_found(member, tmp_path):
    """PyTorch itself reads the file as if nothing were wrong."""
    path = tmp_path / "x.cpt"
    write_tensors({"first": torch.rand(100), "second": torch.rand(100)}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(member))
        sound = archive.read(name)
    content = bytearray(path.read_bytes())
    assert content.count(sound) == 1
    content[content.index(sound) + 200] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(zipfile.BadZipFile, match=f"{member} in it is damaged"):
        load_tensors(path)


# ---------------------------------------------------------------- logs


def test_log_lines_are_appended_and_shown(tmp_path, capsys):
    for text in ("first", "second"):
        with logging_to(tmp_path / "a.log"):
            logging.getLogger("mecoq").info(text)
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line.split(" - ")[1] for line in lines] == ["first", "second"]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    full = tmp_path / "full.log"
    full.symlink_to("/dev/full")
    with utils.logging_to(full):
        utils.LOG.info("one")
        utils.LOG.info("two")
    output = capsys.readouterr()
    assert "one" in output.out
    assert "two" in output.out
    assert output.err.count("WARNING: cannot write to") == 1
    assert "Traceback" not in output.err


# ---------------------------------------------------------------- workers


def test_there_are_as_many_workers_as_asked_for_but_no_more_than_cores(monkeypatch):
    monkeypatch.setattr(utils.os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert [utils.worker_count(asked) for asked in (0, 1, 3, 4, 100)] == [0, 1, 3, 3, 3]


# ---------------------------------------------------------------- seeds, registries


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_sample_seed_is_a_valid_seed_and_tells_neighbours_apart(parts):
    seed = sample_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == sample_seed(*parts)
    assert seed != sample_seed(*parts[:-1], parts[-1] + 1)


def test_a_registry_row_names_a_function():
    assert load_object("utils:sample_seed") is sample_seed


def test_a_library_that_is_not_installed_is_named_in_one_line(capsys):
    assert utils.run_script(lambda: importlib.import_module("kornia_that_is_not_there")) == 2
    assert capsys.readouterr().err == (
        "error: No module named 'kornia_that_is_not_there': pip install -r requirements.txt\n"
    )
