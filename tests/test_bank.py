"""A run on a bank of features is the run itself."""

import csv
import json

import numpy as np
import pytest
import torch
from test_engine import SMALL, small_run
from test_scripts import call

import bank
import data
import main
from utils import InputError

FROZEN = [
    "--backbone", "squeezenet1_0", "--image_size", "32", "--batch_size", "24", "--optimizer", "Adam", "--lr", "0.01",
    "--precision", "fp32", "--limit", "60", "--epoch_num", "3", "--K", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, wide enough that features differ from image to image."""
    torch.manual_seed(0)
    net = main.build_backbone("squeezenet1_0", "random", 0, False).net
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = {k: v * (1.5 if k.endswith("weight") else 1) for k, v in net.state_dict().items()}
    torch.save(state, path)
    return str(path)


def options(*flags):
    return main.resolve(main.build_parser().parse_args([*SMALL, *FROZEN, *flags]))


@pytest.mark.parametrize("flags", [[], ["--recipe", "release", "--symmetric_distance", "--seed", "5"]])
def test_training_on_the_bank_is_training_on_the_images(flags, weights, tmp_path):
    flags = [*flags, "--weights", weights]
    folder = small_run(tmp_path, *FROZEN, *flags)
    expected = json.loads((folder / "metrics.json").read_text())["history"]
    args = options(*flags)
    splits, model = main.build(args)
    bank.build_bank(tmp_path / "bank", splits, model.backbone, args)
    history = bank.train_on_bank(tmp_path / "bank", splits, model, args, tmp_path / "banked")
    assert len(history) == 3
    for ours, theirs in zip(history, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss/total_loss"] == pytest.approx(theirs["loss/total_loss"], rel=1e-4)
        assert ours["val_mAP"] == pytest.approx(theirs["val_mAP"], abs=5e-3)
    states = [
        torch.load(f / "model.cpt", weights_only=True) for f in (folder, tmp_path / "banked/checkpoints/Digits12bits")
    ]
    torch.testing.assert_close(states[1]["projection.weight"], states[0]["projection.weight"], atol=1e-3, rtol=1e-3)


def test_a_bank_is_built_once_and_of_one_thing(weights, tmp_path):
    args = options("--weights", weights)
    splits, model = main.build(args)
    bank.build_bank(tmp_path, splits, model.backbone, args)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before.keys() == {"key.json", "query.npy", "database.npy", *(f"epoch00{e}.npy" for e in range(3))}
    (tmp_path / "epoch001.npy").unlink()  # as if it had been interrupted
    bank.build_bank(tmp_path, splits, model.backbone, args)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"epoch001.npy"}
    inverted = splits.each(lambda images: data.Images(255 - images.pixels, images.labels))
    with pytest.raises(InputError, match="is the feature bank of other data"):
        bank.build_bank(tmp_path, inverted, model.backbone, args)
    for flags in (["--seed", "3"], ["--precision", "bf16"], ["--image_size", "40"]):
        other = options("--weights", weights, *flags)
        with pytest.raises(InputError, match="is the feature bank of other data"):
            bank.build_bank(tmp_path, *(lambda s, m: (s, m.backbone))(*main.build(other)), other)
    model.backbone.net.features[0].weight.data += 1
    with pytest.raises(InputError, match="is the feature bank of other data"):
        bank.build_bank(tmp_path, splits, model.backbone, args)


@pytest.mark.parametrize("flags", [["--trainable_layer_num", "1"], ["--backbone", "vgg16"]])
def test_what_learns_or_drops_out_has_no_bank(flags, tmp_path):
    args = options("--weights", "random", *flags)
    splits, model = main.build(args)
    with pytest.raises(InputError, match="without trained blocks and dropout"):
        bank.build_bank(tmp_path / "bank", splits, model.backbone, args)
    assert not (tmp_path / "bank").exists()


def test_measure_recipes_runs_every_setting_once(weights, tmp_path, capsys):
    flags = [*SMALL, *FROZEN, "--weights", weights, "--hp_lambda", "0.2", "--epoch_num", "1"]
    arguments = ("--seeds", "1", "2", "--bank", tmp_path / "bank", "--results", tmp_path / "results", *flags)
    assert call("measure_recipes", *arguments) == 0
    text = capsys.readouterr().out
    cells = {path.name: json.loads(path.read_text()) for path in (tmp_path / "bank" / "cells").glob("*.json")}
    assert len(cells) == 18
    for flag in ("codebooks", "pairing", "debias_memory", "negative_bound", "normalize_memory", "normalize_query"):
        config = next(c["config"] for c in cells.values() if c["setting"].startswith(f"paper, {flag}="))
        release = main.RECIPES["release"][flag]
        assert main.departures(main.argparse.Namespace(**config)) == {flag: release}
    assert {c["config"]["hp_lambda"] for c in cells.values() if c["setting"] == "paper"} == {0}
    assert {c["config"]["hp_lambda"] for c in cells.values() if c["setting"] == "release"} == {0.2}
    with (tmp_path / "results" / "measure_recipes.csv").open() as file:
        rows = list(csv.reader(file))
    release = [100 * cells[f"release-seed{seed}.json"]["map"] for seed in (1, 2)]
    paper = [100 * cells[f"paper-seed{seed}.json"]["map"] for seed in (1, 2)]
    row = next(row for row in rows if row[0] == "release")
    expected = [*release, np.mean(release), min(release), max(release), np.mean(release) - np.mean(paper)]
    np.testing.assert_allclose([float(x) for x in row[1:]], expected, atol=1e-3)
    assert "| release" in text
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank" / "cells").glob("*.json")}
    assert call("measure_recipes", *arguments) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for further, words in (
        (["--T", "0.2"], "was made with other flags"),
        (["--pairing", "all"], "--pairing: this script sets"),
        (["--recipe", "release"], "--recipe: this script sets"),
        (["--hp_lambda", "0"], "must be more than 0"),
        (["--dry_run"], "have no place here"),
        (["--epoch_num", "0"], "must be more than 0"),
        (["--device", "cuda:99"], "CUDA"),
    ):
        assert call("measure_recipes", *arguments, *further) == 2
        assert words in capsys.readouterr().err
