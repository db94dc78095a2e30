"""Several processes, one per GPU or, here, on one CPU: a run of theirs is the run of one process."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import HOSTILE, LIVELY, ROOT, SEED, SMALL, asked, config_of, method_of, small_run, wait_for

import checkpoint
import distributed
import engine
import loaders


@pytest.fixture(scope="module")
def ranks():
    """Let several processes share a run of main.py: see ranks.py."""
    with asked("ranks.py") as ask:
        yield ask


# ---------------------------------------------------------------- the same numbers

# nine batches an epoch; the last has less than an image for each process
IN_DOUBLE = [
    "--dataset", "Digits", "--image_size", "16", "--limit", "99", "--batch_size", "12", "--num_workers", "0",
    "--epoch_num", "7", "--log_interval", "1", "--feature_cache", "off", "--weights", "random",
]  # fmt: skip
MECOQ = ["--backbone", "convnet", "--M", "2", "--K", "16", "--feat_dim", "8", "--T", "0.3", "--mode", "debias"]
MECOQ += ["--pos_prior", "0.1", "--queue_begin_epoch", "1", "--queue_size", "40", "--lr", "0.05"]
SPQ = ["--method", "SPQ", "--M", "2", "--K", "16", "--backbone", "resnet18_tiny", "--no-drop_last"]
CIBHASH = ["--method", "CIBHash", "--hidden_dim", "32", "--backbone", "convnet"]
RELEASE = ["--recipe", "release"]

METHODS = {
    "MeCoQ": MECOQ,
    "MeCoQ, released": [*MECOQ, *RELEASE, "--no-detect_anomaly"],
    "MeCoQ, features kept": [*MECOQ, "--memory", "feature", "--limit", "105", "--lr", "0.01"],
    "SPQ": SPQ,
    "SPQ, released": [*SPQ, *RELEASE, "--lr", "0.001"],
    "CIBHash": CIBHASH,
    "CIBHash, released": [*CIBHASH, *RELEASE],
}
QUICK = ("MeCoQ", "CIBHash")
COUNTS, SIZE = ((2, 4), ()) if HOSTILE else ((2,), ("--limit", "97", "--epoch_num", "3"))


@pytest.mark.parametrize("name", METHODS if HOSTILE else QUICK)
def test_processes_compute_what_one_does(ranks, tmp_path, name):
    """In float64: the loss of each of 63 steps (27 of the usual tests), the weights and codes after them, and on all
    processes the same bits of weights and memory."""
    found = {}
    for count in (1, *COUNTS):
        flags, path = [*IN_DOUBLE, *METHODS[name], *SIZE], str(tmp_path / str(count))
        answer = ranks(flags, processes=count, double=path, timeout=300)
        assert answer["rc"] == [0] * count, answer["err"]
        found[count] = [dict(np.load(f"{path}_{rank}.npz")) for rank in range(count)]
    (expected,) = found.pop(1)
    assert len(expected["losses"]) == (63 if HOSTILE else 27)
    assert np.ptp(expected["losses"]) > 0.1
    for processes in found.values():
        for each in processes:
            np.testing.assert_allclose(each["losses"], expected["losses"], rtol=0, atol=1e-9)
            np.testing.assert_array_equal(each["codes"], expected["codes"])
            for key in each.keys() - {"losses", "codes"}:
                np.testing.assert_allclose(each[key], expected[key], rtol=0, atol=1e-7, err_msg=key)
                np.testing.assert_array_equal(each[key], processes[0][key], err_msg=key)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("parts", [1, 2, 4, 5])
def test_the_parts_of_batches_are_the_batches(n, parts):
    batches = [loaders.ShuffledBatches(n, 4, seed=1) for _ in range(parts + 1)]
    for part, each in enumerate(batches[1:]):
        each.share = part, parts
    for whole, *own in zip(*(each.rows() for each in batches), strict=True):
        assert torch.equal(torch.cat(own), whole)
        assert max(map(len, own)) - min(map(len, own)) <= 1


def test_numbers_are_drawn_apart_and_again(monkeypatch):
    """Those of the first process go on as if it were alone."""

    def drawn(rank, *seeds):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        torch.manual_seed(3)
        distributed.draw_apart(*seeds)
        return tuple(torch.rand(4).tolist())

    alone = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert drawn(0, 1, 2) == drawn(0, 5, 6) == tuple(alone.tolist())
    assert drawn(1, 1, 2) == drawn(1, 1, 2)
    assert len({drawn(0, 1, 2), drawn(1, 1, 2), drawn(2, 1, 2), drawn(1, 1, 3)}) == 4


def test_the_others_wait_while_the_first_saves(monkeypatch):
    """If one left, torchrun would end the first."""
    happened = []
    monkeypatch.setattr(checkpoint, "largest", lambda *numbers: happened.append("wait") or list(numbers))
    monkeypatch.setattr(checkpoint.Training, "_write", lambda *_: happened.append("write"))
    config = config_of()
    training = engine.start(config, method_of(config), [None])
    for first, expected in ((True, ["write", "wait"]), (False, ["wait"])):
        monkeypatch.setattr(checkpoint, "is_first", lambda first=first: first)
        happened.clear()
        training.save()
        assert happened == expected


def test_a_lost_process_is_told_of_without_places_in_the_code_of_gloo():
    text = "[/a/pair.cc:9] Gloo failed with [../b/pair.cpp:152] timed out: remote=[127.0.0.1]:2480$0. This may ..."
    said = distributed.lost_process(RuntimeError(text))
    assert said.endswith("(Gloo failed with timed out: remote=[127.0.0.1]:2480$0)")


def test_what_nccl_says_is_passed_on():
    text = (
        "NCCL error in: /pytorch/NCCLUtils.cpp:93, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
        "version 2.27.7\nncclSystemError: System call (e.g. socket, malloc) or external library call failed.\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 33030528)"
    )
    said = distributed.lost_process(RuntimeError(text))
    assert said.endswith("NCCL says Error while creating shared memory segment /dev/shm/nccl-x (size 33030528)")


@pytest.mark.parametrize(("words", "loss"), [("NCCL: Connection reset", True), ("NCCL: out of memory", False)])
def test_a_full_gpu_is_no_lost_process(monkeypatch, words, loss):
    monkeypatch.setattr(distributed, "launched", lambda: True)
    assert distributed.is_loss(RuntimeError(words)) == loss


def test_a_first_process_that_is_gone_is_not_waited_for(monkeypatch):
    happened = []
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "largest", lambda *numbers: happened.append("gloo") or list(numbers))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: happened.append("NCCL"))
    distributed.copy_from_first(torch.zeros(2), torch.zeros(3))
    assert happened == ["gloo", "NCCL", "NCCL"]


# ---------------------------------------------------------------- runs

TRAINED = [*SMALL, *LIVELY, "--epoch_num", "4", "--save_interval", "3"]


def shared(ranks, output, *flags, processes=2, **others):
    return ranks([*TRAINED, "--output", output, "--notes", "small", *flags], processes=processes, **others)


def assert_same_bits(ours, theirs):
    for name in ("model.cpt", "db_codes.npy", "PR_curve.txt", "P_at_topK_curve.txt"):
        first, second = ((folder / "checkpoints" / "small" / name).read_bytes() for folder in (ours, theirs))
        assert first == second, name


def only_line(answer):
    """What the processes say on standard error, but for warnings and gloo's own words on a failed connection."""
    (line,) = (line for line in answer["err"].splitlines() if not line.startswith(("WARNING", "[")))
    return line


def losses(output):
    metrics = json.loads((output / "checkpoints" / "small" / "metrics.json").read_text())
    return [epoch["loss/total_loss"] for epoch in metrics["history"]]


def losses_of(ranks, output, processes, *flags):
    answer = shared(ranks, output, *flags, processes=processes)
    assert answer["rc"] == [0] * processes, answer["err"]
    return losses(output)


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """A run of two processes that nothing has stopped, and how long it took."""
    output = tmp_path_factory.mktemp("whole")
    answer = shared(ranks, output)
    assert answer["rc"] == [0, 0], answer["err"]
    assert answer["out"].count("epoch 0:") == 1
    assert answer["err"] == ""
    return output, answer["seconds"]


@pytest.mark.parametrize("number", range(20 if HOSTILE else 1))
def test_the_death_of_one_process_ends_all_and_the_run_goes_on(ranks, whole, tmp_path, number):
    """With the same bits."""
    expected, duration = whole
    generator = np.random.default_rng([SEED, number])
    victim, moment = int(generator.integers(2)), float(generator.uniform(0.2, 0.9)) * duration
    answer = shared(ranks, tmp_path, kill=[victim, signal.SIGKILL, moment])
    assert answer["seconds"] < 30
    if answer["rc"][1 - victim] == -signal.SIGTERM:  # it waited for one that had not come yet
        assert answer["err"] == ""
        assert not (tmp_path / "checkpoints" / "small" / "last.cpt").exists()
    elif answer["rc"][victim] == -signal.SIGKILL:
        assert answer["rc"][1 - victim] == 1, answer
        assert "another process of this run has ended" in only_line(answer)
    answer = shared(ranks, tmp_path, "--resume")
    assert answer["rc"] == [0, 0], answer["err"]
    assert_same_bits(tmp_path, expected)


MOMENTS = [("1", 1, "save", 5), ("1", 0, "step", 5), ("1000", 0, "step", 5), ("1000", 1, "rank", 2)]


@pytest.mark.parametrize(("interval", "victim", "point", "count"), MOMENTS if HOSTILE else MOMENTS[:1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(ranks, whole, tmp_path, interval, victim, point, count):
    """Another number of processes goes on with the same batches."""
    expected, _ = whole
    moment = [victim, point, count, signal.SIGTERM]
    answer = shared(ranks, tmp_path, "--save_interval", interval, signal=moment)
    assert answer["rc"] == [128 + signal.SIGTERM] * 2, answer
    assert answer["err"].count("SIGTERM") == 1
    log = (tmp_path / "logs" / "small.log").read_text()  # the first process's
    assert log.rstrip().endswith("stopped by SIGTERM: go on with --resume")
    for processes in (1, 3, 2) if HOSTILE else (1, 2):
        copy = tmp_path / str(processes)
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("1", "2", "3"))
        np.testing.assert_allclose(losses_of(ranks, copy, processes, "--resume"), losses(expected), rtol=1e-2)
    assert_same_bits(copy, expected)


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
def test_features_are_computed_by_all_and_cached_once(ranks, tmp_path, weights):
    flags = ["--backbone", "squeezenet1_0", "--weights", weights, "--image_size", "32", "--limit", "600"]
    flags += ["--feature_cache", str(tmp_path / "cache"), "--epoch_num", "1"]
    small_run(tmp_path / "1", *LIVELY, *flags)
    made = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("features.npy")}
    shutil.rmtree(tmp_path / "cache")
    for count in (2, 3):
        answer = shared(ranks, tmp_path / str(count), *flags, processes=count)
        assert answer["rc"] == [0] * count, answer["err"]
        assert answer["out"].count("computing the features") == (count == 2)
        assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("features.npy")} == made


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
@pytest.mark.parametrize("flags", [[], ["--views", "pil"], ["--augmentation", "SPQ"]])
def test_photos_are_shared_out_too(ranks, tmp_path, photo_root, flags):
    """A batch with fewer images than processes among them."""
    roots = ["--data_root", str(photo_root / "datasets"), "--list_root", str(photo_root / "data")]
    flags = [*flags, "--dataset", "Flickr25K", *roots, "--batch_size", "9", "--limit", "10", "--epoch_num", "1"]
    found = [losses_of(ranks, tmp_path / str(count), count, *flags) for count in (1, 3)]
    np.testing.assert_allclose(*found, rtol=1e-3)


WRONG = {
    "a flag": (["--topK", "0"], [], "--topK 0"),
    "a missing file": (["--weights", "none.pth"], [], "none.pth does not exist"),
    "small batches": (["--batch_size", "2"], [], "--batch_size 2: less than an image for each of 3 processes"),
    "other flags": ([], ["--lr", "0.3"], "has other flags than process 0"),
    "one GPU for all": (["--device", "cuda:1"], [], "torchrun's processes take a GPU each"),
}


@pytest.mark.parametrize("what", WRONG if HOSTILE else ["a flag", "other flags"])
def test_wrong_input_is_said_once(ranks, tmp_path, what):
    flags, later, line = WRONG[what]
    answer = shared(ranks, tmp_path, *flags, later=later, processes=3)
    assert answer["rc"] == [2, 2, 2], answer
    assert line in only_line(answer)


def test_other_weights_are_refused(ranks, tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    next(iter(state.values())).add_(1)
    torch.save(state, tmp_path / "other.pth")
    flags = ["--backbone", "squeezenet1_0", "--weights", str(weights), "--image_size", "32"]
    answer = shared(ranks, tmp_path, *flags, later=["--weights", str(tmp_path / "other.pth")])
    assert answer["rc"] == [2, 2], answer
    assert "process 1 has other images, labels or weights than process 0" in answer["err"]


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
def test_frozen_batch_norm_is_left_alone(ranks, tmp_path):
    flags = ["--backbone", "resnet18", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1"]
    flags += ["--epoch_num", "1", "--limit", "40"]
    found = [losses_of(ranks, tmp_path / str(count), count, *flags) for count in (1, 2)]
    np.testing.assert_allclose(*found, rtol=2e-2)


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
@pytest.mark.parametrize("codes", ["there", "away"])
def test_processes_test_a_checkpoint(ranks, whole, tmp_path, codes):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    folder = output / "checkpoints" / "small"
    if codes == "away":
        (folder / "db_codes.npy").unlink()
    found = []
    for count in (1, 3):
        flags = ["--test_only", "--checkpoint", str(folder / "model.cpt"), "--output", str(tmp_path / str(count))]
        answer = ranks([*SMALL, *LIVELY, *flags, "--notes", "small"], processes=count)
        assert answer["rc"] == [0] * count, answer["err"]
        found.append(json.loads((tmp_path / str(count) / "checkpoints" / "small" / "metrics.json").read_text())["map"])
    assert found[0] == pytest.approx(found[1], abs=1e-12)


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")
def test_runs_through_torchrun(tmp_path):
    """Its exit codes, a signal that it sends to all, and one that it passes on."""
    program = [sys.executable, "scripts/launch.py", "--standalone", "--nproc_per_node", "2", "main.py"]
    flags = [*TRAINED, "--output", str(tmp_path), "--notes", "small", "--epoch_num", "100000"]
    flags += ["--monitor_counter", "100000"]
    log = tmp_path / "logs" / "small.log"

    def started(*more):
        return subprocess.Popen([*program, *flags, *more], stderr=subprocess.PIPE, text=True, cwd=ROOT)

    process = started()
    wait_for(lambda: log.exists() and "epoch 1:" in log.read_text())
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "state saved, as SIGUSR1 asks" in log.read_text())
    process.terminate()
    assert process.communicate(timeout=60)[1].splitlines() == ["stopped by SIGTERM: go on with --resume"]
    assert process.returncode == 143
    process = started()
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert "holds a run: go on with --resume" in line
    assert process.returncode == 2
    epochs = log.read_text().count("val mAP")
    process = started("--resume")
    wait_for(lambda: log.read_text().count("val mAP") > epochs + 1)
    assert f"going on in epoch {epochs}" in log.read_text()
    process.kill()  # torchrun; its processes end with it
    wait_for(lambda: log.read_text().rstrip().endswith("stopped by SIGTERM: go on with --resume"))
    process.communicate()
