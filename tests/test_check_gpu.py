"""What a user runs first on a new machine: its sections, on a CPU and on a pretended GPU, and failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, HOSTILE, ROOT, thin_vgg, wait_for
from pretended_gpu import MISSING, nothing_left, pretended_gpu

import data
from data import Source
from experiments import check_gpu, check_numbers, check_report, check_speed
from experiments.check_base import Check, Row, Sizes, Skipped, write_images
from methods.mecoq import MeCoQ
from results import StepLog
from utils import RunError, run_script

TINY = Sizes(
    flags=("--dataset", "Digits", "--limit", "24", "--image_size", "32", "--batch_size", "8", "--backbone",
           "squeezenet1_0", "--trainable_layer_num", "1", "--num_workers", "0"),
    small=("--limit", "30", "--image_size", "32", "--batch_size", "10"),
    steps=2, repeats=1, encoded=8, searches=((20, 300, 0, 50), (10, 300, 5, 40)),
)  # fmt: skip
slow = pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
needs_pretended = pytest.mark.skipif(bool(MISSING), reason=f"this PyTorch has no {', '.join(MISSING)}")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    thin_vgg(monkeypatch)
    monkeypatch.setattr(check_report, "write_images", lambda root: None)
    monkeypatch.setattr(check_speed, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(check_speed, "copy_bandwidth", lambda *_: 1e10)
    with nothing_left():
        yield


def rows_of(section: str, folder: Path, device: str = "cpu") -> list[Row]:
    return list(check_gpu.functions([section])[section](Check(device, TINY, Path("datasets"), folder)))


def checked(folder: Path, *flags: str) -> int:
    """The exit code of a check on the CPU."""
    return run_script(lambda: check_gpu.main(["--device", "cpu", "--results", str(folder), *flags]))


@pytest.fixture
def sections(monkeypatch):
    """Let these, by name, be all sections."""

    def be(**functions):
        monkeypatch.setattr(check_gpu, "SECTIONS", functions)
        monkeypatch.setattr(check_gpu, "functions", lambda names: {name: functions[name] for name in names})

    return be


def found(folder: Path) -> dict:
    return json.loads((folder / "check_gpu.json").read_text())


# ---------------------------------------------------------------- the sections


def is_slow(section):
    quick = ("machine", "ranking", "same bits", "run", "encoding", "ranking speed", "memory", "candidates")
    return pytest.param(section, marks=() if section in quick else slow)


@pytest.mark.parametrize("section", [is_slow(name) for name in check_gpu.SECTIONS])
def test_a_section_on_a_cpu(section, tmp_path):
    if section in ("waits", "candidates"):
        with pytest.raises(Skipped):
            rows_of(section, tmp_path)
        return
    rows = rows_of(section, tmp_path)
    assert rows
    assert not [row for row in rows if row.ok is False]
    if section in ("golden numbers", "small runs", "ranking", "same bits", "kill and resume"):
        assert all(row.ok and row.expected for row in rows)


@slow
@needs_pretended
@pytest.mark.parametrize("section", [name for name in check_gpu.SECTIONS if name != "kill and resume"])
def test_a_section_on_a_pretended_gpu(section, tmp_path):
    with pretended_gpu():
        rows = rows_of(section, tmp_path, "cuda:0")
    assert rows or section == "memory"
    assert not [row for row in rows if row.ok is False]


@slow
@needs_pretended
def test_all_of_it_on_a_pretended_gpu(tmp_path, monkeypatch):
    """To its end; runs that are killed have a pretended GPU of their own."""
    (tmp_path / "main.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n"
        "import pretended_gpu, main\nwith pretended_gpu.pretended_gpu():\n    sys.exit(main.main())\n"
    )
    monkeypatch.setattr(check_numbers, "MAIN", tmp_path / "main.py")
    monkeypatch.setattr(check_numbers, "LONGEST", 180)
    monkeypatch.setattr(check_report, "CPU_SIZES", TINY)
    with pretended_gpu():
        code = checked(tmp_path / "results", "--small", "--minutes", "100", "--device", "cuda")
    sections = found(tmp_path / "results")["sections"]
    assert list(sections) == list(check_gpu.SECTIONS)
    assert {name: section["state"] for name, section in sections.items()} == dict.fromkeys(sections, "done")
    assert code == 0
    assert sum(row["ok"] is True for section in sections.values() for row in section["rows"]) > 20


@needs_pretended
def test_waits_are_found_by_file_and_line(tmp_path, monkeypatch):
    with pretended_gpu():
        step, *ranking = rows_of("waits", tmp_path, "cuda:0")
    assert step.ok
    assert step.found.startswith("1: 1 in results.py:")
    assert all(row.ok for row in ranking)
    original, add = MeCoQ.after_step, StepLog.add
    with pretended_gpu(), monkeypatch.context() as patch:
        patch.setattr(StepLog, "add", lambda self, *terms: (add(self, *terms), self.read()))
        assert not rows_of("waits", tmp_path, "cuda:0")[0].ok

    def after_step(self):
        original(self)
        self.quantizer.codebooks.sum().item()

    monkeypatch.setattr(MeCoQ, "after_step", after_step)
    with pretended_gpu():
        step = rows_of("waits", tmp_path, "cuda:0")[0]
    assert not step.ok
    assert "3 in engine.py:" in step.found  # three batches of 24 images


@slow
def test_another_number_is_found(tmp_path, monkeypatch):
    """Golden numbers of which one gradient is off by a thousandth."""
    for path in GOLDEN.glob("*.npz"):
        arrays = dict(np.load(path))
        if path.stem == "release_loss":
            arrays["0/gx1"] = arrays["0/gx1"] * np.float32(1.001)
        np.savez(tmp_path / path.name, **arrays)
    monkeypatch.setattr(check_numbers, "GOLDEN", tmp_path)
    wrong = [row for row in rows_of("golden numbers", tmp_path) if not row.ok]
    assert [row.what for row in wrong] == ["MeCoQ: soft codes, losses, gradients"]
    assert wrong[0].value == pytest.approx(1e-3, rel=0.1)


def test_other_bits_are_found(tmp_path, monkeypatch):
    draws = iter(range(100))
    original = MeCoQ.after_step

    def after_step(self):
        original(self)
        self.projection.bias.data[0] += 1e-4 * next(draws)

    monkeypatch.setattr(MeCoQ, "after_step", after_step)
    assert [row.ok for row in rows_of("same bits", tmp_path)] == [False, False]


@pytest.mark.parametrize(("code", "words"), [(0, "ended before"), (2, "exit code 2: error: no data")])
def test_a_run_that_is_not_there_to_be_killed(code, words, tmp_path, monkeypatch):
    program = f"import sys; sys.stderr.write('error: no data\\n'); sys.exit({code})"
    monkeypatch.setattr(check_numbers, "MAIN", tmp_path / "main.py")
    (tmp_path / "main.py").write_text(program)
    with pytest.raises(RunError, match=words):
        rows_of("kill and resume", tmp_path)


@slow
def test_random_images_are_in_cifar10s_files(tmp_path):
    write_images(tmp_path)
    splits = data.load_splits(Source("CIFAR10", "II", 2021, tmp_path, tmp_path))
    assert [len(part) for part in (splits.train, splits.query, splits.database)] == [5000, 10000, 50000]
    first = splits.database.pixels[splits.database.labels == 3][:2].astype(int)
    assert 5 < np.abs(first[0] - first[1]).mean() < 60  # alike, not the same


# ---------------------------------------------------------------- the table


def test_a_section_that_fails_takes_no_other_down(tmp_path, sections, capsys):
    def broken(_):
        yield Row("a | b", "1 %", value=0.01)
        torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
        raise RuntimeError("CUDA error:\n an illegal memory access")

    def skipped(_):
        raise Skipped("there is none")
        yield

    def fine(_):
        yield Row("c", "2", "2", True)

    sections(one=broken, two=skipped, three=fine)
    before = torch.backends.cudnn.allow_tf32
    assert checked(tmp_path) == 1
    assert torch.backends.cudnn.allow_tf32 == before
    states = [section["state"] for section in found(tmp_path)["sections"].values()]
    assert states == ["FAILED: RuntimeError: CUDA error: an illegal memory access", "skipped: there is none", "done"]
    table = capsys.readouterr().out
    assert table == (tmp_path / "check_gpu.md").read_text()
    assert "| one | a \\| b | 1 % |  |" in table
    assert "| three | c | 2 | 2 |" in table
    assert found(tmp_path)["failed"]
    assert checked(tmp_path, "--only", "two", "three") == 0
    assert not found(tmp_path)["failed"]


def test_what_is_not_as_expected_is_a_failure(tmp_path, sections, capsys):
    def wrong(_):
        yield Row("c", "3", "2", False)

    sections(one=wrong)
    assert checked(tmp_path) == 1
    output = capsys.readouterr()
    assert "| one | c | FAILED: 3 | 2 |" in output.out
    assert "one: FAILED, see the table" in output.err


def test_an_interrupt_leaves_what_was_measured(tmp_path, sections, capsys):
    def interrupted(_):
        yield Row("b", "2")
        raise KeyboardInterrupt

    sections(one=lambda _: iter([Row("a", "1")]), two=interrupted, three=lambda _: pytest.fail("it went on"))
    assert checked(tmp_path) == 130
    assert "| two | b | 2 |" in capsys.readouterr().out
    assert list(found(tmp_path)["sections"]) == ["one", "two"]


def test_when_the_time_is_over_no_section_begins(tmp_path, sections):
    sections(one=lambda _: time.sleep(0.1) or iter(()), two=pytest.fail)
    assert checked(tmp_path, "--minutes", "0.001") == 0
    assert found(tmp_path)["sections"]["two"]["state"] == "skipped: 0.001 minutes are over"


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--device", "cuda:77"], "--device cuda:77"), (["--device", "gpu"], "--device gpu"), (["--minutes", "0"], "0.0"),
     (["--minutes", "nan"], "--minutes"), (["--only", "all"], "--only"), (["--results", "/proc/x"], "/proc/x")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(flags, words, tmp_path, capsys):
    assert checked(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@slow
def test_a_check_that_is_killed_leaves_whole_files(tmp_path):
    command = ["bash", "scripts/check_gpu.sh", "cpu", "--results", str(tmp_path)]
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "check_gpu.json").exists() and len(found(tmp_path)["sections"]) >= 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert found(tmp_path)["sections"]["machine"]["state"] == "done"
    assert "| machine | cores |" in (tmp_path / "check_gpu.md").read_text()
