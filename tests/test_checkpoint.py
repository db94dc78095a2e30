"""What a run goes on from, what it refuses to, and what it does to a run that is there already."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LIVELY,
    SMALL,
    SQUEEZENET,
    Killed,
    change_images,
    config_of,
    killed_run,
    method_of,
    one_level_brighter,
    small_run,
    splits_of,
    write_flickr25k,
    written_below,
)

import checkpoint
import engine
import evaluation
import main
from checkpoint import Patience
from results import Files
from utils import Stopped

FROZEN = ["--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32"]


def again(output, *flags):
    return main.main([*SMALL, "--save_interval", "2", "--output", str(output), "--notes", "small", *flags])


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("kind", ["soft", "hard", "feature", "none"])
def test_a_restored_training_is_the_same_in_every_part(kind, tmp_path):
    flags = ["--memory", kind, "--optimizer", "Adam"] + (["--queue_begin_epoch", "0"] if kind != "none" else [])
    config = config_of(*flags)
    loader = engine.build_loader(config, splits_of("Digits", seed=1, limit=60))
    trainings = []
    for _ in range(2):
        torch.manual_seed(5)
        trainings.append(engine.start(config, method_of(config), loader, tmp_path / "last.cpt", "data"))
    first, second = trainings
    engine.train_epoch(first, loader)
    torch.manual_seed(6)
    first.save()
    drawn = torch.rand(3)
    second.restore(checkpoint.read_state(tmp_path / "last.cpt", config))
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(first.method.state_dict().values(), second.method.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.scheduler.get_last_lr() == second.scheduler.get_last_lr()
    assert (second.epoch, second.step, second.sums) == (0, len(loader), first.sums)
    assert (first.method.memory is None) == (kind == "none")
    if first.method.memory:
        assert torch.equal(first.method.memory.entries(), second.method.memory.entries())
        assert first.method.memory.next == second.method.memory.next
    loader.set_epoch(1)
    for training in trainings:
        training.epoch, training.step, training.sums = 1, 0, {}
    assert engine.train_epoch(first, loader) == engine.train_epoch(second, loader)


def test_patience_and_times_of_a_restored_training_are_those_of_before(tmp_path):
    config = config_of("--monitor_counter", "3", "--epoch_num", "9")
    loader = engine.build_loader(config, splits_of("Digits", limit=20))
    first, second = (engine.start(config, method_of(config), loader, tmp_path / "last.cpt", "data") for _ in range(2))
    for value in (0.25, 0.5, 0.375, 0.125):
        first.patience.improved(value)
    first.stopwatch.seconds = {"train": 12.5}
    first.epoch, first.history = 4, [{"epoch": 3, "val_mAP": 0.125}]
    first.save()
    second.restore(checkpoint.read_state(tmp_path / "last.cpt", config))
    assert (second.patience.best, second.patience.worse_in_a_row, second.saved_best) == (0.5, 2, 0.5)
    assert (second.stopwatch.seconds, second.epoch, second.history) == ({"train": 12.5}, 4, first.history)
    assert not second.finished
    second.patience.improved(0.5)
    assert second.finished


def test_frozen_weights_are_not_saved_again():
    names = checkpoint.changing(method_of(config_of(*FROZEN, "--trainable_layer_num", "1")))
    assert {name for name in names if name.startswith("backbone.")} == {
        f"backbone.net.features.12.{part}.{kind}"
        for part in ("squeeze", "expand1x1", "expand3x3")
        for kind in ("weight", "bias")
    }
    assert {"projection.weight", "projection.bias", "quantizer.codebooks"} < set(names)


def test_resume_begins_if_nothing_is_there(tmp_path):
    assert again(tmp_path, "--resume") == 0
    assert again(tmp_path, "--resume") == 0  # and has nothing to do now


def test_flags_that_change_the_result_are_refused_and_others_are_not(tmp_path, monkeypatch, capsys):
    folder = killed_run(tmp_path, monkeypatch)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert again(tmp_path, "--resume", "--lr", "0.07", "--K", "16") == 2
    error = capsys.readouterr().err
    assert "with --lr 0.05 (now 0.07), --K 8 (now 16)" in error or "with --K 8 (now 16), --lr 0.05 (now 0.07)" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    others = ["--num_workers", "2", "--save_interval", "5", "--log_interval", "1", "--data_root", "elsewhere"]
    assert again(tmp_path, "--resume", *others) == 0
    expected = small_run(tmp_path / "b")
    assert (folder / "model.cpt").read_bytes() == (expected / "model.cpt").read_bytes()
    assert (folder / "db_codes.npy").read_bytes() == (expected / "db_codes.npy").read_bytes()


def test_other_images_are_refused(tmp_path, monkeypatch, capsys):
    killed_run(tmp_path, monkeypatch)
    change_images(monkeypatch, "Digits", lambda images: type(images)(255 - images.pixels, images.labels))
    assert again(tmp_path, "--resume") == 2
    assert "other images, labels or weights" in capsys.readouterr().err


def other_labels(images):
    labels = images.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    return replace(images, labels=labels)


@pytest.mark.parametrize("change", ["nothing", "labels", "one pixel", "weights"])
def test_a_run_goes_on_with_the_very_same_data_only(change, weights, tmp_path, monkeypatch, capsys):
    """The flags are the same before and after; of the weights, the file's name too."""
    path = tmp_path / "weights.pth"
    shutil.copy(weights, path)
    flags = [*SQUEEZENET, "--limit", "100", "--weights", str(path), "--epoch_num", "2"]
    killed_run(tmp_path, monkeypatch, *flags)
    if change == "labels":
        change_images(monkeypatch, "Digits", other_labels)
    elif change == "one pixel":
        change_images(monkeypatch, "Digits", one_level_brighter)
    elif change == "weights":
        state = torch.load(path, weights_only=True)
        state["features.3.squeeze.bias"][2] += 1e-6  # of a frozen block, which last.cpt does not hold
        torch.save(state, path)
    assert again(tmp_path, *flags, "--resume") == (0 if change == "nothing" else 2)
    assert ("is of a run on other images, labels or weights" in capsys.readouterr().err) == (change != "nothing")


@pytest.mark.parametrize("change", ["nothing", "size", "name", "labels"])
def test_a_run_goes_on_with_the_very_same_photos_only(change, tmp_path, monkeypatch, capsys):
    write_flickr25k(tmp_path, 125)
    images, lists = tmp_path / "datasets" / "Flickr25K" / "mirflickr", tmp_path / "data" / "Flickr25k"
    flags = ["--dataset", "Flickr25K", "--data_root", str(tmp_path / "datasets"), "--list_root", str(tmp_path / "data")]
    killed_run(tmp_path, monkeypatch, *flags, step=3)
    if change == "size":
        path = images / "im9.jpg"
        path.write_bytes(path.read_bytes() + b"\0")  # which a decoder passes over
    elif change == "name":
        (images / "im9.jpg").rename(images / "other.jpg")
        (lists / "img.txt").write_text((lists / "img.txt").read_text().replace("im9.jpg", "other.jpg"))
    elif change == "labels":
        labels = np.loadtxt(lists / "targets.txt", dtype=int)
        labels[8, 5] = 1 - labels[8, 5]
        np.savetxt(lists / "targets.txt", labels, fmt="%d")
    assert again(tmp_path, *flags, "--resume") == (0 if change == "nothing" else 2)
    assert ("is of a run on other images, labels or weights" in capsys.readouterr().err) == (change != "nothing")


@pytest.mark.parametrize("part", ["train", "query", "database"])
def test_the_fingerprint_is_of_all_splits(part):
    backbone = method_of(config_of()).backbone
    splits = splits_of("Digits", limit=20)
    before = checkpoint.fingerprint(splits, backbone)
    assert checkpoint.fingerprint(splits_of("Digits", limit=20), backbone) == before
    for change in (one_level_brighter, other_labels):
        changed = replace(splits, **{part: change(getattr(splits, part))})
        assert checkpoint.fingerprint(changed, backbone) != before


@pytest.mark.parametrize("name", ["PR_curve.txt", "metrics.json"])
def test_a_test_and_an_untrained_model_can_be_resumed_as_well(name, tmp_path, monkeypatch):
    base = small_run(tmp_path / "base")
    for flags in (["--epoch_num", "0"], ["--test_only", "--checkpoint", str(base / "model.cpt")]):
        output = tmp_path / flags[0]
        original = Path.replace

        def replace(path, target, original=original):
            if Path(target).name == name:
                raise Killed
            return original(path, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", replace)
            again(output, *flags)
        assert not (output / "checkpoints" / "small" / "metrics.json").exists()
        assert again(output, *flags, "--resume") == 0
        assert (output / "checkpoints" / "small" / "metrics.json").exists()


def test_only_what_was_saved_is_named(tmp_path, monkeypatch, capsys):
    def full(content, path):
        raise OSError(28, "No space left on device", str(path))

    original = engine.save_model
    monkeypatch.setattr(engine, "save_model", lambda method, path: full(0, path))
    assert again(tmp_path) == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "none was saved yet" in error
    monkeypatch.setattr(engine, "save_model", original)
    assert again(tmp_path, "--resume") == 0


@pytest.mark.parametrize("content", [b"", b"junk", {"epoch": 1}, {"format": 99}, [1], "half"])
def test_states_that_are_none_are_refused(content, tmp_path, monkeypatch, capsys):
    folder = killed_run(tmp_path, monkeypatch)
    last = folder / "last.cpt"
    if content == "half":
        state = torch.load(last, weights_only=True)
        del state["optimizer"]["param_groups"]
        torch.save(state, last)
    elif isinstance(content, bytes):
        last.write_bytes(content)
    else:
        torch.save(content, last)
    assert again(tmp_path, "--resume") == 2
    error = capsys.readouterr().err
    assert str(last) in error
    assert "--overwrite" in error
    assert error.count("\n") == 1
    assert again(tmp_path, "--overwrite") == 0


@pytest.mark.parametrize("older", [True, False], ids=["as it was written", "but for its number"])
def test_the_state_of_an_older_version_is_refused_in_one_line(older, tmp_path, monkeypatch, capsys):
    """Format 1 held the code memory by that name, and a configuration without a method."""
    folder = killed_run(tmp_path, monkeypatch)
    last = folder / "last.cpt"
    state = torch.load(last, weights_only=True)
    assert state["format"] == checkpoint.FORMAT > 1
    state["format"] = 1
    if older:
        state["memory"] = state.pop("extra")
        del state["config"]["method"]
    torch.save(state, last)
    before = written_below(tmp_path)
    assert again(tmp_path, "--resume") == 2
    line = f"error: {last} was written by another version of this program: begin anew with --overwrite\n"
    assert capsys.readouterr().err == line
    assert written_below(tmp_path) == before
    assert torch.load(last, weights_only=True)["format"] == 1


@pytest.mark.parametrize("name", ["model", "optimizer", "extra"])
def test_a_state_with_a_changed_number_is_refused(name, tmp_path, monkeypatch, capsys):
    """A single bit of a tensor, which only the checksums in the file can tell."""
    folder = killed_run(tmp_path, monkeypatch)
    last = folder / "last.cpt"
    state = torch.load(last, weights_only=True)
    tensor = {
        "model": lambda: state["model"]["projection.weight"],
        "optimizer": lambda: state["optimizer"]["state"][0]["momentum_buffer"],
        "extra": lambda: state["extra"]["codes"],
    }[name]()
    content, sought = last.read_bytes(), tensor.numpy().tobytes()[:64]
    assert content.count(sought) == 1
    at = content.index(sought) + 8
    last.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    torch.load(last, weights_only=True)  # PyTorch does not mind
    assert again(tmp_path, "--resume") == 2
    assert f"{last} is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- a run that is there


def test_a_run_is_replaced_on_demand_only(tmp_path, monkeypatch, capsys):
    folder = small_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert again(tmp_path, "--seed", "9") == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--resume", "--overwrite", "--notes"))
    for wrong in (["--dataset", "CIFAR10", "--data_root", str(tmp_path / "none")],
                  [*FROZEN, "--feature_cache", str(folder / "model.cpt" / "x")]):  # fmt: skip
        assert again(tmp_path, "--overwrite", *wrong) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert again(tmp_path, "--resume", "--overwrite") == 2
    assert again(tmp_path, "--overwrite", "--seed", "9", "--epoch_num", "1") == 0
    assert json.loads((folder / "metrics.json").read_text())["seed"] == 9
    log = (tmp_path / "logs" / "small.log").read_text()
    assert "--seed 9\n" in log
    assert "--seed 2021" not in log
    assert len(list((tmp_path / "logs" / "small").iterdir())) == 1


def test_finished_runs_are_skipped_and_others_protected(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "checkpoints" / "small" / "metrics.json"
    before = metrics.read_bytes()
    flags = [*SMALL, *LIVELY, "--output", str(tmp_path), "--notes", "small", "--resume"]
    assert main.main([*flags, "--num_workers", "1"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert main.main([*flags, "--seed", "7", "--pairing", "all"]) == 2
    assert "holds a run with seed=2021, pairing=own: give this one another" in capsys.readouterr().err
    assert metrics.read_bytes() == before
    model = metrics.with_name("model.cpt")
    weights = model.read_bytes()
    model.write_bytes(weights + b" ")  # as if another run had been killed after its first epoch
    monkeypatch.setattr(engine, "run", lambda *a: print("it runs"))
    assert main.main(flags) == 0
    assert "it runs" in capsys.readouterr().out
    model.write_bytes(weights)
    monkeypatch.undo()
    assert main.main([*flags, "--data_root", "elsewhere"]) == 0
    assert main.main([*flags, "--weights", "random", "--backbone", "resnet18", "--image_size", "32"]) == 2
    capsys.readouterr()
    metrics.write_text("{}")
    assert main.main(flags) == 2
    assert "is not the metrics.json of a run" in capsys.readouterr().err
    metrics.unlink()
    assert main.main(flags) == 0  # tested again
    assert json.loads(metrics.read_text())["map"] == json.loads(before)["map"]


def test_a_finished_run_of_an_older_version_is_skipped(finished, tmp_path, capsys):
    """Its configuration does not name what was the only method, and holds a flag that is gone."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "small" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["config"]["method"]
    path.write_text(json.dumps(metrics | {"config": metrics["config"] | {"dry_run": False}}))
    flags = [*SMALL, *LIVELY, "--output", str(tmp_path), "--notes", "small", "--resume"]
    assert main.main(flags) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    del metrics["map_by_ties"], metrics["config"]["ties"]  # of a version that knew one order of equal scores only
    path.write_text(json.dumps(metrics))
    assert main.main(flags) == 2
    assert "holds a run with ties=database" in capsys.readouterr().err
    assert main.main([*flags, "--ties", "database"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out


def test_what_failed_before_it_began_is_no_run(tmp_path, capsys):
    flags = ["--dataset", "CIFAR10", "--data_root", str(tmp_path / "none")]
    assert again(tmp_path, *flags) == 2
    assert "stopped: " in (tmp_path / "logs" / "small.log").read_text()
    assert again(tmp_path, "--feature_cache", str(tmp_path / "logs" / "small.log" / "x"), *FROZEN) == 2
    assert again(tmp_path) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_do_not_share_a_run(tmp_path, capsys):
    folder = Files(tmp_path, "small").checkpoints
    folder.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"  # noqa: E501
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert again(tmp_path) == 2
        assert "another process is at this run" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()
    assert again(tmp_path) == 0


# ---------------------------------------------------------------- patience


def test_patience_counts_values_that_are_not_better():
    patience = Patience(2)
    assert [patience.improved(v) for v in (0.1, 0.1, 0.2, 0.2)] == [True, False, True, False]
    assert not patience.exhausted
    assert not patience.improved(0.15)
    assert patience.exhausted
    assert patience.best == 0.2


def test_patience_matches_a_published_run():
    """A public log ends 10 evaluations after its best: 45 epochs, best at epoch 34."""
    patience = Patience(10)
    values = [0.5 + 0.001 * min(epoch, 34) for epoch in range(50)]
    epochs_run = 0
    while not patience.exhausted:
        patience.improved(values[epochs_run])
        epochs_run += 1
    assert epochs_run == 45


# ---------------------------------------------------------------- signals


def test_signals_wait_while_they_are_deferred():
    with checkpoint.Signals() as signals:
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM
        with pytest.raises(Stopped, match="SIGINT"), signals.deferred():
            signal.raise_signal(signal.SIGINT)
            assert signals.waiting()
            with pytest.raises(Stopped, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)  # the second does not wait
            signals.check()
    with checkpoint.Signals() as signals:
        with pytest.raises(Stopped), signals.deferred():
            signal.raise_signal(signal.SIGINT)  # said when the deferral ends, at the latest
        assert not signals.deferring
    with checkpoint.Signals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.waiting()
        signals.check()
        assert not signals.waiting()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_validating_saves_the_epoch(tmp_path, monkeypatch):
    original = evaluation.validate

    def validate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(evaluation, "validate", validate)
    assert again(tmp_path) == 143
    state = torch.load(tmp_path / "checkpoints" / "small" / "last.cpt", weights_only=True)
    assert (state["epoch"], state["step"], state["history"]) == (0, 7, [])
    monkeypatch.undo()
    assert again(tmp_path, "--resume") == 0
    expected = small_run(tmp_path / "b")
    assert (tmp_path / "checkpoints" / "small" / "model.cpt").read_bytes() == (expected / "model.cpt").read_bytes()
    lines = (tmp_path / "logs" / "small.log").read_text().splitlines()
    assert sum("epoch 0: avg loss" in line for line in lines) == 1
    assert sum("stopped by SIGTERM" in line for line in lines) == 1


def test_a_signal_at_the_end_of_an_epoch_saves_it_even_if_that_is_dear(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 0)
    original = engine.LOG.info

    def info(line, *values):
        original(line, *values)
        if line.startswith("val "):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(engine.LOG, "info", info)
    assert main.main([*SMALL, "--output", str(tmp_path), "--notes", "small"]) == 143
    state = torch.load(tmp_path / "checkpoints" / "small" / "last.cpt", weights_only=True)
    assert (state["epoch"], state["step"], len(state["history"])) == (1, 0, 1)


# ---------------------------------------------------------------- how often it is saved


def test_states_are_saved_as_often_as_time_allows(tmp_path, monkeypatch):
    config = config_of()
    training = engine.start(config, method_of(config), [0] * 7, tmp_path / "last.cpt", "data")
    write = lambda state, path: (clock.append(clock[-1] + 1), saved.append(state))  # noqa: E731
    monkeypatch.setattr(checkpoint, "write_tensors", write)
    clock, saved = [training.began], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[-1])
    for _ in range(200):
        clock.append(clock[-1] + 1)
        training.save(if_cheap=True)
    assert 2 <= len(saved) <= 6
    training.save()
    training.epoch = config.epoch_num
    training.save(if_cheap=True)  # the last one always
    assert [state["epoch"] for state in saved[-3:]] == [0, 0, 2]
