"""The files of a run, one by one."""

import errno
import json
import sys
import tokenize

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import results
import utils
from readers import read_array
from results import Events, Files, StepLog, read_codes, read_metrics, save_results, take_place
from retrieval import Metrics
from utils import InputError

METRICS = Metrics(0.5, 0.25, torch.rand(2, 5, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64))

# ---------------------------------------------------------------- codes and curves


@pytest.mark.parametrize(
    ("codes", "dtype"),
    [
        (torch.tensor([[0, 255], [7, 128]], dtype=torch.uint8), np.uint8),
        (torch.tensor([[0, 256], [7, 65535]], dtype=torch.int32), np.uint16),
        (torch.tensor([[0, 3], [7, 1]], dtype=torch.int32), np.uint16),  # K > 256, whichever codes are used
    ],
)
def test_a_code_takes_one_byte_if_its_codewords_fit_one_and_two_if_not(codes, dtype, tmp_path):
    save_results(METRICS, codes, np.array([3, 1]), tmp_path)
    saved = np.load(tmp_path / "db_codes.npy", allow_pickle=False)
    assert saved.dtype == dtype
    assert saved.tolist() == codes.tolist()
    assert np.load(tmp_path / "db_targets.npy", allow_pickle=False).tolist() == [3, 1]
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "PR_curve.txt"), METRICS.pr)
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "P_at_topK_curve.txt"), METRICS.p_at_k)


@pytest.mark.parametrize(("ties", "value"), [("database", 0.5), ("expected", 0.25)])
def test_both_kinds_of_map_are_kept_and_the_chosen_one_is_told(ties, value, tmp_path, caplog):
    files = Files(tmp_path, "x")
    files.checkpoints.mkdir(parents=True)
    codes, told = torch.zeros(2, 1, dtype=torch.uint8), {"config": {"device": "cpu"}}
    with caplog.at_level("INFO", utils.LOG.name):
        kept = results.report(files, np.array([3, 1]), METRICS, codes, ties, told)
    assert caplog.messages[0] == f"test mAP={value:.6f}"
    assert json.loads(files.metrics.read_text()) == kept
    assert (kept["map"], kept["map_by_ties"]) == (value, {"expected": 0.25, "database": 0.5})


@pytest.mark.parametrize(
    "error",
    [tokenize.TokenError("EOF in multi-line statement"), SyntaxError("x"), EOFError(), MemoryError(), OSError()],
)
def test_whatever_numpy_raises_is_said_in_one_line(error, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(np, "load", fails)
    with pytest.raises(InputError, match=r"a\.npy is not a readable \.npy file"):
        read_array(tmp_path / "a.npy")


def test_an_archive_of_arrays_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(InputError, match="an archive of them"):
        read_array(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"config": {}, "map": 1}', '{"config": [], "map": 0.5}', "[" * 10**5]
)
def test_metrics_of_no_run_are_refused(content, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"is not the metrics\.json of a run"):
        read_metrics(path)
    path.write_text(json.dumps({"config": {"seed": 1}, "map": 0.5}))
    assert read_metrics(path)["map"] == 0.5


@pytest.mark.parametrize(("code", "sound"), [(-1, False), (0, True), (63, True), (64, False)])
def test_saved_codes_are_numbers_of_codewords(code, sound, tmp_path):
    """Of 64, counted from 0; one out of range would be read from beyond its table."""
    labels, codes = np.array([4, 2, 2]), np.array([[5, 7], [1, code], [9, 2]], np.int16)
    np.save(tmp_path / "db_codes.npy", codes)
    model = tmp_path / "model.cpt"
    model.write_bytes(b"")
    if sound:
        assert read_codes(model, 2, 64, labels).tolist() == codes.tolist()
    else:
        with pytest.raises(InputError, match=f"a code is .*{code}.*codewords are 0 to 63"):
            read_codes(model, 2, 64, labels)


# ---------------------------------------------------------------- the folder of a run


def test_nothing_is_removed_if_a_folder_stands_in_the_place_of_a_file(tmp_path):
    files = Files(tmp_path, "x")
    files.checkpoints.mkdir(parents=True)
    files.model.write_text("")
    files.metrics.mkdir()
    with pytest.raises(InputError, match=r"metrics\.json is a folder"):
        files.clear()
    assert files.present() == ["model.cpt", "metrics.json"]
    files.metrics.rmdir()
    files.clear()
    assert files.present() == []


# ---------------------------------------------------------------- going on in the files of an earlier run

LINE = "2024-05-01 10:00:00,123 - "
TOLD = [
    "recipe paper: pairing=own", "epoch 0: avg loss=2.500000, avg quantization error=0.1", "val mAP=0.200000",
    "epoch 1: avg loss=2.400000, avg quantization error=0.1", "val mAP=0.300000", "WARNING: a slow disk",
    "epoch 2: avg loss=2.300000, avg quantization error=0.1", "val mAP=0.250000",
    "early stop: no better val mAP in 1 evaluations", "test mAP=0.300000", "test P@1=0.500000", "stopped by SIGTERM",
]  # fmt: skip


@pytest.mark.parametrize(
    ("epoch", "again"), [(0, {1, 2, 3, 4, 6, 7, 8}), (1, {3, 4, 6, 7, 8}), (2, {6, 7, 8}), (3, set())]
)
def test_the_log_loses_what_will_be_told_again_and_nothing_else(epoch, again, tmp_path):
    files = Files(tmp_path, "x")
    files.log.parent.mkdir()
    files.log.write_text("".join(f"{LINE}{line}\n" for line in TOLD))
    new = files.log.with_name("new.log")
    new.write_text(f"{LINE}going on\n")
    take_place(files, new, {"epoch": epoch, "steps": 0})
    kept = [line for i, line in enumerate(TOLD) if i not in again | {9, 10}]
    assert files.log.read_text() == "".join(f"{LINE}{line}\n" for line in [*kept, "going on"])
    assert not new.exists()


def test_tensorboards_files_lose_what_will_be_told_again_and_nothing_else(tmp_path):
    """Going on in epoch 2, with step 5 of all: values of steps 0 to 4 and epochs 0 and 1 stay, once each."""
    files = Files(tmp_path, "x")
    files.checkpoints.mkdir(parents=True)
    files.log.parent.mkdir()
    files.log.write_text("")
    for steps, epochs in ((range(4), range(1)), (range(2, 8), range(4))):  # the second run was one itself
        with Events(files.tensorboard) as events:
            for step in steps:
                events.add_scalar("lr", step / 8, step)
            for epoch in epochs:
                events.add_scalar("val_mAP", epoch / 4, epoch)
    take_place(files, files.log, {"epoch": 2, "steps": 5})
    read = EventAccumulator(str(files.tensorboard)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("lr")] == [(step, step / 8) for step in range(5)]
    assert [(e.step, e.value) for e in read.Scalars("val_mAP")] == [(0, 0.0), (1, 0.25)]
    assert len(files.events()) == 1
    assert not files.new_events.exists()


# ---------------------------------------------------------------- what is told of steps


@pytest.mark.parametrize("interval", [1, 3, 7, 100])
@pytest.mark.parametrize("done", [0, 4])
def test_every_step_is_told_once_and_in_its_order(interval, done):
    told, steps = [], 10
    log = StepLog(interval, steps, done, lambda step, values: told.append((step, values)))
    for step in range(done, steps):
        log.add(0.1 * step, {"a": torch.tensor(1.0 * step), "b": torch.tensor(-1.0 * step)})
        assert len(told) == (step - done + 1 if step + 1 == steps else (step - done + 1) // interval * interval)
    assert told == [(step, {"lr": 0.1 * step, "a": step, "b": -step}) for step in range(done, steps)]
    assert log.last == told[-1][1]


def test_tensorboard_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(utils.LOG, "warning", lambda *words: said.append(words))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Events(tmp_path) as events:
        monkeypatch.setattr(events.writer, "add_scalar", full)
        events.add_scalar("lr", 1.0, 0)
        events.add_scalar("lr", 1.0, 1)
        events.flush()
    assert len(said) == 1
    assert "going on without them" in said[0][0]


def test_a_run_goes_on_if_tensorboard_is_not_installed(tmp_path, monkeypatch):
    """And what an earlier one left of it stays."""
    said, left = [], tmp_path / "events.out.tfevents.1"
    left.write_bytes(b"x")
    monkeypatch.setattr(utils.LOG, "warning", lambda *words: said.append(words))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard" or "utils.tensorb" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with Events(tmp_path) as events:
        events.add_scalar("lr", 1.0, 0)
    assert len(said) == 1
    assert "going on without them" in said[0][0]
    files = Files(tmp_path, "x")
    monkeypatch.setattr(Files, "tensorboard", tmp_path)
    take_place(files, files.log, {"epoch": 0, "steps": 0})
    assert left.read_bytes() == b"x"


# ---------------------------------------------------------------- how long it took


def test_a_phase_that_comes_again_adds_up(monkeypatch):
    clock = iter([10.0, 11.5, 20.0, 20.25, 30.0, 34.0])
    monkeypatch.setattr(results.time, "perf_counter", lambda: next(clock))
    watch = results.Stopwatch()
    for phase in ("train", "validate"):
        with watch.measure(phase):
            pass
    with pytest.raises(ZeroDivisionError), watch.measure("train"):
        1 / 0  # noqa: B018
    assert watch.seconds == {"train": 1.5 + 4.0, "validate": 0.25}
