import hashlib
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDEN

import data
import readers
from utils import InputError


def cifar10(root, protocol="II", seed=2021):
    return data.Source("CIFAR10", protocol, seed, root, root)


def photos(root, dataset, seed=2021):
    return data.Source(dataset, "I", seed, root / "datasets", root / "data")


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
    splits = data.load_cifar10(cifar10(cifar10_root, protocol))
    per_class = {"query": 1000, "train": 5000 if protocol == "I" else 500, "database": 5000}
    for part, count in per_class.items():
        images = getattr(splits, part)
        assert np.bincount(images.labels).tolist() == [count] * 10
        assert images.pixels.shape == (10 * count, 32, 32, 3)
        assert (images.pixels[:, 5, 7, 1] == images.labels * 25).all()  # pixels and labels stayed together
    assert not splits.canonical


def test_golden_split_of_cibhash(golden):
    """Positions within each class, and the halves of the official test images; by their hashes, too."""
    numbers = golden("cibhash")
    labels = np.random.RandomState(3).permutation(np.repeat(np.arange(10), 6000))
    labels[:50000] = np.random.RandomState(4).permutation(np.repeat(np.arange(10), 5000))
    indices = data.cibhash_indices(50000, labels)
    of_class = [np.flatnonzero(labels[:50000] == c) for c in range(10)]
    ranks = [np.searchsorted(of_class[c], part) for c, part in enumerate(indices["train"].reshape(10, 500))]
    parts = {"train_rank": np.stack(ranks), "val": indices["validation"] - 50000, "test": indices["query"] - 50000}
    hashes = json.loads(str(numbers["config"]))["split_sha256"]
    for name, part in parts.items():
        np.testing.assert_array_equal(part, numbers[f"split/{name}"])
        assert hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() == hashes[name]
    np.testing.assert_array_equal(indices["database"], np.arange(50000))


def test_the_official_split_and_that_of_cibhash(cifar10_root):
    official, cibhash = (data.load_splits(cifar10(cifar10_root, protocol)) for protocol in ("official", "CIBHash"))
    assert [len(images) for images in official.all.values()] == [50000, 10000, 50000]
    assert official.validation is None
    sizes = {name: len(images) for name, images in cibhash.all.items()}
    assert sizes == {"train": 5000, "query": 5000, "database": 50000, "validation": 5000}
    assert np.bincount(cibhash.train.labels).tolist() == [500] * 10
    last = readers.read_cifar10_batch(cifar10_root / "CIFAR-10/cifar-10-batches-py/test_batch")
    assert np.array_equal(official.query.labels, last.labels)
    limited = data.load_splits(cifar10(cifar10_root, "CIBHash"), limit=20)
    assert [len(images) for images in limited.all.values()] == [20] * 4


def test_cifar10_is_found_without_its_folder_too(cifar10_root, tmp_path):
    (tmp_path / "cifar-10-batches-py").symlink_to(cifar10_root / "CIFAR-10/cifar-10-batches-py")
    assert len(data.load_cifar10(cifar10(tmp_path, "official")).query) == 10000


@pytest.mark.parametrize("pickle_protocol", [2, 4, 5])
def test_cifar10_pixels_are_planes_of_rows(pickle_protocol, tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (10000, 3072), dtype=np.uint8)
    batch = {"batch_label": "testing batch 1 of 1", "labels": [3] * 10000, "data": rows}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=pickle_protocol))
    images = readers.read_cifar10_batch(tmp_path / "test_batch")
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
    images = readers.read_cifar10_batch(tmp_path / "test_batch")
    assert (images.labels == 7).all()
    assert images.pixels[1, 0, :3, 0].tolist() == rows[1, :3].tolist()


def test_changed_files_load_with_a_warning(cifar10_root, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    assert not data.load_cifar10(cifar10(cifar10_root)).canonical
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
        data.load_cifar10(cifar10(tmp_path))
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
    assert not data.load_flickr25k(photos(photo_root, "Flickr25K")).canonical
    assert "125 images, Flickr25K 25000" in caplog.text
    assert not data.load_nuswide(photos(photo_root, "NUSWIDE")).canonical
    assert "20 queries and 70 others" in caplog.text


def test_queries_in_the_database_are_pointed_out(photo_root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    shutil.copytree(photo_root / "data", tmp_path, dirs_exist_ok=True)
    test = (tmp_path / "Nuswide" / "test.txt").read_text()
    with (tmp_path / "Nuswide" / "database.txt").open("a") as file:
        file.write(test.splitlines()[4])
    data.load_nuswide(replace(photos(photo_root, "NUSWIDE"), list_root=tmp_path))
    assert "1 queries are in the database too, sky/0004.jpg the first" in caplog.text


def test_splits_that_come_out_empty_are_refused(photo_root, tmp_path):
    for name in ("img.txt", "targets.txt"):
        lines = (photo_root / "data" / "Flickr25k" / name).read_text().splitlines()[:9]
        (tmp_path / "Flickr25k").mkdir(exist_ok=True)
        (tmp_path / "Flickr25k" / name).write_text("\n".join(lines))
    with pytest.raises(InputError, match="none is left for the query split"):
        data.load_splits(replace(photos(photo_root, "Flickr25K"), list_root=tmp_path))


def test_missing_data_set_says_where_and_how(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}/CIFAR-10/cifar-10-batches-py.*--download_cifar10"):
        data.load_cifar10(cifar10(tmp_path))


def test_download_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=r"--download_cifar10 failed .*no route to host"):
        data.load_cifar10(replace(cifar10(tmp_path), download=True))


def test_digits():
    splits = data.load_digits(data.Source("Digits", "I", 2021, Path(), Path()))
    assert len(splits.query) + len(splits.database) == 1797
    assert np.bincount(splits.query.labels).tolist() == [30] * 10
    assert splits.train is splits.database
    together = np.concatenate([splits.query.pixels, splits.database.pixels])
    assert together.shape == (1797, 8, 8, 3)
    assert together.max() == 255
    rows = {row.tobytes() for row in together}
    assert len(rows) == len(np.unique(together.reshape(1797, -1), axis=0))
    other = data.load_digits(data.Source("Digits", "I", 7, Path(), Path()))
    assert not np.array_equal(other.query.pixels, splits.query.pixels)


def test_limit_keeps_all_classes(cifar10_root, caplog, monkeypatch):
    monkeypatch.setattr(data.LOG, "propagate", True)
    splits = data.load_splits(cifar10(cifar10_root), limit=50)
    for images in (splits.train, splits.query, splits.database):
        assert np.bincount(images.labels).tolist() == [5] * 10
    assert "WARNING: --limit 50" in caplog.text


def test_real_images_load_with_their_labels(real_cifar10_root):
    splits = data.load_cifar10(cifar10(real_cifar10_root))
    assert [len(part) for part in (splits.train, splits.query, splits.database)] == [5000, 10000, 50000]
    means = np.stack([splits.database.pixels[splits.database.labels == c].mean(axis=(0, 1, 2)) for c in range(10)])
    assert means[[0, 8], 2].min() > means[[2, 4, 6], 2].max()  # aeroplanes and ships are bluer than birds, deer, frogs


# ---------------------------------------------------------------- the registry


@pytest.mark.parametrize("dataset", ["Flickr25K", "Digits"])
def test_splits_come_from_the_seed(dataset, photo_root):
    def identities(seed):
        splits = data.load_splits(photos(photo_root, dataset, seed))
        return [part.identities().tolist() for part in (splits.train, splits.query, splits.database)]

    first, again, other = identities(1), identities(1), identities(2)
    assert first == again
    for part, of_another_seed in zip(first, other, strict=True):
        assert len(part) == len(of_another_seed)
        assert set(part) != set(of_another_seed)


def test_cifar10_is_split_by_seed_and_protocol(cifar10_root, monkeypatch):
    """Its images in these tests differ by class only: what is drawn is seen on the way."""
    original, seen = data.cifar10_indices, []
    monkeypatch.setattr(data, "cifar10_indices", lambda *arguments: seen.append(arguments) or original(*arguments))
    data.load_splits(cifar10(cifar10_root, "I", 5))
    ((labels, protocol, seed),) = seen
    assert (len(labels), protocol, seed) == (60000, "I", 5)
    first, other = (original(labels, "I", seed)["query"] for seed in (5, 6))
    assert not np.array_equal(first, other)


def test_a_data_set_is_one_row(photo_root, monkeypatch):
    """Nothing else has to change for a new one."""

    def load(source):
        pixels = np.random.default_rng(source.seed).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        images = readers.Images(pixels, np.arange(12) % 3)
        return data.Splits(images, images.subset(np.arange(3)), images)

    monkeypatch.setitem(data.DATASETS, "Own", data.Dataset(load, "mine", classes=("a", "b", "c"), mirrored=False))
    splits = data.load_splits(replace(photos(photo_root, "Own"), seed=3), limit=6)
    assert [len(part) for part in (splits.train, splits.query, splits.database)] == [6, 3, 6]
    assert not splits.mirrored
    assert data.class_names("Own", photo_root) == ("a", "b", "c")


def test_only_digits_have_no_mirror_image(photo_root):
    mirrored = {dataset: data.load_splits(photos(photo_root, dataset)).mirrored for dataset in ("Digits", "NUSWIDE")}
    assert mirrored == {"Digits": False, "NUSWIDE": True}
    assert [name for name, row in data.DATASETS.items() if row.protocols] == ["CIFAR10"]


def test_names_of_classes_stand_in_the_registry_or_beside_the_lists(photo_root):
    assert data.class_names("CIFAR10", photo_root)[3] == "cat"
    assert data.class_names("Flickr25K", photo_root / "data") == ()
    names = data.class_names("Flickr25K", Path(data.__file__).parent / "data")
    assert len(names) == readers.FLICKR25K_CONCEPTS


def test_a_missing_folder_of_images_is_named(photo_root, tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}/Flickr25K/mirflickr is missing"):
        data.load_splits(replace(photos(photo_root, "Flickr25K"), data_root=tmp_path))
