"""A training on cached features of views is the run itself: its MAP is not only distributed alike, it is the same."""

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import FROZEN, config_of, small_run

import engine
from experiments import sweep
from experiments.view_cache import CachedViews, ViewCache, cache_key, can_cache
from readers import Images
from utils import InputError


def frozen(*flags):
    return config_of(*FROZEN, *flags)


def filled(root, configuration, splits, backbone):
    """The cache of a configuration's views, as trials use it."""
    cache = ViewCache(root, cache_key(configuration, sweep.fingerprint(splits, backbone)))
    loader = engine.build_loader(configuration, splits)
    cache.fill(configuration.epoch_num, loader, backbone, len(splits.train))
    return cache


@pytest.mark.parametrize(
    "flags",
    [[], ["--recipe", "release", "--symmetric_distance", "--seed", "5"], ["--normalize_features"], ["--int8_views"]],
)
def test_training_on_cached_views_is_training_on_the_images(flags, weights, tmp_path):
    flags = [*flags, "--weights", weights]
    folder = small_run(tmp_path, *FROZEN, *flags)
    expected = json.loads((folder / "metrics.json").read_text())["history"]
    configuration = frozen(*flags)
    shared = sweep.Shared(configuration, tmp_path / "views")
    assert can_cache(shared.backbone)
    result = sweep.train(configuration, shared, tmp_path)
    assert len(result["history"]) == 3
    for ours, theirs in zip(result["history"], expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss/total_loss"] == pytest.approx(theirs["loss/total_loss"], rel=1e-4)
        assert ours["val_mAP"] == pytest.approx(theirs["val_mAP"], abs=5e-3)
    assert result["map"] == max(epoch["val_mAP"] for epoch in result["history"])
    assert len(list((tmp_path / "views").glob("*/epoch*.npy"))) == 3


def test_a_cache_knows_kornias_version_if_there_is_one(monkeypatch):
    import kornia

    assert kornia.__version__ in cache_key(frozen(), "")["versions"]
    monkeypatch.setattr("importlib.metadata.distribution", mock.Mock(side_effect=PackageNotFoundError))
    assert None in cache_key(frozen(), "")["versions"]


def test_a_cache_holds_the_features_of_the_views(weights, tmp_path):
    configuration = frozen("--weights", weights)
    splits, method = engine.build(configuration)
    cache, n = filled(tmp_path, configuration, splits, method.backbone), len(splits.train)
    loader, cached = engine.build_loader(configuration, splits), CachedViews(cache, n, configuration.batch_size, "cpu")
    loader.set_epoch(2)
    cached.set_epoch(2)
    assert len(loader) == len(cached)
    for views, features in zip(loader, cached, strict=True):
        torch.testing.assert_close(features, method.backbone(views), atol=1e-5, rtol=1e-4)
    others = CachedViews(cache, n, 7, "cpu")  # other batches of the same views
    others.set_epoch(2)
    first_views = [torch.cat([batch.chunk(2)[0] for batch in batches]) for batches in (cached, others)]
    assert torch.equal(*first_views)
    whole, length = list(others), len(others)
    others.set_epoch(2, first_step=3)
    assert len(others) == length
    assert all(torch.equal(a, b) for a, b in zip(others, whole[3:], strict=True))


def test_a_cache_holds_the_images_that_a_trial_leaves_out(weights, tmp_path, monkeypatch):
    configuration = frozen("--weights", weights, "--drop_last")
    options = engine.view_options(configuration)
    monkeypatch.setattr(engine, "view_options", lambda _: replace(options, drop_last=True))
    shared = sweep.Shared(configuration, tmp_path)
    assert len(shared.splits.train) == 60
    cached = shared.cached_views(configuration)
    assert [len(batch) for batch in cached] == [48, 48]  # both views of 24 images, twice
    assert len(cached) == 2
    cached.set_epoch(0, first_step=1)
    assert [len(batch) for batch in cached] == [48]
    whole = CachedViews(shared.view_cache, 60, configuration.batch_size, "cpu")
    assert [len(batch) for batch in whole] == [48, 48, 24]
    assert len(CachedViews(shared.view_cache, 60, 20, "cpu", drop_last=True)) == 3


def test_spqs_views_depend_on_the_batch_size(monkeypatch):
    """The order of the colour operations is drawn for each batch."""
    key = cache_key(frozen(), "")
    assert "batch_size" not in key
    assert cache_key(frozen("--batch_size", "9"), "") == key
    keys = [cache_key(frozen("--augmentation", "SPQ", "--batch_size", size), "") for size in ("9", "10")]
    assert keys[0] != keys[1]
    made = []
    monkeypatch.setattr(sweep, "Shared", lambda configuration, _: made.append(configuration.batch_size))
    shared = sweep.SharedBySeed(None)
    for flags in (["9"], ["10"], ["9", "--augmentation", "SPQ"], ["10", "--augmentation", "SPQ"]):
        shared.of(frozen("--batch_size", *flags))
    assert made == [9, 9, 10]


def test_a_cache_is_filled_once_and_of_one_thing(weights, tmp_path):
    configuration = frozen("--weights", weights)
    splits, method = engine.build(configuration)
    folder = filled(tmp_path, configuration, splits, method.backbone).folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert before.keys() == {f"epoch00{e}.npy" for e in range(3)}
    (folder / "epoch001.npy").unlink()
    (folder / "epoch002.json").unlink()  # as if it had been interrupted
    assert filled(tmp_path, configuration, splits, method.backbone).folder == folder
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert {name for name in after if after[name] != before[name]} == {"epoch001.npy", "epoch002.npy"}
    folders = {folder}
    inverted = splits.each(lambda images: Images(255 - images.pixels, images.labels))
    folders.add(filled(tmp_path, configuration, inverted, method.backbone).folder)
    for flags in (["--seed", "3"], ["--precision", "bf16"], ["--image_size", "40"], ["--views", "pil"]):
        other = frozen("--weights", weights, *flags)
        folders.add(filled(tmp_path, other, *with_backbone(engine.build(other))).folder)
    method.backbone.net.features[0].weight.data += 1
    folders.add(filled(tmp_path, configuration, splits, method.backbone).folder)
    assert len(folders) == 7
    same = frozen("--weights", weights, "--hp_gamma", "0.1", "--batch_size", "9", "--M", "4", "--num_workers", "1")
    assert filled(tmp_path, same, *with_backbone(engine.build(same))).folder == folder


def with_backbone(built):
    splits, method = built
    return splits, method.backbone


@pytest.mark.parametrize("flags", [["--trainable_layer_num", "1"], ["--backbone", "vgg16"]])
def test_what_learns_or_drops_out_has_no_cache(flags, tmp_path):
    configuration = frozen("--weights", "random", *flags)
    splits, method = engine.build(configuration)
    with pytest.raises(InputError, match="without trained blocks and dropout"):
        filled(tmp_path / "views", configuration, splits, method.backbone)
    assert not (tmp_path / "views").exists()


def flip_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_in_features(folder):
    flip_bit(folder / "epoch001.npy", -6)  # of the last number but one, not its sign


def flip_in_header(folder):
    flip_bit(folder / "epoch001.npy", 8)


def flip_in_checksum(folder):
    flip_bit(folder / "epoch001.json", 20)


def cut(folder):
    path = folder / "epoch001.npy"
    path.write_bytes(path.read_bytes()[:-4])


def other_shape(folder):
    path = folder / "epoch001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [2, 3, 4]}))


@pytest.mark.parametrize("damage", [flip_in_features, flip_in_header, flip_in_checksum, cut, other_shape])
def test_a_damaged_file_is_computed_again_with_the_same_result(damage, weights, tmp_path, caplog):
    configuration = frozen("--weights", weights)

    def trained() -> dict:
        return sweep.train(configuration, sweep.Shared(configuration, tmp_path / "views"), tmp_path / damage.__name__)

    expected = trained()
    (folder,) = (tmp_path / "views").iterdir()
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "damaged" not in caplog.text
    damage(folder)
    for path in (tmp_path / damage.__name__).glob("checkpoints/*/last.cpt"):
        path.unlink()  # the training begins anew
    again = trained()
    assert again["history"] == expected["history"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound
    warnings = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(warnings) == 1
    assert "epoch001.npy is damaged" in warnings[0]


def test_files_are_checked_once_per_process(weights, tmp_path, monkeypatch):
    configuration = frozen("--weights", weights)
    shared = sweep.Shared(configuration, tmp_path / "views")
    shared.cached_views(configuration)
    checked = []
    monkeypatch.setattr(ViewCache, "_whole", lambda self, epoch, _: checked.append(epoch) or True)
    again = sweep.Shared(configuration, tmp_path / "views")
    for epochs in (2, 2, 3, 1):
        again.cached_views(configuration.replace(epoch_num=epochs))
    assert checked == [0, 1, 2]
    views = again.cached_views(configuration)
    assert np.isfinite(next(iter(views)).numpy()).all()
