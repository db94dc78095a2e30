"""A user's own folder as a data set: what is listed, how it is split, and runs that have no labels."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HOSTILE, Killed, before_step, call, refused, write_photos
from hostile_photos import encoded, picture, turned, write_hostile_photos

import data
import engine
import evaluation
import loaders
import main
import retrieval
from config import parse
from data import Source, load_splits
from decoding import UprightImage
from methods.mecoq import used_codewords
from photos import list_photos, shown_name
from transforms import from_bytes, photo_pixels

RUN = [
    "--dataset", "Folder", "--backbone", "convnet", "--image_size", "16", "--batch_size", "8", "--M", "2", "--K", "8",
    "--feat_dim", "8", "--T", "0.3", "--lr", "0.05", "--num_workers", "0", "--epoch_num", "2", "--feature_cache", "off",
    "--disable_writer",
]  # fmt: skip


def folder_source(root, seed=2021):
    return Source("Folder", "I", seed, Path("none"), Path("none"), photos=root)


def run(images, output, *flags):
    """Returns the folder of checkpoints of a run that must succeed."""
    assert main.main([*RUN, "--images", str(images), "--output", str(output), "--notes", "own", *flags]) == 0
    return output / "checkpoints" / "own"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """40 photos in no subfolder."""
    root = tmp_path_factory.mktemp("plain")
    write_photos(root, [f"{i:02d}.jpg" for i in range(40)])
    return root


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """40 photos in a subfolder per source."""
    root = tmp_path_factory.mktemp("classes")
    write_photos(root, [f"{('china', 'flower')[i % 2]}/{i:02d}.jpg" for i in range(40)])
    return root


@pytest.fixture(scope="module")
def finished(plain, tmp_path_factory):
    return run(plain, tmp_path_factory.mktemp("run"))


# ---------------------------------------------------------------- what is listed


def test_what_is_listed(tmp_path):
    expected = write_hostile_photos(tmp_path)
    assert list_photos(tmp_path) == sorted(expected, key=os.fsencode)


def test_links_lead_out_and_never_round(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    write_photos(outside, ["a.jpg", "deep/b.jpg"])
    write_photos(root, ["z/c.jpg"])
    (root / "link").symlink_to(outside)
    for name in ("again", "zz"):
        (root / name).symlink_to(root / "z")
    (outside / "back").symlink_to(root)
    assert list_photos(root) == ["link/a.jpg", "link/deep/b.jpg", "z/c.jpg"]


def test_a_folder_that_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        assert main.main([*RUN, "--images", str(path), "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1


def test_names_are_shown_in_one_line():
    assert shown_name("a\nb\udcff\u202e.jpg") == "a\\nb\\udcff\\u202e.jpg"
    assert shown_name("K\u00e4se \U0001f408.jpg") == "K\u00e4se \U0001f408.jpg"


# ---------------------------------------------------------------- splits


def test_splits(plain):
    splits = load_splits(folder_source(plain))
    names = [f"{i:02d}.jpg" for i in range(40)]
    chosen = np.random.RandomState(2021).permutation(40)[:4]
    assert splits.query.names.tolist() == [names[i] for i in sorted(chosen)]
    assert splits.train.names.tolist() == splits.database.names.tolist()
    assert sorted([*splits.query.names, *splits.train.names]) == names
    assert (splits.labelled, splits.validated, splits.mirrored, splits.classes) == (False, False, True, ())
    other = load_splits(folder_source(plain, seed=7))
    assert other.query.names.tolist() != splits.query.names.tolist()
    assert len(data.folder_indices(20000, 1)["query"]) == 1000


def test_a_subfolder_per_class_labels(classes):
    splits = load_splits(folder_source(classes))
    assert (splits.labelled, splits.validated, splits.classes) == (True, False, ("china", "flower"))
    for images in (splits.train, splits.query):
        assert [splits.classes[label] for label in images.labels] == [name.split("/")[0] for name in images.names]


@pytest.mark.parametrize("names", [["a/1", "2"], ["a/1", "a/b/2"], ["1", "2"]])
def test_other_folders_label_nothing(names):
    labels, found = data.subfolder_labels(names)
    assert (labels.tolist(), found) == ([0] * len(names), ())


def test_too_few_images(tmp_path, capsys):
    write_photos(tmp_path, [f"{i}.jpg" for i in range(9)])
    assert main.main([*RUN, "--images", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "9 images are there, at least 10 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--dataset", "Folder"], ["--images", "x"]])
def test_the_data_set_and_its_folder_go_together(flags, capsys):
    assert main.main(flags) == 2
    assert "--dataset Folder and --images DIR go together" in capsys.readouterr().err


# ---------------------------------------------------------------- what the network sees


def test_test_images_are_those_of_the_search(plain):
    splits = load_splits(folder_source(plain))
    batches = loaders.test_batches(splits.query, loaders.Preprocessing(64, "cpu", 0))
    contents = [(plain / name).read_bytes() for name in splits.query.names]
    expected = torch.stack([photo_pixels(UprightImage(content), 64) for content in contents])
    assert torch.equal(torch.cat(list(batches)), from_bytes(expected.float(), normalized=True))


def test_views_are_upright(tmp_path):
    """The eight turns of a picture make the same views, whoever makes them."""
    for orientation in range(1, 9):
        (tmp_path / f"{orientation}.jpg").write_bytes(turned(orientation))
    names = np.array(list_photos(tmp_path))
    images = data.ImageFiles(tmp_path, names, np.zeros(8, np.int64), upright=True)
    transform = loaders.transforms.view_transform(32, True)
    made = [
        [loaders.photo_views(images, True, 32, i, 5)[0] for i in range(8)],
        [loaders.whole_photo(images, 32, i, 5)[1] for i in range(8)],
        [loaders.pil_views(images, transform, i, 5)[0] for i in range(8)],
    ]
    assert all(torch.equal(view, views[0]) for views in made for view in views)
    stored = replace(images, upright=False)
    assert not torch.equal(loaders.whole_photo(stored, 32, 5, 5)[1], made[1][0])


def test_features_of_upright_images_have_a_key_of_their_own(plain, weights):
    from feature_cache import cache_key
    from methods.backbones import build_backbone

    backbone = build_backbone("squeezenet1_0", weights, 0, bf16=False)
    images = load_splits(folder_source(plain)).query
    how = loaders.Preprocessing(64, "cpu", 0)
    keys = [cache_key(backbone, replace(images, upright=u), images.names, how, {}) for u in (True, False)]
    changed = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed == {"transform", "versions"}
    assert keys[0]["transform"].startswith("photo 1: upright")


# ---------------------------------------------------------------- runs


def test_a_run_without_labels(finished):
    metrics = metrics_of(finished)
    assert (metrics["map"], metrics["map_by_ties"], metrics["best_epoch"]) == (None, None, None)
    assert metrics["canonical_data"]
    assert not any("val_mAP" in epoch for epoch in metrics["history"])
    files = {path.name for path in finished.iterdir()} - {".lock"}
    assert files == {"config.json", "db_codes.npy", "last.cpt", "metrics.json", "model.cpt"}
    assert np.load(finished / "db_codes.npy").shape == (36, 2)


def test_what_is_measured_without_labels(finished):
    """Views found, by a loop over images; the rest by their definitions."""
    metrics = metrics_of(finished)
    config = parse([])
    config = config.replace(**metrics["config"] | {"test_only": True, "checkpoint": str(finished / "model.cpt")})
    splits, method = engine.build(config)
    method.eval()
    views = engine.build_loader(config, replace(splits, train=splits.query))
    views.set_epoch(0)
    with torch.no_grad():
        (batch,) = views  # four images
        z = method(batch).double()
        method = method.double()
        scores = retrieval.aqs_scores(method.tables(z[:4]), method.codes(z[4:]))
        _, soft = method.quantizer(z)
        error = (method.quantizer.segments(z) - soft).square().mean()
    found = [(row[i] >= row.max() - 1e-9) / (row >= row[i] - 1e-9).sum() for i, row in enumerate(scores)]
    measured = metrics["unlabelled"]
    assert measured["views_found"] == pytest.approx(float(sum(found)) / 4, abs=1e-6)
    assert measured["quantization_error"] == pytest.approx(float(error), abs=1e-5)
    codes = torch.from_numpy(np.load(finished / "db_codes.npy"))
    assert (measured["codewords_used"], measured["perplexity"]) == used_codewords(codes, 8)


def test_the_last_epoch_is_kept(plain, tmp_path):
    """A run of one epoch less ends with another model; last.cpt holds the one that is kept."""
    kept = run(plain, tmp_path, "--monitor_counter", "1", "--eval_interval", "1", "--epoch_num", "3")
    assert metrics_of(kept)["epochs_run"] == 3
    last = torch.load(kept / "last.cpt", weights_only=True)
    model = torch.load(kept / "model.cpt", weights_only=True)
    assert all(torch.equal(tensor, model[name]) for name, tensor in last["model"].items())


def test_labels_serve_the_test_alone(classes, tmp_path):
    folder = run(classes, tmp_path)
    metrics = metrics_of(folder)
    assert 0 < metrics["map"] <= 1
    assert metrics["unlabelled"].keys() == {"codewords_used", "perplexity", "quantization_error", "views_found"}
    assert not any("val_mAP" in epoch for epoch in metrics["history"])
    assert set(np.load(folder / "db_targets.npy")) == {0, 1}
    log = (tmp_path / "logs/own.log").read_text()
    assert "MAP by subfolder (2 of them): it means something only if they are classes" in log
    assert log.count("test mAP=") == log.count("test without labels: ") == 1
    assert call("report", "own", "--output", tmp_path, "--queries", 1) == 0
    page = (folder / "report.html").read_text()
    assert "MAP@all" in page
    assert 'class="hit' in page


@pytest.mark.parametrize("step", [3, 9] if HOSTILE else [7])
def test_a_killed_run_goes_on(plain, finished, tmp_path, monkeypatch, step):
    def kill():
        raise Killed

    moved = tmp_path / "moved"
    shutil.copytree(plain, moved)
    flags = [*RUN, "--output", str(tmp_path), "--notes", "own", "--save_interval", "2"]
    with before_step(monkeypatch, step, kill), pytest.raises(Killed):
        main.main([*flags, "--images", str(plain)])
    assert main.main([*flags, "--images", str(moved), "--resume"]) == 0  # the content counts
    for name in ("model.cpt", "db_codes.npy"):
        assert (tmp_path / "checkpoints/own" / name).read_bytes() == (finished / name).read_bytes()
    (moved / "00.jpg").unlink()
    (tmp_path / "checkpoints/own/metrics.json").unlink()
    assert main.main([*flags, "--images", str(moved), "--resume"]) == 2


def test_a_finished_run_is_not_of_another_folder(plain, finished, capsys):
    flags = [*RUN, "--output", str(finished.parents[1]), "--notes", "own", "--resume"]
    assert main.main([*flags, "--images", str(plain)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main.main([*flags, "--images", "elsewhere"]) == 2
    assert "images=" in capsys.readouterr().err


def test_a_model_is_tested_again(plain, finished, tmp_path):
    checkpoint = str(finished / "model.cpt")
    again = metrics_of(run(plain, tmp_path, "--test_only", "--checkpoint", checkpoint, "--epoch_num", "0"))
    assert again["unlabelled"] == metrics_of(finished)["unlabelled"]


@pytest.mark.parametrize("method", ["SPQ", "CIBHash"])
def test_other_methods(method, plain, tmp_path):
    flags = ["--dataset", "Folder", "--images", str(plain), "--method", method, "--backbone", "convnet", "--image_size",
             "16", "--batch_size", "8", "--num_workers", "0", "--epoch_num", "1", "--feature_cache", "off", "--notes",
             "own", "--output", str(tmp_path), "--disable_writer"]  # fmt: skip
    assert main.main(flags) == 0
    error = metrics_of(tmp_path / "checkpoints/own")["unlabelled"]["quantization_error"]
    assert (error is None) == (method == "CIBHash")


@pytest.mark.skipif(not HOSTILE, reason="only with MECOQ_HOSTILE")
def test_a_hostile_folder_ends_no_run(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    expected = write_hostile_photos(photos)
    folder = run(photos, tmp_path)
    unusable = sum(kind == "unusable" for kind in expected.values())
    log = (tmp_path / "logs/own.log").read_text(encoding="utf-8")
    assert f"{unusable} of {len(expected)} images are left out: " in log
    queries = len(expected) // 10
    assert len(np.load(folder / "db_codes.npy")) >= len(expected) - unusable - queries
    assert "Traceback" not in capsys.readouterr().err


def test_its_checkpoint_is_inspected(finished, capsys):
    assert call("inspect_checkpoint", finished) == 0
    output = capsys.readouterr().out
    assert "own, no labels, last epoch of 2" in output
    assert "NOT" not in output


# ---------------------------------------------------------------- the report


def test_a_report_without_labels(finished):
    assert call("report", "own", "--output", finished.parents[1], "--queries", 1) == 0
    page = (finished / "report.html").read_text()
    assert "MAP" not in page.partition("all flags")[0].replace("no MAP", "")
    assert "one view finds the other" in page
    assert "the last one kept" in page
    assert page.count('<figure class="asked') == 3
    assert page.count('<figure class="found') == 30
    assert 'class="hit' not in page


def test_a_report_of_images_that_changed(plain, finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    (other / "00.jpg").unlink()
    (other / "more.png").write_bytes(encoded(picture(), "PNG"))
    (other / "evenmore.png").write_bytes(encoded(picture(), "PNG"))
    error = refused(capsys, "report", "own", "--output", finished.parents[1], "--images", other, "--html",
                    tmp_path / "x.html")  # fmt: skip
    assert "are not those of the run: name their folder with --images" in error


def test_ties_of_views_count_by_chance():
    """Four images whose codes are all alike: each is found with probability 1/4."""

    class Alike:
        K = 4

        def eval(self):
            pass

        def __call__(self, views):
            return views

        def query(self, z):
            return z

        def codes(self, z):
            return torch.zeros(len(z), 1, dtype=torch.uint8)

        def tables(self, queries):
            return torch.ones(len(queries), 1, 4)

        def quantization_error(self, z):
            return None

    class Views(list):
        def set_epoch(self, epoch):
            assert epoch == 0

    measured = evaluation.unlabelled(Alike(), Views([torch.ones(8, 2)]), torch.zeros(5, 1, dtype=torch.uint8))
    assert measured["views_found"] == pytest.approx(0.25)
    assert measured["quantization_error"] is None
