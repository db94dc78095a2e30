"""Files for other programs: ONNX against the encoder, faiss against brute force, Parquet against the index, and what
the documents tell strangers to run, run."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HOSTILE, ROOT, config_of, method_of, no_backbone, run_script, write_photos

import search.__main__ as command_line
import transforms
from config import recorded
from decoding import UprightImage
from methods.cibhash import CIBHash
from methods.cibhash import Objective as HashObjective
from methods.mecoq import Codebooks, MeCoQ, Objective, Search
from methods.spq import SPQ, SoftQuantizer
from methods.spq import Objective as CrossObjective
from model_file import save_model
from search import ann, export
from search.encoder import Encoder
from search.store import Store, printable
from search.writing import File, Stretch, Writer, stored_features, write_info, write_skipped
from transforms import photo_pixels
from utils import sha256, write_json

NAMES = [f"{'sky' if i % 2 else 'sea'}/{i:02d}.jpg" for i in range(60)] + ["b\udcff,d.jpg"]
REMOVED = 7  # an id in the middle


def called(*argv):
    """The exit code of a command."""
    return run_script(lambda: command_line.main([str(arg) for arg in argv]))


def refused(capsys, *argv):
    """The error, one line, of a command that must end with exit code 2."""
    assert called("export", *argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def snippet(word):
    """The Python block of the page about search that has a word in it."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)
                if word in b]  # fmt: skip
    return block


def pixels_of(paths, image_size):
    return np.stack([photo_pixels(UprightImage(path.read_bytes()), image_size).numpy() for path in paths])


def write_run(folder, photos):
    """A model that was not trained, whose embeddings of some photos are centred, so that codes differ."""
    config = config_of("--M", "4", "--K", "64", "--feat_dim", "16")
    method = method_of(config).eval()
    images = torch.from_numpy(pixels_of(photos, config.image_size))
    with torch.inference_mode():
        z = method.project(method.backbone(transforms.from_bytes(images.float(), normalized=True)))
        method.projection.bias -= z.mean(dim=0)
    folder.mkdir()
    save_model(method, folder / "model.cpt")
    write_json(folder / "config.json", recorded(config))


def write_index(folder, photos, run):
    """An index of `NAMES` in two shards, of which one image was removed."""
    encoder = Encoder(run)
    folder.mkdir()
    with Writer(folder, "int8", lambda: None) as writer:
        for names in (NAMES[:40], NAMES[40:]):
            encoded = encoder.encode(pixels_of([photos / name for name in names], encoder.image_size))
            images = [(File(name, 1, 1), (100 + i, 50)) for i, name in enumerate(names)]
            writer.commit(Stretch(images, [], [encoded.codes], [stored_features(encoded.features, "int8")]))
        writer.forget([os.fsencode(NAMES[REMOVED])])
        files = writer.files()
    (folder / "model").mkdir()
    for name in ("model.cpt", "config.json"):
        (folder / "model" / name).write_bytes((run / name).read_bytes())
    info = {"format": 1, "complete": True, "K": encoder.K, "M": encoder.M, "D": encoder.D, "F": encoder.F,
            "features": "int8", "base": str(photos), "method": encoder.method, "transform": "photo",
            "model_sha256": encoder.model_sha256, "files": {}}  # fmt: skip
    codes = Store(folder, info).codes()
    ann.build(folder / "search.faiss", encoder.codewords, codes, "flat", ())
    write_skipped(folder, [])
    others = ("model/model.cpt", "model/config.json", "names.sqlite", "search.faiss", "skipped.csv")
    write_info(folder, info | {"files": files | {name: sha256(folder / name) for name in others}})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `photos`, `run`, `mine.index`, and what is exported of it, `shared`."""
    root = tmp_path_factory.mktemp("place")
    write_photos(root / "photos", NAMES)
    write_run(root / "run", [root / "photos" / name for name in NAMES])
    write_index(root / "mine.index", root / "photos", root / "run")
    assert called("export", root / "mine.index", "-o", root / "shared", "--onnx", "--faiss", "flat", "--parquet") == 0
    return root


@pytest.fixture(scope="module")
def store(place):
    return Store.open(place / "mine.index")


@pytest.fixture(scope="module")
def encoder(place):
    return Encoder(place / "mine.index" / "model")


def brute_force(codewords, codes, vectors):
    """Scores `[q, n]` in float64."""
    chosen = codewords.astype(np.float64)[np.arange(codes.shape[1]), codes.astype(int)]
    return vectors.astype(np.float64) @ chosen.reshape(len(codes), -1).T


# ---------------------------------------------------------------- the model


def session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("n", [1, 5])
def test_onnx_gives_what_the_encoder_gives(n, place, encoder):
    model = session(place / "shared" / "model.onnx")
    pixels = pixels_of([place / "photos" / name for name in NAMES[:n]], encoder.image_size)
    vectors, features = model.run(None, {"pixels": pixels})
    expected = encoder.encode(pixels)
    np.testing.assert_allclose(vectors, expected.vectors, atol=1e-5)
    np.testing.assert_allclose(features, expected.features, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_onnx_says_what_it_is_and_no_place(place, encoder):
    onnx = pytest.importorskip("onnx")
    content = (place / "shared" / "model.onnx").read_bytes()
    told = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    assert told["S"] == str(encoder.image_size)
    assert told["model_sha256"] == encoder.model_sha256
    assert str(ROOT).encode() not in content
    assert b"backbones.py" not in content


METHODS = {
    "symmetric": lambda: MeCoQ(no_backbone(12), Codebooks(3, 16, 12), Objective(T=0.3), search=Search(symmetric=True)),
    "raw": lambda: MeCoQ(no_backbone(12), Codebooks(2, 300, 12), Objective(T=0.3), search=Search(False, False)),
    "SPQ": lambda: SPQ(no_backbone(12), SoftQuantizer(3, 8, 4, 5.0), CrossObjective()),
    "CIBHash": lambda: CIBHash(no_backbone(12), 24, 16, HashObjective()),
}


@pytest.mark.parametrize("name", METHODS if HOSTILE else ["symmetric", "SPQ", "CIBHash"])
def test_every_method_becomes_onnx(name):
    """On images of 2 x 2 pixels, which are their own features."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from search.onnx_model import QueryGraph, to_onnx

    method = METHODS[name]().eval()
    method.backbone.blocks = (torch.nn.Flatten(),)
    graph = QueryGraph(method, normalized=False).eval()
    model = onnxruntime.InferenceSession(to_onnx(graph, 2, {}))
    pixels = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    with torch.inference_mode():
        features = pixels.flatten(1) / 255
        expected = method.vectors(method.query(method.project(features))).numpy()
    vectors, units = model.run(None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(units, torch.nn.functional.normalize(features).numpy(), atol=1e-6)


def test_a_frozen_backbone_is_normalised_and_in_float32(weights):
    from search.onnx_model import QueryGraph
    from transforms import IMAGENET_MEAN, IMAGENET_STD

    config = config_of("--backbone", "squeezenet1_0", "--weights", weights, "--image_size", "32")
    method = method_of(config).eval()
    assert method.backbone.bf16
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (pixels / 255 - mean) / std
    with torch.inference_mode():
        features = method.backbone.net.features(images).mean(dim=(2, 3))
        found = QueryGraph(method, normalized=True)(pixels)[1]
    torch.testing.assert_close(found, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_a_model_that_differs_is_not_written(place, tmp_path, monkeypatch, capsys):
    from search import onnx_model

    monkeypatch.setattr(onnx_model, "to_onnx", lambda *_: b"model")
    monkeypatch.setattr(onnx_model, "largest_difference", lambda *_: 2e-3)
    assert called("export", place / "mine.index", "-o", tmp_path, "--onnx") == 1
    assert "differs from PyTorch by 2.0e-03" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- the codes


def test_faiss_finds_ids_by_the_scores_of_codes(place, store, encoder):
    faiss = pytest.importorskip("faiss")
    index = faiss.read_index(str(place / "shared" / "flat.faiss"))
    vectors = encoder.encode(pixels_of([place / "photos" / name for name in NAMES[:5]], encoder.image_size)).vectors
    scores, ids = index.search(vectors, len(store.ids))
    exact = brute_force(encoder.codewords, store.codes(), vectors)
    assert REMOVED not in ids
    for row in range(5):
        assert sorted(ids[row]) == store.ids.tolist()
        np.testing.assert_allclose(scores[row], exact[row][np.searchsorted(store.ids, ids[row])], atol=1e-6)


def random_codes(n, M, K, d, seed=0):
    generator = np.random.default_rng(seed)
    codewords = generator.standard_normal((M, K, d)).astype(np.float32)
    codewords /= np.linalg.norm(codewords, axis=2, keepdims=True)
    ids = np.sort(generator.choice(10 * n, n, replace=False))
    vectors = generator.standard_normal((9, M * d)).astype(np.float32)
    return codewords, generator.integers(0, K, (n, M)).astype(np.uint8), ids, vectors


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_kinds_of_index_carry_the_ids(kind, tmp_path):
    faiss = pytest.importorskip("faiss")
    codewords, codes, ids, vectors = random_codes(500, 4, 256, 3)
    ann.write(export.faiss_index(codewords, codes, ids, kind), tmp_path / "i.faiss")
    index = faiss.read_index(str(tmp_path / "i.faiss"))
    if kind == "ivf":
        assert index.nprobe > 1
        index.nprobe = index.nlist
    scores, found = index.search(vectors, 10)
    exact = brute_force(codewords, codes, vectors)
    np.testing.assert_allclose(scores, np.sort(exact, axis=1)[:, :-11:-1], atol=2e-6)
    np.testing.assert_array_equal(found, ids[np.argsort(-exact, axis=1)[:, :10]])


def test_fast_scan_of_16_codewords_and_of_no_others(tmp_path, place, capsys):
    faiss = pytest.importorskip("faiss")
    codewords, codes, ids, vectors = random_codes(2000, 8, 16, 3)
    ann.write(export.faiss_index(codewords, codes, ids, "fastscan"), tmp_path / "i.faiss")
    scores, found = faiss.read_index(str(tmp_path / "i.faiss")).search(vectors, 20)
    exact = brute_force(codewords, codes, vectors)
    best = ids[np.argsort(-exact, axis=1)[:, :10]]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]) > 0.9  # tables of bytes
    np.testing.assert_allclose(np.take_along_axis(exact, np.searchsorted(ids, found), axis=1), scores, atol=0.1)
    assert "--K 16" in refused(capsys, place / "mine.index", "-o", tmp_path / "out", "--faiss", "fastscan")
    assert not (tmp_path / "out").exists()


def test_names_and_table_are_those_of_the_index(place, store):
    parquet = pytest.importorskip("pyarrow.parquet")
    with (place / "shared" / "names.csv").open(encoding="utf-8", newline="") as file:
        assert {int(row["id"]): row["name"] for row in csv.DictReader(file)} == {
            image: printable(store.name(image)) for image in store.ids.tolist()
        }
    table = parquet.read_table(place / "shared" / "images.parquet").to_pydict()
    assert table["id"] == store.ids.tolist()
    rows = store.rows(store.ids)
    assert table["name"] == [printable(name) for name, _, _ in rows]
    assert list(zip(table["width"], table["height"], strict=True)) == [(width, height) for _, width, height in rows]
    np.testing.assert_array_equal([list(code) for code in table["code"]], store.codes())
    shards = [np.load(place / "mine.index" / "features" / f"0000{i}.npy") for i in range(2)]
    features = np.concatenate(shards)[store.ids]
    np.testing.assert_array_equal([np.frombuffer(row, np.int8) for row in table["feature"]], features)


def test_codes_of_two_bytes_are_little_endian():
    assert export.as_binary(np.array([[1, 256], [258, 3]], np.uint16)).to_pylist() == [b"\1\0\0\1", b"\2\1\3\0"]


# ---------------------------------------------------------------- the command


def test_a_file_is_replaced_only_if_told_to(place, tmp_path, capsys):
    (tmp_path / "names.csv").write_text("mine")
    flags = place / "mine.index", "-o", tmp_path, "--faiss", "flat"
    assert "--overwrite" in refused(capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["names.csv"]
    assert called("export", *flags, "--overwrite") == 0
    for name in ("flat.faiss", "names.csv"):
        assert (tmp_path / name).read_bytes() == (place / "shared" / name).read_bytes()
    (tmp_path / "model.onnx").mkdir()
    assert "not a regular file" in refused(capsys, *flags, "--onnx", "--overwrite")


def test_wrong_input_is_one_line(place, tmp_path, capsys, monkeypatch):
    index = place / "mine.index"
    assert "nothing to export" in refused(capsys, index, "-o", tmp_path)
    assert "the index itself" in refused(capsys, index, "-o", index, "--parquet")
    assert "is no index" in refused(capsys, tmp_path, "-o", tmp_path / "out", "--parquet")
    for package, flag in (("onnxscript", ["--onnx"]), ("faiss", ["--faiss", "ivf"]), ("pyarrow", ["--parquet"])):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, wanted=package: name != wanted or None)
            assert f"{package} is needed" in refused(capsys, index, "-o", tmp_path, *flag)
    assert not any(tmp_path.iterdir())


def test_without_onnxruntime_nothing_is_compared(place, tmp_path, capsys, monkeypatch):
    from search import onnx_model

    monkeypatch.setattr(onnx_model, "to_onnx", lambda *_: b"model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "onnxruntime" or None)
    assert called("export", place / "mine.index", "-o", tmp_path, "--onnx") == 0
    assert "not checked" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").read_bytes() == b"model"


def test_a_dry_run_waits_for_nothing(tmp_path):
    code = (
        "import sys, search.__main__ as m; m.main(sys.argv[1:]);"
        "assert not {'torch', 'onnx', 'faiss', 'pyarrow'} & set(sys.modules)"
    )
    flags = ["export", "none.index", "-o", "out", "--onnx", "--faiss", "ivf", "--parquet", "--dry_run"]
    result = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        f"would write {Path('out') / name}" for name in ("model.onnx", "ivf.faiss", "names.csv", "images.parquet")
    ]
    assert not (ROOT / "out").exists()


# ---------------------------------------------------------------- what the documents tell others to run


def check_alike(output, hits):
    """The stranger's lines against the project's (score, name) of one image: the same names, but for the order of
    those whose scores hardly differ, and for which of these are the last. Pillow rounds a few pixels otherwise."""
    lines = [line.split(" ", 1) for line in output.splitlines()]
    assert len({name for _, name in lines}) == len(lines) == len(hits)
    scores = np.array([score for score, _ in hits])
    np.testing.assert_allclose([float(score) for score, _ in lines], scores, atol=0.03)
    clear = scores > scores[-1] + 0.06
    assert {name for (_, name), sure in zip(lines, clear, strict=True) if sure} <= {name for _, name in hits}
    assert clear.sum() >= 5


@pytest.mark.parametrize("name", [NAMES[0], NAMES[9], NAMES[-1]])
def test_the_strangers_program_finds_what_the_project_finds(name, place, store, encoder, capsys, monkeypatch):
    session(place / "shared" / "model.onnx")
    (place / "photo.jpg").write_bytes((place / "photos" / name).read_bytes())
    monkeypatch.chdir(place)
    exec(compile(snippet("onnxruntime"), "docs", "exec"), {})
    vectors = encoder.encode(pixels_of([place / "photo.jpg"], encoder.image_size)).vectors
    scores, positions = ann.search(ann.open_mapped(store.folder / "search.faiss"), vectors, 10)
    hits = list(zip(scores[0], map(printable, store.names(store.ids[positions[0]])), strict=True))
    check_alike(capsys.readouterr().out, hits)


def test_an_index_is_read_without_the_project(place, store, capsys, monkeypatch):
    monkeypatch.chdir(place)
    exec(compile(snippet("sqlite3"), "docs", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40
    assert [line for line in lines if " removed " in line] == [lines[REMOVED]]
    assert lines[8] == f"8 {NAMES[8]} indexed {store.codes()[7]}"


def test_the_table_is_read_by_pandas(place, store, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(place)
    names = {}
    exec(compile(snippet("read_parquet"), "docs", "exec"), names)
    np.testing.assert_array_equal(names["codes"], store.codes())
    assert names["features"].shape == (len(store.ids), store.info["F"])


def test_blocks_joined_on_disk_find_what_is_there(tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    codewords, codes, ids, vectors = random_codes(600, 4, 256, 3)
    halves = slice(0, 250), slice(250, 600)
    for number, part in enumerate(halves):
        (tmp_path / f"part{number}").mkdir()
        index = export.faiss_index(codewords, codes[part], ids[part], "flat")
        ann.write(index, tmp_path / f"part{number}" / "flat.faiss")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet("merge_ondisk").replace("LISTS = 65536", "LISTS = 8"), "docs", "exec"), {})
    joined = faiss.read_index("joined.faiss")
    assert joined.nprobe == 64
    scores, found = joined.search(vectors, 10)
    exact = brute_force(codewords, codes, vectors)
    best = np.argsort(-exact, axis=1)[:, :10]
    np.testing.assert_allclose(scores, np.take_along_axis(exact, best, axis=1), atol=2e-6)
    np.testing.assert_array_equal(found, ids[best] + (best >= 250) * 10**9)


@pytest.mark.skipif(not HOSTILE, reason="installs packages from the network")
def test_a_stranger_with_an_environment_of_their_own(place, tmp_path):
    """By the commands alone: index, export, query; the documents' program in an environment of four packages."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["faiss-cpu", "numpy", "onnxruntime", "pillow"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, cwd=tmp_path)

    def project(*flags):
        command = [sys.executable, "-m", "search", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    index = tmp_path / "mine.index"
    project("index", place / "photos", "--model", place / "run", "-o", index)
    project("export", index, "-o", tmp_path / "shared", "--onnx", "--faiss", "flat")
    program, photo = tmp_path / "program.py", tmp_path / "photo.jpg"
    program.write_text(snippet("onnxruntime"))
    for name in NAMES[::6]:
        photo.write_bytes((place / "photos" / name).read_bytes())
        command = [python, program.name]
        output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        told = json.loads(project("query", index, photo, "-k", 10, "--rerank", 0, "--json"))["queries"][0]["results"]
        check_alike(output, [(hit["score"], hit["name"]) for hit in told])
