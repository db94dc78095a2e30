"""The scripts that write the split lists and say what data is there."""

import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import ROOT, call, load, refused, written_below, zipped

import data
import readers

# ---------------------------------------------------------------- MIRFLICKR-25000

RELEVANT = ("baby", "bird", "car", "clouds", "dog", "female", "flower", "male", "night", "people", "portrait", "river",
            "sea", "tree")  # fmt: skip
POTENTIAL = (*RELEVANT, "animals", "food", "indoor", "lake", "plant_life", "sky", "structures", "sunset", "transport",
             "water")  # fmt: skip
FLICKR_FILES = (*POTENTIAL, *(f"{name}_r1" for name in RELEVANT))


@pytest.fixture
def mirflickr(tmp_path):
    """The makers' layout in small, 60 images: potential labels, relevant ones (_r1), a README; and the true labels."""
    folder = tmp_path / "mirflickr25k_annotations_v080"
    folder.mkdir()
    generator = np.random.default_rng(3)
    truth = {}
    for name in FLICKR_FILES:
        truth[name] = np.sort(generator.choice(60, generator.integers(1, 30), replace=False)) + 1
        (folder / f"{name}.txt").write_text("\r\n".join(map(str, truth[name])) + "\r\n")
    (folder / "README.txt").write_text("Annotations of MIRFLICKR-25000")
    return folder, {name: numbers for name, numbers in truth.items() if not name.endswith("_r1")}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_flickr25k_lists_hold_the_potential_labels(kind, mirflickr, tmp_path, capsys):
    folder, truth = mirflickr
    source = folder if kind == "folder" else zipped(folder.parent, tmp_path.parent / f"{tmp_path.name}.zip")
    output = tmp_path / "data" / "Flickr25k"
    assert call("prepare_flickr25k", source, "--output", output, "--count", 60) == 0
    assert f"water {len(truth['water'])}" in capsys.readouterr().out
    images = readers.read_flickr25k(output, tmp_path)
    assert images.names.tolist() == [f"im{i}.jpg" for i in range(1, 61)]
    concepts = (output / "concepts.txt").read_text().split()
    assert sorted(concepts) == sorted(truth)
    for column, concept in enumerate(concepts):
        assert (np.flatnonzero(images.labels[:, column]) + 1).tolist() == truth[concept].tolist()


def test_flickr25k_lists_are_not_overwritten_unless_forced(mirflickr, tmp_path, capsys):
    output = tmp_path / "lists"
    output.mkdir()
    (output / "targets.txt").write_text("mine")
    assert "--force" in refused(capsys, "prepare_flickr25k", mirflickr[0], "--output", output, "--count", 60)
    assert [path.name for path in output.iterdir()] == ["targets.txt"]
    assert (output / "targets.txt").read_text() == "mine"
    assert call("prepare_flickr25k", mirflickr[0], "--output", output, "--count", 60, "--force") == 0
    assert len((output / "targets.txt").read_text().splitlines()) == 60
    assert call("prepare_flickr25k", mirflickr[0], "--output", output, "--count", 60) == 0  # nothing would change


def test_flickr25k_lists_of_the_project_can_be_made_again(tmp_path, capsys):
    """From files as the makers have them: what the columns mean, and the counts of labels, are right."""
    names, given = (ROOT / "data" / "Flickr25k" / name for name in ("concepts.txt", "targets.txt"))
    labels = np.array([line.split() for line in given.read_text().splitlines()]) == "1"
    (tmp_path / "annotations").mkdir()
    for concept, column in zip(names.read_text().split(), labels.T, strict=True):
        numbers = "".join(f"{i + 1}\n" for i in np.flatnonzero(column))
        (tmp_path / "annotations" / f"{concept}.txt").write_text(numbers)
    flags = (tmp_path / "annotations", "--output", tmp_path / "lists")
    assert call("prepare_flickr25k", *flags) == 0
    text = capsys.readouterr().out
    assert "25000 images" in text
    assert "419 of them without a label" in text
    assert text.endswith("\nthe makers' counts of the 24 potential labels\n")
    for name in ("img.txt", "targets.txt", "concepts.txt"):
        assert (tmp_path / "lists" / name).read_bytes() == (ROOT / "data" / "Flickr25k" / name).read_bytes()
    numbers = (tmp_path / "annotations" / "lake.txt").read_text().split()
    (tmp_path / "annotations" / "lake.txt").write_text("\n".join(numbers[1:]))
    assert call("prepare_flickr25k", *flags, "--force") == 0
    assert "WARNING: not the makers' counts of the 24 potential labels: lake 790 (not 791)" in capsys.readouterr().out


def test_labels_of_the_project_contain_each_other():
    """A dog is an animal: the columns of the authors' list have the names that `concepts.txt` gives them."""
    folder = ROOT / "data" / "Flickr25k"
    labels = readers.read_flickr25k(folder, ROOT).labels
    column = dict(zip((folder / "concepts.txt").read_text().split(), labels.T.astype(bool), strict=True))
    for whole, parts in (
        ("sky", ["clouds"]),
        ("animals", ["dog", "bird"]),
        ("plant_life", ["tree", "flower"]),
        ("water", ["lake", "river", "sea"]),
        ("transport", ["car"]),
        ("people", ["baby", "male", "female", "portrait"]),
    ):
        for part in parts:
            assert column[whole][column[part]].mean() > 0.99


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sky.txt", "1\n61\n", "sky.txt:2: '61' is no image number from 1 to 60"),
        ("sky.txt", "0\n", "sky.txt:1: '0' is no image number"),
        ("sky.txt", "1\nim7.jpg\n", "sky.txt:2: 'im7.jpg' is no image number"),
        ("sky.txt", "0000000019999999\n", "sky.txt:1: '0000000019999999' is no image number"),
        ("sky.txt", "4\n5\n4\n", "sky.txt:3: image 4 stands there twice"),
        ("sky.txt", "", "sky.txt is empty"),
        ("tree.txt", None, "1 of the 24 label files are not in it: tree"),
    ],
)
def test_flickr25k_annotations_that_are_wrong(name, content, words, mirflickr, tmp_path, capsys):
    folder = mirflickr[0]
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    output = tmp_path / "lists"
    assert words in refused(capsys, "prepare_flickr25k", folder, "--output", output, "--count", 60)
    assert not list(output.iterdir())


def test_annotations_that_are_no_archive(tmp_path, capsys):
    flags = ("--output", tmp_path / "lists")
    assert "none.zip does not exist" in refused(capsys, "prepare_flickr25k", tmp_path / "none.zip", *flags)
    (tmp_path / "bad.zip").write_text("404: not found")
    assert "bad.zip is not a readable zip archive" in refused(capsys, "prepare_flickr25k", tmp_path / "bad.zip", *flags)


def test_annotations_that_are_pipes_are_refused_at_once(mirflickr, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.zip")
    flags = ("--output", tmp_path / "lists", "--count", 60)
    assert "pipe.zip is not a regular file" in refused(capsys, "prepare_flickr25k", tmp_path / "pipe.zip", *flags)
    (mirflickr[0] / "sky.txt").unlink()
    os.mkfifo(mirflickr[0] / "sky.txt")
    assert "sky.txt is not a regular file" in refused(capsys, "prepare_flickr25k", mirflickr[0], *flags)


@pytest.mark.parametrize("damaged", ["size", "content"])
def test_archives_do_not_fill_the_memory(damaged, tmp_path, capsys, monkeypatch):
    """A bomb, and an archive whose content ends too early."""
    path = tmp_path / "annotations.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sky.txt", bytes(2**26) if damaged == "size" else "1\n22\n333\n" * 1000)
    if damaged == "content":
        content = path.read_bytes()
        path.write_bytes(content[:50] + b"\xff" * 20 + content[70:])
    monkeypatch.setattr(readers, "MOST_TEXT", 2**20)
    tracemalloc.start()
    error = refused(capsys, "prepare_flickr25k", path, "--output", tmp_path / "lists")
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    words = "more than 1 MiB of text" if damaged == "size" else "is not a readable zip archive"
    assert f"{path}, sky.txt" in error
    assert words in error


@pytest.mark.parametrize("kind", ["file", "below a file", "folder in the way"])
def test_lists_that_can_not_be_written(kind, mirflickr, tmp_path, capsys):
    output = tmp_path / "lists"
    if kind == "folder in the way":
        (output / "img.txt").mkdir(parents=True)
    else:
        output.touch()
    target = output / "below" if kind == "below a file" else output
    assert str(output) in refused(
        capsys, "prepare_flickr25k", mirflickr[0], "--output", target, "--count", 60, "--force"
    )


# ---------------------------------------------------------------- NUS-WIDE


@pytest.fixture
def nuswide(tmp_path):
    """The makers' layout in small: 30 concepts, 400 images; and labels by name of image."""
    generator = np.random.default_rng(5)
    concepts = [f"concept{i:02d}" for i in range(30)]
    labels = generator.random((400, 30)) < np.linspace(0.02, 0.2, 30)[generator.permutation(30)]
    truths, images = tmp_path / "Groundtruth", tmp_path / "ImageList"
    for folder in (truths / "AllLabels", truths / "TrainTestLabels", images):
        folder.mkdir(parents=True)
    for column, concept in enumerate(concepts):
        (truths / "AllLabels" / f"Labels_{concept}.txt").write_text("".join(f"{x:d}\n" for x in labels[:, column]))
        (truths / "TrainTestLabels" / f"Labels_{concept}_Train.txt").write_text("1\n")
    names = [f"actor\\{i:04d}_{i * 7}.jpg" for i in range(400)]
    (images / "Imagelist.txt").write_text("\r\n".join(names) + "\r\n")
    (images / "TrainImagelist.txt").write_text(names[0])
    order = sorted(range(30), key=lambda i: (-labels[:, i].sum(), concepts[i]))[:21]
    frequent = sorted(order, key=lambda i: concepts[i])
    truth = {name.replace("\\", "/"): labels[i, frequent] for i, name in enumerate(names)}
    return truths, images, [concepts[i] for i in frequent], truth


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_nuswide_lists_keep_the_frequent_concepts(kind, nuswide, tmp_path):
    truths, images, concepts, truth = nuswide
    if kind == "zip":
        truths, images = zipped(truths, tmp_path / "Groundtruth.zip"), zipped(images, tmp_path / "ImageList.zip")
    output = tmp_path / "data" / "Nuswide"
    assert call("prepare_nuswide", truths, images, "--output", output, "--count", 400, "--draw", "--queries", 3) == 0
    assert (output / "concepts.txt").read_text().split() == concepts
    train, database, test = (
        readers.read_nuswide(output / f"{part}.txt", tmp_path) for part in ("train", "database", "test")
    )
    np.testing.assert_array_equal(train.names, database.names)
    assert len(test) == 63
    assert set(test.names) | set(database.names) == {name for name, row in truth.items() if row.any()}
    assert not set(test.names) & set(database.names)
    for part in (train, database, test):
        np.testing.assert_array_equal(part.labels, np.array([truth[name] for name in part.names]))
    assert test.labels.sum(axis=0).min() >= 3


def test_nuswide_queries_come_from_the_seed(nuswide, tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--output", tmp_path / name, "--count", 400, "--draw", "--queries", 3, "--seed", seed)
        assert call("prepare_nuswide", *nuswide[:2], *flags) == 0
        contents.append((tmp_path / name / "test.txt").read_text())
    assert contents[0] == contents[1] != contents[2]


IMAGES = "ImageList/Imagelist.txt"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (IMAGES, lambda text: text[: len(text) // 2], "images instead of 400"),
        (IMAGES, lambda text: text.replace("0001_7", "0000_0"), ":2: 'actor/0000_0.jpg' stands in line 1 already"),
        (IMAGES, lambda text: text.replace("r\\0007", "r\\..\\..\\0007"), "Imagelist.txt:8: 'actor/../../0"),
        (IMAGES, lambda text: text.replace("actor\\0007", "\\0007"), "is no path below the image folder"),
        (IMAGES, lambda text: text.replace("r\\0007", "r\\00 07"), "'actor/00 07_49.jpg' has a space"),
        (IMAGES, None, "there is no Imagelist.txt"),
        ("Groundtruth/AllLabels/Labels_concept04.txt", lambda text: text[2:], "399 labels for 400 images"),
        (
            "Groundtruth/AllLabels/Labels_concept04.txt",
            lambda text: "0\n2\n" + text[4:],
            "Labels_concept04.txt:2: a label is '2'",
        ),
    ],
)
def test_nuswide_annotations_that_are_wrong(file, change, words, nuswide, tmp_path, capsys):
    path = tmp_path / file
    text = path.read_text()
    path.unlink()
    if change is not None:
        path.write_text(change(text))
    flags = ("--output", tmp_path / "lists", "--count", 400, "--draw", "--queries", 3)
    assert words in refused(capsys, "prepare_nuswide", *nuswide[:2], *flags)
    assert not list((tmp_path / "lists").iterdir())


def test_nuswide_refuses_what_cannot_be_drawn_and_what_is_there(nuswide, tmp_path, capsys):
    flags = ("--output", tmp_path / "lists", "--count", 400)
    assert "images left to draw from" in refused(
        capsys, "prepare_nuswide", *nuswide[:2], *flags, "--draw", "--queries", 90
    )
    assert call("prepare_nuswide", *nuswide[:2], *flags, "--draw", "--queries", 2) == 0
    assert "--force" in refused(capsys, "prepare_nuswide", *nuswide[:2], *flags, "--draw", "--queries", 3)
    assert len((tmp_path / "lists" / "test.txt").read_text().splitlines()) == 42


def given_queries(nuswide, path, columns):
    """A list of 30 queries, in an order of its own, with the true labels in the given order of columns."""
    names = [name for name, row in nuswide[3].items() if row.any()][100:40:-2]
    path.write_text("".join(f"{name} {' '.join(map(str, nuswide[3][name][columns].astype(int)))}\n" for name in names))
    return path


def test_nuswide_queries_of_a_list_keep_their_order_and_columns(nuswide, tmp_path, capsys):
    columns = np.random.default_rng(0).permutation(21)
    path = given_queries(nuswide, tmp_path / "queries.txt", columns)
    output = tmp_path / "lists"
    output.mkdir()
    shutil.copy(path, output / "test.txt")  # the same: no conflict
    flags = (*nuswide[:2], "--queries_from", path, "--output", output, "--count", 400)
    assert call("prepare_nuswide", *flags) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert (output / "test.txt").read_bytes() == path.read_bytes()
    assert (output / "concepts.txt").read_text().split() == [nuswide[2][i] for i in columns]
    database = readers.read_nuswide(output / "database.txt", tmp_path)
    np.testing.assert_array_equal(database.labels, [nuswide[3][name][columns] for name in database.names])
    queries = set(readers.read_nuswide(path, tmp_path).names)
    assert set(database.names) == {name for name, row in nuswide[3].items() if row.any()} - queries


def test_nuswide_labels_are_the_annotations(nuswide, tmp_path, capsys):
    path = given_queries(nuswide, tmp_path / "queries.txt", np.arange(21))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:-1] + str(1 - int(lines[0][-1])), *lines[1:]]))
    flags = (*nuswide[:2], "--queries_from", path, "--output", tmp_path / "lists", "--count", 400)
    assert call("prepare_nuswide", *flags) == 0
    assert "in no order of their columns are the labels" in capsys.readouterr().out
    assert (tmp_path / "lists" / "test.txt").read_text().splitlines() == lines
    path.write_text("\n".join([*lines, f"actor/none.jpg{' 1' * 21}"]))
    assert "1 of 31 queries are not among" in refused(capsys, "prepare_nuswide", *flags)


def test_nuswide_queries_are_the_authors_wherever_the_script_is_called(nuswide, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (*nuswide[:2], "--output", tmp_path / "lists", "--count", 400)
    assert call("prepare_nuswide", *flags, "--dry_run") == 0
    assert str(ROOT / "data" / "Nuswide" / "test.txt") in capsys.readouterr().out
    assert "2100 of 2100 queries are not among" in refused(capsys, "prepare_nuswide", *flags)
    for wrong in (["--queries", 3], ["--seed", 1], ["--draw", "--queries_from", "x"], ["--draw", "--queries", 0]):
        assert refused(capsys, "prepare_nuswide", *flags, *wrong).startswith("error: --")


# ---------------------------------------------------------------- check_data


def test_check_data_says_what_is_there_and_what_is_missing(photo_root, cifar10_root, tmp_path, capsys):
    shutil.copytree(photo_root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "datasets" / "CIFAR-10").symlink_to(cifar10_root / "CIFAR-10")
    roots = ("--data_root", tmp_path / "datasets", "--list_root", tmp_path / "data", "--num_workers", 0)
    assert call("check_data", *roots) == 0
    text = capsys.readouterr().out
    assert "airplane 5000, automobile 5000" in text
    assert "50000 training images, 10000 queries, 50000 in the database" in text
    assert "125 named by the lists, 125 sound, 0 missing" in text
    splits = data.load_nuswide(data.Source("NUSWIDE", "I", 1, tmp_path / "datasets", tmp_path / "data"))
    assert ", ".join(f"{i} {n}" for i, n in enumerate(splits.database.labels.sum(axis=0))) in text
    name = splits.query.names[3]
    (splits.query.root / name).unlink()
    (splits.query.root / splits.database.names[1]).write_bytes(b"")
    (tmp_path / "data" / "Flickr25k" / "img.txt").unlink()
    assert call("check_data", *roots) == 1
    text = capsys.readouterr().out
    assert "not usable" in text.partition("Flickr25K:")[2].partition("NUSWIDE:")[0]
    assert "90 named by the lists, 88 sound, 1 missing, 1 do not decode" in text
    assert f"{name} is missing" in text
    (tmp_path / "data" / "Nuswide" / "concepts.txt").write_bytes(b"\xff\xfe")
    assert call("check_data", *roots, "--dataset", "NUSWIDE", "--dataset", "CIFAR10") == 1
    text = capsys.readouterr().out
    assert "not usable" in text.partition("CIFAR10:")[0]
    assert "concepts.txt is not a readable text file" in text
    assert "airplane 5000" in text
    assert call("check_data", *roots, "--dataset", "CIFAR10") == 0


def test_check_data_tells_the_authors_lists_from_others(tmp_path, capsys):
    shutil.copytree(ROOT / "data", tmp_path / "data")
    flags = ("--list_root", tmp_path / "data", "--data_root", tmp_path, "--dataset", "Flickr25K")
    assert call("check_data", *flags) == 1  # there are no images
    text = capsys.readouterr().out
    assert "Flickr25k/img.txt: the authors' list" in text
    assert "Flickr25k/targets.txt: the authors' list" in text
    assert f"{tmp_path}/Flickr25K/mirflickr is missing" in text
    assert "people 9" in text
    assert len(text.splitlines()) < 12
    path = tmp_path / "data" / "Flickr25k" / "targets.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    call("check_data", *flags)
    assert "Flickr25k/targets.txt: the authors' list" in capsys.readouterr().out
    path.write_bytes(b"0" + path.read_bytes()[1:])
    call("check_data", *flags)
    assert "Flickr25k/targets.txt: not the authors' list" in capsys.readouterr().out


def test_check_data_counts_the_lists_of_nuswide(photo_root, tmp_path, capsys, monkeypatch):
    shutil.copytree(photo_root / "data", tmp_path / "data")
    flags = ("--list_root", tmp_path / "data", "--data_root", photo_root / "datasets", "--dataset", "NUSWIDE")
    assert call("check_data", *flags) == 0
    text = capsys.readouterr().out
    assert "Nuswide/test.txt: not the authors' list" in text
    assert "Nuswide/train.txt: 70 images, the authors have 193734" in text
    shutil.copy(ROOT / "data" / "Nuswide" / "test.txt", tmp_path / "data" / "Nuswide")
    module = load("check_data")
    monkeypatch.setattr(data, "NUSWIDE_SIZES", (2100, 70))
    assert module.main([str(flag) for flag in flags]) == 1
    text = capsys.readouterr().out
    assert "Nuswide/test.txt: the authors' list" in text
    assert "Nuswide/database.txt: 70 images, as many as the authors have" in text


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    ("name", "flags"), [("prepare_flickr25k", ["a"]), ("prepare_nuswide", ["a", "b"]), ("check_data", [])]
)
def test_a_dry_run_touches_nothing_and_loads_no_library(name, flags, tmp_path):
    script = f"""
import runpy, sys
sys.argv = ["{name}.py", *{flags}, "--dry_run"]
try:
    runpy.run_path("{ROOT / "scripts" / name}.py", run_name="__main__")
finally:
    print([module for module in ("torch", "torchvision", "sklearn", "cv2", "pandas") if module in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.startswith("would ")
    assert result.stdout.endswith("\n[]\n")
    assert not written_below(tmp_path)


@pytest.mark.parametrize("name", ["prepare_flickr25k", "prepare_nuswide", "check_data"])
def test_wrong_flags_are_one_line(name, capsys):
    refused(capsys, name, "--none")
    refused(capsys, name, "a", "b", "c", "--dry_run")
