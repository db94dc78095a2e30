"""The command as a user meets it: devices, places, failures, exit codes."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from test_config import refused

import engine
import main


def test_absent_cuda(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable CUDA device" in refused(capsys, "--device", "cuda", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, "--output", str(tmp_path / "file"))


def test_a_log_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "logs" / "x.log").mkdir(parents=True)
    flags = ["--dataset", "Digits", "--backbone", "convnet", "--output", str(tmp_path), "--notes", "x"]
    assert "x.log" in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "out of memory"),
    ],
)
def test_failures_under_the_run_end_in_one_line_there_and_in_the_log(error, words, capsys, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(engine, "run", fail)
    flags = ["--dataset", "Digits", "--backbone", "convnet", "--output", str(tmp_path), "--notes", "x"]
    assert main.main(flags) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert words in printed
    assert "stopped: " in (tmp_path / "logs" / "x.log").read_text().splitlines()[-1]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine, "run", fail)
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


def test_a_closed_pipe_ends_a_run_without_a_word(tmp_path):
    """As under `| head -1`."""
    flags = "--dataset Digits --backbone convnet --image_size 16 --limit 60 --epoch_num 1 --batch_size 16 --topK 9"
    command = f"{sys.executable} {ROOT}/main.py {flags} --disable_writer --feature_cache off | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert list(tmp_path.glob("checkpoints/*/metrics.json"))


def test_closed_output_does_not_matter(tmp_path):
    flags = "--dataset Digits --backbone convnet --image_size 16 --limit 60 --epoch_num 1 --batch_size 16 --topK 9"
    command = f"exec {sys.executable} {ROOT}/main.py {flags} --feature_cache off >&- 2>&-"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False, env=os.environ)
    assert result.returncode == 0
    assert list(tmp_path.glob("checkpoints/*/metrics.json"))
