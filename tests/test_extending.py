"""A method of one file and one registry row, and a data set of one row, go through a whole run."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import Killed, hamming_map

import config
import data
import engine
import evaluation
import main
from methods import METHODS, MethodRow
from methods.flags import Flag, at_least
from readers import Images

SIGN_HASHING = '''
"""Sign hashing: a linear projection whose signs are the code, eight to a byte; ranked by Hamming distance."""

import torch
from torch import nn

import loss
from methods.base import Method

PATTERNS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).float() * 2 - 1  # [256, 8], a byte's bits as -1 and 1


class SignHashing(Method):
    """The sign of each of the projection's outputs is a bit. `warmth`: of the tanh that stands for it in training."""

    def __init__(self, backbone, bits, warmth):
        super().__init__(backbone, M=bits // 8, K=256)
        self.projection, self.warmth, self.seen = nn.Linear(backbone.dim, bits), warmth, 0

    def project(self, features):
        return self.projection(features)

    def loss(self, views, epoch):
        soft = torch.tanh(self.warmth * self(views))
        contrastive = loss.contrastive_loss(*soft.chunk(2), T=0.3 + 0.001 * self.seen)
        return {"loss/total_loss": contrastive, "quant_err": (soft.abs() - 1).square().mean()}

    def after_step(self):
        self.seen += 1

    def extra_state(self):
        return {"seen": self.seen}

    def load_extra_state(self, state):
        self.seen = state["seen"]

    def codes(self, z):
        bits = (z.view(len(z), self.M, 8) > 0).to(torch.uint8)
        return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=-1).to(torch.uint8)

    def query(self, z):
        return self.codes(z)

    def tables(self, queries):
        return PATTERNS[queries.long()] @ PATTERNS.T  # [q, M, 256]: bits in common less those that differ


def build(backbone, config):
    return SignHashing(backbone, config.code_length, config.warmth)
'''
FLAGS = {
    "sign hashing": (
        Flag("code_length", 16, "result", "bits of a code", at_least(8)),
        Flag("warmth", 1.0, "result", "of the tanh", at_least(0.1)),
    )
}
RUN = ["--method", "SignHashing", "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--topK", "20",
       "--limit", "120", "--batch_size", "32", "--optimizer", "Adam", "--lr", "0.003", "--epoch_num", "3",
       "--num_workers", "0", "--feature_cache", "off", "--save_interval", "2", "--notes", "sign"]  # fmt: skip


@pytest.fixture
def sign_hashing(tmp_path, monkeypatch):
    """The method, registered: its file and one row."""
    assert len(SIGN_HASHING.strip().splitlines()) <= 60
    (tmp_path / "sign_hashing.py").write_text(SIGN_HASHING)
    monkeypatch.syspath_prepend(tmp_path)
    row = MethodRow("sign_hashing:build", lambda values: (values["code_length"] // 8, 256), lambda bits: {}, FLAGS)
    monkeypatch.setitem(METHODS, "SignHashing", row)
    yield
    sys.modules.pop("sign_hashing", None)


def test_a_method_of_one_file_trains_resumes_and_is_tested(sign_hashing, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main([*RUN, "--output", str(whole)]) == 0
    metrics = json.loads((whole / "checkpoints/sign/metrics.json").read_text())
    assert (metrics["method"], metrics["bits"], metrics["epochs_run"]) == ("SignHashing", 16, 3)

    from sign_hashing import SignHashing

    original = SignHashing.after_step

    def killed_at_the_sixth_step(self):
        original(self)
        if self.seen == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SignHashing, "after_step", killed_at_the_sixth_step)
        main.main([*RUN, "--output", str(stopped)])
    assert main.main([*RUN, "--output", str(stopped), "--resume", "--warmth", "2"]) == 2
    assert "--warmth 1.0 (now 2.0)" in capsys.readouterr().err
    assert main.main([*RUN, "--output", str(stopped), "--resume"]) == 0
    for name in ("model.cpt", "db_codes.npy", "PR_curve.txt"):
        folders = (output / "checkpoints/sign" for output in (whole, stopped))
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, name

    flags = ["--test_only", "--checkpoint", str(whole / "checkpoints/sign/model.cpt"), "--notes", "again"]
    assert main.main([*RUN, *flags, "--output", str(whole)]) == 0
    assert json.loads((whole / "checkpoints/again/metrics.json").read_text())["map"] == metrics["map"]


def test_its_map_is_that_of_hamming_distances(sign_hashing, tmp_path):
    assert main.main([*RUN, "--output", str(tmp_path)]) == 0
    folder = tmp_path / "checkpoints/sign"
    settings = config.parse(RUN)
    splits, method = engine.build(settings)
    method.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    features = engine.build_features(settings, method.backbone, {"query": splits.query})
    queries = np.unpackbits(evaluation.encode_queries(method, features["query"]).numpy(), axis=1)
    database = np.unpackbits(np.load(folder / "db_codes.npy"), axis=1)
    found = json.loads((folder / "metrics.json").read_text())["map_by_ties"]["database"]
    assert found == pytest.approx(hamming_map(queries, database, splits, 20), abs=1e-9)


def test_a_flag_of_another_method_is_refused_in_one_line(sign_hashing, capsys):
    for flags in (["--method", "SignHashing", "--alpha", "3"], ["--warmth", "3"]):
        assert main.main([*flags, "--dry_run"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert flags[-2] in error


# ---------------------------------------------------------------- a data set


def load_stripes(source: data.Source) -> data.Splits:
    """Images of horizontal or vertical stripes."""
    generator = np.random.RandomState(source.seed)
    labels = np.arange(90) % 2
    waves = np.sin(np.arange(16) + generator.uniform(0, 6, (90, 1)))[:, None, :] * np.ones((1, 16, 1))
    waves = np.where(labels[:, None, None] == 1, waves, waves.transpose(0, 2, 1))
    images = Images(np.repeat((127 * waves + 128).astype(np.uint8)[..., None], 3, axis=3), labels)
    return data.Splits(*(images.subset(np.arange(*part)) for part in ((30, 90), (0, 30), (30, 90))))


def test_a_data_set_of_one_row_trains_and_is_tested(tmp_path, monkeypatch):
    row = data.Dataset(load_stripes, "90 striped images", classes=("horizontal", "vertical"), mirrored=False)
    monkeypatch.setitem(data.DATASETS, "Stripes", row)
    flags = ["--dataset", "Stripes", "--backbone", "convnet", "--image_size", "16", "--batch_size", "20", "--K", "16",
             "--feat_dim", "8", "--M", "2", "--topK", "20", "--epoch_num", "4", "--optimizer", "Adam", "--lr", "0.003",
             "--num_workers", "0", "--output", str(tmp_path)]  # fmt: skip
    assert main.main(flags) == 0
    metrics = json.loads((tmp_path / "checkpoints/Stripes8bits/metrics.json").read_text())
    assert metrics["dataset"] == "Stripes"
    assert metrics["map"] > 0.7  # chance: 0.5
