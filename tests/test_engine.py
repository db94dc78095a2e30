"""Whole runs on the Digits, small enough for a test, and the parts of a run that can be looked at alone."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import engine
import loss
import main
import retrieval
from feature_cache import Computed, test_features
from methods.mecoq import build_backbone
from utils import RunError

SMALL = [
    "--dataset", "Digits", "--backbone", "convnet", "--image_size", "16", "--limit", "100",
    "--batch_size", "16", "--M", "2", "--K", "8", "--feat_dim", "8",
    "--T", "0.3", "--lr", "0.05", "--num_workers", "0", "--epoch_num", "2",
    "--topK", "20", "--queue_begin_epoch", "1", "--queue_size", "40", "--mode", "debias",
    "--pos_prior", "0.1", "--feature_cache", "off",
]  # fmt: skip

# a few steps of Adam spread the codes of so small a run; SGD's warm-up leaves them nearly all alike
LIVELY = ["--optimizer", "Adam", "--lr", "0.003", "--K", "64"]


def small_run(output: Path, *flags: str, notes: str = "small") -> Path:
    assert main.main([*SMALL, "--output", str(output), "--notes", notes, *flags]) == 0
    return output / "checkpoints" / notes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    small_run(output, *LIVELY)
    return output


def args_of(*flags):
    return main.resolve(main.build_parser().parse_args([*SMALL, *flags]))


def measured(model, splits, args):
    return engine.test(model, test_features(model.backbone, splits, args), splits, args)


def model_of(args):
    torch.manual_seed(0)
    backbone = build_backbone(args.backbone, args.weights, args.trainable_layer_num, bf16=args.precision == "bf16")
    return main.assemble(backbone, args)


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
    model = model_of(main.argparse.Namespace(**config))
    model.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    splits = data.load_splits("Digits", "I", config["seed"], Path("none"), limit=100)
    again, db_codes = measured(model, splits, main.argparse.Namespace(**config))
    np.testing.assert_array_equal(db_codes, codes)
    np.testing.assert_array_equal(targets, splits.database.labels)
    assert metrics["map"] == again.map
    assert metrics["best_epoch"] in (0, 1)
    best = max(h["val_mAP"] for h in metrics["history"])
    assert metrics["map"] == pytest.approx(best, abs=1e-12)
    assert metrics["topK"] == 20
    assert metrics["recipe"] == "paper"
    assert metrics["seed"] == 2021
    assert set(metrics["seconds"]) == {"features", "train", "validate", "test"}
    assert metrics["peak_memory_mb"]["process"] > 50
    assert metrics["versions"]["torch"] == torch.__version__
    assert "cpu" in metrics["device"]


def map_of_saved_codes(folder: Path, splits: data.Splits) -> float:
    """Score every query against every saved code, rank and average in float64, without any of our retrieval code."""
    args = Namespace(**json.loads((folder / "config.json").read_text()))
    model = model_of(args)
    model.load_state_dict(torch.load(folder / "model.cpt", weights_only=True))
    with torch.inference_mode():
        model.eval()
        z = engine.encode(model, Computed(model.backbone, splits.query, args), hard=False).view(
            -1, args.M, args.feat_dim // args.M
        )
        words = model.quantizer.codewords().double().numpy()
    z = z.double().numpy()
    if args.normalize_query:
        z = z / np.linalg.norm(z, axis=2, keepdims=True)  # Eq. 16
    codes, targets = np.load(folder / "db_codes.npy"), np.load(folder / "db_targets.npy")
    np.testing.assert_array_equal(targets, splits.database.labels)
    aps = []
    for segments, label in zip(z, splits.query.labels, strict=True):
        scores = [sum(segments[m] @ words[m][c[m]] for m in range(args.M)) for c in codes]  # Eq. 17
        ranked = targets[np.argsort(-np.float32(scores), kind="stable")[: args.topK]]
        hits = (ranked == label if ranked.ndim == 1 else (ranked & label).any(axis=1)).astype(float)
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        aps.append((precision * hits).sum() / max(hits.sum(), 1))
    return np.mean(aps)


def test_map_is_that_of_float64_scores_over_the_saved_codes(finished):
    folder = finished / "checkpoints" / "small"
    splits = data.load_splits("Digits", "I", 2021, Path("none"), limit=100)
    expected = json.loads((folder / "metrics.json").read_text())["map"]
    assert map_of_saved_codes(folder, splits) == pytest.approx(expected, abs=2e-3)  # last-bit ties may fall otherwise


@pytest.mark.parametrize("recipe", ["paper", "release"])
@pytest.mark.parametrize("dataset", ["Flickr25K", "NUSWIDE"])
def test_photos_with_many_labels_train_and_test(dataset, recipe, photo_root, tmp_path):
    roots = photo_root / "datasets", photo_root / "data"
    folder = small_run(
        tmp_path, "--dataset", dataset, "--data_root", str(roots[0]), "--list_root", str(roots[1]), "--recipe", recipe,
        "--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "48", "--limit", "1000", *LIVELY,
    )  # fmt: skip
    splits = data.load_splits(dataset, "I", 2021, *roots)
    sizes = {"Flickr25K": (10, 25, 115), "NUSWIDE": (20, 70, 70)}[dataset]
    assert tuple(len(part) for part in (splits.query, splits.train, splits.database)) == sizes
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["canonical_data"] is False
    assert metrics["epochs_run"] == 2
    assert map_of_saved_codes(folder, splits) == pytest.approx(metrics["map"], abs=2e-3)


@pytest.mark.parametrize("dataset", ["Flickr25K", "NUSWIDE"])
def test_real_images_as_photos_with_many_labels(dataset, real_data, real_cifar10_root, tmp_path):
    """CIFAR-10's images as JPEG files, labelled with their class and whether it is an animal; 32 bits, trained."""
    images = data.load_cifar10(real_cifar10_root, "II", 2021, download=False).query
    images = images.subset(np.random.RandomState(0).permutation(len(images))[:600])
    roots = tmp_path / "datasets", tmp_path / "data"
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
    flags = [
        "--dataset", dataset, "--data_root", str(roots[0]), "--list_root", str(roots[1]), "--limit", "1000",
        "--backbone", "squeezenet1_0", "--weights", str(real_data / "real" / "squeezenet1_0_imagenet_fp16.pth"),
        "--image_size", "64", "--M", "4", "--K", "256", "--feat_dim", "48", "--topK", "100",
    ]  # fmt: skip
    before = small_run(tmp_path, *flags, "--epoch_num", "0", notes="before")
    after = small_run(tmp_path, *flags, "--batch_size", "32", "--epoch_num", "5", notes="after")
    maps = [json.loads((folder / "metrics.json").read_text())["map"] for folder in (before, after)]
    assert maps[1] > maps[0] + 0.02
    splits = data.load_splits(dataset, "I", 2021, *roots)
    assert map_of_saved_codes(after, splits) == pytest.approx(maps[1], abs=2e-3)


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


# ---------------------------------------------------------------- testing alone


def test_only_gives_the_map_of_the_run_with_its_codes_or_without(finished, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "small"
    shutil.copytree(finished / "checkpoints" / "small", folder)
    expected = json.loads((folder / "metrics.json").read_text())
    flags = (*LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt"))
    encoded = small_run(tmp_path, *flags, notes="encoded")  # --limit: the database is encoded
    metrics = json.loads((encoded / "metrics.json").read_text())
    assert metrics["map"] == expected["map"]
    assert metrics["epochs_run"] == 0
    assert (encoded / "db_codes.npy").read_bytes() == (folder / "db_codes.npy").read_bytes()
    np.testing.assert_array_equal(np.loadtxt(encoded / "PR_curve.txt"), np.loadtxt(folder / "PR_curve.txt"))
    assert not (encoded / "model.cpt").exists()
    assert main.main([*SMALL, *flags, "--output", str(tmp_path), "--notes", "small"]) == 2
    assert "holds a trained model" in capsys.readouterr().err
    assert main.main([*SMALL, *LIVELY, "--M", "4", *flags[-3:], "--output", str(tmp_path)]) == 2
    assert "give --M 2 --K 64 --feat_dim 8" in capsys.readouterr().err
    assert main.main([*SMALL, *flags, "--backbone", "resnet18", "--image_size", "32", "--output", str(tmp_path)]) == 2
    assert "does not fit this --backbone" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole_digits(tmp_path_factory):
    """A finished run over all digits: codes beside a checkpoint are taken for a whole database only."""
    return small_run(tmp_path_factory.mktemp("whole"), *LIVELY, "--limit", "99999", "--epoch_num", "1")


def only_test(whole_digits, tmp_path, change):
    folder = tmp_path / "trained"
    shutil.copytree(whole_digits, folder)
    change(folder)
    flags = [flag for flag in SMALL if flag not in ("--limit", "100")]
    flags += [*LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt"), "--output", str(tmp_path)]
    return main.main(flags), tmp_path / "checkpoints" / "trained-test"


def test_codes_beside_a_checkpoint_are_taken(whole_digits, tmp_path, monkeypatch):
    encoded = []
    original = engine.encode
    monkeypatch.setattr(engine, "encode", lambda m, i, **k: encoded.append(len(i.images)) or original(m, i, **k))

    def otherwise_written(folder):
        np.save(folder / "db_codes.npy", np.load(folder / "db_codes.npy").astype(np.int64))
        np.save(folder / "db_targets.npy", np.eye(10)[np.load(folder / "db_targets.npy")])

    code, results = only_test(whole_digits, tmp_path, otherwise_written)
    assert code == 0
    assert encoded == [64, 300]  # the probe and the queries, not the 1,497
    expected = json.loads((whole_digits / "metrics.json").read_text())
    assert json.loads((results / "metrics.json").read_text())["map"] == expected["map"]
    assert np.load(results / "db_codes.npy").dtype == np.uint8


def claims_too_much(folder):
    """A .npy file whose head speaks of 2e14 rows."""
    with (folder / "db_codes.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2 * 10**14, 2)})


def saved(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (saved("db_codes.npy", lambda codes: codes[:-1]), "not a code of 2 numbers for each of 1497 images"),
        (saved("db_codes.npy", lambda codes: codes[:, :1]), "not a code of 2 numbers"),
        (saved("db_codes.npy", lambda codes: codes.astype(float)), "holds float64"),
        (saved("db_codes.npy", lambda codes: codes + 64), "codewords are 0 to 63"),
        (saved("db_codes.npy", lambda codes: 63 - codes), "of the codes of 64 images are the checkpoint's"),
        (saved("db_targets.npy", lambda labels: labels[::-1]), "other labels than those of this data set"),
        (lambda folder: (folder / "db_codes.npy").write_bytes(b"no array"), "db_codes.npy is not a readable .npy"),
        (lambda folder: (folder / "db_codes.npy").write_bytes(b"PK\3\4 no zip"), "db_codes.npy is not a readable .npy"),
        (claims_too_much, "is not a readable .npy"),
        (lambda folder: torch.save({0: torch.ones(1)}, folder / "model.cpt"), "is not a state dict"),
        (lambda folder: (folder / "model.cpt").write_bytes(b"no model"), "model.cpt is not a readable PyTorch state"),
        (lambda folder: (folder / "model.cpt").unlink(), "model.cpt does not exist"),
        (lambda folder: torch.save({"w": torch.ones(1)}, folder / "model.cpt"), "there are no codebooks"),
    ],
)
def test_codes_and_checkpoints_that_do_not_fit_are_refused(change, words, whole_digits, tmp_path, capsys):
    code, results = only_test(whole_digits, tmp_path, change)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (results / "metrics.json").exists()


def test_codes_of_another_model_are_refused_even_where_they_are_alike(whole_digits, tmp_path, capsys):
    """The model changes by a hair, as from one epoch to the next: nearly all its codes stay."""

    def a_hair(folder):
        state = torch.load(folder / "model.cpt", weights_only=True)
        state["projection.weight"] *= 1.0001
        torch.save(state, folder / "model.cpt")

    code, _ = only_test(whole_digits, tmp_path, a_hair)
    assert code == 2
    assert "db_codes.npy was made with another model" in capsys.readouterr().err


def test_codes_without_a_history_are_probed_beyond_chance(whole_digits, tmp_path, capsys):
    """Codes that nearly all agree because nearly all are equal prove nothing."""

    def collapsed(folder):
        (folder / "metrics.json").unlink()
        state = torch.load(folder / "model.cpt", weights_only=True)
        state["projection.weight"] *= 0
        state["projection.bias"][:] = 1
        torch.save(state, folder / "model.cpt")
        codes = np.load(folder / "db_codes.npy")
        words = F.normalize(state["quantizer.codebooks"], dim=-1)
        codes[:] = (words.sum(dim=-1)).argmax(dim=1).numpy()
        codes[::30] += 1  # a few are wrong
        np.save(folder / "db_codes.npy", codes % 64)

    code, _ = only_test(whole_digits, tmp_path, collapsed)
    assert code == 2
    assert "are the checkpoint's" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_checkpoint_of_the_authors_release(recipe, tmp_path):
    """Their keys, `vgg.*`, `projection.*`, `pq_layer._C`: MAP as by torchvision's network and plain scoring."""
    vgg = torchvision.models.vgg16(weights=None).eval()
    M, K, d = 2, 64, 4
    projection, C = torch.nn.Linear(4096, M * d), F.normalize(torch.randn(M, K, d), dim=-1)
    projection.weight.data *= 30  # random features differ little: let the codes differ all the same
    state = {f"vgg.{key}": value for key, value in vgg.state_dict().items() if not key.startswith("classifier.6")}
    state |= {f"projection.{key}": value for key, value in projection.state_dict().items()} | {"pq_layer._C": C}
    torch.save(state, tmp_path / "model.cpt")
    folder = small_run(
        tmp_path, "--backbone", "vgg16", "--image_size", "32", "--limit", "60", "--M", "2", "--K", "64",
        "--precision", "fp32", "--recipe", recipe, "--test_only", "--checkpoint", str(tmp_path / "model.cpt"),
    )  # fmt: skip
    splits = data.load_splits("Digits", "I", 2021, Path("none"), limit=60)
    vgg.classifier = vgg.classifier[:6]
    T = torchvision.transforms
    transform = T.Compose([T.Resize((32, 32)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    @torch.inference_mode()
    def embed(images):
        return projection(vgg(torch.stack([transform(images.picture(i)) for i in range(60)]))).view(60, M, d)

    db, query = embed(splits.database), embed(splits.query)
    codes = torch.einsum("nmd,mkd->nmk", F.normalize(db, dim=-1), C).argmax(dim=-1)
    agree = (codes.numpy() == np.load(folder / "db_codes.npy")).mean()
    assert agree > 0.98  # float32 in another order: a tie may fall otherwise
    codes = torch.from_numpy(np.load(folder / "db_codes.npy")).long()
    decoded = torch.stack([C[m][codes[:, m]] for m in range(M)], dim=1)  # [n, M, d]
    segments = F.normalize(query, dim=-1) if recipe == "paper" else query
    scores = torch.einsum("qmd,nmd->qn", segments.double(), decoded.double())
    hits = torch.from_numpy(splits.query.labels[:, None] == splits.database.labels[None])
    order = scores.float().argsort(dim=1, descending=True, stable=True)
    expected = retrieval.average_precision(hits.gather(1, order)[:, :20]).mean()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["map"] == pytest.approx(float(expected), abs=2e-3)


def test_finished_runs_are_skipped_and_others_protected(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "checkpoints" / "small" / "metrics.json"
    before = metrics.read_bytes()
    flags = [*SMALL, *LIVELY, "--output", str(tmp_path), "--notes", "small", "--resume"]
    assert main.main([*flags, "--num_workers", "1"]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert main.main([*flags, "--seed", "7", "--pairing", "all"]) == 2
    assert "holds a run with seed=2021, pairing=own: give this one another" in capsys.readouterr().err
    assert metrics.read_bytes() == before
    model = metrics.with_name("model.cpt")
    weights = model.read_bytes()
    model.write_bytes(weights + b" ")  # as if another run had been killed after its first epoch
    monkeypatch.setattr(main.engine, "run", lambda *a: print("it runs"))
    assert main.main(flags) == 0
    assert "it runs" in capsys.readouterr().out
    model.write_bytes(weights)
    monkeypatch.undo()
    assert main.main([*flags, "--data_root", "elsewhere"]) == 0
    assert main.main([*flags, "--weights", "random", "--backbone", "resnet18", "--image_size", "32"]) == 2
    capsys.readouterr()
    metrics.write_text("{}")
    assert main.main(flags) == 2
    assert "is not the metrics.json of a run" in capsys.readouterr().err
    metrics.unlink()
    assert main.main(flags) == 0  # tested again
    assert json.loads(metrics.read_text())["map"] == json.loads(before)["map"]


# ---------------------------------------------------------------- parts of a run


def test_objective_is_equation_14_over_both_views_and_the_memory():
    args = args_of("--hp_lambda", "0.3")
    model = model_of(args)
    model.memory.enqueue(torch.rand(11, 2, 8).softmax(-1))
    images = torch.rand(10, 3, 16, 16)
    terms, z, soft_codes = engine.objective(model, images, True, args)
    z = model(images)
    p, _ = model.quantizer(z)
    C = F.normalize(model.quantizer.codebooks, dim=-1)

    def decode(soft):
        return torch.cat([soft[:, m] @ C[m] for m in range(2)], dim=1)

    views = decode(p)
    memory = decode(model.memory.codes[:11])
    contrastive = loss.contrastive_loss(views[:5], views[5:], memory, T=0.3, pos_prior=0.1)
    expected = contrastive + 0.3 * loss.code_entropy(p) + 0.5 * loss.codeword_diversity(C)
    torch.testing.assert_close(terms["loss/total_loss"], expected)
    torch.testing.assert_close(soft_codes, p)
    without = engine.objective(model, images, False, args)[0]["loss/simclr_loss"]
    torch.testing.assert_close(without, loss.contrastive_loss(views[:5], views[5:], T=0.3, pos_prior=0.1))
    terms["loss/total_loss"].backward()
    assert model.quantizer.codebooks.grad.abs().sum() > 0


class Recorded(list):
    """Steps of recorded features, as a loader."""

    batch_sampler = Namespace(epoch=0)


def test_golden_release_trace(golden):
    """60 steps of the released code, memory from epoch 2 on: loss, weights, codebooks and queue."""
    numbers = golden("release_trace")
    c = json.loads(str(numbers["config"]))
    args = main.resolve(main.build_parser().parse_args(["--recipe", "release", "--mode", "debias", "--M", str(c["M"])]))
    args.epoch_num, args.warmup_epoch_num, args.feat_dim = c["epochs"], c["warmup_epochs"], c["M"] * c["D"]
    shared = ("K", "alpha", "T", "pos_prior", "queue_begin_epoch", "queue_size", "hp_lambda", "hp_gamma", "hp_beta",
              "lr", "momentum", "start_lr", "final_lr")  # fmt: skip
    for name in shared:
        setattr(args, name, c[name])
    args.memory = "soft"
    backbone = torch.nn.Identity()
    backbone.dim = c["feat_in"]
    model = main.assemble(backbone, args)
    model.projection.weight.data, model.projection.bias.data, model.quantizer.codebooks.data = (
        torch.from_numpy(numbers[name]) for name in ("W0", "b0", "C0")
    )
    steps = Recorded(torch.from_numpy(numbers["feats"]).flatten(1, 2))
    writer = Namespace(losses=[])
    writer.add_scalar = lambda tag, value, step: tag == "loss/total_loss" and writer.losses.append(value)
    training = engine.start(model, steps[: c["steps_per_epoch"]], args)
    training.events = writer
    for epoch in range(c["epochs"]):
        training.epoch, training.step, training.sums = epoch, 0, {}
        engine.train_epoch(training, Recorded(steps[epoch * c["steps_per_epoch"] :][: c["steps_per_epoch"]]), args)
    np.testing.assert_allclose(writer.losses, numbers["loss"], atol=1e-4)
    np.testing.assert_allclose(model.projection.weight.detach(), numbers["W"], atol=1e-4)
    np.testing.assert_allclose(model.projection.bias.detach(), numbers["b"], atol=1e-4)
    np.testing.assert_allclose(model.quantizer.codewords(), numbers["C"], atol=1e-4)
    np.testing.assert_allclose(model.memory.codes, numbers["queue"], atol=1e-4)


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_a_step_reads_nothing_from_the_device(kind, monkeypatch):
    """Tensors on the meta device have no values: whatever asked for one would fail. What is read every
    `--log_interval` steps is taken away, and fails where it is not."""
    args = args_of("--queue_begin_epoch", "0", "--memory", kind, "--hp_lambda", "0.1", "--precision", "fp32")
    model = model_of(args).to("meta")
    steps = Recorded([torch.empty(12, 3, 16, 16, device="meta")] * 3)
    training = engine.start(model, steps, args)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        engine.train_epoch(training, steps, args)
    monkeypatch.setattr(engine.StepLog, "add", lambda *_: None)
    training.step = 0
    engine.train_epoch(training, steps, args)


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


def test_memory_is_used_from_its_epoch_on_and_holds_both_views(monkeypatch):
    args = args_of("--epoch_num", "3", "--queue_begin_epoch", "2")
    model, splits = model_of(args), data.load_splits("Digits", "I", 1, Path("none"), limit=20)
    loader = data.train_loader(splits, args)
    training = engine.start(model, loader, args)
    seen = []
    original = engine.objective
    monkeypatch.setattr(engine, "objective", lambda *a: seen.append((a[2], model.memory.filled)) or original(*a))
    for epoch in range(3):
        training.epoch, training.step = epoch, 0
        engine.train_epoch(training, loader, args)
    # 16 + 4 images a epoch, two views each, 40 slots
    assert seen == [(False, 0), (False, 32), (False, 40), (False, 40), (True, 40), (True, 40)]


def test_learning_rates_follow_the_schedule_and_keep_their_scale():
    args = args_of(
        "--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1",
        "--lr_scaling", "0.01", "--epoch_num", "3",
    )  # fmt: skip
    model = model_of(args)
    optimizer = engine.build_optimizer(model, args)
    scheduler = engine.build_scheduler(optimizer, args, 4)
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rates = np.array(rates)
    np.testing.assert_allclose(rates[:, 1], rates[:, 0] * 0.01)
    assert rates[0, 0] == pytest.approx(1e-5)
    assert rates[:, 0].max() == rates[3, 0] == pytest.approx(0.05)
    counts = [len(group["params"]) for group in optimizer.param_groups]
    assert counts == [3, 6]  # projection and codebooks; one Fire module


@pytest.mark.parametrize(
    ("flags", "share"),
    [([], 0.01), (["--recipe", "release"], 1.0), (["--recipe", "release", "--disable_scheduler"], 0.01)],
)
def test_the_released_scheduler_overwrites_the_scaling(flags, share):
    args = args_of(
        "--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1",
        "--lr_scaling", "0.01", *flags,
    )  # fmt: skip
    optimizer = engine.build_optimizer(model_of(args), args)
    scheduler = engine.build_scheduler(optimizer, args, 4)
    for _ in range(6):
        head, backbone = (group["lr"] for group in optimizer.param_groups)
        assert backbone == pytest.approx(head * share)
        optimizer.step()
        scheduler.step()


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_detection_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    original = engine.objective

    def broken_gradient(*a):
        terms, z, soft_codes = original(*a)
        terms["loss/total_loss"] = terms["loss/total_loss"] + 0 * (0 * z.sum()).sqrt()  # 0 / 0 on the way back
        return terms, z, soft_codes

    monkeypatch.setattr(engine, "objective", broken_gradient)
    assert main.main([*SMALL, "--output", str(tmp_path), "--detect_anomaly"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "returned nan values" in error
    assert "epoch 0, step 0" in error


@pytest.mark.parametrize("normalize", [True, False])
def test_similarity_weighs_the_querys_segments_or_does_not(normalize, monkeypatch):
    args = args_of("--normalize_query" if normalize else "--no-normalize_query")
    model, splits = model_of(args), data.load_splits("Digits", "I", 1, Path("none"), limit=50)
    z = torch.randn(50, 8) * torch.tensor([5.0] * 4 + [1.0] * 4)
    db_codes = torch.randint(8, (50, 2)).to(torch.uint8)
    monkeypatch.setattr(engine, "encode", lambda *a, hard: db_codes if hard else z)
    words = model.quantizer.codewords().detach()
    segments = [F.normalize(part, dim=1) if normalize else part for part in z.split(4, dim=1)]
    scores = sum(segments[m] @ words[m][db_codes[:, m].long()].T for m in range(2))
    hits = torch.from_numpy(splits.query.labels[:, None] == splits.database.labels[None])
    order = scores.argsort(dim=1, descending=True, stable=True)
    expected = retrieval.average_precision(hits.gather(1, order)[:, :20]).mean()
    assert measured(model, splits, args)[0].map == pytest.approx(float(expected), abs=2e-3)
    args.normalize_query = not normalize
    assert abs(measured(model, splits, args)[0].map - float(expected)) > 5e-3


def test_early_stopping_keeps_the_best_model(tmp_path, monkeypatch):
    values = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    original, seen = engine.test, []
    remember = lambda model: seen.append(model.projection.weight.detach().clone())  # noqa: E731
    monkeypatch.setattr(engine, "validate", lambda model, *rest: remember(model) or next(values))
    monkeypatch.setattr(engine, "test", lambda model, *rest: remember(model) or original(model, *rest))
    folder = small_run(tmp_path, "--epoch_num", "9", "--monitor_counter", "2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [h["val_mAP"] for h in metrics["history"]] == [0.3, 0.5, 0.4, 0.5]
    assert metrics["best_epoch"] == 1
    best = torch.load(folder / "model.cpt", weights_only=True)["projection.weight"]
    assert torch.equal(best, seen[1])
    assert len(seen) == 5
    assert torch.equal(seen[4], seen[1])  # the test uses the best model, not the last


def test_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    original, steps = engine.objective, []

    def breaks(*a):
        terms, *rest = original(*a)
        steps.append(0)
        if len(steps) == 10:  # epoch 1, step 2
            terms["loss/total_loss"] = terms["loss/total_loss"] * math.nan
        return terms, *rest

    monkeypatch.setattr(engine, "objective", breaks)
    assert main.main([*SMALL, "--output", str(tmp_path), "--notes", "nan"]) == 1
    error = capsys.readouterr().err.strip()
    assert "epoch 1, step 2" in error
    assert str(tmp_path / "checkpoints" / "nan" / "model.cpt") in error
    assert "\n" not in error
    state = torch.load(tmp_path / "checkpoints" / "nan" / "model.cpt", weights_only=True)
    assert all(v.isfinite().all() for v in state.values())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_turns_unreadable_ends_the_run_in_one_line(workers, photo_root, tmp_path, monkeypatch, capsys):
    shutil.copytree(photo_root, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(data, "find_bad_images", lambda *a: {})  # it was sound when the run began
    train = data.load_nuswide(tmp_path / "datasets", tmp_path / "data").train
    bad = train.root / train.names[9]
    bad.write_bytes(bad.read_bytes()[:200])
    flags = ["--dataset", "NUSWIDE", "--data_root", str(tmp_path / "datasets"), "--list_root", str(tmp_path / "data")]
    flags += ["--limit", "1000", "--num_workers", workers, "--output", str(tmp_path / "out")]
    assert main.main([*SMALL, *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: epoch 0, step ")
    assert f": {bad} became unreadable during the run" in error
    assert error.endswith("last good checkpoint: none was saved yet")
    assert "\n" not in error
    assert "Traceback" not in error


def test_broken_weights_are_not_tested():
    args = args_of()
    model, splits = model_of(args), data.load_splits("Digits", "I", 1, Path("none"), limit=5)
    model.projection.weight.data[0, 0] = math.nan
    with pytest.raises(RunError, match="not finite"):
        measured(model, splits, args)


def test_symmetric_test_quantizes_the_queries():
    args = args_of("--symmetric_distance")
    model, splits = model_of(args), data.load_splits("Digits", "I", 1, Path("none"), limit=50)
    metrics, db_codes = measured(model, splits, args)
    query_codes = engine.encode(model, Computed(model.backbone, splits.query, args), hard=True)
    words = model.quantizer.codewords().detach()
    decode = lambda codes: torch.cat([words[m][codes[:, m].long()] for m in range(2)], dim=1)  # noqa: E731
    scores = decode(query_codes) @ decode(db_codes).T
    hits = torch.from_numpy(splits.query.labels[:, None] == splits.database.labels[None])
    order = scores.double().add(-1e-6 * torch.arange(50)).argsort(dim=1, descending=True)
    expected = retrieval.average_precision(hits.gather(1, order)[:, :20]).mean()
    assert metrics.map == pytest.approx(float(expected), abs=1e-9)
