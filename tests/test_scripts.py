"""The tools that a user starts by hand, called in this process as `main(argv)` under `run_script`."""

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, wait_for

import data
import main
import readers
from utils import run_script


def load(name):
    (path,) = (path for folder in ("scripts", "experiments") if (path := ROOT / folder / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name, *argv):
    return run_script(lambda: load(name).main([str(arg) for arg in argv]))


def refused(capsys, name, *argv):
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
    assert concepts == sorted(truth)
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
    assert "does not exist" in refused(capsys, "prepare_flickr25k", tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_text("404: not found")
    assert "bad.zip is not a readable zip archive" in refused(capsys, "prepare_flickr25k", tmp_path / "bad.zip")


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
    ground, images = tmp_path / "Groundtruth", tmp_path / "ImageList"
    for folder in (ground / "AllLabels", ground / "TrainTestLabels", images):
        folder.mkdir(parents=True)
    for column, concept in enumerate(concepts):
        (ground / "AllLabels" / f"Labels_{concept}.txt").write_text("".join(f"{x:d}\n" for x in labels[:, column]))
        (ground / "TrainTestLabels" / f"Labels_{concept}_Train.txt").write_text("1\n")
    names = [f"actor\\{i:04d}_{i * 7}.jpg" for i in range(400)]
    (images / "Imagelist.txt").write_text("\r\n".join(names) + "\r\n")
    (images / "TrainImagelist.txt").write_text(names[0])
    order = sorted(range(30), key=lambda i: (-labels[:, i].sum(), concepts[i]))[:21]
    frequent = sorted(order, key=lambda i: concepts[i])
    truth = {name.replace("\\", "/"): labels[i, frequent] for i, name in enumerate(names)}
    return ground, images, [concepts[i] for i in frequent], truth


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_nuswide_lists_keep_the_frequent_concepts(kind, nuswide, tmp_path):
    ground, images, concepts, truth = nuswide
    if kind == "zip":
        ground, images = zipped(ground, tmp_path / "Groundtruth.zip"), zipped(images, tmp_path / "ImageList.zip")
    output = tmp_path / "data" / "Nuswide"
    assert call("prepare_nuswide", ground, images, "--output", output, "--count", 400, "--queries", 3) == 0
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
        flags = ("--output", tmp_path / name, "--count", 400, "--queries", 3, "--seed", seed)
        assert call("prepare_nuswide", *nuswide[:2], *flags) == 0
        contents.append((tmp_path / name / "test.txt").read_text())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("ImageList/Imagelist.txt", lambda text: text[: len(text) // 2], "images instead of 400"),
        ("ImageList/Imagelist.txt", lambda text: text.replace("0001_7", "0000_0"), "stands in Imagelist.txt twice"),
        ("ImageList/Imagelist.txt", None, "there is no Imagelist.txt"),
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
    flags = ("--output", tmp_path / "lists", "--count", 400, "--queries", 3)
    assert words in refused(capsys, "prepare_nuswide", *nuswide[:2], *flags)
    assert not list((tmp_path / "lists").iterdir())


def test_nuswide_refuses_what_can_not_be_drawn_and_what_is_there(nuswide, tmp_path, capsys):
    flags = ("--output", tmp_path / "lists", "--count", 400)
    assert "images left to draw from" in refused(capsys, "prepare_nuswide", *nuswide[:2], *flags, "--queries", 90)
    assert call("prepare_nuswide", *nuswide[:2], *flags, "--queries", 2) == 0
    assert "--force" in refused(capsys, "prepare_nuswide", *nuswide[:2], *flags, "--queries", 3)
    assert len((tmp_path / "lists" / "test.txt").read_text().splitlines()) == 42


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
    splits = data.load_nuswide(tmp_path / "datasets", tmp_path / "data")
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


# ---------------------------------------------------------------- run0001.sh ... run0024.sh


@pytest.fixture
def stub(tmp_path):
    """An interpreter that writes down its arguments, one a line, and fails where --notes is Flickr32bits."""
    path = tmp_path / "python"
    path.write_text(
        f"#!/bin/bash\n{{ flock 9; printf '%s\\n' \"$@\" --; }} 9>{tmp_path}/lock >>{tmp_path}/calls\n"
        '[[ "$*" != *"Flickr32bits "* ]] || { echo "error: no data" >&2; exit 2; }\n'
    )
    path.chmod(0o755)
    (tmp_path / "calls").touch()

    def run(*command, cwd=ROOT):
        environment = os.environ | {"MECOQ_PYTHON": str(path)}
        result = subprocess.run(
            ["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        calls = [call.split("\n")[1:-1] for call in (tmp_path / "calls").read_text().split("--\n")[:-1]]
        return result, calls

    return run


def run_configs():
    with (ROOT / "tests" / "golden" / "run_configs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", run_configs(), ids=lambda row: row["script"])
def test_scripts_hold_the_published_flags_and_nothing_else(row, stub):
    inside = int(row["M"]) == 4
    script, cwd = (row["script"], ROOT / "scripts") if inside else (f"scripts/{row['script']}", ROOT)
    result, calls = stub(script, "0", cwd=cwd)
    assert result.returncode in (0, 2)  # the stub's
    config = vars(main.resolve(main.build_parser().parse_args(calls[0])))
    assert config["notes"] == row["notes"]
    assert config["symmetric_distance"] == (row["symmetric_distance"] == "1")
    for flag in ("dataset", "mode"):
        assert config[flag] == row[flag]
    if row["protocol"]:
        assert config["protocol"] == row["protocol"]
    for flag in ("trainable_layer_num", "M", "feat_dim", "queue_begin_epoch", "topK"):
        assert config[flag] == int(row[flag])
    for flag in ("T", "hp_beta", "hp_lambda", "pos_prior"):
        assert config[flag] == float(row[flag])
    same = ("notes", "dataset", "protocol", "trainable_layer_num", "M", "feat_dim", "T", "hp_beta", "hp_lambda", "mode",
            "pos_prior", "queue_begin_epoch", "topK", "symmetric_distance", "device", "memory")  # fmt: skip
    defaults = vars(main.resolve(main.build_parser().parse_args([])))
    assert {k: v for k, v in config.items() if k not in same} == {k: v for k, v in defaults.items() if k not in same}
    assert (config["device"], config["memory"]) == ("cuda:0", "soft")


def test_there_is_a_script_for_each_row_and_no_other():
    scripts = sorted((ROOT / "scripts").glob("run[0-9]*.sh"))
    assert [path.name for path in scripts] == [row["script"] for row in run_configs()]
    published, golden = (ROOT / folder / "run_configs.csv" for folder in ("docs/published", "tests/golden"))
    assert published.read_bytes() == golden.read_bytes()


def test_further_flags_are_passed_on_and_win(stub):
    _, calls = stub(
        "scripts/run0015.sh", "3", "--recipe", "release", "--seed", "7", "--notes", "mine", "--hp_lambda", "0"
    )
    config = main.resolve(main.build_parser().parse_args(calls[0]))
    assert (config.device, config.recipe, config.seed, config.notes) == ("cuda:3", "release", 7, "mine")
    assert (config.hp_lambda, config.pairing) == (0, "all")
    _, calls = stub("scripts/run0015.sh", "cpu")
    assert main.resolve(main.build_parser().parse_args(calls[1])).device == "cpu"


@pytest.mark.parametrize("arguments", [[], ["cuda"], ["--seed", "7"], ["0a"], [""]])
def test_scripts_say_how_they_are_called(arguments, stub):
    result, calls = stub("scripts/run0001.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith("error: usage: ")
    assert result.stderr.count("\n") == 1


def test_a_script_really_starts_main():
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    command = ["bash", "run0008.sh", "1", "--dry_run"]
    result = subprocess.run(command, cwd=ROOT / "scripts", env=environment, capture_output=True, text=True, check=True)
    config = json.loads(result.stdout)
    assert (config["notes"], config["device"], config["symmetric_distance"]) == ("CifarI16bitsSymm", "cuda:1", True)


# ---------------------------------------------------------------- run_all.sh


def test_run_all_runs_each_script_once_and_reports_failures(stub):
    result, calls = stub("scripts/run_all.sh", "0,2,cpu", "1-5,0009", "--recipe", "release")
    configs = [main.resolve(main.build_parser().parse_args(call)) for call in calls]
    rows = run_configs()
    assert sorted(c.notes for c in configs) == sorted(rows[i - 1]["notes"] for i in (1, 2, 3, 4, 5, 9))
    assert all(c.recipe == "release" and c.resume for c in configs)
    assert {c.device for c in configs} <= {"cuda:0", "cuda:2", "cpu"}
    assert result.returncode == 1
    assert "run0003.sh: error: no data" in result.stderr
    assert result.stderr.rstrip().endswith("failed: run0003.sh")
    result, calls = stub("scripts/run_all.sh", "1", "7-8")
    assert result.returncode == 0
    assert [main.resolve(main.build_parser().parse_args(call)).device for call in calls[-2:]] == ["cuda:1"] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["0"],
        ["0", "x"],
        ["a", "1"],
        ["0", "1-"],
        ["0", "0"],
        ["0", "23-25"],
        ["0", "5-1"],
        ["0", "1,9-7"],
        ["0", "1", "--dry_run"],
        ["0", "1", "--notes", "x"],
    ],
)
def test_run_all_refuses_what_it_can_not_run(arguments, stub):
    result, calls = stub("scripts/run_all.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_run_all_interrupted_ends_its_runs_and_starts_no_other(number, tmp_path):
    """With an interpreter that, like main.py, ends by itself when it is interrupted."""
    python, pids = tmp_path / "python", tmp_path / "pids"
    python.write_text(f"#!/bin/bash\ntrap 'exit 130' INT\necho $$ >>{pids}\nwhile :; do sleep 0.1; done\n")
    python.chmod(0o755)
    pids.touch()
    process = subprocess.Popen(
        ["bash", "scripts/run_all.sh", "0,1", "1-6"], cwd=ROOT, env=os.environ | {"MECOQ_PYTHON": str(python)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored where the tests run in background
    )  # fmt: skip
    try:
        wait_for(lambda: len(pids.read_text().split()) == 2)
        process.send_signal(number)
        assert process.wait(timeout=20) == 130
        time.sleep(0.5)
        started = pids.read_text().split()
        assert len(started) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    finally:
        process.kill()
        for pid in pids.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_run_all_tells_of_scripts_that_never_ran(tmp_path):
    """A worker that is killed leaves its queue undone."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nkill -9 -- -$(ps -o pgid= -p $$ | tr -d ' ')\n")  # the worker's whole group
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", "scripts/run_all.sh", "0", "1-3"], cwd=ROOT, env=os.environ | {"MECOQ_PYTHON": str(python)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "failed: run0001.sh run0002.sh run0003.sh"
