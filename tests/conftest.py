"""Fixtures. MECOQ_GOLDEN names another folder of golden numbers; MECOQ_REAL_DATA one with real images and weights."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers, and what they start, have a core each; before torch is imported

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from methods.backbones import build_backbone  # noqa: E402, found from ROOT

GOLDEN = Path(os.environ.get("MECOQ_GOLDEN", ROOT / "tests" / "golden"))


FROZEN = [
    "--backbone", "squeezenet1_0", "--image_size", "32", "--batch_size", "24", "--optimizer", "Adam", "--lr", "0.01",
    "--precision", "fp32", "--limit", "60", "--epoch_num", "3", "--K", "64",
]  # fmt: skip


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


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights of SqueezeNet, wide enough that features differ from image to image."""
    torch.manual_seed(0)
    net = build_backbone("squeezenet1_0", "random", 0, False).net
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    state = {k: v * (1.5 if k.endswith("weight") else 1) for k, v in net.state_dict().items()}
    torch.save(state, path)
    return str(path)


def wait_for(condition: Callable[[], object]) -> None:
    """Fails where it does not come true within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written_below(folder: Path) -> list[str]:
    """All files below a folder, from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_photos(folder: Path, names: list[str], seed: int = 0) -> None:
    """JPEG files of different sizes, cut out of the two photographs that come with scikit-learn."""
    photos = load_sample_images().images
    generator = np.random.default_rng(seed)
    for i, name in enumerate(names):
        height, width = generator.integers(60, 120, 2)
        top, left = generator.integers(0, 300, 2)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 2][top : top + height, left : left + width]).save(path, quality=90)


def write_flickr25k(root: Path, n: int) -> None:
    """n photos with labels in the layout of Flickr25K: `root/datasets` and `root/data`. Photos of one source share
    a label."""
    names = [f"im{i + 1}.jpg" for i in range(n)]
    write_photos(root / "datasets" / "Flickr25K" / "mirflickr", names)
    lists = root / "data" / "Flickr25k"
    lists.mkdir(parents=True)
    (lists / "img.txt").write_text("".join(f"{name}\n" for name in names))
    labels = np.random.default_rng(1).random((n, 24)) < 0.04
    labels[np.arange(n), np.arange(n) % 2] = True
    np.savetxt(lists / "targets.txt", labels, fmt="%d")


def write_nuswide(root: Path, queries: int, others: int) -> None:
    """The same in the layout of NUS-WIDE."""
    n = queries + others
    names = [f"{('sky', 'water')[i % 2]}/{i:04d}.jpg" for i in range(n)]
    write_photos(root / "datasets" / "NUS-WIDE" / "Flickr", names)
    labels = np.random.default_rng(1).random((n, 21)) < 0.04
    labels[np.arange(n), np.arange(n) % 2] = True
    lines = [f"{name} {' '.join(map(str, row))}\n" for name, row in zip(names, labels.astype(int), strict=True)]
    lists = root / "data" / "Nuswide"
    lists.mkdir(parents=True)
    for part, chosen in (("test", lines[:queries]), ("train", lines[queries:]), ("database", lines[queries:])):
        (lists / f"{part}.txt").write_text("".join(chosen))


@pytest.fixture(scope="session")
def photo_root(tmp_path_factory):
    """A folder whose `datasets` and `data` hold a small Flickr25K and a small NUS-WIDE; tests must not change it."""
    root = tmp_path_factory.mktemp("photos")
    write_flickr25k(root, 125)
    write_nuswide(root, 20, 70)
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
