"""Whole runs, small enough for a test: their files, their numbers, their variants."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HOSTILE, LIVELY, features_of, method_of, small_run, splits_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import engine
import evaluation
from config import Config
from feature_cache import Computed

# ---------------------------------------------------------------- the files of a run


def test_every_output_file_reads_back_and_they_agree(finished):
    folder = finished / "checkpoints" / "small"
    names = {"model.cpt", "db_codes.npy", "db_targets.npy", "PR_curve.txt", "P_at_topK_curve.txt", "config.json",
             "metrics.json", "last.cpt", ".lock"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
    codes = np.load(folder / "db_codes.npy", allow_pickle=False)
    targets = np.load(folder / "db_targets.npy", allow_pickle=False)
    assert (codes.dtype, codes.shape, targets.shape) == (np.uint8, (100, 2), (100,))
    pr, p_at_k = np.loadtxt(folder / "PR_curve.txt"), np.loadtxt(folder / "P_at_topK_curve.txt")
    assert pr.shape == (2, 100)
    assert pr[0, -1] == pytest.approx(1)
    np.testing.assert_array_equal(p_at_k[0], np.arange(1, 21))
    np.testing.assert_allclose(p_at_k[1], pr[1, :20])
    config = Config(config)
    method = method_of(config)
    method.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    splits = splits_of("Digits", seed=config.seed, limit=100)
    measured = evaluation.Measure(config.topK, config.ties)
    again, db_codes = evaluation.test(method, features_of(config, method, splits), splits, measured)
    np.testing.assert_array_equal(db_codes, codes)
    np.testing.assert_array_equal(targets, splits.database.labels)
    assert metrics["map_by_ties"] == again.map_by_ties
    assert metrics["map"] == again.map_by_ties[measured.ties]


def test_metrics_tell_of_the_training_and_of_the_machine(finished):
    metrics = json.loads((finished / "checkpoints" / "small" / "metrics.json").read_text())
    assert metrics["best_epoch"] in (0, 1)
    best = max(h["val_mAP"] for h in metrics["history"])
    assert metrics["map"] == pytest.approx(best, abs=1e-12)
    assert metrics["topK"] == 20
    assert metrics["recipe"] == "paper"
    assert metrics["method"] == "MeCoQ"
    assert metrics["bits"] == 12
    assert metrics["seed"] == 2021
    assert set(metrics["seconds"]) == {"features", "train", "validate", "test"}
    assert metrics["peak_memory_mb"]["process"] > 50
    assert metrics["versions"]["torch"] == torch.__version__
    assert "cpu" in metrics["device"]


def map_of_saved_codes(folder: Path, splits: data.Splits) -> float:
    """Score every query against every saved code, rank and average in float64, without any of our retrieval code."""
    config = Config(json.loads((folder / "config.json").read_text()))
    method = method_of(config)
    method.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    with torch.inference_mode():
        method.eval()
        images = Computed(method.backbone, splits.query, engine.preprocessing(config))
        z = torch.cat([method.embed(batch.float()) for batch in images]).view(-1, config.M, config.feat_dim // config.M)
        words = method.quantizer.codewords().double().numpy()
    z = z.double().numpy()
    if config.normalize_query:
        z = z / np.linalg.norm(z, axis=2, keepdims=True)  # Eq. 16
    codes, targets = np.load(folder / "db_codes.npy"), np.load(folder / "db_targets.npy")
    np.testing.assert_array_equal(targets, splits.database.labels)
    aps = []
    for segments, label in zip(z, splits.query.labels, strict=True):
        scores = [sum(segments[m] @ words[m][c[m]] for m in range(config.M)) for c in codes]  # Eq. 17
        ranked = targets[np.argsort(-np.float32(scores), kind="stable")[: config.topK]]
        hits = (ranked == label if ranked.ndim == 1 else (ranked & label).any(axis=1)).astype(float)
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        aps.append((precision * hits).sum() / max(hits.sum(), 1))
    return np.mean(aps)


def test_map_is_that_of_float64_scores_over_the_saved_codes(finished):
    folder = finished / "checkpoints" / "small"
    expected = json.loads((folder / "metrics.json").read_text())["map_by_ties"]["database"]
    # last-bit ties may fall otherwise
    assert map_of_saved_codes(folder, splits_of("Digits", limit=100)) == pytest.approx(expected, abs=2e-3)


def test_log_keeps_the_released_lines_and_tensorboard_its_tags(finished):
    lines = [line.split(" - ", 1)[1] for line in (finished / "logs" / "small.log").read_text().splitlines()]
    metrics = json.loads((finished / "checkpoints" / "small" / "metrics.json").read_text())
    for epoch in metrics["history"]:
        assert (
            f"epoch {epoch['epoch']}: avg loss={epoch['loss/total_loss']:.6f}, "
            f"avg quantization error={epoch['quant_err']:.6f}"
        ) in lines
        assert f"val mAP={epoch['val_mAP']:.6f}" in lines
    assert f"test mAP={metrics['map']:.6f}" in lines
    assert lines[0].startswith("recipe paper")
    events = EventAccumulator(str(finished / "logs" / "small")).Reload()
    steps = 2 * math.ceil(100 / 16)
    expected = dict.fromkeys(
        ("lr", "quant_err", "loss/simclr_loss", "loss/entropy_reg_loss", "loss/codeword_reg_loss", "loss/total_loss"),
        steps,
    ) | {"val_mAP": 2}
    assert {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]} == expected
    assert [e.step for e in events.Scalars("lr")] == list(range(steps))
    for tag in ("loss/total_loss", "quant_err"):  # an epoch's number is the mean of its seven steps
        means = np.array([e.value for e in events.Scalars(tag)]).reshape(2, 7).mean(axis=1)
        np.testing.assert_allclose([epoch[tag] for epoch in metrics["history"]], means, rtol=1e-6)


@pytest.mark.parametrize("interval", ["1", "3", "1000"])
def test_losses_are_the_same_however_rarely_they_are_read(interval, finished, tmp_path):
    folder = small_run(tmp_path, *LIVELY, "--log_interval", interval)
    histories = [
        json.loads((of / "metrics.json").read_text())["history"] for of in (finished / "checkpoints" / "small", folder)
    ]
    assert histories[0] == histories[1]
    ours, theirs = (EventAccumulator(str(of / "logs" / "small")).Reload() for of in (tmp_path, finished))
    for tag in ("lr", "loss/total_loss", "quant_err"):
        assert [(e.step, e.value) for e in ours.Scalars(tag)] == [(e.step, e.value) for e in theirs.Scalars(tag)]


# ---------------------------------------------------------------- photos on disk


@pytest.mark.parametrize("recipe", ["paper", "release"])
@pytest.mark.parametrize("dataset", ["Flickr25K", "NUSWIDE"])
def test_photos_with_many_labels_train_and_test(dataset, recipe, photo_root, tmp_path):
    roots = photo_root / "datasets", photo_root / "data"
    folder = small_run(
        tmp_path, "--dataset", dataset, "--data_root", str(roots[0]), "--list_root", str(roots[1]), "--recipe", recipe,
        "--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "48", "--limit", "1000", *LIVELY,
    )  # fmt: skip
    splits = splits_of(dataset, *roots)
    sizes = {"Flickr25K": (10, 25, 115), "NUSWIDE": (20, 70, 70)}[dataset]
    assert tuple(len(part) for part in (splits.query, splits.train, splits.database)) == sizes
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["canonical_data"] is False
    assert metrics["epochs_run"] == 2
    assert map_of_saved_codes(folder, splits) == pytest.approx(metrics["map_by_ties"]["database"], abs=2e-3)


def write_real_photos(images: data.Images, dataset: str, roots: tuple[Path, Path]) -> None:
    """600 images as JPEG files, labelled with their class and whether it is an animal, in the layout of a data set."""
    width = {"Flickr25K": 24, "NUSWIDE": 21}[dataset]
    labels = np.zeros((600, width), int)
    labels[np.arange(600), images.labels] = 1
    labels[:, 10] = ~np.isin(images.labels, (0, 1, 8, 9))
    names = [f"sky/im{i + 1}.jpg" for i in range(600)]
    folder, lists = {
        "Flickr25K": (roots[0] / "Flickr25K" / "mirflickr", roots[1] / "Flickr25k"),
        "NUSWIDE": (roots[0] / "NUS-WIDE" / "Flickr", roots[1] / "Nuswide"),
    }[dataset]
    (folder / "sky").mkdir(parents=True)
    lists.mkdir(parents=True)
    for i, name in enumerate(names):
        images.picture(i).resize((96, 80)).save(folder / name)
    rows = [" ".join(map(str, row)) for row in labels]
    if dataset == "Flickr25K":
        (lists / "img.txt").write_text("\n".join(names))
        (lists / "targets.txt").write_text("\n".join(rows))
    else:
        lines = [f"{name} {row}" for name, row in zip(names, rows, strict=True)]
        for part, chosen in (("test", lines[:80]), ("train", lines[80:]), ("database", lines[80:])):
            (lists / f"{part}.txt").write_text("\n".join(chosen))


@pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --all")
@pytest.mark.parametrize("dataset", ["Flickr25K", "NUSWIDE"])
def test_real_images_as_photos_with_many_labels(dataset, real_data, real_cifar10_root, tmp_path):
    """CIFAR-10's images as JPEG files with several labels; 32 bits, trained."""
    images = data.load_cifar10(data.Source("CIFAR10", "II", 2021, real_cifar10_root, Path("none"))).query
    images = images.subset(np.random.RandomState(0).permutation(len(images))[:600])
    roots = tmp_path / "datasets", tmp_path / "data"
    write_real_photos(images, dataset, roots)
    flags = [
        "--dataset", dataset, "--data_root", str(roots[0]), "--list_root", str(roots[1]), "--limit", "1000",
        "--backbone", "squeezenet1_0", "--weights", str(real_data / "real" / "squeezenet1_0_imagenet_fp16.pth"),
        "--image_size", "64", "--M", "4", "--K", "256", "--feat_dim", "48", "--topK", "100",
    ]  # fmt: skip
    before = small_run(tmp_path, *flags, "--epoch_num", "0", notes="before")
    after = small_run(tmp_path, *flags, "--batch_size", "32", "--epoch_num", "5", notes="after")
    maps = [json.loads((folder / "metrics.json").read_text())["map"] for folder in (before, after)]
    assert maps[1] > maps[0] + 0.02
    assert map_of_saved_codes(after, splits_of(dataset, *roots)) == pytest.approx(maps[1], abs=2e-3)


# ---------------------------------------------------------------- seeds, variants, learning


def test_one_seed_one_result_and_another_seed_another(tmp_path):
    flags = ["--limit", "200", "--K", "64"]
    files = ("model.cpt", "db_codes.npy", "PR_curve.txt", "P_at_topK_curve.txt")
    first, second = (
        small_run(tmp_path / name, *flags, "--num_workers", workers) for name, workers in (("a", "0"), ("b", "2"))
    )
    other = small_run(tmp_path / "c", *flags, "--seed", "7")
    for name in files[1:]:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    weights = [torch.load(folder / "model.cpt", weights_only=True) for folder in (first, second, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["quantizer.codebooks"], weights[2]["quantizer.codebooks"])
    histories = [json.loads((folder / "metrics.json").read_text())["history"] for folder in (first, second)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--symmetric_distance"],
        ["--mode", "simple"],
        ["--K", "16"],
        ["--K", "256", "--epoch_num", "1"],
        ["--K", "257", "--epoch_num", "1"],
        ["--K", "300", "--epoch_num", "1"],
        ["--batch_size", "59"],
        ["--queue_size", "100"],
        ["--recipe", "release"],
        ["--memory", "hard", "--queue_begin_epoch", "0"],
        ["--memory", "feature", "--queue_begin_epoch", "0"],
        ["--queue_size", "7", "--queue_begin_epoch", "0"],
        ["--queue_begin_epoch", "-1", "--hp_lambda", "0.5"],
        ["--optimizer", "Adam", "--lr", "0.001"],
        ["--epoch_num", "0", "--disable_writer"],
        ["--disable_scheduler", "--eval_interval", "5", "--topK", "1000"],
        ["--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "2"],
    ],
    ids=" ".join,
)
def test_variants_run(flags, tmp_path):
    folder = small_run(tmp_path, *flags)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["map"] <= 1
    codes = np.load(folder / "db_codes.npy")
    K = json.loads((folder / "config.json").read_text())["K"]
    assert codes.dtype == (np.uint16 if K > 256 else np.uint8)
    assert codes.max() < K
    if "--disable_writer" in flags:
        assert not (tmp_path / "logs" / "small").exists()


def test_a_code_of_the_default_codebooks_is_a_byte_each(tmp_path):
    """All 256 codewords of K = 256 fit a byte, and the largest of them comes back as it was."""
    folder = small_run(tmp_path, "--K", "256", "--M", "4", "--limit", "99999", *LIVELY[:4], "--epoch_num", "1")
    codes = np.load(folder / "db_codes.npy")
    assert codes.dtype == np.uint8
    assert codes.nbytes == 1497 * 4
    assert codes.max() > 240


def test_training_teaches(tmp_path):
    """MAP of the digits rises well above an untrained network's within a few seconds."""
    flags = ["--limit", "1497", "--batch_size", "64", "--M", "4", "--K", "64", "--feat_dim", "32", "--lr", "0.02"]
    before, after = (
        json.loads((small_run(tmp_path, *flags, "--epoch_num", epochs, notes=epochs) / "metrics.json").read_text())
        for epochs in ("0", "3")
    )
    assert before["map"] < 0.5
    assert after["map"] > before["map"] + 0.25


def test_real_images_and_weights(real_cifar10_root, real_data, tmp_path):
    """One epoch on 1,000 real images with the real SqueezeNet beats its untrained projection and codebooks."""
    weights = real_data / "real" / "squeezenet1_0_imagenet_fp16.pth"
    flags = [
        "--dataset", "CIFAR10", "--protocol", "II", "--data_root", str(real_cifar10_root), "--limit", "1000",
        "--backbone", "squeezenet1_0", "--weights", str(weights), "--image_size", "64", "--K", "256", "--M", "4",
        "--feat_dim", "48", "--batch_size", "64", "--topK", "100", "--num_workers", "2",
    ]  # fmt: skip
    before, after = (
        json.loads((small_run(tmp_path, *flags, "--epoch_num", epochs, notes=epochs) / "metrics.json").read_text())
        for epochs in ("0", "2")
    )
    assert before["canonical_data"] is False
    assert before["map"] > 0.15  # chance: 0.1
    assert after["map"] > before["map"] + 0.05
