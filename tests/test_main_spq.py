"""main_SPQ.py: the flags of SPQ's released code, translated."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from config import parse
from main_SPQ import NAMES, build_parser, translated

PUBLISHED = ["--gpu_id=0", "--batch_size=256", "--N_books=8", "--N_words=16", "--eval_epoch=100"]
ALL = {
    "gpu_id": "1", "if_download": "True", "data_dir": "elsewhere", "batch_size": "32", "num_workers": "3",
    "input_size": "96", "N_books": "4", "N_words": "256", "L_word": "8", "soft_quantization_scale": "2",
    "contrastive_temperature": "0.2", "num_cls": "10", "eval_epoch": "7", "output_dir": "runs", "Top_N": "50",
}  # fmt: skip


def started(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "main_SPQ.py"), *flags], capture_output=True, text=True, check=False
    )


def test_what_spqs_users_type():
    result = started(*PUBLISHED, "--dry_run")
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout)
    expected = parse(["--method", "SPQ", "--device", "cuda:0", "--dry_run"])
    assert config == vars(expected)
    assert (config["M"], config["K"], config["L"], config["eval_interval"]) == (8, 16, 16, 100)


def test_every_flag_has_a_meaning():
    config = parse(translated([f"--{name}={value}" for name, value in ALL.items()]))
    for name, ours in NAMES.items():
        value = getattr(config, ours)
        assert value == type(value)(ALL[name]), name
    assert (config.device, config.download_cifar10) == ("cuda:1", True)
    assert not parse(translated(["--if_download", "False"])).download_cifar10
    assert parse(translated([])) == parse(["--method", "SPQ", "--device", "cuda:0"])
    listed = build_parser().format_help()
    assert all(f"--{name}" in listed for name in ALL)


def test_flags_of_the_project_are_passed_on():
    config = parse(translated([*PUBLISHED, "--recipe", "release", "--epoch_num", "3", "--gpu_id", "cpu"]))
    assert (config.recipe, config.epoch_num, config.device, config.freeze_bn) == ("release", 3, "cpu", True)


@pytest.mark.parametrize(
    "flags",
    ["--N_words 10", "--N_books 0", "--gpu_id two", "--gpu_id 0,1", "--if_download maybe", "--num_cls 100", "--Top_N x",
     "--L_word 0", "--method MeCoQ", "--alpha 3", "--contrastive_temperature 0", "--batch_size 1"],
)  # fmt: skip
def test_wrong_flags_end_in_one_line_with_their_own_names(flags):
    result = started(*flags.split())
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert flags.split()[0] in result.stderr
