"""What several test files share: flags of small runs, what is built from them, data sets written to disk, tools."""

import contextlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images

import data
import engine
import main
from config import Config, parse
from data import Source, Splits
from methods.base import Method
from methods.mecoq import MeCoQ
from readers import ImageFiles, Images
from utils import run_script

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "MECOQ_HOSTILE" in os.environ
SEED = int(os.environ.get("MECOQ_FAULT_SEED", "2022"))
GOLDEN = Path(os.environ.get("MECOQ_GOLDEN", ROOT / "tests" / "golden"))

SMALL = [
    "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--limit", "100",
    "--batch_size", "16", "--M", "2", "--K", "8", "--feat_dim", "8",
    "--T", "0.3", "--lr", "0.05", "--num_workers", "0", "--epoch_num", "2",
    "--topK", "20", "--queue_begin_epoch", "1", "--queue_size", "40", "--mode", "debias",
    "--pos_prior", "0.1", "--feature_cache", "off",
]  # fmt: skip

# a few steps of Adam spread the codes of so small a run; SGD's warm-up leaves them nearly all alike
LIVELY = ["--optimizer", "Adam", "--lr", "0.003", "--K", "64"]

# a frozen backbone and a few steps; to be used with --weights
FROZEN = [
    "--backbone", "squeezenet1_0", "--image_size", "32", "--batch_size", "24", "--optimizer", "Adam", "--lr", "0.01",
    "--precision", "fp32", "--limit", "60", "--epoch_num", "3", "--K", "64",
]  # fmt: skip

# the same beside SMALL, in the precision that is usual
SQUEEZENET = [
    "--backbone", "squeezenet1_0", "--image_size", "32", "--limit", "45", "--epoch_num", "1", "--optimizer", "Adam",
]  # fmt: skip


# ---------------------------------------------------------------- runs, and what they are built of


def small_run(output: Path, *flags: str, notes: str = "small") -> Path:
    """A run of `main.main`. Returns its folder of checkpoints."""
    assert main.main([*SMALL, "--output", str(output), "--notes", notes, *flags]) == 0
    return output / "checkpoints" / notes


def config_of(*flags: str) -> Config:
    return parse([*SMALL, *flags])


def method_of(config: Config) -> Method:
    """The method that the flags describe, the same whenever they are."""
    torch.manual_seed(0)
    return engine.build_method(config)


def no_backbone(dim: int) -> torch.nn.Module:
    """A backbone whose images are their own features `[B, dim]`."""
    backbone = torch.nn.Identity()
    backbone.dim = dim
    return backbone


def thin_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let VGG16 have the same blocks, thin."""
    real = torchvision.models.get_model

    def get_model(name, **options):
        if name != "vgg16":
            return real(name, **options)
        with mock.patch.object(torch.nn, "Linear", lambda *_: torch.nn.Identity()):  # 500 MB less
            net = torchvision.models.VGG(torchvision.models.vgg.make_layers([8, "M"] * 5), init_weights=False)
        net.classifier[0], net.classifier[3] = torch.nn.Linear(8 * 49, 32), torch.nn.Linear(32, 4096)
        return net

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


def hamming_map(queries: np.ndarray, database: np.ndarray, splits: Splits, K: int) -> float:
    """MAP@K of bits `[Q, B]` and `[n, B]`, compared one by one, equal distances in database order."""
    precisions = []
    for bits, label in zip(queries, splits.query.labels, strict=True):
        order = np.argsort((bits != database).sum(axis=1), kind="stable")[:K]
        hits = (splits.database.labels[order] == label).astype(float)
        precisions.append((hits.cumsum() / np.arange(1, K + 1) * hits).sum() / max(hits.sum(), 1))
    return float(np.mean(precisions))


def splits_of(dataset: str, *roots: Path, seed: int = 2021, limit: int | None = None) -> Splits:
    """Splits by protocol I; `roots`: of images and lists, if the data set is on disk."""
    return data.load_splits(Source(dataset, "I", seed, *(roots or (Path("none"), Path("none")))), limit=limit)


def features_of(config: Config, method: Method, splits: Splits) -> dict:
    method.eval()
    return engine.build_features(config, method.backbone, splits.tested)


def change_images(monkeypatch: pytest.MonkeyPatch, dataset: str, change: Callable) -> None:
    """Let a data set have other images: `change` is applied to those of all splits."""
    row = data.DATASETS[dataset]
    monkeypatch.setitem(data.DATASETS, dataset, replace(row, load=lambda source: row.load(source).each(change)))


def one_level_brighter(images: Images | ImageFiles) -> Images:
    return Images(images.pixels ^ np.array(1, dtype=np.uint8), images.labels)


class Killed(BaseException):
    """No code catches it."""


@contextlib.contextmanager
def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` before the `step`-th optimisation step, counted from 1 over all epochs."""
    original, steps = MeCoQ.loss, []

    def loss(*arguments):
        steps.append(0)
        if len(steps) == step:
            action()
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MeCoQ, "loss", loss)
        yield


def killed_run(output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, step: int = 8) -> Path:
    """A run that ends without any ado before its `step`-th step. Returns its folder."""

    def kill():
        raise Killed

    with before_step(monkeypatch, step, kill), pytest.raises(Killed):
        main.main([*SMALL, "--save_interval", "2", "--output", str(output), "--notes", "small", *flags])
    return output / "checkpoints" / "small"


@contextlib.contextmanager
def asked(script: str) -> Iterator[Callable]:
    """A program of tests/ that answers requests, a line of JSON each: (arguments, others by name) -> its answer."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def ask(argv, **others):
        server.stdin.write(json.dumps({"argv": [str(arg) for arg in argv], **others}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


def wait_for(condition: Callable[[], object]) -> None:
    """Fails if it does not come true within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written_below(folder: Path) -> list[str]:
    """All files below a folder, as paths from there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- data sets on disk


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


# ---------------------------------------------------------------- tools that a user starts by hand


def load(name):
    """The module in scripts/ or experiments/."""
    (path,) = (path for folder in ("scripts", "experiments") if (path := ROOT / folder / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name, *argv):
    """The exit code."""
    return run_script(lambda: load(name).main([str(arg) for arg in argv]))


def refused(capsys, name, *argv):
    """The error, which must be one line, of a call that must end with exit code 2."""
    assert call(name, *argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


# ---------------------------------------------------------------- damage


def truncated(content, generator):
    return content[: generator.integers(len(content))]


def bit_flipped(content, generator):
    content = bytearray(content)
    content[generator.integers(len(content))] ^= 1 << generator.integers(8)
    return bytes(content)


def overwritten(content, generator):
    start, size = generator.integers(len(content)), generator.integers(1, 200)
    return content[:start] + generator.bytes(size) + content[start + size :]


def lengthened(content, generator):
    return content + generator.bytes(generator.integers(1, 1000))


def emptied(content, generator):
    return b""


DAMAGES = (truncated, bit_flipped, overwritten, lengthened, emptied)


def damages(name: str, n: int) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """n ways to damage a file's content, each with its name; the same for the same `name` of a kind of file."""
    generator = np.random.default_rng([SEED, *name.encode()])
    first = int(generator.integers(len(DAMAGES)))
    for i in range(n):
        damage = DAMAGES[(first + i) % len(DAMAGES)]
        yield f"{i}-{damage.__name__}", partial(damage, generator=generator)
