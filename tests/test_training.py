"""Parts of a run that can be tested alone: the memory's epochs, early stopping, validation, and how runs end."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HOSTILE, SMALL, before_step, config_of, features_of, method_of, small_run, splits_of

import data
import engine
import evaluation
import main
import retrieval
from methods.mecoq import MeCoQ
from utils import RunError


def measured(method, splits, config):
    measure = evaluation.Measure(config.topK, "database")
    return evaluation.test(method, features_of(config, method, splits), splits, measure)


def expected_map(scores, splits):
    """MAP@20 of the best scores `[Q, n]`, equal ones in database order."""
    hits = torch.from_numpy(splits.query.labels[:, None] == splits.database.labels[None])
    order = scores.argsort(dim=1, descending=True, stable=True)
    return float(retrieval.average_precision(hits.gather(1, order)[:, :20]).mean())


# ---------------------------------------------------------------- training


def test_memory_is_used_from_its_epoch_on_and_holds_both_views(monkeypatch):
    config = config_of("--epoch_num", "3", "--queue_begin_epoch", "2")
    method, splits = method_of(config), splits_of("Digits", seed=1, limit=20)
    loader = engine.build_loader(config, splits)
    training = engine.start(config, method, loader)
    seen, recalled = [], []
    original, recall = MeCoQ.loss, MeCoQ.recall
    monkeypatch.setattr(MeCoQ, "recall", lambda *a: recalled.append(0) or recall(*a))

    def loss(method, views, epoch):
        filled, before = int(method.memory.written.sum()), len(recalled)
        terms = original(method, views, epoch)
        seen.append((len(recalled) > before, filled))
        return terms

    monkeypatch.setattr(MeCoQ, "loss", loss)
    for epoch in range(3):
        training.epoch, training.step = epoch, 0
        loader.set_epoch(epoch)
        engine.train_epoch(training, loader)
    # 16 + 4 images per epoch, two views each, 40 slots
    assert seen == [(False, 0), (False, 32), (False, 40), (False, 40), (True, 40), (True, 40)]


def test_early_stopping_keeps_the_best_model(tmp_path, monkeypatch):
    values = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    original, seen = evaluation.test, []
    remember = lambda method: seen.append(method.projection.weight.detach().clone())  # noqa: E731
    monkeypatch.setattr(evaluation, "validate", lambda method, *rest: remember(method) or next(values))
    monkeypatch.setattr(evaluation, "test", lambda method, *rest: remember(method) or original(method, *rest))
    folder = small_run(tmp_path, "--epoch_num", "9", "--monitor_counter", "2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [h["val_mAP"] for h in metrics["history"]] == [0.3, 0.5, 0.4, 0.5]
    assert metrics["best_epoch"] == 1
    best = torch.load(folder / "model.cpt", weights_only=True)["projection.weight"]
    assert torch.equal(best, seen[1])
    assert len(seen) == 5
    assert torch.equal(seen[4], seen[1])  # the test uses the best model, not the last


@pytest.mark.parametrize(("interval", "validated"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [2, 5, 6]), (9, [6])])
def test_validations_come_at_their_interval_and_after_the_last_epoch(interval, validated, tmp_path, monkeypatch):
    values = iter(np.arange(1, 9) / 10)
    monkeypatch.setattr(evaluation, "validate", lambda *_: float(next(values)))
    folder = small_run(tmp_path, "--epoch_num", "7", "--eval_interval", str(interval), "--limit", "20")
    history = json.loads((folder / "metrics.json").read_text())["history"]
    assert [entry["epoch"] for entry in history] == list(range(7))
    assert [entry["epoch"] for entry in history if "val_mAP" in entry] == validated


# ---------------------------------------------------------------- how a run ends


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_detection_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    original = MeCoQ.loss

    def broken_gradient(method, *rest):
        terms = original(method, *rest)
        terms["loss/total_loss"] = terms["loss/total_loss"] + 0 * (0 * method.projection.bias.sum()).sqrt()  # 0 / 0
        return terms

    monkeypatch.setattr(MeCoQ, "loss", broken_gradient)
    assert main.main([*SMALL, "--output", str(tmp_path), "--detect_anomaly"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "returned nan values" in error
    assert "epoch 0, step 0" in error


def test_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    original, steps = MeCoQ.loss, []

    def breaks(*a):
        terms = original(*a)
        steps.append(0)
        if len(steps) == 10:  # epoch 1, step 2
            terms["loss/total_loss"] = terms["loss/total_loss"] * math.nan
        return terms

    monkeypatch.setattr(MeCoQ, "loss", breaks)
    assert main.main([*SMALL, "--output", str(tmp_path), "--notes", "nan"]) == 1
    error = capsys.readouterr().err.strip()
    assert "epoch 1, step 2" in error
    assert str(tmp_path / "checkpoints" / "nan" / "model.cpt") in error
    assert "\n" not in error
    state = torch.load(tmp_path / "checkpoints" / "nan" / "model.cpt", weights_only=True)
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.parametrize("workers", ["0", *["2"] * HOSTILE])  # its workers take 20 seconds to end
def test_an_image_that_turns_unreadable_ends_the_run_in_one_line(workers, photo_root, tmp_path, monkeypatch, capsys):
    shutil.copytree(photo_root, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(data.ImageFiles, "faults", lambda *a: {})  # it was sound when the run began
    roots = tmp_path / "datasets", tmp_path / "data"
    train = splits_of("NUSWIDE", *roots).train
    bad = train.root / train.names[9]
    bad.write_bytes(bad.read_bytes()[:200])
    flags = ["--dataset", "NUSWIDE", "--data_root", str(roots[0]), "--list_root", str(roots[1])]
    flags += ["--limit", "1000", "--num_workers", workers, "--output", str(tmp_path / "out")]
    assert main.main([*SMALL, *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: epoch 0, step ")
    assert f": {bad} became unreadable during the run" in error
    assert error.endswith("last good checkpoint: none was saved yet")
    assert "\n" not in error
    assert "Traceback" not in error


def vanished(folder, _):
    shutil.rmtree(folder)
    return ".lock was removed"


def replaced_by_a_file(folder, _):
    shutil.rmtree(folder)
    folder.write_text("")
    return ".lock was removed"


def read_only(folder, patch):
    """As a file system does after a fault of its disk; a mode would not keep the superuser out."""
    original = type(folder).open

    def refusing(path, mode="r", *rest, **named):
        if folder in path.parents and mode.strip("rbt"):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, mode, *rest, **named)

    patch.setattr(type(folder), "open", refusing)
    return "Read-only file system"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [vanished, replaced_by_a_file, read_only], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("part", ["checkpoints/small", "."])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_output_that_fails_in_mid_run_ends_it_in_one_line(epoch, part, fault, tmp_path, monkeypatch, capsys):
    """The line names the step, the file and what is left of the run; it is not about the log."""
    output = tmp_path / "out"
    flags = [*SMALL, "--limit", "48", "--save_interval", "2", "--output", str(output), "--notes", "small"]
    words = []
    step = 1 + 3 * epoch  # of three per epoch, the second of which is saved
    with before_step(monkeypatch, step, lambda: words.append(fault(output / part, monkeypatch))):
        assert main.main(flags) == 1
    monkeypatch.undo()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: epoch {epoch}, step 2: ")
    (word,) = words
    assert word in errors[0]
    folder = output / "checkpoints" / "small"
    assert str(folder) in errors[0].partition("; last good checkpoint: ")[0]
    assert ".log" not in errors[0]
    best = errors[0].partition("; last good checkpoint: ")[2]
    assert best.startswith(f"{folder / 'model.cpt'} (val mAP=0.") if epoch else best == "none was saved yet"


def test_broken_weights_are_not_tested():
    config = config_of()
    method, splits = method_of(config), splits_of("Digits", seed=1, limit=5)
    method.projection.weight.data[0, 0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        measured(method, splits, config)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e16])
def test_one_embedding_that_is_not_finite_is_enough(value):
    method = method_of(config_of())
    rows = torch.randn(3, 5, 8)
    assert evaluation.encode(method, Embedded(method, rows), method.codes, "").shape == (15, 2)
    rows[1, 4, 6] = value
    with pytest.raises(RunError, match="the embeddings are not finite"):
        evaluation.encode(method, Embedded(method, rows), method.codes, "")


class Embedded(list):
    """Batches that are embeddings already: the method passes them on."""

    def __init__(self, method, batches):
        super().__init__(batches)
        method.embed = lambda z: z


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_weighs_the_querys_segments_or_does_not(normalize, monkeypatch):
    config = config_of("--normalize_query" if normalize else "--no-normalize_query")
    method, splits = method_of(config), splits_of("Digits", seed=1, limit=50)
    z = torch.randn(50, 8) * torch.tensor([5.0] * 4 + [1.0] * 4)
    db_codes = torch.randint(8, (50, 2)).to(torch.uint8)
    monkeypatch.setattr(evaluation, "encode_queries", lambda *a: z)
    monkeypatch.setattr(evaluation, "encode_database", lambda *a: db_codes)
    words = method.quantizer.codewords().detach()
    segments = [F.normalize(part, dim=1) if normalize else part for part in z.split(4, dim=1)]
    scores = sum(segments[m] @ words[m][db_codes[:, m].long()].T for m in range(2))
    expected = expected_map(scores, splits)
    assert measured(method, splits, config)[0].map == pytest.approx(expected, abs=2e-3)
    other = method_of(config.replace(normalize_query=not normalize))
    assert torch.equal(other.quantizer.codewords(), words)
    assert abs(measured(other, splits, config)[0].map - expected) > 5e-3


def test_symmetric_test_quantizes_the_queries():
    config = config_of("--symmetric_distance")
    method, splits = method_of(config), splits_of("Digits", seed=1, limit=50)
    metrics, db_codes = measured(method, splits, config)
    query_codes = evaluation.encode_queries(method, features_of(config, method, splits)["query"])
    assert query_codes.dtype == torch.uint8
    words = method.quantizer.codewords().detach()
    decode = lambda codes: torch.cat([words[m][codes[:, m].long()] for m in range(2)], dim=1)  # noqa: E731
    scores = decode(query_codes) @ decode(db_codes).T
    expected = expected_map(scores.double().add(-1e-6 * torch.arange(50)), splits)
    assert metrics.map == pytest.approx(expected, abs=1e-9)


def test_validation_finds_what_the_test_finds():
    config = config_of()
    method, splits = method_of(config), splits_of("Digits", seed=1, limit=80)
    features = features_of(config, method, splits)
    for topK in (1, 20, None):
        for ties in ("database", "expected"):
            measure = evaluation.Measure(topK, ties)
            tested = evaluation.test(method, features, splits, measure)[0].map_by_ties
            assert evaluation.validate(method, features, splits, measure) == tested[ties]
    assert np.isfinite(evaluation.validate(method, features, splits, evaluation.Measure(20, "expected")))
