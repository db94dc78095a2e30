"""Fixtures. MECOQ_GOLDEN names another folder of golden numbers; MECOQ_REAL_DATA one with real images and weights."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOLDEN = Path(os.environ.get("MECOQ_GOLDEN", ROOT / "tests" / "golden"))


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
    """A data root with the real images, laid out by the folder's own tool."""
    root = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, real_data / "tools" / "make_cifar10.py", root / "CIFAR-10"], check=True)
    return root


def write_cifar10(folder: Path) -> None:
    """A CIFAR-10 of the true size and format whose images show their class as a shade."""
    folder.mkdir(parents=True)
    labels = np.arange(60000) % 10
    pixels = np.repeat((labels * 25).astype(np.uint8)[:, None], 3072, axis=1)
    for k in range(6):
        part = slice(10000 * k, 10000 * (k + 1))
        title = f"training batch {k + 1} of 5" if k < 5 else "testing batch 1 of 1"
        name = f"data_batch_{k + 1}" if k < 5 else "test_batch"
        batch = {"batch_label": title, "labels": labels[part].tolist(), "data": pixels[part], "filenames": []}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory):
    """A data root holding CIFAR-10/cifar-10-batches-py; tests must not change it."""
    root = tmp_path_factory.mktemp("datasets")
    write_cifar10(root / "CIFAR-10" / "cifar-10-batches-py")
    return root
