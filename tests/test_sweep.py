"""Sweeps: a trial is the run that its flags describe, none is trained twice, and an interrupted one goes on."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import FROZEN, HOSTILE, ROOT, call

import evaluation
import loss
import main
from config import Config
from experiments import flags, sweep
from utils import InputError, NonFiniteError, RunError

FLAGS = [*FROZEN[:-2], "--limit", "300", "--epoch_num", "2", "--queue_begin_epoch", "1", "--queue_size", "48",
         "--mode", "debias", "--pos_prior", "0.1", "--T", "0.3", "--topK", "20", "--num_workers", "0"]  # fmt: skip
WHICH = ("--datasets", "Digits", "--bits", "16", "--seeds", "1", "2")


def flags_in(folder, weights):
    """The flags of tables and figures that keep all they make in a folder."""
    where = [f"--{name}={folder / name}" for name in ("results", "trials", "view_cache", "feature_cache")]
    return [*WHICH, *where, *FLAGS, "--weights", weights]


@pytest.fixture(scope="module")
def place(weights, tmp_path_factory):
    """The flags of all tables here, and the folder they share."""
    folder = tmp_path_factory.mktemp("sweep")
    return flags_in(folder, weights), folder


def results_in(folder):
    """The results of all finished trials."""
    return [json.loads(path.read_text())["result"] for path in sorted(folder.glob("*.json"))]


def interrupted(monkeypatch, owner, name, call_number):
    """Let one call of a function be interrupted as by Ctrl-C; returns a list that grows with every call."""
    real, calls = getattr(owner, name), []

    def counted(*arguments, **more):
        calls.append(1)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


# ---------------------------------------------------------------- a trial


def test_a_trial_is_the_run_that_main_makes_of_its_flags(place, weights, tmp_path):
    given, folder = place
    assert call("table2", *given) == 0
    (trial,) = (
        result for result in results_in(folder / "trials")
        if (result["config"]["seed"], result["config"]["memory"]) == (2, "feature")
    )  # fmt: skip
    own = ["--dataset", "Digits", "--M", "2", "--seed", "2", "--memory", "feature", "--weights", weights]
    argv = ["--output", str(tmp_path), "--notes", "a", "--feature_cache", "off", *FLAGS, *own]
    assert main.main(argv) == 0
    metrics = json.loads((tmp_path / "checkpoints/a/metrics.json").read_text())
    assert trial["map"] == pytest.approx(metrics["map"], abs=5e-3)
    others = {flag for flag, value in trial["config"].items() if metrics["config"][flag] != value}
    assert others <= {"notes", "output", "feature_cache"}


def test_a_trial_goes_on_within_an_epoch(place, tmp_path, monkeypatch):
    given, _ = place
    there = [*given, "--seeds", "1", "--layers", "0", "--save_interval", "4", f"--results={tmp_path}"]
    assert call("layers", *there, f"--trials={tmp_path}/a") == 0
    calls = interrupted(monkeypatch, loss, "contrastive_loss", 13 + 6)  # an epoch has 13 steps
    assert call("layers", *there, f"--trials={tmp_path}/b") == 130
    assert call("layers", *there, f"--trials={tmp_path}/b") == 0
    assert len(calls) == 13 + 6 + 13 - 4
    ended = [results_in(tmp_path / name)[0] for name in "ab"]
    assert ended[0]["history"] == ended[1]["history"]


def test_a_training_of_the_backbone_goes_on_from_where_it_was_stopped(tmp_path, monkeypatch):
    """Views of a backbone that learns have no cache: its trials train on images, and are saved as runs are."""
    given = ["--backbone", "convnet", "--image_size", "16", "--limit", "100", "--batch_size", "16",
             "--feat_dim", "8", "--topK", "20", "--lr", "0.05", "--num_workers", "0", "--epoch_num", "3",
             "--queue_begin_epoch", "1", "--queue_size", "30", "--feature_cache", "off"]  # fmt: skip
    own = ["--datasets", "Digits", "--bits", "16", "--seeds", "5", f"--results={tmp_path}", "--layers", "0"]
    calls = interrupted(monkeypatch, evaluation, "validate", 3)
    assert call("layers", *own, *given, f"--trials={tmp_path}/a") == 130
    assert list((tmp_path / "a").glob("checkpoints/*/last.cpt"))
    assert call("layers", *own, *given, f"--trials={tmp_path}/a") == 0
    assert len(calls) < 3 + 3  # it did not begin anew
    assert call("layers", *own, *given, f"--trials={tmp_path}/b") == 0
    ended = [results_in(tmp_path / name)[0] for name in "ab"]
    assert ended[0]["history"] == ended[1]["history"]
    argv = [*given, "--dataset", "Digits", "--M", "2", "--seed", "5", "--output", str(tmp_path), "--notes", "run"]
    assert main.main(argv) == 0
    assert ended[0]["map"] == json.loads((tmp_path / "checkpoints/run/metrics.json").read_text())["map"]
    assert not list((tmp_path / "a").glob("checkpoints/*"))


def test_a_training_that_fails_leaves_its_row_empty(place, tmp_path, monkeypatch, caplog):
    given, _ = place
    real = sweep.train

    def diverging(configuration, *others):
        if configuration.hp_gamma == 0:
            raise RunError("epoch 1, step 2: the loss became nan") from NonFiniteError("the loss became nan")
        return real(configuration, *others)

    monkeypatch.setattr(sweep, "train", diverging)
    for script in ("table2", "figure2"):
        assert call(script, *given, "--seeds", "1", f"--trials={tmp_path}", f"--results={tmp_path}") == 0
    assert "the loss became nan" in caplog.text
    frame = pd.read_csv(tmp_path / "table2.csv").set_index("method")["map"]
    assert frame.isna().sum() == 1
    assert np.isnan(frame["w/o codeword diversity"])

    def unreadable(*_):
        raise RunError("epoch 0, step 1: im1.jpg became unreadable") from RunError("im1.jpg became unreadable")

    monkeypatch.setattr(sweep, "train", unreadable)  # that says nothing of the method, and is not kept
    assert call("table2", *given, "--seeds", "2", f"--trials={tmp_path}", f"--results={tmp_path}") == 1


# ---------------------------------------------------------------- what is kept


def test_nothing_is_trained_twice(place, monkeypatch):
    given, folder = place
    assert call("table2", *given) == 0
    trained = []

    def train(configuration, *_):
        trained.append(configuration)
        return {"map": 0.5, "history": []}

    monkeypatch.setattr(sweep, "train", train)
    assert call("table2", *given) == 0
    # MeCoQ of Table 1 is the full method of Table 2
    assert call("layers", *given, "--layers", "0", f"--results={folder / 'x'}") == 0
    assert not trained
    priors = ["--priors", "0.1", "--sizes", "0", "48", "96"]
    assert call("figure4", *given, *priors, f"--trials={folder / 'x'}") == 0
    assert len(trained) == 2 * 3  # rho+ of 0.1 and a memory of 48 are the same


def test_a_stopped_table_goes_on(place, tmp_path, monkeypatch):
    given, _ = place
    count = interrupted(monkeypatch, sweep, "train", 4)
    there = [*given, f"--trials={tmp_path}"]
    assert call("table2", *there) == 130
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert call("table2", *there) == 0
    assert len(count) == 4 + 11


def run_trial(folder, *given, callback=None, device="cpu"):
    """`sweep.run_trial` of images and weights that are pretended; returns the key under which it was kept."""

    class Pretended:
        fingerprint, splits = "abc", type("Splits", (), {"canonical": True})
        of = staticmethod(lambda configuration: Pretended)

    configuration = flags.configured("Digits", 16, 2021, [*FLAGS, *given])
    sweep.run_trial(configuration.replace(device=device), Pretended, folder, callback)
    (path,) = folder.glob("*.json")
    key = json.loads(path.read_text())["key"]
    path.unlink()
    return key


def test_a_trial_with_a_callback_does_not_stop_early(tmp_path, monkeypatch):
    patience = []

    def train(configuration, *_):
        patience.append(configuration.monitor_counter)
        return {"map": 0.5, "history": []}

    monkeypatch.setattr(sweep, "train", train)
    for callback in (None, "CodebookUse"):
        run_trial(tmp_path, "--monitor_counter=2", "--epoch_num=7", callback=callback)
    assert patience == [2, 7]


def test_the_key_of_a_trial_holds_what_changes_its_result_and_nothing_else(tmp_path, monkeypatch):
    """A flag at its default is in no key, so that a new flag makes nothing stale."""
    monkeypatch.setattr(sweep, "train", lambda *_: {"map": 0.5, "history": []})
    key = run_trial(tmp_path)
    given = {"T": 0.3, "dataset": "Digits", "queue_size": 48}
    assert ({"format": sweep.FORMAT, "sha256": "abc", "callback": None} | given).items() <= key.items()
    assert not {"seed", "hp_gamma", "lr_scaling", "views"} & key.keys()  # at their defaults
    same = ["--num_workers", "3", "--data_root", "x", "--weights", "random", "--save_interval", "3",
            "--hp_gamma", "0.5", "--feature_cache", "off", "--detect_anomaly", "--disable_writer",
             "--list_root", "y"]  # fmt: skip
    assert run_trial(tmp_path, *same) == key
    others = ("--hp_gamma=0.4", "--views=pil", "--limit=9", "--image_size=40", "--batch_size=9", "--recipe=release")
    keys = [run_trial(tmp_path, given) for given in others] + [run_trial(tmp_path, callback="CodebookUse")]
    assert all(key != other for other in keys)
    assert keys[-1]["callback"] == "CodebookUse"


def test_a_damaged_file_is_named(tmp_path):
    sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.5})
    (path,) = tmp_path.glob("*.json")
    assert sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.7})["map"] == 0.5
    text = path.read_text()
    assert '"map": 0.5' in text
    damaged = text.replace('"map": 0.5', '"map": 0.7')  # one bit
    for content in ("{", "{}", "[1]", '{"result": {"map": 1}, "key": {"a": 2}}', "[" * 10**5, damaged):
        path.write_text(content)
        with pytest.raises(InputError, match=f"{path.name} is damaged"):
            sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.7})
    path.write_text(text)
    assert sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.7})["map"] == 0.5


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --all")
def test_two_processes_share_the_work(tmp_path):
    """The second waits for the trial that the first is at, and takes it."""
    program = (
        "import sys, time, json; from pathlib import Path; from experiments import sweep\n"
        "folder = Path(sys.argv[1])\n"
        "def compute():\n"
        "    (folder / f'began-{sys.argv[2]}').touch(); time.sleep(1); return {'by': sys.argv[2]}\n"
        "print(sweep.kept(folder, {'a': 1}, compute)['by'])"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert len(list(tmp_path.glob("began-*"))) == 1
    assert said[0] == said[1] in ("0", "1")


def test_trials_share_images_and_features_of_a_seed(monkeypatch, tmp_path):
    """Nothing is loaded again unless what the images and features depend on changed."""
    built = []
    monkeypatch.setattr(sweep, "Shared", lambda configuration, _: built.append(configuration) or object())
    shared = sweep.SharedBySeed(tmp_path)

    def of(**change: object) -> object:
        return shared.of(Config(vars(flags.configured("Digits", 16, 1, FLAGS)) | change))

    first = of()
    assert of(hp_gamma=0.1, batch_size=9, memory="none", epoch_num=9) is first
    for change in ({"seed": 2}, {"weights": "random"}, {"image_size": 40}, {"trainable_layer_num": 1}, {"limit": 9},
                   {"precision": "bf16"}, {"device": "cuda:0"}, {"views": "pil"}):  # fmt: skip
        last = of(**change)
        assert last is not first
        first = of()
        assert first is not last
    assert len(built) == 1 + 2 * 8
