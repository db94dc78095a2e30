"""`python -m search query` and `duplicates`: what they print, what they refuse."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, write_photos
from PIL import Image
from search_small import in_process, write_index

from search import __main__ as command
from search.searcher import Options, Searcher
from utils import run_script

ODD = os.fsdecode(b"odd/\xff<b>\x1b[31m.jpg")  # no UTF-8, HTML, and what would colour a terminal
COPIES = {"copies/a.jpg": "plain/00.jpg", "copies/b.jpg": "plain/00.jpg", "copies/c.jpg": "plain/05.jpg"}


@pytest.fixture(scope="module", params=["int8", "none"])
def index(request, finished, tmp_path_factory):
    """An index of photographs, some of which are there twice."""
    folder = tmp_path_factory.mktemp("asked")
    write_photos(folder / "photos", [f"plain/{i:02d}.jpg" for i in range(30)] + ["odd/x.jpg"])
    (folder / "photos" / "odd" / "x.jpg").rename(folder / "photos" / ODD)
    (folder / "photos" / "copies").mkdir()
    for copy, original in COPIES.items():
        shutil.copy(folder / "photos" / original, folder / "photos" / copy)
    kind = "flat" if request.param == "none" else "ivf"
    return write_index(folder, finished / "checkpoints" / "small", "--features", request.param, "--kind", kind)


@pytest.fixture
def asked(index, monkeypatch, capsys):
    """Calls a verb on the index: exit code, standard output, standard error."""
    in_process(monkeypatch)

    def call(verb, *flags):
        code = run_script(lambda: command.main([verb, str(index), *map(str, flags)]))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def photos(index):
    return index.parent / "photos"


# ---------------------------------------------------------------- query


def test_a_table_for_each_image(asked, photos, index):
    code, output, errors = asked("query", photos / "plain" / "03.jpg", photos / ODD, "-k", 4)
    assert (code, errors) == (0, "")
    first, second = output.split("\n\n")
    assert first.splitlines()[0] == str(photos / "plain" / "03.jpg")
    assert len(first.splitlines()) == 2 + 4
    searcher = Searcher(index)
    if searcher.store.has_features:
        assert first.splitlines()[2].split()[3] == "plain/03.jpg"
        assert second.splitlines()[2].split()[3] == r"odd/\udcff<b>\x1b[31m.jpg"
    assert "\x1b" not in output
    hits = searcher.of_id(searcher.store.ids[searcher.store.under("odd")][0], Options(k=4), itself=True)
    assert len(hits) == 4


def test_json_as_documented(asked, photos, index, tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"no image")
    code, output, errors = asked("query", photos / "plain" / "03.jpg", tmp_path / "no.jpg", "-k", 3, "--json")
    assert code == 0
    assert errors.count("\n") == 1
    assert errors.startswith(f"{tmp_path / 'no.jpg'}: is not an image")
    content = json.loads(output)
    assert content.keys() == {"index", "images", "queries", "unusable"}
    assert (content["index"], content["images"]) == (str(index), 34)
    (query,) = content["queries"]
    assert query["image"] == str(photos / "plain" / "03.jpg")
    searcher = Searcher(index)
    assert len(query["results"]) == 3
    for hit in query["results"]:
        assert hit.keys() == {"id", "name", "score", "cosine", "width", "height"}
        with Image.open(photos / hit["name"]) as image:
            assert image.size == (hit["width"], hit["height"])
        assert searcher.store.name(hit["id"]) == hit["name"]
        assert (hit["cosine"] is None) == (not searcher.store.has_features)
    assert [(one["image"], one["reason"][:3]) for one in content["unusable"]] == [(str(tmp_path / "no.jpg"), "is ")]


def test_no_usable_image_is_an_error(asked, tmp_path):
    code, output, errors = asked("query", tmp_path / "gone.jpg", "--json")
    assert (code, output) == (2, "")
    assert errors.splitlines() == [f"{tmp_path / 'gone.jpg'}: is missing", "error: none of the images can be used"]


def test_a_page_that_needs_no_other_file(asked, photos, tmp_path):
    page = tmp_path / "found.html"
    shutil.move(photos / "copies" / "c.jpg", tmp_path)  # gone since it was indexed
    try:
        code, output, _ = asked("query", photos / "plain" / "03.jpg", "-k", 100, "--html", page)
    finally:
        shutil.move(tmp_path / "c.jpg", photos / "copies")
    assert (code, output) == (0, f"{page}: 1 queries\n")
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert r"odd/\udcff&lt;b&gt;\x1b[31m.jpg" in text
    assert text.count("file is gone") == 1
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 1 + 33
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"), validate=True)
        assert Image.open(io.BytesIO(content)).size == (240, 240)
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_terminal_shows_any_name(encoding, asked, photos, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    name = photos.parent / "\u00e4\u4f60.jpg"
    shutil.copy(photos / "plain" / "03.jpg", name)
    monkeypatch.setattr(sys, "stdout", output)
    assert asked("query", name, "-k", 1)[0] == 0
    output.flush()
    expected = "\u00e4\u4f60" if encoding == "utf-8" else r"\xe4\u4f60"
    assert expected in output.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["query", "x.jpg", "-k", "0"], "-k 0: must be from 1"),
        (["query", "x.jpg", "--rerank", "-1"], "--rerank -1: must be from 0"),
        (["query", "x.jpg", "--nprobe", "0"], "--nprobe 0: must be from 1"),
        (["query", "x.jpg", "--json", "--html", "y"], "not allowed with"),
        (["query", "x.jpg", "--html", "."], "is not a regular file"),
        (["query"], "IMAGE"),
        (["duplicates", "--above", "2"], "--above 2: is a cosine"),
        (["duplicates", "--above", "nan"], "--above nan: is a cosine"),
        (["duplicates", "--candidates", "0"], "--candidates 0: must be"),
        (["duplicates", "-o", "."], "is not a regular file"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(flags, words, asked):
    code, output, errors = asked(*flags)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert words in errors


def test_a_folder_that_holds_no_image(asked, photos):
    code, _, errors = asked("query", photos / "plain" / "03.jpg", "--under", "nowhere")
    assert code == 2
    assert errors == "error: there is no image below nowhere\n"


@pytest.mark.parametrize("flags", [["query", "a", "b.jpg", "--dry_run"], ["query", "--help"],
                                   ["duplicates", "a", "--dry_run"], ["duplicates", "--help"]])  # fmt: skip
def test_help_and_dry_run_answer_without_pytorch(flags):
    program = (f"import sys\nfrom search.__main__ import main\ntry:\n    main({flags!r})\nexcept SystemExit as e:\n"
               "    assert not e.code\nassert 'torch' not in sys.modules and 'faiss' not in sys.modules")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


# ---------------------------------------------------------------- duplicates


def pairs_of(text):
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["name", "other", "cosine", "id", "other_id"]
    return rows[1:]


def test_pairs_against_all_pairs(asked, index, tmp_path):
    searcher = Searcher(index)
    store = searcher.store
    names, codes, n = store.names(store.ids), store.codes(), len(store.ids)
    flags = ["--above", "0.97"] if store.has_features else []
    code, output, errors = asked("duplicates", *flags, "-o", tmp_path / "pairs.csv")
    rows = pairs_of((tmp_path / "pairs.csv").read_text())
    assert (code, output, errors) == (0, f"{tmp_path / 'pairs.csv'}: {len(rows)} pairs\n", "")
    features = store.features(np.arange(n)).astype(np.float64) if store.has_features else None
    expected = {}
    for i in range(n):
        for j in range(i + 1, n):
            if features is not None and (cosine := features[i] @ features[j]) >= 0.97:
                expected[i, j] = cosine
            elif features is None and (codes[i] == codes[j]).all():
                expected[i, j] = None
    ids = {name: image for name, image in zip(names, store.ids.tolist(), strict=True)}
    found = {}
    for name, other, cosine, image, other_id in rows:
        assert store.name(int(image)).encode("utf-8", "backslashreplace").decode() == name
        assert int(image) < int(other_id)
        found[store.position(int(image)), store.position(int(other_id))] = float(cosine) if cosine else None
        assert other
    assert found.keys() == expected.keys()
    assert all(value == expected[pair] or abs(value - expected[pair]) < 1e-4 for pair, value in found.items())
    assert len(found) == len(rows)
    copies = {
        (ids[a], ids[b])
        for a, b in [
            ("copies/a.jpg", "copies/b.jpg"),
            ("copies/a.jpg", "plain/00.jpg"),
            ("copies/b.jpg", "plain/00.jpg"),
            ("copies/c.jpg", "plain/05.jpg"),
        ]
    }
    same = {(int(row[3]), int(row[4])) for row in rows}
    assert copies <= same
    if features is not None:
        assert {(int(row[3]), int(row[4])) for row in rows[:4]} == copies
        cosines = [float(row[2]) for row in rows]
        assert cosines == sorted(cosines, reverse=True)


def test_pairs_among_the_images_of_a_list_alone(asked, index):
    whole, part = (pairs_of(asked("duplicates", "--nprobe", nprobe)[1]) for nprobe in (64, 1))
    assert part
    assert {tuple(row) for row in part} <= {tuple(row) for row in whole}
    if Searcher(index).store.info["index"]["kind"] == "ivf":
        assert len(part) < len(whole)


def test_pairs_on_standard_output(asked, index):
    has_features = Searcher(index).store.has_features
    code, output, errors = asked("duplicates", *(["--above", "1", "--candidates", "3"] if has_features else []))
    assert (code, errors) == (0, "")
    assert not has_features or len(pairs_of(output)) <= 4


def test_a_cosine_needs_features(asked, index):
    if Searcher(index).store.has_features:
        pytest.skip("it has some")
    code, _, errors = asked("duplicates", "--above", "0.9")
    assert code == 2
    assert "has no features" in errors
