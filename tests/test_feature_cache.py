"""The cache of test images' features: never stale, never half, and without effect on a single code."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    SQUEEZENET,
    change_images,
    config_of,
    features_of,
    one_level_brighter,
    small_run,
    splits_of,
    wait_for,
    write_flickr25k,
)

import engine
import feature_cache
import main
import transforms
from config import parse
from feature_cache import Computed
from loaders import Preprocessing
from methods.backbones import build_backbone
from utils import InputError


def written(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path(folder).rglob("*")}


def frozen_config(weights, *flags):
    return config_of(*SQUEEZENET, "--weights", weights, *flags)


def values_of(config):
    """split -> the features of its test images, as a run with this configuration gets them."""
    splits, method = engine.build(config)
    parts = features_of(config, method, splits)
    return {name: torch.cat([batch.float() for batch in part]) for name, part in parts.items()}


# ---------------------------------------------------------------- the values


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("trained", ["0", "2"])
def test_a_run_gives_the_same_codes_with_and_without(trained, precision, weights, tmp_path):
    flags = [*SQUEEZENET, "--weights", weights, "--precision", precision, "--trainable_layer_num", trained]
    flags += ["--M", "16", "--K", "256", "--feat_dim", "64"]
    folders = {
        name: small_run(tmp_path, *flags, "--feature_cache", cache, notes=name)
        for name, cache in (("off", "off"), ("fills", str(tmp_path / "cache")), ("reads", str(tmp_path / "cache")))
    }
    expected = np.load(folders["off"] / "db_codes.npy")
    assert len(np.unique(expected, axis=0)) > 3
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders.values()]
    for folder, found in zip(folders.values(), metrics, strict=True):
        np.testing.assert_array_equal(np.load(folder / "db_codes.npy"), expected)
        assert found["map"] == metrics[0]["map"]
        assert found["history"] == metrics[0]["history"]


def test_features_do_not_depend_on_neighbours(weights, tmp_path):
    """Cached rows were computed in another order and in other company than a split's."""
    config = frozen_config(weights, "--limit", "70")
    computed = values_of(config)
    cached = values_of(config.replace(feature_cache=str(tmp_path)))
    for name, values in computed.items():
        assert torch.equal(cached[name], values)
        assert len(np.unique(values.numpy(), axis=0)) == 70


def test_real_codes_are_the_same_to_the_last_bit(real_cifar10_root, real_data, tmp_path):
    weights = real_data / "real" / "squeezenet1_0_imagenet_fp16.pth"
    config = parse(
        ["--dataset", "CIFAR10", "--protocol", "II", "--data_root", str(real_cifar10_root), "--limit", "200",
         "--backbone", "squeezenet1_0", "--weights", str(weights), "--image_size", "128", "--feature_cache", "off"]
    )  # fmt: skip
    computed = values_of(config)
    for _ in range(2):
        cached = values_of(config.replace(feature_cache=str(tmp_path)))
        assert all(torch.equal(values, computed[name]) for name, values in cached.items())


def test_what_is_kept_is_what_enters_the_first_trained_layer():
    """VGG16: fc7's output if nothing is trained, else the convolutions', whether fc6 is trained or not."""
    with torch.device("meta"):
        for trained, size in ((0, 4096), (1, 25088), (2, 25088)):
            backbone = build_backbone("vgg16", "random", trained, bf16=False).eval()
            features_of_two = backbone.prefix(torch.empty(2, 3, 64, 64))
            assert features_of_two.shape == (2, size)
            assert backbone.suffix(features_of_two).shape == (2, 4096)
    assert build_backbone("convnet", "random", 0, bf16=False).cut == 0
    assert build_backbone("resnet18", "random", 1, bf16=False).cut == 8


def test_numbers_beyond_half_precision_are_cut_off(weights):
    config = frozen_config(weights)
    splits, method = engine.build(config)
    method.eval()
    method.backbone.net.features[12].expand3x3.weight.data *= 1e9
    for batch in Computed(method.backbone, splits.query, engine.preprocessing(config)):
        assert batch.isfinite().all()
        assert batch.max() == torch.finfo(torch.float16).max


# ---------------------------------------------------------------- when they count


def test_runs_of_all_lengths_recipes_and_seeds_share_a_cache_that_they_do_not_touch(weights, tmp_path):
    cache = tmp_path / "cache"
    flags = [*SQUEEZENET, "--limit", "2000", "--weights", weights, "--epoch_num", "0", "--feature_cache", str(cache)]
    small_run(tmp_path, *flags)
    before = written(cache)
    assert len(list(cache.iterdir())) == 1
    key = json.loads(next(cache.glob("*/key.json")).read_text())["key"]
    assert key["images"] == 1797
    for further in (["--M", "4"], ["--recipe", "release"], ["--seed", "3"], ["--batch_size", "7", "--views", "pil"]):
        small_run(tmp_path, *flags, *further, "--overwrite", notes="further")
    assert written(cache) == before


def folders_of(cache, config):
    """The folders of the cache before and after a run with this configuration has taken its features."""
    before = set(cache.iterdir()) if cache.exists() else set()
    values_of(config)
    return before, set(cache.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        ["--image_size", "40"],
        ["--precision", "fp32"],
        ["--trainable_layer_num", "1"],
        ["--backbone", "resnet18", "--weights", "random"],
        ["--limit", "44"],
        "pixels", "weights", "versions", "device", "format",
    ],
)  # fmt: skip
def test_each_thing_that_values_depend_on_makes_another_cache(change, weights, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    flags = ["--feature_cache", str(cache)]
    values_of(frozen_config(weights, *flags))
    if change == "pixels":
        change_images(monkeypatch, "Digits", one_level_brighter)
    elif change == "weights":
        state = torch.load(weights, weights_only=True)
        state["features.0.bias"][3] += 1e-6
        weights = str(tmp_path / "changed.pth")
        torch.save(state, weights)
    elif change == "versions":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif change == "device":
        monkeypatch.setattr(feature_cache, "processor_name", lambda device: "another processor")
    elif change == "format":
        monkeypatch.setattr(feature_cache, "FORMAT", 0)
    else:
        flags += change
    config = frozen_config(weights, *flags)
    before, after = folders_of(cache, config)
    assert len(before) == 1
    assert len(after) == 2
    off = values_of(config.replace(feature_cache="off"))
    assert all(torch.equal(values, off[name]) for name, values in values_of(config).items())


@pytest.mark.parametrize("dataset", ["Digits", "Flickr25K"])
def test_the_key_says_whether_images_are_normalised_and_caches_of_earlier_versions_count(dataset, photo_root):
    images = splits_of(dataset, photo_root / "datasets", photo_root / "data", limit=9).query
    earlier = {
        "Digits": "(8, 8, 3) enlarged and normalised",
        "Flickr25K": "Compose(\n    Resize(size=37, interpolation=bilinear, max_size=None, antialias=True)\n    "
        "CenterCrop(size=(32, 32))\n    ToTensor()\n    Normalize(mean=(0.485, 0.456, 0.406), "
        "std=(0.229, 0.224, 0.225))\n)",
    }[dataset]
    backbone, names = build_backbone("convnet", "random", 0, bf16=False), np.sort(images.identities())
    first, second = (
        feature_cache.cache_key(backbone, images, names, Preprocessing(32, "cpu", 0, normalized), {})
        for normalized in (True, False)
    )
    assert first["transform"] == earlier
    assert second.pop("transform") == earlier.replace(" and normalised", "").split("\n    Normalize")[0] + (
        "\n)" if dataset == "Flickr25K" else ""
    )
    assert first.keys() - second.keys() == {"transform"}
    assert second.items() <= first.items()


@pytest.mark.parametrize("change", ["nothing", "time", "size", "transform"])
def test_photos_that_changed_make_another_cache(change, tmp_path, monkeypatch, weights):
    """The flags are the same before and after: but for the change, the cache would be taken."""
    write_flickr25k(tmp_path, 50)
    cache = tmp_path / "cache"
    config = frozen_config(
        weights, "--dataset", "Flickr25K", "--data_root", str(tmp_path / "datasets"), "--list_root",
        str(tmp_path / "data"), "--feature_cache", str(cache), "--limit", "1000",
    )  # fmt: skip
    values_of(config)
    path = tmp_path / "datasets" / "Flickr25K" / "mirflickr" / "im7.jpg"
    stat = path.stat()
    if change == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "transform":
        original = transforms.photo_transform
        changed = lambda *how: transforms.transforms.Compose(original(*how).transforms[1:])  # noqa: E731
        monkeypatch.setattr(transforms, "photo_transform", changed)
    before, after = folders_of(cache, config)
    assert len(before) == 1
    assert len(after - before) == (0 if change == "nothing" else 1)
    off = values_of(config.replace(feature_cache="off"))
    assert all(torch.equal(values, off[name]) for name, values in values_of(config).items())


def truncated(folder):
    path = folder / "features.npy"
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(folder):
    path = folder / "features.npy"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        one_bit,
        lambda folder: (folder / "key.json").write_text("{"),
        lambda folder: (folder / "key.json").write_text("[" * 100000),
        lambda folder: (folder / "key.json").unlink(),
        lambda folder: (folder / "features.npy").unlink(),
        lambda folder: (folder / "key.json").write_text((folder / "key.json").read_text().replace('"bf16"', '"fp32"')),
    ],
)
def test_a_damaged_cache_is_made_anew(damage, weights, tmp_path):
    config = frozen_config(weights, "--feature_cache", str(tmp_path))
    expected = values_of(config)
    folder = next(tmp_path.iterdir())
    whole = {name: (folder / name).read_bytes() for name in ("features.npy", "key.json")}
    damage(folder)
    assert all(torch.equal(values, expected[name]) for name, values in values_of(config).items())
    assert whole == {name: (folder / name).read_bytes() for name in whole}


# ---------------------------------------------------------------- faults

SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import loaders, main
original = loaders.test_batches
def slow(*arguments):
    for batch in original(*arguments):
        yield batch
        time.sleep({pause})
loaders.test_batches = slow
sys.exit(main.main(sys.argv[1:]))
"""


def start(pause, *flags):
    code = SLOW.format(root=str(ROOT), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_while_writing(weights, tmp_path):
    cache = tmp_path / "cache"
    flags = [*SQUEEZENET, "--limit", "200", "--weights", weights, "--epoch_num", "0"]
    process = start(30, *SMALL, *flags, "--output", str(tmp_path), "--feature_cache", str(cache))
    # half of the features are there as soon as the first batch is
    wait_for(lambda: any(path.stat().st_size > 1024 for path in cache.glob("*/.features.npy.tmp")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(cache.glob("*/.features.npy.tmp"))
    assert not list(cache.glob("*/key.json"))
    config = frozen_config(weights, "--limit", "200")
    expected = values_of(config)
    cached = values_of(config.replace(feature_cache=str(cache)))
    assert all(torch.equal(values, expected[name]) for name, values in cached.items())
    assert not list(cache.glob("*/.features.npy.tmp"))


def test_two_processes_at_once_fill_one_cache(weights, tmp_path):
    flags = [*SQUEEZENET, "--limit", "200", "--weights", weights, "--epoch_num", "0"]
    cached = ["--feature_cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    processes = [start(0.5, *SMALL, *flags, *cached, "--notes", name) for name in ("a", "b")]
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("waiting for another process" in output for output in outputs) == 1
    assert sum("computing the features" in output for output in outputs) == 1
    small_run(tmp_path, *flags, notes="off")
    codes = [np.load(tmp_path / "checkpoints" / name / "db_codes.npy") for name in ("off", "a", "b")]
    np.testing.assert_array_equal(codes[1], codes[0])
    np.testing.assert_array_equal(codes[2], codes[0])


def test_a_disk_that_is_too_small_is_named_before_anything_is_computed(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: Namespace(free=2**20))
    cache = tmp_path / "cache"
    flags = [*SQUEEZENET, "--weights", weights, "--output", str(tmp_path), "--feature_cache", str(cache)]
    assert main.main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert "need 0.00 GB" in error
    assert "--feature_cache DIR" in error
    assert not list(cache.glob("*/*features*"))


def test_a_cache_that_cannot_be_written_is_said_in_one_line(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        values_of(frozen_config(weights, "--feature_cache", str(tmp_path / "file")))
