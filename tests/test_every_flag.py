"""Every flag does what it says it affects, and only that: results change or stay, to the last bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import config
import main
import optimizer
from config import rows
from methods import METHODS

BASE = [
    "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--limit", "60", "--epoch_num", "2",
    "--batch_size", "16", "--M", "2", "--K", "16", "--feat_dim", "8", "--T", "0.3", "--lr", "0.05", "--topK", "20",
    "--queue_begin_epoch", "1", "--queue_size", "40", "--mode", "debias", "--pos_prior", "0.1", "--num_workers", "0",
    "--feature_cache", "off", "--hp_lambda", "0.1",
]  # fmt: skip
FROZEN = ["--backbone", "squeezenet1_0", "--image_size", "32", "--weights", "WEIGHTS", "--K", "256", "--M", "4"]
DEBIASED_TO_THE_BOUND = ["--pos_prior", "0.9", "--T", "0.1"]
TRAINED = [*FROZEN, "--trainable_layer_num", "1", "--lr_scaling", "0.1"]
UNTRAINED = [*FROZEN, "--epoch_num", "0"]
STILL = [*FROZEN, "--lr", "1e-9", "--start_lr", "0", "--final_lr", "0", "--epoch_num", "3"]
FORGOTTEN = ["--queue_size", "7", "--queue_begin_epoch", "0"]

# flag -> the flags beside it, and what it is changed to
CHANGES: dict[str, tuple[list[str], list[str]]] = {
    "seed": ([], ["--seed", "7"]),
    "limit": ([], ["--limit", "61"]),
    "image_size": ([], ["--image_size", "24"]),
    "views": ([], ["--views", "pil"]),
    "backbone": (FROZEN, ["--backbone", "resnet18", "--weights", "random"]),
    "weights": (FROZEN, ["--weights", "random"]),
    "trainable_layer_num": (FROZEN, ["--trainable_layer_num", "1", "--lr_scaling", "1"]),
    "normalize_features": (FROZEN, ["--normalize_features"]),
    "precision": (FROZEN, ["--precision", "fp32"]),
    "int8_views": (FROZEN, ["--int8_views"]),
    "epoch_num": ([], ["--epoch_num", "1"]),
    "batch_size": ([], ["--batch_size", "20"]),
    "optimizer": ([], ["--optimizer", "Adam"]),
    "lr": ([], ["--lr", "0.04"]),
    "lr_scaling": (TRAINED, ["--lr_scaling", "0.5"]),
    "keep_lr_scaling": (TRAINED, ["--no-keep_lr_scaling"]),
    "momentum": ([], ["--momentum", "0.8"]),
    "hp_beta": ([], ["--hp_beta", "0.01"]),
    "disable_scheduler": ([], ["--disable_scheduler"]),
    "warmup_epoch_num": ([], ["--warmup_epoch_num", "0"]),
    "start_lr": ([], ["--start_lr", "0.001"]),
    "final_lr": ([], ["--final_lr", "0.001"]),
    "feat_dim": ([], ["--feat_dim", "16"]),
    "M": ([], ["--M", "4"]),
    "K": ([], ["--K", "8"]),
    "codebooks": ([], ["--codebooks", "frozen"]),
    "codebook_init": ([], ["--codebook_init", "xavier"]),
    "queue_advance": (["--queue_begin_epoch", "0"], ["--queue_advance", "batch"]),
    "augmentation": ([], ["--augmentation", "SPQ"]),
    "drop_last": ([], ["--drop_last"]),
    "schedule": ([], ["--schedule", "epoch"]),
    "ties": ([], ["--ties", "database"]),
    "alpha": ([], ["--alpha", "5"]),
    "T": ([], ["--T", "0.4"]),
    "mode": ([], ["--mode", "simple"]),
    "pos_prior": ([], ["--pos_prior", "0.2"]),
    "hp_gamma": ([], ["--hp_gamma", "0"]),
    "hp_lambda": ([], ["--hp_lambda", "0.2"]),
    "pairing": ([], ["--pairing", "all"]),
    "debias_memory": ([], ["--no-debias_memory"]),
    "negative_bound": (DEBIASED_TO_THE_BOUND, ["--negative_bound", "release"]),
    "normalize_memory": ([], ["--no-normalize_memory"]),
    "memory": ([], ["--memory", "hard"]),
    "queue_begin_epoch": ([], ["--queue_begin_epoch", "0"]),
    "queue_size": (FORGOTTEN, ["--queue_size", "20"]),
    "symmetric_distance": (UNTRAINED, ["--symmetric_distance"]),
    "normalize_query": (UNTRAINED, ["--no-normalize_query"]),
    "topK": ([], ["--topK", "10"]),
    "recipe": ([], ["--recipe", "release"]),
    "eval_interval": ([], ["--eval_interval", "2"]),
    "monitor_counter": (STILL, ["--monitor_counter", "1"]),
    # no result
    "num_workers": (["--views", "pil"], ["--num_workers", "2"]),
    "log_interval": ([], ["--log_interval", "1"]),
    "save_interval": ([], ["--save_interval", "1"]),
    "detect_anomaly": ([], ["--detect_anomaly"]),
    "disable_writer": ([], ["--disable_writer"]),
    "feature_cache": (FROZEN, ["--feature_cache", "FOLDER"]),
    "data_root": ([], ["--data_root", "elsewhere"]),
    "list_root": ([], ["--list_root", "elsewhere"]),
    "output": ([], []),
    "notes": ([], ["--notes", "another"]),
    "overwrite": ([], ["--overwrite"]),
    "resume": ([], ["--resume"]),
}  # fmt: skip
SHORT = [
    "--dataset", "Digits", "--image_size", "16", "--limit", "40", "--epoch_num", "2", "--batch_size", "16", "--topK",
    "20", "--eval_interval", "1", "--num_workers", "0", "--feature_cache", "off", "--lr", "0.003",
]  # fmt: skip
OWN_BASES = {
    "SPQ": [*SHORT, "--method", "SPQ", "--backbone", "resnet18_tiny", "--M", "2", "--K", "4", "--L", "4"],
    "CIBHash": [*SHORT, "--method", "CIBHash", "--backbone", "convnet"],
}
# the same for the other methods' own flags; --head_only permits a backbone and changes nothing
OWN_CHANGES = {
    "SPQ": {
        "M": ["--M", "3"], "K": ["--K", "8"], "L": ["--L", "5"], "T": ["--T", "0.4"], "pairs": ["--pairs", "all"],
        "soft_quantization_scale": ["--soft_quantization_scale", "3"], "head_init": ["--head_init", "uniform"],
        "anchors": ["--anchors", "both"], "freeze_bn": ["--freeze_bn"],
    },
    "CIBHash": {
        "code_length": ["--code_length", "24"], "hidden_dim": ["--hidden_dim", "64"], "T": ["--T", "0.4"],
        "sampling": ["--sampling", "sign"], "alphabet": ["--alphabet", "pm"], "kl_weight": ["--kl_weight", "0.1"],
        "detach_kl": ["--detach_kl"],
    },
}  # fmt: skip
# what has a test of its own: other images, a download, a device, a compiler, a test without a training, no run at all
ELSEWHERE = {"method", "dataset", "protocol", "skip_bad_images", "download_cifar10", "device", "compile", "test_only",
             "checkpoint", "vgg_model_path", "dry_run", "images", "embeddings", "embedding_views",
             "embedding_labels"}  # fmt: skip


def test_every_flag_is_tried():
    assert CHANGES.keys() | ELSEWHERE == rows("MeCoQ").keys()
    assert not CHANGES.keys() & ELSEWHERE
    for method, changes in OWN_CHANGES.items():
        own = {flag.name for table in METHODS[method].flags.values() for flag in table}
        assert changes.keys() == own - {"head_only"}


@pytest.fixture(scope="module")
def outcome(weights, tmp_path_factory):
    """What comes out of a run with flags: a digest of all its results; each run is made once."""
    made: dict[tuple, str] = {}

    def run(flags: list[str], base: list[str] = BASE) -> str:
        flags = [weights if flag == "WEIGHTS" else flag for flag in flags]
        if (*base, *flags) not in made:
            output = tmp_path_factory.mktemp("run")
            flags = [str(output / "cache") if flag == "FOLDER" else flag for flag in flags]
            assert main.main([*base, *flags, "--output", str(output)]) == 0
            made[(*base, *flags)] = digest(next(output.glob("checkpoints/*")))
        return made[(*base, *flags)]

    return run


def digest(folder: Path) -> str:
    """Of the model, the codes, the curves, MAP and the history, without times."""
    found = hashlib.sha256()
    for name, tensor in torch.load(folder / "model.cpt", weights_only=True).items():
        found.update(name.encode() + tensor.numpy().tobytes())
    for name in ("db_codes.npy", "PR_curve.txt", "P_at_topK_curve.txt"):
        found.update((folder / name).read_bytes())
    metrics = json.loads((folder / "metrics.json").read_text())
    found.update(json.dumps([metrics["map"], metrics["history"]]).encode())
    return found.hexdigest()


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_what_it_affects(flag, outcome):
    beside, change = CHANGES[flag]
    same = outcome(beside) == outcome([*beside, *change])
    assert same == (rows("MeCoQ")[flag].affects in ("speed", "place", "action"))


@pytest.mark.parametrize(("method", "flag"), [(method, flag) for method in OWN_CHANGES for flag in OWN_CHANGES[method]])
def test_a_flag_of_another_method_changes_what_it_affects(method, flag, outcome):
    base, change = OWN_BASES[method], OWN_CHANGES[method][flag]
    assert outcome([], base) != outcome(change, base)


# ---------------------------------------------------------------- optimisers


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_optimisers_take_their_flags(name):
    settings = config.parse(["--optimizer", name, "--momentum", "0.7", "--hp_beta", "0.25", "--lr", "0.5"])
    method = torch.nn.Module()
    method.parameter_groups = lambda lr, backbone_lr: [{"params": [torch.ones(1, requires_grad=True)], "lr": lr}]
    (group,) = optimizer.build_optimizer(method, settings).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert group.get("momentum") == (0.7 if name == "SGD" else None)
