"""scripts/inspect_checkpoint.py: what it tells of a run's folder, whole, damaged or stopped."""

import json

import pytest
import torch
from helpers import LIVELY, ROOT, call, killed_run, refused, small_run

import checkpoint
from utils import InputError


def test_inspect_checkpoint(tmp_path, capsys, monkeypatch):
    folder = small_run(tmp_path, *LIVELY)
    capsys.readouterr()
    assert call("inspect_checkpoint", folder) == 0
    output = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "model.cpt: whole" in output
    assert "last.cpt: whole" in output
    assert "2 codebooks of 64 codewords of 4 dimensions: 12 bits per image" in output
    assert f"MAP@20 {metrics['map']:.6f}" in output
    assert "stands in epoch 2 of 2" in output
    assert "quantizer.codebooks [2, 64, 4] float32" in output
    assert "NOT" not in output
    model = folder / "model.cpt"
    state = torch.load(model, weights_only=True)
    state["projection.bias"][0] = torch.nan
    torch.save(state, model)
    assert call("inspect_checkpoint", model) == 0
    output = capsys.readouterr().out
    assert "NOT FINITE: projection.bias" in output
    assert "NOT THE SAME MODEL" in output
    model.write_bytes(model.read_bytes()[:-2000])
    assert "not a readable" in refused(capsys, "inspect_checkpoint", model)
    (folder / "last.cpt").write_bytes(b"x")
    assert "is damaged" in refused(capsys, "inspect_checkpoint", folder / "last.cpt")
    assert "neither a model.cpt" in refused(capsys, "inspect_checkpoint", ROOT / "docs")
    stopped = killed_run(tmp_path / "stopped", monkeypatch, step=7)
    assert call("inspect_checkpoint", stopped / "last.cpt") == 0
    output = capsys.readouterr().out
    assert "stands in epoch 0 of 2, 6 steps of it done; not validated yet" in output
    assert "has not finished" in output
    with pytest.raises(InputError):
        checkpoint.load_state(ROOT / "README.md")
