"""Flags: names, defaults, what is refused and how. Most start `main.main` in this process, some a real one."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import main

DEFAULTS = {
    "dataset": "CIFAR10", "protocol": "I", "batch_size": 128, "epoch_num": 50, "optimizer": "SGD", "lr": 0.01,
    "lr_scaling": 1e-3, "momentum": 0.9, "hp_beta": 5e-6, "warmup_epoch_num": 1, "start_lr": 1e-5, "final_lr": 1e-5,
    "feat_dim": 64, "M": 4, "K": 256, "alpha": 10, "trainable_layer_num": 0, "T": 0.1, "mode": "simple",
    "pos_prior": 0, "hp_gamma": 0.5, "queue_begin_epoch": -1, "topK": None, "eval_interval": 1, "monitor_counter": 10,
    "device": "cpu", "seed": 2021, "num_workers": 10, "queue_size": 384, "recipe": "paper", "backbone": "vgg16",
    "weights": "imagenet", "image_size": 224, "output": ".", "precision": "bf16", "symmetric_distance": False,
    "disable_writer": False, "disable_scheduler": False, "download_cifar10": False, "limit": None,
    "hp_lambda": 0, "codebooks": "trained", "pairing": "own", "debias_memory": True, "negative_bound": "dcl",
    "normalize_memory": True, "keep_lr_scaling": True, "normalize_query": True, "detect_anomaly": False,
    "memory": "none", "skip_bad_images": False,
    "test_only": False, "checkpoint": None, "resume": False, "overwrite": False, "compile": False, "save_interval": 500,
}  # fmt: skip


def dry_run(capsys, *flags):
    assert main.main([*flags, "--dry_run"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *flags):
    assert main.main(list(flags)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_defaults(capsys):
    config = dry_run(capsys)
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS
    assert set(config) - set(DEFAULTS) == {
        "notes",
        "data_root",
        "list_root",
        "dry_run",
        "feature_cache",
        "views",
        "log_interval",
    }


def test_dry_run_touches_neither_data_nor_device_nor_disk(tmp_path):
    flags = ["--device", "cuda:3", "--weights", "nowhere.pth", "--data_root", "nowhere", "--output", "out", "--dry_run"]
    result = subprocess.run(
        [sys.executable, ROOT / "main.py", *flags], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["device"] == "cuda:3"
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


RELEASE = {
    "codebooks": "frozen", "pairing": "all", "debias_memory": False, "negative_bound": "release",
    "normalize_memory": False, "keep_lr_scaling": False, "normalize_query": False, "hp_lambda": 1,
    "detect_anomaly": True,
}  # fmt: skip


def test_the_release_recipe_changes_its_flags_and_nothing_else(capsys):
    paper, release = dry_run(capsys), dry_run(capsys, "--recipe", "release")
    assert {name: value for name, value in release.items() if value != paper[name]} == RELEASE | {"recipe": "release"}


@pytest.mark.parametrize("flag", RELEASE)
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_flag_of_the_user_wins_over_the_recipe(flag, recipe, capsys):
    value = RELEASE[flag] if recipe == "paper" else DEFAULTS[flag]
    given = [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    config = dry_run(capsys, "--recipe", recipe, *given)
    assert config == dry_run(capsys, "--recipe", recipe) | {flag: value}
    args = main.argparse.Namespace(**config)
    assert main.departures(args) == {flag: value}
    assert f"{flag}={value}" in main.recipe_line(args).partition("the recipe itself has")[0]


def test_the_log_says_which_recipe_and_what_differs_from_it(capsys):
    line = main.recipe_line(main.argparse.Namespace(**dry_run(capsys, "--recipe", "release", "--pairing", "own")))
    assert line.startswith("recipe release: codebooks=frozen, pairing=own, ")
    assert line.endswith("(the recipe itself has pairing=all)")
    assert "as the recipe has them" in main.recipe_line(main.argparse.Namespace(**dry_run(capsys)))


def test_no_memory_is_one_thing_whichever_flag_says_so(capsys):
    off = dry_run(capsys)
    assert dry_run(capsys, "--memory", "none", "--queue_begin_epoch", "3") == off
    assert "--queue_begin_epoch" in refused(capsys, "--memory", "hard")
    on = dry_run(capsys, "--queue_begin_epoch", "3")
    assert (on["memory"], on["queue_begin_epoch"]) == ("soft", 3)


def test_aliases(capsys):
    assert dry_run(capsys, "--device", "cuda")["device"] == "cuda:0"  # torch.cuda.set_device wants a number
    assert dry_run(capsys, "--protocal", "II")["protocol"] == "II"
    assert dry_run(capsys, "--vgg_model_path", "a.pth")["weights"] == "a.pth"
    assert "different weights" in refused(capsys, "--vgg_model_path", "a.pth", "--weights", "b.pth")


def test_defaults_that_depend_on_other_flags(capsys):
    config = dry_run(capsys, "--backbone", "convnet", "--M", "2", "--pos_prior", "0.3", "--dataset", "Digits")
    assert (config["weights"], config["lr_scaling"], config["notes"]) == ("random", 1.0, "Digits16bits")
    assert config["pos_prior"] == 0.0  # --mode simple
    assert dry_run(capsys, "--protocol", "II", "--M", "8")["notes"] == "CIFAR10II64bits"
    assert dry_run(capsys, "--mode", "debias", "--pos_prior", "0.3")["pos_prior"] == 0.3


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset MNIST", "--protocol III", "--optimizer LBFGS", "--device tpu", "--device cuda:x",
        "--backbone alexnet", "--recipe mine", "--precision fp8", "--mode hard", "--feat_dim 30",
        "--feat_dim 0", "--M 0", "--M -1", "--K 1", "--K 65537", "--T 0", "--T -1", "--T nan", "--T inf", "--T 1e-40",
        "--pos_prior 1 --mode debias", "--pos_prior -0.1 --mode debias", "--pos_prior 1",
        "--pos_prior nan", "--batch_size 0", "--batch_size 1",
        "--batch_size -5", "--queue_size 0", "--queue_begin_epoch -2", "--topK 0", "--image_size 0",
        "--image_size 16", "--epoch_num -1", "--num_workers -1", "--limit 0", "--eval_interval 0",
        "--monitor_counter 0", "--lr 0", "--lr nan", "--hp_beta -1", "--hp_gamma nan", "--hp_lambda -1",
        "--alpha 0", "--momentum 1", "--trainable_layer_num 3", "--seed -1", "--seed 4294967296",
        "--M two", "--unknown 1", "--device cuda:00", "--batch_size 100000000000000000000",
        "--notes ../up", "--notes a/b", "--notes .", "--notes ", "--backbone convnet --weights imagenet",
        "--test_only", "--checkpoint model.cpt", "--test_only --checkpoint model.cpt --weights imagenet",
        "--warmup_epoch_num -1", "--lr_scaling -1", "--mo debias",
    ],
)  # fmt: skip
def test_bad_flags_are_refused_in_one_line(flags, capsys):
    given = flags.split(" ")
    error = refused(capsys, *given)
    assert any(flag in error for flag in given if flag.startswith("--"))


def test_absent_cuda(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable CUDA device" in refused(capsys, "--device", "cuda", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_output_that_can_not_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, "--output", str(tmp_path / "file"))


def test_a_log_that_can_not_be_written(capsys, tmp_path):
    (tmp_path / "logs" / "x.log").mkdir(parents=True)
    flags = ["--dataset", "Digits", "--backbone", "convnet", "--output", str(tmp_path), "--notes", "x"]
    assert "x.log" in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_failures_under_the_run_end_in_one_line_there_and_in_the_log(error, words, capsys, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(main.engine, "run", fail)
    flags = ["--dataset", "Digits", "--backbone", "convnet", "--output", str(tmp_path), "--notes", "x"]
    assert main.main(flags) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert words in printed
    assert "stopped: " in (tmp_path / "logs" / "x.log").read_text().splitlines()[-1]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(main.engine, "run", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        main.main(["--dataset", "Digits", "--backbone", "convnet", "--output", str(tmp_path)])


def test_missing_data_set(tmp_path):
    """As a user meets it: a real process, one line, exit code 2."""
    result = subprocess.run(
        [sys.executable, ROOT / "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "datasets/CIFAR-10/cifar-10-batches-py" in result.stderr
    assert "--download_cifar10" in result.stderr


def test_help_groups_flags_and_names_symbols():
    text = " ".join(main.build_parser().format_help().split())
    assert all(f"--{name}" in text for name in DEFAULTS)
    assert all(symbol in text for symbol in ("tau", "rho+", "gamma", "beta", "Omega", "Eq. 8", "N_M", "alpha"))
    assert all(action.help for action in main.build_parser()._actions)
