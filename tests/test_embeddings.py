"""Embeddings of a user's own, and features that are normalised: against brute force, float64 and faiss itself."""

import itertools
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from helpers import FROZEN, SMALL, Killed, before_step, call, config_of, killed_run, method_of, small_run
from sklearn.metrics import average_precision_score

import engine
import evaluation
import main
import quantizers
import vectors
from config import key, parse
from loaders import ShuffledBatches
from methods.backbones import PassThrough
from retrieval import Measure
from utils import run_script
from vectors import VectorPairs, Vectors, mean_of, nearest, unit

N, D = 400, 12
FLAGS = ["--dataset", "Embeddings", "--M", "2", "--feat_dim", "16", "--T", "0.3", "--epoch_num", "2", "--lr", "0.05",
         "--batch_size", "64", "--topK", "30"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five overlapping clusters far from zero: X.npy, V.npy with three views of each, Y.npy."""
    folder, generator = tmp_path_factory.mktemp("embeddings"), np.random.default_rng(0)
    labels = generator.integers(0, 5, N)
    x = 3 * generator.normal(size=(5, D))[labels] + generator.normal(size=(N, D)) + 5
    views = x[:, None] + 0.5 * generator.normal(size=(N, 3, D))
    np.save(folder / "X.npy", x.astype(np.float32))
    np.save(folder / "V.npy", views.astype(np.float16))
    np.save(folder / "Y.npy", labels)
    return folder


def flags_of(folder, *names):
    flags = {"X": "--embeddings", "V": "--embedding_views", "Y": "--embedding_labels"}
    return [part for name in names for part in (flags[name], str(folder / f"{name}.npy"))]


def run(output, *flags, notes="run"):
    assert main.main([*FLAGS, *flags, "--output", str(output), "--notes", notes]) == 0
    return output / "checkpoints" / notes


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), *flags_of(files, "X", "V", "Y"))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------- --normalize_features


def test_features_are_centred_and_of_one_length_before_the_projection():
    method = method_of(config_of())
    method.backbone = PassThrough(512)
    names = set(method.state_dict())
    assert names == {"projection.weight", "projection.bias", "quantizer.codebooks"}
    features = 3 + torch.randn(50, 512)
    before = method(features)
    method.normalize_features()
    method.centre_features(features.split(7))
    centred = features.numpy().astype(np.float64)
    centred -= centred.mean(axis=0)
    centred *= np.sqrt(512) / np.linalg.norm(centred, axis=1, keepdims=True)
    expected = method.project(torch.from_numpy(centred).float())
    torch.testing.assert_close(method(features), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.embed(features), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=0.1)
    assert set(method.state_dict()) == names | {"feature_mean"}
    assert "normalize_features" not in key(config_of())


def test_a_run_is_centred_by_the_training_images(weights, tmp_path, capsys):
    flags = [*FROZEN, "--weights", weights, "--normalize_features"]
    folder = small_run(tmp_path, *flags)
    config = config_of(*flags)
    splits, method = engine.build(config)
    images = engine.build_features(config, method.backbone.eval(), splits.all)["train"]
    expected = torch.cat([batch.double() for batch in images]).mean(dim=0)
    state = torch.load(folder / "model.cpt", weights_only=True)
    torch.testing.assert_close(state["feature_mean"].double(), expected, atol=1e-6, rtol=1e-5)
    tested = ["--test_only", "--checkpoint", str(folder / "model.cpt"), "--output", str(tmp_path), "--notes", "tested"]
    frozen = [*SMALL, *FROZEN, *tested]
    assert main.main([*frozen, "--normalize_features"]) == 0
    assert metrics_of(tmp_path / "checkpoints" / "tested")["map"] == metrics_of(folder)["map"]
    capsys.readouterr()
    assert main.main([*frozen, "--overwrite"]) == 2
    assert "give --normalize_features" in capsys.readouterr().err
    (tmp_path / "killed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        killed_run(tmp_path / "killed", patch, *flags, step=5)
    resumed = small_run(tmp_path / "killed", *flags, "--resume")
    assert (resumed / "model.cpt").read_bytes() == (folder / "model.cpt").read_bytes()


@pytest.mark.parametrize(
    "flags", [["--backbone", "convnet"], ["--backbone", "squeezenet1_0", "--trainable_layer_num", "1"]]
)
def test_features_that_learn_are_not_centred(flags, capsys):
    assert main.main(["--normalize_features", *flags]) == 2
    assert "--normalize_features" in capsys.readouterr().err


# ---------------------------------------------------------------- neighbours and pairs


def items(files, views=False):
    arrays = [np.load(files / f"{name}.npy", mmap_mode="r") for name in ("X", "V", "Y")]
    rows = np.arange(0, N, 3)
    return Vectors(arrays[0], rows, np.array(arrays[2][rows]), arrays[1] if views else None)


def test_neighbours_are_those_of_brute_force(files, monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 1000)
    part = items(files)
    x = np.array(part.array[part.rows], dtype=np.float64)
    x -= x.mean(axis=0)
    cosine = (x @ x.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))
    np.fill_diagonal(cosine, -2)
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(nearest(part, 10, "cpu"), expected)
    assert nearest(part.subset(np.arange(3)), 10, "cpu").shape == (3, 2)


def pairs_of(part, epoch=0):
    batches = ShuffledBatches(len(part), 20, seed=7)
    batches.epoch = epoch
    order = [item for batch in batches for item, _ in batch]
    first, second = zip(*(batch[0].chunk(2) for batch in VectorPairs(part, batches, "cpu")), strict=True)
    return order, torch.cat(first).numpy(), torch.cat(second).numpy()


def test_a_pair_is_an_item_and_one_of_its_neighbours(files):
    part = items(files)
    order, first, second = pairs_of(part)
    near = nearest(part, 10, "cpu")
    chosen = [
        [tuple(row) for row in part.read(near[item])].index(tuple(other))
        for item, other in zip(order, second, strict=True)
    ]
    np.testing.assert_array_equal(first, part.read(np.array(order)))
    assert set(chosen) == set(range(10))
    np.testing.assert_array_equal(second, pairs_of(part)[2])
    assert not np.array_equal(np.sort(second, axis=0), np.sort(pairs_of(part, epoch=1)[2], axis=0))


@pytest.mark.parametrize("V", [1, 2, 3])
def test_a_pair_is_two_different_views(V, files):
    part = items(files, views=True)
    part = replace(part, views=np.array(part.views[:, :V]))
    order, first, second = pairs_of(part)
    seen = set()
    for item, *pair in zip(order, first, second, strict=True):
        views = part.views[part.rows[item]].astype(np.float32)
        views = [*views, part.read(np.array([item]))[0]] if V == 1 else views
        seen.add(tuple(next(i for i, view in enumerate(views) if np.array_equal(view, one)) for one in pair))
    assert seen == ({(1, 0)} if V == 1 else set(itertools.permutations(range(V), 2)))


# ---------------------------------------------------------------- beside faiss's quantizers


def test_faiss_finds_the_same_when_called_directly(files):
    x, labels = (np.load(files / f"{name}.npy") for name in ("X", "Y"))
    rows = {"train": np.arange(60, N), "query": np.arange(60), "database": np.arange(60, N)}
    splits = {name: Vectors(x, part, labels[part]) for name, part in rows.items()}
    tensors = [torch.from_numpy(labels[rows[name]]) for name in ("query", "database")]
    found = quantizers.compare({}, splits, 16, tensors, Measure(None, "expected"))
    assert list(found) == ["exact search", "PQ", "OPQ", "PCA+OPQ"]
    wide = x.astype(np.float64) - x[60:].astype(np.float64).mean(axis=0)
    wide = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    hits = labels[:60, None] == labels[60:]
    true = np.argmax(wide[:60] @ wide[60:].T, axis=1)
    names = {"exact search": "Flat", "PQ": "PQ2np", "OPQ": "OPQ2,PQ2np", "PCA+OPQ": "PCA6,OPQ2,PQ2np"}
    for name, factory in names.items():
        index = faiss.index_factory(D, factory)
        index.train(wide[60:])
        index.add(wide[60:])
        distances, order = index.search(wide[:60], N - 60)
        scores = np.empty((60, N - 60))
        np.put_along_axis(scores, order, -np.round(distances, 5), axis=1)
        expected = np.mean([average_precision_score(*pair) for pair in zip(hits, scores, strict=True)])
        assert found[name]["map"] == pytest.approx(expected, abs=0.02), name
        recall = np.mean([recall_of(row, target) for row, target in zip(scores, true, strict=True)])
        assert found[name]["recall"] == pytest.approx(recall, abs=0.03), name
    assert found["exact search"]["recall"] == 1


def recall_of(scores, target):
    """The probability that an item is among the first ten if equal scores come in any order, from its definition."""
    higher, equal = int((scores > scores[target]).sum()), int((scores == scores[target]).sum())
    return sum(higher + place < 10 for place in range(equal)) / equal


def test_recall_is_the_mean_over_orders_of_equal_scores(monkeypatch):
    monkeypatch.setattr(quantizers, "CHUNK", 100)
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.integers(0, 6, (40, 30))).float()
    target = torch.from_numpy(generator.integers(0, 30, 40))
    expected = np.mean([recall_of(row, int(its)) for row, its in zip(scores.numpy(), target, strict=True)])
    assert 0.1 < expected < 0.9
    assert quantizers.neighbour_recall(quantizers.Ranker(lambda part: part, scores), target) == pytest.approx(expected)


def test_dimensions_that_bytes_do_not_divide(files):
    x = np.load(files / "X.npy")[:, :7]
    parts = {
        "train": Vectors(x, np.arange(300), np.zeros(300, int)),
        "query": Vectors(x, np.arange(9), np.zeros(9, int)),
    }
    found = quantizers.compare({}, parts | {"database": parts["train"]}, 32, None, Measure(None, "expected"))
    assert list(found) == ["exact search", "PQ", "OPQ"]  # no four segments in three dimensions
    assert all(row["map"] is None and row["recall"] > 0.9 for row in found.values())


def test_the_advice_names_what_is_better():
    rows = {name: {"map": m, "recall": r} for name, m, r in
            (("exact search", 0.9, 1.0), ("PQ", 0.4, 0.2), ("OPQ", 0.6, 0.3), ("ours", 0.5, 0.1))}  # fmt: skip
    told = quantizers.advice(rows, "ours")
    assert told.startswith("OPQ better by MAP; PQ and OPQ better by recall. ")
    rows = {name: row | {"map": None, "recall": 1.0} for name, row in rows.items()}
    assert quantizers.advice(rows, "ours").startswith("none of faiss better by recall. ")


# ---------------------------------------------------------------- runs


def test_a_run_learns_and_tells_what_stands_beside_it(finished, files):
    metrics = metrics_of(finished)
    rows = metrics["beside"]["rows"]
    assert list(rows) == ["exact search", "PQ", "OPQ", "PCA+OPQ", "this run"]
    assert rows["this run"]["map"] == pytest.approx(metrics["map"], abs=1e-9)
    assert metrics["beside"]["bits"] == 16
    assert (metrics["map"] > 0.6, metrics["config"]["backbone"]) == (True, "none")
    log = (finished.parent.parent / "logs" / "run.log").read_text()
    assert log.count(" - beside it: ") == 7
    labels = np.load(files / "Y.npy")
    order = np.random.RandomState(2021).permutation(N)
    np.testing.assert_array_equal(np.load(finished / "db_targets.npy"), labels[np.sort(order[40:])])


def test_codes_of_further_vectors_by_numpy_alone(finished, files):
    """As docs/embeddings.md has it."""
    model = torch.load(finished / "model.cpt", map_location="cpu", weights_only=True)
    mean, W, b, C = (
        model[name].numpy() for name in ("feature_mean", "projection.weight", "projection.bias", "quantizer.codebooks")
    )
    M, _, d = C.shape
    x = np.load(files / "X.npy") - mean
    z = (np.sqrt(D) * x / np.linalg.norm(x, axis=1, keepdims=True)) @ W.T + b
    codes = np.einsum("nmd,mkd->nmk", z.reshape(-1, M, d), C / np.linalg.norm(C, axis=2, keepdims=True)).argmax(axis=2)
    order = np.random.RandomState(2021).permutation(N)
    assert (codes[np.sort(order[40:])] == np.load(finished / "db_codes.npy")).mean() > 0.999


def test_a_run_is_tested_and_resumed(finished, files, tmp_path, capsys, monkeypatch):
    given = flags_of(files, "X", "V", "Y")
    tested = run(tmp_path, *given, "--test_only", "--checkpoint", str(finished / "model.cpt"), notes="tested")
    assert metrics_of(tested)["map"] == metrics_of(finished)["map"]

    def kill():
        raise Killed

    with before_step(monkeypatch, 9, kill), pytest.raises(Killed):
        run(tmp_path, *given, "--save_interval", "2")
    capsys.readouterr()
    other = np.load(files / "V.npy")
    other[:, 0, 0] += 1
    np.save(tmp_path / "V.npy", other)
    begin = [*FLAGS, "--output", str(tmp_path), "--notes", "run", "--save_interval", "2", "--resume"]
    assert main.main([*begin, *flags_of(files, "X", "Y"), *flags_of(tmp_path, "V")]) == 2
    assert "other images, labels or weights" in capsys.readouterr().err
    assert main.main([*begin, *given]) == 0
    for name in ("model.cpt", "db_codes.npy"):
        assert (tmp_path / "checkpoints" / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_without_labels_there_is_no_map(files, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metrics = metrics_of(run(tmp_path, *flags_of(files, "X"), "--limit", "300"))
    assert metrics["map"] is None
    assert metrics["unlabelled"]["views_found"] is None
    assert metrics["beside"]["rows"]["this run"]["map"] is None
    assert "300 training images, 40 queries, 360 in the database" in caplog.text
    assert "nearest embedding @10" in caplog.text


def test_without_faiss_or_with_too_little_the_comparison_is_left_out(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    few = Vectors(np.ones((255, 3)), np.arange(255), np.zeros(255, int))
    splits = SimpleNamespace(database=few, train=few)
    assert evaluation.beside(None, {}, splits, None, None) == {}
    assert "need 256 embeddings" in caplog.text
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    assert evaluation.beside(None, {}, splits, None, None) == {}
    assert "pip install -r requirements-extra.txt" in caplog.text


def test_a_report_has_no_gallery_of_embeddings(finished, capsys):
    assert call("report", "run", "--output", finished.parent.parent) == 0
    page = (finished / "report.html").read_text()
    assert "Embeddings" in page
    assert 'class="query"' not in page


@pytest.mark.parametrize("flags", [["--method", "SPQ", "--head_only"], ["--method", "CIBHash"]])
def test_other_methods_learn_from_embeddings_too(flags, files, tmp_path):
    more = ["--dataset", "Embeddings", "--epoch_num", "1", "--batch_size", "64", "--topK", "30", "--notes", "run"]
    assert main.main([*flags, *more, *flags_of(files, "X", "V", "Y"), "--output", str(tmp_path)]) == 0
    assert 0 < metrics_of(tmp_path / "checkpoints" / "run")["map"] <= 1


# ---------------------------------------------------------------- bad input

X, V = np.ones((30, 4), np.float32), np.ones((30, 2, 4), np.float32)


def spoilt(array, value):
    array = array.copy()
    array[17, ..., 1] = value
    return array


BAD = {
    "X": {
        "integers": X.astype(int), "one dimension": X[0], "three dimensions": V, "complex": X.astype(complex),
        "nan": spoilt(X, np.nan), "infinite": spoilt(X, -np.inf), "huge": spoilt(X, 1e30), "few": X[:19],
        "none": X[:0], "no dimension": X[:, :0], "objects": X.astype(object), "long": X.astype(np.longdouble),
        "structured": np.zeros(30, dtype=[("a", "f4")]),
    },
    "V": {"rows": V[:29], "no views": V[:, :0], "dimensions": V[:, :, :3], "flat": X, "nan": spoilt(V, np.nan),
          "integers": V.astype(int)},
    "Y": {"rows": np.ones(29, int), "floats": np.ones(30), "other numbers": np.full((30, 3), 2),
          "bools": np.ones(30, bool),
          "text": np.array(["a"] * 30), "objects": np.array([None] * 30), "flat": np.ones((30, 2, 2), int)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in BAD.items() for fault in faults])
def test_bad_arrays_are_refused_in_one_line(name, fault, tmp_path, capsys):
    for file, array in {"X": X, "V": V, "Y": np.ones(30, int)}.items():
        np.save(tmp_path / f"{file}.npy", BAD[name][fault] if file == name else array, allow_pickle=True)
    error = refused(capsys, tmp_path, *flags_of(tmp_path, "X", "V", "Y"))
    assert str(tmp_path / f"{name}.npy") in error


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "folder", "cut", "archive"])
def test_files_that_are_no_arrays_are_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "X.npy"
    if content == "folder":
        path.mkdir()
    elif content == "archive":
        with path.open("wb") as file:
            np.savez(file, X)
    elif content == "cut":
        np.save(path, X)
        path.write_bytes(path.read_bytes()[:-1])
    elif content is not None:
        path.write_bytes(content)
    assert "X.npy" in refused(capsys, tmp_path, *flags_of(tmp_path, "X"))


@pytest.mark.parametrize(
    "flags",
    ["--dataset Embeddings", "--embeddings X.npy", "--embedding_views V.npy", "--backbone none",
     "--dataset Embeddings --embeddings X.npy --backbone resnet18", "--dataset Embeddings --embeddings X.npy --compile",
     "--dataset Embeddings --embeddings X.npy --weights w.pth", "--dataset Embeddings --embeddings X.npy --method SPQ",
     "--dataset Embeddings --embeddings X.npy --trainable_layer_num 1"],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_in_one_line(flags, capsys):
    assert main.main([*flags.split(), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: --"), error.count("\n")) == (True, 1)


def refused(capsys, output, *flags):
    assert main.main([*FLAGS, *flags, "--output", str(output), "--notes", "bad"]) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    return error


def test_vectors_are_read_block_by_block_in_any_floating_point(files, monkeypatch):
    x = np.load(files / "X.npy")
    monkeypatch.setattr(vectors, "BLOCK", 100)
    for kind in (np.float16, np.float32, np.float64, ">f4"):
        part = Vectors(x.astype(kind), np.arange(5, 60), np.zeros(55, int))
        blocks = list(part.blocks())
        assert (len(blocks) > 5, blocks[0].dtype) == (True, np.float32)
        np.testing.assert_array_equal(np.concatenate(blocks), x.astype(kind)[5:60].astype(np.float32))
        expected = x.astype(kind)[5:60].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(mean_of(part.blocks()), expected, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit(x, mean_of([x])), axis=1), 1, atol=1e-6)


def test_a_flag_that_has_no_place_is_recorded_as_what_holds(files):
    config = parse([*FLAGS, *flags_of(files, "X")])
    assert (config.backbone, config.weights, config.normalize_features) == ("none", "none", True)


# ---------------------------------------------------------------- the tables


def test_the_table_has_every_method_and_is_made_once(tmp_path, monkeypatch, capsys):
    from experiments import embeddings

    monkeypatch.setattr(embeddings, "HEADS", {"Digits": {"epoch_num": 1, "topK": 20}})
    given = ["--datasets", "Digits", "--bits", "16", "--seeds", "1", "--limit", "300", f"--results={tmp_path}",
             f"--trials={tmp_path}/trials", f"--view_cache={tmp_path}/views"]  # fmt: skip
    assert run_script(lambda: embeddings.main(given)) == 0
    table = (tmp_path / "embeddings.md").read_text().splitlines()[4:]
    names = [line.split("|")[1].strip() for line in table]
    assert names == ["exact search", "PQ", "OPQ", "PCA+OPQ", "head, neighbours", "head, views"]
    (trial,) = (tmp_path / "trials").glob("*.json")
    rows = json.loads(trial.read_text())["result"]["rows"]
    assert f"{100 * rows['OPQ']['recall']:.2f}" in table[2]
    monkeypatch.setattr(embeddings, "compared", None)
    assert run_script(lambda: embeddings.main(given)) == 0
    capsys.readouterr()
    assert run_script(lambda: embeddings.main(["--datasets", "Flickr25K"])) == 2
    assert "--datasets Flickr25K: there are Digits here" in capsys.readouterr().err


def test_digits_views_are_those_of_their_own_digit():
    from experiments import embeddings

    splits = embeddings.digits(config_of("--limit", "100"))
    x, views = splits.train.array, splits.train.views
    assert views.shape == (100, 16, 64)
    nearest_digit = np.linalg.norm(views[:, :, None] - x, axis=-1).argmin(axis=2)
    assert (nearest_digit == np.arange(100)[:, None]).mean() > 0.7
    np.testing.assert_array_equal(views, embeddings.turned(x, 2021))
    assert not np.array_equal(views, embeddings.turned(x, 1))


def test_cached_views_are_in_the_images_order(weights, tmp_path, monkeypatch):
    """Each equals the features of the view that the run's own loader makes of that image."""
    from experiments import embeddings, sweep

    monkeypatch.setattr(embeddings, "VIEW_EPOCHS", 2)
    configuration = config_of(*FROZEN, "--weights", weights)
    shared = sweep.Shared(configuration, tmp_path)
    splits = embeddings.backbone_features(configuration, shared)
    assert (len(splits.query), splits.train.views.shape) == (12, (60, 4, 512))
    loader = engine.build_loader(configuration, shared.splits)
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch, made in zip(loader.batches, loader, strict=True):
            first, second = shared.backbone(made).chunk(2)
            for k, (image, _) in enumerate(batch):
                found = splits.train.views[image, 2 * epoch : 2 * epoch + 2]
                np.testing.assert_allclose(found, torch.stack([first[k], second[k]]), rtol=1e-3, atol=1e-2)
