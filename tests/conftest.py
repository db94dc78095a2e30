"""Fixtures. MECOQ_GOLDEN names another folder of golden numbers; MECOQ_REAL_DATA one with real images and weights."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers, and what they start, have a core each; before torch is imported

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import GOLDEN, LIVELY, ROOT, small_run, write_cifar10, write_flickr25k, write_nuswide  # noqa: F401

from methods.backbones import build_backbone
from utils import locked


# a session's, as Hypothesis wants it
@pytest.fixture(scope="session", params=["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])])
def device(request):
    """Each device that is there; its float32 is no TF32."""
    if request.param != "cpu":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """name -> the arrays of golden/<name>.npz."""
    return lambda name: np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


@pytest.fixture(scope="session")
def real_data():
    """The folder with real/cifar10_jpeg.tar.xz and real/squeezenet1_0_imagenet_fp16.pth."""
    if "MECOQ_REAL_DATA" not in os.environ:
        pytest.skip("MECOQ_REAL_DATA is not set")
    return Path(os.environ["MECOQ_REAL_DATA"]).resolve()


@pytest.fixture(scope="session")
def real_cifar10_root(real_data, tmp_path_factory):
    """A data root with the real images, laid out by the folder's own tool, once for all workers."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp().parent / "real" if several else tmp_path_factory.mktemp("real")
    with locked(root.with_suffix(".lock"), "waiting for the real images", wait=True):
        if not (root / "complete").exists():
            subprocess.run([sys.executable, real_data / "tools" / "make_cifar10.py", root / "CIFAR-10"], check=True)
            (root / "complete").touch()
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights of SqueezeNet, wide enough that features differ from image to image; tests must not change the
    file."""
    torch.manual_seed(0)
    net = build_backbone("squeezenet1_0", "random", 0, False).net
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = {k: v * (1.5 if k.endswith("weight") else 1) for k, v in net.state_dict().items()}
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="session")
def photo_root(tmp_path_factory):
    """A folder whose `datasets` and `data` hold a small Flickr25K and a small NUS-WIDE; tests must not change it."""
    root = tmp_path_factory.mktemp("photos")
    write_flickr25k(root, 125)
    write_nuswide(root, 20, 70)
    return root


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory):
    """A data root holding CIFAR-10/cifar-10-batches-py; tests must not change it."""
    root = tmp_path_factory.mktemp("datasets")
    write_cifar10(root / "CIFAR-10" / "cifar-10-batches-py")
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The output folder of a finished run named "small"; tests must not change it."""
    output = tmp_path_factory.mktemp("run")
    small_run(output, *LIVELY)
    return output
