"""SPQ and CIBHash through whole runs: killed and resumed, tested again, validated on queries of their own."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import Killed

import config
import engine
import evaluation
import main
from checkpoint import Training

SHORT = ["--dataset", "Digits", "--image_size", "16", "--limit", "60", "--batch_size", "16", "--topK", "20",
         "--epoch_num", "4", "--eval_interval", "1", "--num_workers", "0", "--feature_cache", "off", "--lr", "0.003",
         "--save_interval", "1", "--notes", "run"]  # fmt: skip
RUNS = {
    "SPQ": ["--method", "SPQ", "--backbone", "resnet18_tiny", "--M", "2", "--K", "4", "--L", "4", "--freeze_bn"],
    "SPQ-release": ["--method", "SPQ", "--backbone", "resnet18_tiny", "--recipe", "release", "--M", "2", "--L", "4"],
    "CIBHash": ["--method", "CIBHash", "--backbone", "convnet"],
    "CIBHash, int8_views": [
        "--method",
        "CIBHash",
        "--backbone",
        "squeezenet1_0",
        "--weights",
        "random",
        "--int8_views",
        "--image_size",
        "32",
        "--trainable_layer_num",
        "1",
    ],
    "CIBHash-release": ["--method", "CIBHash", "--backbone", "convnet", "--recipe", "release"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    flags, whole, stopped = [*SHORT, *RUNS[name]], tmp_path / "whole", tmp_path / "stopped"
    assert main.main([*flags, "--output", str(whole)]) == 0
    original, saves = Training.save, []

    def killed_behind_a_save(self, *arguments, **options):
        original(self, *arguments, **options)
        saves.append(1)
        if len(saves) == 8:  # in the middle of an epoch, after a validation
            assert self.step
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "save", killed_behind_a_save)
        main.main([*flags, "--output", str(stopped)])
    assert main.main([*flags, "--output", str(stopped), "--resume"]) == 0
    folders = [output / "checkpoints/run" for output in (whole, stopped)]
    for file in ("model.cpt", "db_codes.npy", "PR_curve.txt"):
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert first == second, file
    metrics, again = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for field in ("map", "map_by_ties", "history", "best_epoch"):
        assert metrics[field] == again[field], field
    test = ["--test_only", "--checkpoint", str(folders[0] / "model.cpt"), "--notes", "again", "--output", str(whole)]
    assert main.main([*(flag for flag in flags if flag not in ("--weights", "random")), *test]) == 0
    assert json.loads((whole / "checkpoints/again/metrics.json").read_text())["map"] == metrics["map"]


@pytest.mark.parametrize(
    ("trained", "tested", "advice"),
    [
        ("SPQ", ["--K", "8"], "--M 2 --K 4 --L 4"),
        ("SPQ", ["--L", "5"], "--M 2 --K 4 --L 4"),
        ("SPQ", ["--head_init", "uniform"], "--head_init normal"),
        ("CIBHash", ["--code_length", "24"], "--code_length 16"),
        ("CIBHash", ["--hidden_dim", "7"], "--hidden_dim 1024"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_in_one_line(trained, tested, advice, tmp_path, capsys):
    settings = config.parse([*SHORT, *RUNS[trained]])
    torch.save(engine.build_method(settings).state_dict(), tmp_path / "model.cpt")
    test = ["--test_only", "--checkpoint", str(tmp_path / "model.cpt"), "--output", str(tmp_path)]
    assert main.main([*SHORT, *RUNS[trained], *tested, *test, "--notes", "test"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert advice in error


def test_validation_queries_pick_the_checkpoint_and_others_are_reported(cifar10_root, tmp_path):
    """The released split of CIBHash: the validations' MAP is that of the validation queries, the test's is not."""
    flags = ["--method", "CIBHash", "--protocol", "CIBHash", "--backbone", "convnet", "--image_size", "8", "--limit",
             "60", "--epoch_num", "2", "--eval_interval", "1", "--topK", "20", "--data_root", str(cifar10_root),
             "--num_workers", "0", "--feature_cache", "off", "--notes", "run", "--output", str(tmp_path)]  # fmt: skip
    assert main.main(flags) == 0
    folder = tmp_path / "checkpoints/run"
    metrics = json.loads((folder / "metrics.json").read_text())
    log = (tmp_path / "logs/run.log").read_text()
    assert "60 other queries pick the checkpoint" in log
    settings = config.parse(flags)
    splits, method = engine.build(settings)
    method.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    features = engine.build_features(settings, method.backbone, splits.tested)
    codes = np.unpackbits(np.load(folder / "db_codes.npy"), axis=1)
    found = {}
    for name, images in (("validation", splits.validation), ("query", splits.query)):
        queries = np.unpackbits(evaluation.encode_queries(method, features[name]).numpy(), axis=1)
        found[name] = expected_map(queries, codes, images.labels, splits.database.labels, 20)
    best = max(entry["val_mAP"] for entry in metrics["history"])
    assert best == pytest.approx(found["validation"], abs=0.02)
    assert metrics["map"] == metrics["map_by_ties"]["expected"] == pytest.approx(found["query"], abs=0.02)
    assert float(re.search(r"test mAP=([\d.]+)", log)[1]) == pytest.approx(metrics["map"], abs=1e-6)


def expected_map(queries, database, query_labels, labels, K):
    """MAP@K, the mean over 200 random orders of equal Hamming distances."""
    generator, values = np.random.default_rng(0), []
    distances = (queries[:, None] != database).sum(axis=2)
    for row, label in zip(distances, query_labels, strict=True):
        for _ in range(200):
            order = np.lexsort((generator.random(len(row)), row))[:K]
            hits = (labels[order] == label).astype(float)
            values.append((hits.cumsum() / np.arange(1, K + 1) * hits).sum() / max(hits.sum(), 1))
    return np.mean(values)
