"""Files that are no files, locks that are taken away, and memory that runs out while something is saved."""

import os
import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import HOSTILE, ROOT

import engine
import main
import utils
from utils import InputError, RunError, atomic_write, locked, run_script, write_tensors

RUN = [
    "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--limit", "60", "--epoch_num", "2",
    "--batch_size", "16", "--topK", "9", "--disable_writer", "--feature_cache", "off", "--num_workers", "0",
    "--notes", "x", "--save_interval", "1",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "link to a device", "link to itself"])
def test_only_regular_files_are_written(kind, tmp_path):
    path = tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o20666, os.makedev(1, 3))
    else:
        path.symlink_to("/dev/full" if "device" in kind else path)
    before = path.lstat()
    with pytest.raises(InputError, match="is not a regular file"), atomic_write(path) as file:
        file.write(b"x")
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_of_a_link_the_target_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link, "w") as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link", "target"]


def test_a_lock_or_a_log_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"), locked(tmp_path / "pipe", "busy", wait=False):
        pass
    with pytest.raises(InputError, match="is not a regular file"), utils.new_log(tmp_path / "pipe", beside=False):
        pass


@pytest.mark.parametrize("change", ["removed", "replaced", "kept"])
def test_a_lock_says_whether_it_is_still_held(change, tmp_path):
    path = tmp_path / ".lock"
    with locked(path, "busy", wait=False) as check:
        check()
        if change != "kept":
            path.unlink()
        if change == "replaced":
            path.touch()
        if change == "kept":
            check()
        else:
            with pytest.raises(RunError, match=r"\.lock was removed"):
                check()


REMOVED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import main
from methods.mecoq import MeCoQ
original, steps = MeCoQ.loss, []
def loss(*arguments):
    steps.append(0)
    if len(steps) == 3:
        Path(sys.argv[1]).unlink()
    return original(*arguments)
MeCoQ.loss = loss
sys.exit(main.main(sys.argv[2:]))
"""


def test_a_run_whose_lock_is_removed_writes_no_more(tmp_path):
    lock = tmp_path / "checkpoints/x/.lock"
    command = [sys.executable, "-c", REMOVED.format(root=str(ROOT)), lock, *RUN, "--output", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.fullmatch(r"error: epoch 0, step 3: .*\.lock was removed.*\n", result.stderr)
    state = torch.load(tmp_path / "checkpoints/x/last.cpt", weights_only=True)
    assert state["steps"] == 2  # saved before the third step


def test_a_run_whose_lock_is_removed_before_it_begins_touches_nothing(tmp_path, monkeypatch, capsys):
    assert main.main([*RUN, "--output", str(tmp_path)]) == 0
    folder = tmp_path / "checkpoints/x"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    original = engine.build_features

    def build_features(*arguments):
        (folder / ".lock").unlink()
        return original(*arguments)

    monkeypatch.setattr(engine, "build_features", build_features)
    capsys.readouterr()
    assert main.main([*RUN, "--output", str(tmp_path), "--overwrite"]) == 1
    assert ".lock was removed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("output", "code"), [("| true", 141), (">/dev/full", 1), (">&-", 0)])
def test_output_that_cannot_be_written(output, code, unbuffered, tmp_path):
    program = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from utils import run_script"
    program += "; time.sleep(0.3); sys.exit(run_script(lambda: print('x' * 9)))"
    command = f'set -o pipefail; {sys.executable} -c "$PROGRAM" {output}'
    environment = os.environ | {"PROGRAM": program, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert result.stderr.count("\n") == (code == 1)


def test_odd_letters_are_logged_on_an_output_that_has_none(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils; from pathlib import Path\n"
    program += (
        f"with utils.logging_to(Path({str(tmp_path)!r}) / 'a.log'): utils.LOG.info('caf\u00e9'); utils.LOG.info('two')"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [line.partition(" - ")[2] for line in result.stdout.splitlines()] == ["caf\\xe9", "two"]
    assert result.stderr == ""


def test_memory_that_runs_out_while_saving_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    """As PyTorch's zip writer puts it if its buffer cannot grow."""

    def full(content, buffer):
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0\nmore lines")

    monkeypatch.setattr(torch, "save", full)

    def save():
        with utils.naming_lack_of_memory():
            write_tensors({"a": torch.ones(3)}, tmp_path / "x.cpt")

    assert run_script(save) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["db_codes.npy", "metrics.json", "last.cpt"])
def test_a_folder_in_the_place_of_a_result_loses_nothing(name, tmp_path, capsys):
    """--overwrite removes the old run's files only once it is clear that all can be removed."""
    assert main.main([*RUN, "--output", str(tmp_path)]) == 0
    folder = tmp_path / "checkpoints/x"
    (folder / name).unlink()
    (folder / name).mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    assert main.main([*RUN, "--output", str(tmp_path), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(folder / name) in error
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("kind", ["raw pickle", "sparse", "old zip of code"] if HOSTILE else ["sparse"])
def test_pytorch_says_nothing_beside_the_one_line(kind, tmp_path):
    path = tmp_path / "model.cpt"
    if kind == "raw pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "sparse":
        state = {"projection.weight": torch.eye(8).to_sparse_csr(), "quantizer.codebooks": torch.ones(2, 8, 4)}
        torch.save(state, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/code/x.py", "")
            archive.writestr("model/constants.pkl", b"")
    flags = [*RUN, "--test_only", "--checkpoint", path, "--output", tmp_path]
    command = [sys.executable, ROOT / "main.py", *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
