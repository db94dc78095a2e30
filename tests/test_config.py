"""Flags: names, defaults, what is refused and how; recipes; and the keys that are taken from flags."""

import json
import pickle
import subprocess
import sys

import pytest
from helpers import ROOT

import config
import main
from config import Config, build_parser, departures, key, recipe_line, rows
from methods import METHODS
from methods.flags import AFFECTS, Flag

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
    "codebook_init": "sphere", "queue_advance": "entries", "ties": "expected", "augmentation": "MeCoQ",
    "drop_last": False, "schedule": "batch", "int8_views": False,
    "memory": "none", "skip_bad_images": False, "images": None, "normalize_features": False,
    "embeddings": None, "embedding_views": None, "embedding_labels": None,
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
        "method",
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
    "detect_anomaly": True, "codebook_init": "xavier", "queue_advance": "batch", "ties": "database",
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
    resolved = Config(config)
    assert departures(resolved) == {flag: value}
    assert f"{flag}={value}" in recipe_line(resolved).partition("the recipe itself has")[0]


def test_the_log_says_which_recipe_and_what_differs_from_it(capsys):
    line = recipe_line(Config(dry_run(capsys, "--recipe", "release", "--pairing", "own")))
    assert line.startswith("recipe release: codebooks=frozen, pairing=own, ")
    assert line.endswith("(the recipe itself has pairing=all)")
    assert "as the recipe has them" in recipe_line(Config(dry_run(capsys)))


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
        "--M two", "--unknown 1", "--method VQ", "--lr 1e39", "--hp_beta 1e39",
        "--device cuda:00", "--batch_size 100000000000000000000",
        "--notes ../up", "--notes a/b", "--notes .", "--notes ", "--backbone convnet --weights imagenet",
        "--test_only", "--checkpoint model.cpt", "--test_only --checkpoint model.cpt --weights imagenet",
        "--warmup_epoch_num -1", "--lr_scaling -1", "--mo debias", "--method SPQ --K 10", "--method SPQ --alpha 10",
        "--method SPQ --backbone vgg16", "--method SPQ --head_only", "--method CIBHash --code_length 12",
        "--anchors both", "--method SPQ --head_only --backbone vgg16 --trainable_layer_num 1", "--method CIBHash --M 4",
        "--method SPQ --no-normalize_query", "--method SPQ --image_size 8",
        "--method SPQ --views pil", "--method CIBHash --freeze_bn", "--code_length=16",
    ],
)  # fmt: skip
def test_bad_flags_are_refused_in_one_line(flags, capsys):
    given = flags.split(" ")
    error = refused(capsys, *given)
    assert any(flag.partition("=")[0] in error for flag in given if flag.startswith("--"))


SPQ = {
    "protocol": "official", "backbone": "resnet18_small", "weights": "random", "image_size": 32, "batch_size": 256,
    "drop_last": True, "optimizer": "Adam", "lr": 3e-4, "hp_beta": 1e-5, "start_lr": 3e-4, "warmup_epoch_num": 10,
    "final_lr": 0, "epoch_num": 5000, "eval_interval": 100, "topK": 1000, "M": 8, "K": 16, "L": 16, "T": 0.5,
    "soft_quantization_scale": 5, "notes": "SPQ-CIFAR10official32bits",
}  # fmt: skip
CIBHASH = {
    "backbone": "vgg16", "image_size": 224, "batch_size": 64, "drop_last": False, "optimizer": "Adam", "lr": 1e-3,
    "hp_beta": 0, "disable_scheduler": True, "epoch_num": 80, "eval_interval": 20, "monitor_counter": 6, "topK": 1000,
    "code_length": 16, "hidden_dim": 1024, "T": 0.3, "kl_weight": 0.001,
}  # fmt: skip
# as the fact sheets' last sections have them: flag -> (paper, release)
RECIPES = {
    "SPQ": {
        "augmentation": ("SPQ", "SPQ-release"), "schedule": ("epoch", "returning"), "head_init": ("normal", "uniform"),
        "pairs": ("cross", "all"), "anchors": ("embeddings", "both"), "freeze_bn": (False, True),
    },
    "CIBHash": {
        "protocol": ("II", "CIBHash"), "sampling": ("bernoulli", "sign"), "alphabet": ("01", "pm"),
        "detach_kl": (False, True),
    },
}  # fmt: skip


@pytest.mark.parametrize(("method", "defaults"), [("SPQ", SPQ), ("CIBHash", CIBHASH)])
def test_each_method_has_defaults_and_recipes_of_its_own(method, defaults, capsys):
    paper, release = (dry_run(capsys, "--method", method, "--recipe", recipe) for recipe in ("paper", "release"))
    assert {name: paper[name] for name in defaults} == defaults
    columns = RECIPES[method] | {"ties": ("expected", "database"), "recipe": ("paper", "release")}
    found = {name: (paper[name], release[name]) for name in paper if paper[name] != release[name] and name != "notes"}
    assert found == columns
    for name, (_, value) in RECIPES[method].items():  # a flag that is given wins
        given = f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        assert dry_run(capsys, "--method", method, given)[name] == value
        assert f"{name}={value}" in recipe_line(config.parse(["--method", method, "--recipe", "release"]))


def test_defaults_of_a_method_that_depend_on_other_flags(capsys):
    assert dry_run(capsys, "--method", "CIBHash", "--code_length", "32")["epoch_num"] == 60
    assert dry_run(capsys, "--method", "CIBHash", "--epoch_num", "3")["epoch_num"] == 3
    head = dry_run(capsys, "--method", "SPQ", "--head_only", "--backbone", "vgg16", "--lr", "0.001")
    assert (head["image_size"], head["weights"], head["start_lr"]) == (224, "imagenet", 0.001)
    assert not dry_run(capsys, "--method", "CIBHash", "--no-disable_scheduler")["disable_scheduler"]
    assert not dry_run(capsys, "--no-drop_last")["drop_last"]
    text = " ".join(build_parser("SPQ").format_help().split() + build_parser("CIBHash").format_help().split())
    assert all(f"(default: {words})" in text for words in ("as --lr", "60, at 16 bits 80"))
    assert "whole database (default: 1000)" in text


def test_a_flag_that_only_another_method_has_is_named_as_such(capsys):
    for flags in (["--method", "SPQ", "--no-normalize_query"], ["--method", "CIBHash", "--alpha=3"], ["--L", "3"]):
        assert "a flag of" in refused(capsys, *flags)


def test_help_groups_flags_and_names_symbols():
    text = " ".join(build_parser().format_help().split())
    assert all(f"--{name}" in text for name in DEFAULTS)
    assert all(symbol in text for symbol in ("tau", "rho+", "gamma", "beta", "Omega", "Eq. 8", "N_M", "alpha"))
    assert all(action.help for action in build_parser()._actions)


def test_help_shows_every_default_once():
    text = build_parser().format_help()
    assert "(default: 0.01)" in text
    assert "%(default)" not in text
    assert text.count("[recipe]") == len(RELEASE) + 1  # and in the help of --recipe
    for method in ("SPQ", "CIBHash"):
        assert build_parser(method).format_help().count("[recipe]") == len(RECIPES[method]) + 2  # and --ties


# ---------------------------------------------------------------- no PyTorch before it is needed

FAST = """
import sys
sys.argv = ["main.py", *sys.argv[1:]]
sys.path.insert(0, {root!r})
import main
code = main.main()
heavy = {{"torch", "torchvision", "kornia", "sklearn", "pandas", "cv2", "tensorboard"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.mark.parametrize(("flags", "code"), [("--dry_run", 0), ("--lr fast", 2), ("--dataset MNIST", 2), ("--K 1", 2)])
def test_flags_are_answered_without_torch(flags, code, tmp_path):
    command = [sys.executable, "-c", FAST.format(root=str(ROOT)), *flags.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr


# ---------------------------------------------------------------- a configuration and its keys


def test_a_configuration_does_not_change():
    settings = config.parse(["--lr", "0.5"])
    with pytest.raises(AttributeError, match="replace"):
        settings.lr = 1.0
    other = settings.replace(lr=1.0)
    assert (settings.lr, other.lr) == (0.5, 1.0)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_every_flag_says_what_it_affects():
    for flag in rows("MeCoQ").values():
        assert flag.affects in AFFECTS
        assert flag.help
    names = [flag.name for table in (*config.FLAGS.values(), *METHODS["MeCoQ"].flags.values()) for flag in table]
    assert len(names) == len(set(names))


def test_a_key_has_the_flags_that_affect_results_and_are_not_at_their_default():
    assert key(config.parse([])) == {}
    flags = ["--dataset", "Digits", "--lr", "0.05", "--views", "pil", "--image_size", "32", "--num_workers", "3",
             "--notes", "x", "--output", "y", "--weights", "z", "--T", "0.1", "--resume", "--device",
             "cuda"]  # fmt: skip
    settings = config.parse(flags)
    assert key(settings) == {"dataset": "Digits", "lr": 0.05, "views": "pil", "image_size": 32}
    assert key(settings, "images") == {"dataset": "Digits"}
    assert key(settings, "features") == {"image_size": 32}
    assert key(settings, "images", "views") == {"dataset": "Digits", "views": "pil"}
    release = key(config.parse(["--recipe", "release"]))
    assert release == {name: value for name, value in RELEASE.items() if name != "detect_anomaly"} | {
        "recipe": "release"
    }


def test_methods_on_the_same_images_share_caches():
    flags = ["--dataset", "CIFAR10", "--protocol", "II", "--backbone", "resnet50", "--augmentation", "SPQ"]
    methods = (["--method", "MeCoQ"], ["--method", "CIBHash"], ["--method", "SPQ", "--head_only"])
    first, *others = (config.parse([*method, *flags]) for method in methods)
    for other in others:
        for kinds in (("images",), ("features",), ("views",), ("images", "features", "views")):
            assert key(other, *kinds) == key(first, *kinds)
        assert key(other) != key(first)
    assert key(config.parse(["--method", "CIBHash"]), "images") == {"protocol": "II"}  # its default, not MeCoQ's


def test_stored_configurations_are_compared_by_what_affects_results():
    settings = config.parse(["--lr", "0.05", "--weights", "a"])
    stored = config.recorded(settings)
    assert "resume" not in stored
    for change, differing in (
        ({"lr": 0.01}, ["lr"]),
        ({"num_workers": 3, "data_root": "x", "weights": "b"}, []),
        ({"seed": 7, "queue_size": 5}, ["seed", "queue_size"]),
    ):
        assert config.differing(settings, stored | change) == differing
    assert config.differing(settings, stored | {"weights": "b"}, "weights") == ["weights"]
    del stored["momentum"]  # an older version, which had no such flag
    assert config.differing(settings, stored) == []
    assert config.differing(settings.replace(momentum=0.5), stored) == ["momentum"]


@pytest.fixture
def new_flag(monkeypatch):
    """A flag of each kind that no version has had so far, at its default."""
    flags = tuple(Flag(f"new_{kind}", 3, kind, "new") for kind in AFFECTS)
    return lambda: monkeypatch.setitem(config.FLAGS, "new", flags)


def test_a_new_flag_at_its_default_changes_no_key(new_flag):
    argv = ["--dataset", "Digits", "--lr", "0.05"]
    before = config.parse(argv)
    keys = [key(before), *(key(before, kind) for kind in AFFECTS)]
    new_flag()
    after = config.parse(argv)
    assert after.new_result == 3
    assert [key(after), *(key(after, kind) for kind in AFFECTS)] == keys
    assert config.differing(after, config.recorded(before), *AFFECTS) == []
    assert key(config.parse([*argv, "--new_images", "4"]), "images") == {"dataset": "Digits", "new_images": 4}
