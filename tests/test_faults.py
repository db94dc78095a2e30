"""Runs that are killed, stopped or handed damaged files; `scripts/test.sh --hostile` tries hundreds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HOSTILE, LIVELY, ROOT, SEED, SMALL, SQUEEZENET, asked, damages, wait_for, write_cifar10
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def forked():
    """Call main.py with flags in a process of its own: see forks.py."""
    with asked("forks.py") as ask:
        yield lambda *argv, kill=None, timeout=60: ask(argv, kill=kill, timeout=timeout)


# ---------------------------------------------------------------- killed, and going on


def told(output):
    """What the log and TensorBoard tell of epochs and steps."""
    lines = [line.partition(" - ")[2] for line in (output / "logs" / "small.log").read_text().splitlines()]
    events = EventAccumulator(str(output / "logs" / "small"), size_guidance={"scalars": 0}).Reload()
    return (
        [line for line in lines if line.startswith(("epoch ", "val mAP", "early stop", "test "))],
        {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]},
    )


def assert_same_run(output, expected):
    """The same bits in every file, but for times, memory and the folder's name."""
    ours, theirs = (folder / "checkpoints" / "small" for folder in (output, expected))
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    for name in names - {"config.json", "metrics.json", "last.cpt", ".lock"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs)]
    for each in metrics:
        del each["seconds"], each["peak_memory_mb"]
        for flag in ("output", "feature_cache", "save_interval"):
            del each["config"][flag]
    assert metrics[0] == metrics[1]
    assert told(output) == told(expected)
    assert not list(output.rglob("*.tmp"))
    assert len(list((output / "logs").rglob("*"))) == 1 + 1 + len(list((output / "logs" / "small").iterdir()))


TRAINED = [*SMALL, *LIVELY, "--epoch_num", "3", "--save_interval", "3", "--hp_lambda", "0.1"]
KINDS = {
    "trained": TRAINED,
    "hard memory, stops early": [
        *TRAINED, "--memory", "hard", "--queue_size", "70", "--monitor_counter", "1", "--epoch_num", "6",
    ],
    "frozen": [*SMALL, *SQUEEZENET, "--epoch_num", "2", "--save_interval", "2", "--num_workers", "2", "--views", "pil"],
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(forked, weights, tmp_path_factory):
    """kind -> the flags, the folder and the points of a run that nothing stopped."""
    runs = {}
    for kind, flags in KINDS.items():
        output = tmp_path_factory.mktemp("undisturbed")
        flags = [*flags, *(["--weights", weights] if kind == "frozen" else []), "--notes", "small"]
        cache = ["--feature_cache", str(output / "cache")] if kind == "frozen" else []
        answer = forked(*flags, *cache, "--output", output)
        assert answer["rc"] == 0, answer
        runs[kind] = flags, output, answer["points"]
    return runs


def plans(n):
    """When to kill runs: kind of run, kills (point and share of how often it comes there) one after the other."""
    generator = np.random.default_rng(SEED)
    points = ["step", "step", "log", "event", "sync", "rename", "rename", "rank"]
    for i in range(n):
        kills = [(points[generator.integers(len(points))], generator.random()) for _ in range(generator.integers(1, 4))]
        yield pytest.param(list(KINDS)[i % len(KINDS)], kills, id=f"{i}")


@pytest.mark.parametrize(("kind", "kills"), list(plans(125 if HOSTILE else 4)))
def test_killed_runs_end_as_if_they_had_not_been(kind, kills, forked, undisturbed, tmp_path):
    flags, expected, points = undisturbed[kind]
    cache = ["--feature_cache", str(tmp_path / "cache")] if kind == "frozen" else []
    killed = 0
    for point, share in kills:
        answer = forked(*flags, *cache, "--output", tmp_path, "--resume", kill=[point, 1 + int(share * points[point])])
        assert answer["rc"] in (-signal.SIGKILL, 0), answer
        killed += answer["rc"] == -signal.SIGKILL
    assert killed >= 1
    answer = forked(*flags, *cache, "--output", tmp_path, "--resume")
    assert answer["rc"] == 0, answer
    assert_same_run(tmp_path, expected)
    print(f"\n{kind}: {killed} kills (seed {SEED})")


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import main
from methods.mecoq import MeCoQ
original = MeCoQ.loss
def slow(*arguments):
    time.sleep({pause})
    return original(*arguments)
MeCoQ.loss = slow
sys.exit(main.main(sys.argv[1:]))
"""


def start(*flags, pause=0.12):
    code = SLOW.format(root=str(ROOT), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)][: 1 + HOSTILE])
def test_a_stopped_run_saves_its_step_and_goes_on_there(number, code, forked, undisturbed, tmp_path):
    """Every process of the run gets the signal, as under a scheduler or a terminal."""
    flags = [*undisturbed["trained"][0], "--output", tmp_path, "--num_workers", "2", "--views", "pil"]
    plain = tmp_path / "plain"
    assert forked(*flags, "--output", plain)["rc"] == 0
    last = tmp_path / "checkpoints" / "small" / "last.cpt"
    process = start(*flags, "--save_interval", "1")
    wait_for(lambda: last.exists() or process.poll() is not None)
    wait_for(lambda: torch.load(last, weights_only=True)["steps"] >= 2)
    before = torch.load(last, weights_only=True)["steps"]
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines() == [f"stopped by {number.name}: go on with --resume"]
    assert f"stopped by {number.name}" in (tmp_path / "logs" / "small.log").read_text()
    state = torch.load(last, weights_only=True)
    assert before <= state["steps"] <= before + 2
    answer = forked(*flags, "--resume")
    assert answer["rc"] == 0, answer
    assert f"going on in epoch {state['epoch']}, with step {state['step']}" in answer["out"]
    assert_same_run(tmp_path, plain)


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
def test_workers_outlive_the_signal_however_long_the_step_takes(undisturbed, tmp_path):
    flags = [*undisturbed["trained"][0], "--output", tmp_path, "--num_workers", "2", "--views", "pil"]
    process = start(*flags, "--save_interval", "1", pause=7)
    last = tmp_path / "checkpoints" / "small" / "last.cpt"
    wait_for(lambda: last.exists() or process.poll() is not None)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert torch.load(last, weights_only=True)["steps"] == 1


def test_a_signal_to_save_saves_and_the_run_goes_on(forked, undisturbed, tmp_path):
    flags, expected, points = undisturbed["trained"]
    answer = forked(*flags, "--output", tmp_path, kill=["step", 2, signal.SIGUSR1])
    assert answer["rc"] == 0, answer
    assert answer["out"].count("state saved, as SIGUSR1 asks") == 1
    assert answer["points"]["save"] == points["save"] + 1
    assert_same_run(tmp_path, expected)


# ---------------------------------------------------------------- what it needs is gone


def ended(process):
    """The one line that a run says when it ends with exit code 1."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    lines = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(forked, undisturbed, tmp_path):
    flags, expected, _ = undisturbed["trained"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        process = start(*flags, "--output", disk)
        last = disk / "checkpoints" / "small" / "last.cpt"
        wait_for(lambda: (disk / "checkpoints" / "small" / "model.cpt").exists() or process.poll() is not None)
        filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        line = ended(process)
        assert "No space left on device" in line
        assert "last good checkpoint" in line
        assert torch.load(last, weights_only=True)["steps"] >= 3
        assert not list(disk.rglob("*.tmp"))
        (disk / "filler").unlink()
        answer = forked(*flags, "--output", disk, "--resume")
        assert answer["rc"] == 0, answer
        assert_same_run(disk, expected)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_folder_that_is_gone_ends_the_run(undisturbed, tmp_path):
    flags, _, _ = undisturbed["trained"]
    process = start(*flags, "--output", tmp_path)
    folder = tmp_path / "checkpoints" / "small"
    wait_for(lambda: (folder / "last.cpt").exists() or process.poll() is not None)
    shutil.rmtree(folder)
    line = ended(process)
    assert ".lock was removed" in line
    assert str(folder) in line


def test_a_worker_that_dies_ends_the_run(undisturbed, tmp_path):
    flags, _, _ = undisturbed["trained"]
    process = start(*flags, "--output", tmp_path, "--num_workers", "1", "--views", "pil")
    last = tmp_path / "checkpoints" / "small" / "last.cpt"
    wait_for(lambda: (last.exists() and torch.load(last, weights_only=True)["steps"]) or process.poll() is not None)
    (worker, *_) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    line = ended(process)
    assert "DataLoader worker" in line
    assert line.startswith("error: epoch ")
    assert torch.load(last, weights_only=True)["steps"] >= 3


# ---------------------------------------------------------------- damaged files


def whole_digits(folder, forked):
    """A run on all digits, so that saved codes are taken."""
    at = SMALL.index("--limit")
    flags = [*SMALL[:at], *SMALL[at + 2 :], "--batch_size", "128", "--epoch_num", "1", "--notes", "base"]
    assert forked(*flags, "--output", folder)["rc"] == 0
    return [*flags, "--test_only", "--checkpoint", folder / "checkpoints" / "base" / "model.cpt", "--notes", "again"]


@dataclass(frozen=True)
class Bases:
    """Functions that make, in a folder, all that a run needs, and return one of its files and the run's flags."""

    forked: Callable
    weights: str
    photo_root: Path

    def tested(self, name, folder):
        return folder / "checkpoints" / "base" / name, whole_digits(folder, self.forked)

    def stopped(self, point, count, path, folder):
        flags = [*TRAINED, "--notes", "small", "--output", folder]
        assert self.forked(*flags, kill=[point, count])["rc"] == -signal.SIGKILL
        found = folder / path
        return (found if found.is_file() else next(found.glob("events*"))), [*flags, "--resume"]

    def weights_file(self, folder):
        path = folder / "weights.pth"
        shutil.copy(self.weights, path)
        return path, [*SMALL, *SQUEEZENET, "--weights", path, "--epoch_num", "0"]

    def cached(self, name, folder):
        flags = [*SMALL, *SQUEEZENET, "--weights", self.weights, "--epoch_num", "0"]
        flags += ["--feature_cache", folder / "cache"]
        assert self.forked(*flags, "--output", folder / "first")["rc"] == 0
        return next((folder / "cache").glob(f"*/{name}")), flags

    def cifar(self, folder):
        path = folder / "CIFAR-10" / "cifar-10-batches-py"
        write_cifar10(path)
        flags = [*SMALL, "--dataset", "CIFAR10", "--data_root", folder, "--limit", "30", "--epoch_num", "0"]
        return path / "data_batch_3", flags

    def photos(self, dataset, path, folder):
        shutil.copytree(self.photo_root, folder, dirs_exist_ok=True)
        roots = ["--data_root", folder / "datasets", "--list_root", folder / "data"]
        return folder / path, [*SMALL, "--dataset", dataset, *roots, "--limit", "1000", "--epoch_num", "1"]


@pytest.fixture(scope="module")
def bases(forked, weights, photo_root):
    """kind of file -> the function of `Bases` that makes it."""
    make = Bases(forked, weights, photo_root)
    return {
        "model.cpt": partial(make.tested, "model.cpt"),
        "db_codes.npy": partial(make.tested, "db_codes.npy"),
        "db_targets.npy": partial(make.tested, "db_targets.npy"),
        "metrics.json": partial(make.tested, "metrics.json"),
        "last.cpt": partial(make.stopped, "step", 10, "checkpoints/small/last.cpt"),
        "last.cpt of a trained model": partial(make.stopped, "rank", 4, "checkpoints/small/last.cpt"),
        "best model.cpt": partial(make.stopped, "rank", 4, "checkpoints/small/model.cpt"),
        "log": partial(make.stopped, "step", 10, "logs/small.log"),
        "events": partial(make.stopped, "step", 10, "logs/small"),
        "weights": make.weights_file,
        "features.npy": partial(make.cached, "features.npy"),
        "key.json": partial(make.cached, "key.json"),
        "CIFAR-10 batch": make.cifar,
        "img.txt": partial(make.photos, "Flickr25K", "data/Flickr25k/img.txt"),
        "targets.txt": partial(make.photos, "Flickr25K", "data/Flickr25k/targets.txt"),
        "JPEG": partial(make.photos, "Flickr25K", "datasets/Flickr25K/mirflickr/im9.jpg"),
        "train.txt": partial(make.photos, "NUSWIDE", "data/Nuswide/train.txt"),
    }


# damage to these cannot go unnoticed if it changes what a run finds
SUMMED = ("model.cpt", "best model.cpt", "last.cpt", "last.cpt of a trained model", "log", "events", "weights",
          "features.npy", "key.json", "metrics.json")  # fmt: skip
NAMES = ("model.cpt", "db_codes.npy", "db_targets.npy", "metrics.json", "last.cpt", "last.cpt of a trained model",
         "best model.cpt", "log", "events", "weights", "features.npy", "key.json", "CIFAR-10 batch", "img.txt",
         "targets.txt", "JPEG", "train.txt")  # fmt: skip


def assert_whole(folder, damaged):
    """No file is half there under its name, but the damaged one."""
    assert not [path for path in folder.rglob("*.tmp") if "cache" not in path.parts]
    for path in folder.rglob("*"):
        if path == damaged:
            continue
        if path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".cpt", ".pth"):
            torch.load(path, weights_only=True)


def copied(base, folder, path, flags):
    """The folder of a run again, its damaged-to-be file and the flags that name it."""

    def link_or_copy(source, target):
        (os.link if Path(source).stat().st_size > 2**20 else shutil.copy2)(source, target)

    shutil.copytree(base, folder, copy_function=link_or_copy)
    file = folder / path.relative_to(base)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    flags = [str(flag).replace(str(base), str(folder)) for flag in flags]
    return file, flags if "--output" in flags else [*flags, "--output", str(folder / "out")]


def map_of(flags):
    output = Path(flags[flags.index("--output") + 1])
    (path,) = (path for path in output.glob("checkpoints/*/metrics.json") if path.parent.name != "base")
    return json.loads(path.read_text())["map"]


@pytest.mark.parametrize("name", NAMES[:: 1 if HOSTILE else 2])
def test_damaged_files_do_no_harm_or_are_named(name, bases, forked, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    path, flags = bases[name](base)
    _, command = copied(base, tmp_path / "sound", path, flags)
    answer = forked(*command)
    assert answer["rc"] == 0, answer
    expected = map_of(command)
    counts = {0: 0, 1: 0, 2: 0}
    for case, damage in damages(name, 50 if HOSTILE else 1):
        folder = tmp_path / case
        file, command = copied(base, folder, path, flags)
        file.write_bytes(damage(file.read_bytes()))
        answer = forked(*command)
        about = f"{name}, {case}: {answer}"
        assert answer["rc"] in counts, about
        assert "Traceback" not in answer["out"] + answer["err"], about
        if answer["rc"]:
            lines = [line for line in answer["err"].splitlines() if line.strip()]
            assert len(lines) == 1, about
            assert lines[0].startswith("error: "), about
        elif name in SUMMED:
            assert map_of(command) == expected, about
        assert_whole(folder, file)
        counts[answer["rc"]] += 1
        shutil.rmtree(folder)
    print(f"\n{name}: {counts[0]} did no harm, {counts[2]} refused (2), {counts[1]} ended (1)")
