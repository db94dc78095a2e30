"""A training on a bank of features is the run itself: its MAP is not only distributed alike, it is the same."""

import json

import pytest
import torch
from conftest import FROZEN
from test_engine import SMALL, small_run

import data
import main
from experiments import sweep, view_cache
from utils import InputError


def options(*flags):
    return main.resolve(main.build_parser().parse_args([*SMALL, *FROZEN, *flags]))


@pytest.mark.parametrize("flags", [[], ["--recipe", "release", "--symmetric_distance", "--seed", "5"]])
def test_training_on_the_bank_is_training_on_the_images(flags, weights, tmp_path):
    flags = [*flags, "--weights", weights]
    folder = small_run(tmp_path, *FROZEN, *flags)
    expected = json.loads((folder / "metrics.json").read_text())["history"]
    args = options(*flags)
    ground = sweep.Ground(args, tmp_path / "bank")
    assert view_cache.can_bank(ground.backbone)
    result = sweep.train(args, ground, tmp_path)
    assert len(result["history"]) == 3
    for ours, theirs in zip(result["history"], expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss/total_loss"] == pytest.approx(theirs["loss/total_loss"], rel=1e-4)
        assert ours["val_mAP"] == pytest.approx(theirs["val_mAP"], abs=5e-3)
    assert result["map"] == max(epoch["val_mAP"] for epoch in result["history"])
    assert len(list((tmp_path / "bank").glob("*/epoch*.npy"))) == 3


def test_a_bank_holds_the_features_of_the_views(weights, tmp_path):
    args = options("--weights", weights)
    splits, model = main.build(args)
    folder = view_cache.build_bank(tmp_path, splits, model.backbone, args)
    loader, banked = data.train_loader(splits, args), view_cache.BankedViews(folder, len(splits.train), args)
    loader.batch_sampler.epoch = banked.batch_sampler.epoch = 2
    assert len(loader) == len(banked)
    for views, features in zip(loader, banked, strict=True):
        torch.testing.assert_close(features, model.backbone(views), atol=1e-5, rtol=1e-4)
    args.batch_size = 7  # other batches of the same views
    others = view_cache.BankedViews(folder, len(splits.train), args)
    others.batch_sampler.epoch = 2
    first_views = [torch.cat([batch.chunk(2)[0] for batch in some]) for some in (banked, others)]
    assert torch.equal(*first_views)


def test_a_bank_is_built_once_and_of_one_thing(weights, tmp_path):
    args = options("--weights", weights)
    splits, model = main.build(args)
    folder = view_cache.build_bank(tmp_path, splits, model.backbone, args)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert before.keys() == {f"epoch00{e}.npy" for e in range(3)}
    (folder / "epoch001.npy").unlink()  # as if it had been interrupted
    assert view_cache.build_bank(tmp_path, splits, model.backbone, args) == folder
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert {name for name in after if after[name] != before[name]} == {"epoch001.npy"}
    folders = {folder}
    inverted = splits.each(lambda images: data.Images(255 - images.pixels, images.labels))
    folders.add(view_cache.build_bank(tmp_path, inverted, model.backbone, args))
    for flags in (["--seed", "3"], ["--precision", "bf16"], ["--image_size", "40"]):
        other = options("--weights", weights, *flags)
        splits_, model_ = main.build(other)
        folders.add(view_cache.build_bank(tmp_path, splits_, model_.backbone, other))
    model.backbone.net.features[0].weight.data += 1
    folders.add(view_cache.build_bank(tmp_path, splits, model.backbone, args))
    assert len(folders) == 6


@pytest.mark.parametrize("flags", [["--trainable_layer_num", "1"], ["--backbone", "vgg16"]])
def test_what_learns_or_drops_out_has_no_bank(flags, tmp_path):
    args = options("--weights", "random", *flags)
    splits, model = main.build(args)
    with pytest.raises(InputError, match="without trained blocks and dropout"):
        view_cache.build_bank(tmp_path / "bank", splits, model.backbone, args)
    assert not (tmp_path / "bank").exists()
