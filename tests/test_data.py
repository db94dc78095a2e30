import hashlib
import json
import pickle
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import data
import transforms
from utils import InputError


def golden_splits():
    for path in sorted(GOLDEN.glob("splits_seed*.json")):
        seed = int(re.search(r"seed(\d+)", path.name)[1])
        for name, expected in json.loads(path.read_text()).items():
            protocol, part = name.split("/")
            yield pytest.param(seed, protocol, part, expected, id=f"{seed}-{protocol}-{part}")


GOLDEN_SPLITS = list(golden_splits())
assert GOLDEN_SPLITS, f"no splits_seed*.json in {GOLDEN}"


@pytest.mark.parametrize(("seed", "protocol", "part", "expected"), GOLDEN_SPLITS)
def test_golden_splits(seed, protocol, part, expected):
    """The hashes were taken over a file order in which every ten images hold each class once, turned by one."""
    position = np.arange(60000)
    labels = (7 * position + position // 10) % 10
    if protocol in ("I", "II"):
        indices = data.cifar10_indices(labels, protocol, seed)[part]
    else:
        indices = data.flickr25k_indices(25000, seed)[part]
    assert len(indices) == expected["n"]
    assert indices[:4].tolist() == expected["first"]
    assert hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("protocol", ["I", "II"])
def test_cifar10_protocols(protocol, cifar10_root):
    splits = data.load_cifar10(cifar10_root, protocol, 2021, download=False)
    per_class = {"query": 1000, "train": 5000 if protocol == "I" else 500, "database": 5000}
    for part, count in per_class.items():
        images = getattr(splits, part)
        assert np.bincount(images.labels).tolist() == [count] * 10
        assert images.pixels.shape == (10 * count, 32, 32, 3)
        assert (images.pixels[:, 5, 7, 1] == images.labels * 25).all()  # pixels and labels stayed together
    assert not splits.canonical


@pytest.mark.parametrize("pickle_protocol", [2, 4, 5])
def test_cifar10_pixels_are_planes_of_rows(pickle_protocol, tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (10000, 3072), dtype=np.uint8)
    batch = {"batch_label": "testing batch 1 of 1", "labels": [3] * 10000, "data": rows}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=pickle_protocol))
    images = data.read_cifar10_batch(tmp_path / "test_batch")
    assert images.pixels[17, 4, 9].tolist() == [rows[17, plane * 1024 + 4 * 32 + 9] for plane in range(3)]


def test_cifar10_batch_pickled_by_python_2(tmp_path):
    """The published files: byte strings for keys and array contents, NumPy's old module names."""
    rows = np.arange(10000 * 3072, dtype=np.uint8).reshape(10000, 3072)
    parts = [
        b"(dS'batch_label'\nS'testing batch 1 of 1'\nsS'labels'\n(l", b"I7\na" * 10000, b"sS'data'\n",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR",
        b"(I1\n(I10000\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n",
        b"T" + rows.nbytes.to_bytes(4, "little") + rows.tobytes(), b"tbs.",
    ]  # fmt: skip
    (tmp_path / "test_batch").write_bytes(b"".join(parts))
    images = data.read_cifar10_batch(tmp_path / "test_batch")
    assert (images.labels == 7).all()
    assert images.pixels[1, 0, :3, 0].tolist() == rows[1, :3].tolist()


def test_changed_files_load_with_a_warning(cifar10_root, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    data.load_cifar10(cifar10_root, "II", 2021, download=False)
    assert "not comparable" in caplog.text
    assert "data_batch_1" in caplog.text


class Evil:
    def __reduce__(self):
        return (print, ("hacked",))


def remade(batch, **changes):
    return pickle.dumps(batch | changes, protocol=2)


def damage(folder, kind):
    path = folder / "data_batch_3"
    batch = pickle.loads(path.read_bytes())
    labels = batch["labels"]
    content = {
        "truncated": path.read_bytes()[:-1000],
        "empty": b"",
        "text": b"this is no pickle",
        "evil": pickle.dumps(Evil()),
        "list": pickle.dumps([1, 2]),
        "label out of range": remade(batch, labels=[10, *labels[1:]]),
        "too few labels": remade(batch, labels=labels[1:]),
        "labels of text": remade(batch, labels=["cat"] * 10000),
        "class sizes": remade(batch, labels=[4, *labels[1:]]),
        "odd title": remade(batch, batch_label=np.zeros(3)),
        "short data": remade(batch, data=batch["data"][:-1]),
        "swapped files": (folder / "data_batch_4").read_bytes(),
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "data_batch_3 is missing"),
        ("truncated", "data_batch_3 is not a readable"),
        ("empty", "data_batch_3 is not a readable"),
        ("text", "data_batch_3 is not a readable"),
        ("evil", "data_batch_3 is not a readable .*print"),
        ("list", "data_batch_3: not a CIFAR-10 batch"),
        ("label out of range", "data_batch_3: mislabelled"),
        ("too few labels", "data_batch_3: there are not 10000 labels"),
        ("labels of text", "data_batch_3: mislabelled"),
        ("class sizes", "mislabelled, CIFAR-10 has 6000 images a class but class 0 has 5999"),
        ("odd title", "data_batch_3: mislabelled, the file says"),
        ("short data", "data_batch_3: data is not an array"),
        ("swapped files", "data_batch_3: mislabelled, the file says it is 'training batch 4 of 5'"),
    ],
)
def test_damaged_batches_are_named(kind, words, cifar10_root, tmp_path, capsys):
    original = cifar10_root / "CIFAR-10" / "cifar-10-batches-py"
    folder = tmp_path / "CIFAR-10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for path in original.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "data_batch_3").unlink()
    shutil.copy(original / "data_batch_3", folder)
    damage(folder, kind)
    with pytest.raises(InputError, match=words) as caught:
        data.load_cifar10(tmp_path, "II", 2021, download=False)
    assert "\n" not in str(caught.value)
    assert "hacked" not in capsys.readouterr().out


@pytest.mark.parametrize("n", [25000, 1000, 130])
def test_flickr25k_splits_share_no_query_with_the_database(n):
    parts = data.flickr25k_indices(n, 1)
    assert [len(parts[name]) for name in ("query", "train", "database")] == [n * 2 // 25, n // 5, n - n * 2 // 25]
    assert sorted([*parts["query"], *parts["database"]]) == list(range(n))
    assert set(parts["train"]) <= set(parts["database"])


def test_photo_lists_that_are_not_the_published_ones_warn(photo_root, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    roots = photo_root / "datasets", photo_root / "data"
    assert not data.load_flickr25k(*roots, 2021).canonical
    assert "125 images, Flickr25K 25000" in caplog.text
    assert not data.load_nuswide(*roots).canonical
    assert "20 queries and 70 others" in caplog.text


def test_queries_in_the_database_are_pointed_out(photo_root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    shutil.copytree(photo_root / "data", tmp_path, dirs_exist_ok=True)
    test = (tmp_path / "Nuswide" / "test.txt").read_text()
    with (tmp_path / "Nuswide" / "database.txt").open("a") as file:
        file.write(test.splitlines()[4])
    data.load_nuswide(photo_root / "datasets", tmp_path)
    assert "1 queries are in the database too, sky/0004.jpg the first" in caplog.text


def test_splits_that_come_out_empty_are_refused(photo_root, tmp_path):
    for name in ("img.txt", "targets.txt"):
        lines = (photo_root / "data" / "Flickr25k" / name).read_text().splitlines()[:9]
        (tmp_path / "Flickr25k").mkdir(exist_ok=True)
        (tmp_path / "Flickr25k" / name).write_text("\n".join(lines))
    with pytest.raises(InputError, match="none is left for the query split"):
        data.load_splits("Flickr25K", "I", 1, photo_root / "datasets", tmp_path)


def test_missing_data_set_says_where_and_how(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}/CIFAR-10/cifar-10-batches-py.*--download_cifar10"):
        data.load_cifar10(tmp_path, "I", 2021, download=False)


def test_download_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=r"--download_cifar10 failed .*no route to host"):
        data.load_cifar10(tmp_path, "I", 2021, download=True)


def test_digits():
    splits = data.load_digits(2021)
    assert len(splits.query) + len(splits.database) == 1797
    assert np.bincount(splits.query.labels).tolist() == [30] * 10
    assert splits.train is splits.database
    together = np.concatenate([splits.query.pixels, splits.database.pixels])
    assert together.shape == (1797, 8, 8, 3)
    assert together.max() == 255
    rows = {row.tobytes() for row in together}
    assert len(rows) == len(np.unique(together.reshape(1797, -1), axis=0))
    other = data.load_digits(7)
    assert not np.array_equal(other.query.pixels, splits.query.pixels)


def test_limit_keeps_all_classes(cifar10_root, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    splits = data.load_splits("CIFAR10", "II", 2021, cifar10_root, limit=50)
    for images in (splits.train, splits.query, splits.database):
        assert np.bincount(images.labels).tolist() == [5] * 10
    assert "WARNING: --limit 50" in caplog.text


# ---------------------------------------------------------------- views and loaders


def pictures(n=23):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    splits = data.Images(pixels, np.arange(n))
    return data.Splits(splits, splits, splits)


def options(**changes):
    return Namespace(**{"image_size": 32, "batch_size": 5, "num_workers": 0, "seed": 1, "device": "cpu"} | changes)


def one_epoch(epoch, workers=0, seed=1, batch_size=5, kind="batched"):
    loader = data.train_loader(pictures(), options(batch_size=batch_size, num_workers=workers, seed=seed, views=kind))
    loader.batch_sampler.epoch = epoch
    return list(loader)


def test_batches_hold_every_image_once_and_the_last_is_smaller():
    sampler = data.ShuffledBatches(23, 5, seed=1)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert len(sampler) == 5
    assert sorted(index for batch in batches for index, _ in batch) == list(range(23))
    sampler.epoch = 1
    assert [i for b in sampler for i, _ in b] != [i for b in batches for i, _ in b]


@pytest.mark.parametrize("kind", ["batched", "pil"])
def test_views_depend_on_seed_and_epoch_but_not_on_workers(kind):
    before = torch.random.get_rng_state()
    first = one_epoch(0, kind=kind)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first, one_epoch(0, workers=2, kind=kind), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], one_epoch(1, kind=kind)[0])
    assert not torch.equal(first[0], one_epoch(0, seed=2, kind=kind)[0])
    assert not torch.equal(*first[0].chunk(2))
    assert [batch.shape for batch in first] == [(10, 3, 32, 32)] * 4 + [(6, 3, 32, 32)]


def share(transform, picture, test, n=400):
    return sum(bool(test(transform(picture))) for _ in range(n)) / n


def test_views_are_drawn_as_described():
    """Shares of grey and of mirrored views, on pictures where each shows."""
    red = Image.new("RGB", (32, 32), (200, 40, 40))
    view = transforms.view_transform(32, mirrored=True)
    std, mean = (torch.tensor(values)[:, None, None] for values in (transforms.IMAGENET_STD, transforms.IMAGENET_MEAN))
    undo = lambda x: x * std + mean  # noqa: E731
    grey = share(view, red, lambda x: (undo(x).amax(0) - undo(x).amin(0)).max() < 0.02)
    assert grey == pytest.approx(0.2, abs=0.07)
    colour = torch.tensor([200, 40, 40])[:, None, None] / 255
    untouched = share(view, red, lambda x: (undo(x) - colour).abs().max() < 0.01)
    assert untouched == pytest.approx(0.3 * 0.8, abs=0.07)
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2))
    rising = lambda x: x[:, :, -1].mean() > x[:, :, 0].mean()  # noqa: E731
    assert share(view, ramp, rising) == pytest.approx(0.5, abs=0.08)
    assert share(transforms.view_transform(32, mirrored=False), ramp, rising) == 1.0


def test_photos_are_resized_by_their_shorter_side_and_cut():
    """A picture twice as wide as high: its outer quarters are cut off, and an eighth of what is left on each side."""
    picture = Image.new("RGB", (512, 256), (0, 0, 255))
    picture.paste((255, 0, 0), (144, 16, 368, 240))  # the 224 x 224 in the middle
    x = data.photo_transform(224)(picture)
    assert x.shape == (3, 224, 224)
    np.testing.assert_allclose(x[0], (1 - 0.485) / 0.229, rtol=1e-5)
    assert data.photo_transform(64)(picture).shape == (3, 64, 64)


def test_real_images_load_with_their_labels(real_cifar10_root):
    splits = data.load_cifar10(real_cifar10_root, "II", 2021, download=False)
    assert [len(part) for part in (splits.train, splits.query, splits.database)] == [5000, 10000, 50000]
    means = np.stack([splits.database.pixels[splits.database.labels == c].mean(axis=(0, 1, 2)) for c in range(10)])
    assert means[[0, 8], 2].min() > means[[2, 4, 6], 2].max()  # aeroplanes and ships are bluer than birds, deer, frogs
