"""Batches of views and of test images."""

import gc
import hashlib
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import loaders
import transforms
from data import Splits
from decoding import EncodedImage
from readers import ImageFiles, Images
from utils import InputError


def pictures(n=23):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    images = Images(pixels, np.arange(n))
    return Splits(images, images, images)


def train_loader(splits, kind="batched", workers=0, seed=1, batch_size=5):
    return loaders.train_loader(splits, loaders.ViewOptions(kind, 32, batch_size, seed), "cpu", workers)


def one_epoch(epoch, workers=0, seed=1, batch_size=5, kind="batched"):
    loader = train_loader(pictures(), kind, workers, seed, batch_size)
    loader.set_epoch(epoch)
    return list(loader)


def test_batches_hold_every_image_once_and_the_last_is_smaller():
    sampler = loaders.ShuffledBatches(23, 5, seed=1)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert len(sampler) == 5
    assert sorted(index for batch in batches for index, _ in batch) == list(range(23))
    sampler.epoch = 1
    assert [i for b in sampler for i, _ in b] != [i for b in batches for i, _ in b]


def test_a_last_batch_that_is_smaller_can_be_left_out():
    kept, whole = (loaders.ShuffledBatches(23, 5, 1, drop_last) for drop_last in (True, False))
    assert list(kept) == list(whole)[:4]
    assert len(kept) == 4
    kept.first = 3
    assert [len(batch) for batch in kept] == [5]
    assert len(loaders.ShuffledBatches(20, 5, 1, drop_last=True)) == 4
    options = loaders.ViewOptions("batched", 32, 5, 1, drop_last=True)
    assert [len(batch) for batch in loaders.train_loader(pictures(), options, "cpu", 0)] == [10] * 4


@pytest.mark.parametrize("augmentation", ["MeCoQ", "SPQ"])
def test_an_epoch_without_a_whole_batch_is_refused(augmentation):
    options = loaders.ViewOptions("batched", 32, 24, 1, augmentation, drop_last=True)
    with pytest.raises(InputError, match=r"^23 training images make no whole batch of 24, .*--no-drop_last$"):
        loaders.train_loader(pictures(), options, "cpu", 0)
    assert len(loaders.train_loader(pictures(), replace(options, batch_size=23), "cpu", 0)) == 1


def as_pixels(x):
    """Normalised images, in [0, 1] again."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return x * std + mean


@pytest.mark.parametrize("kind", ["batched", "pil"])
@pytest.mark.parametrize("place", ["tiny", "memory", "disk"])
def test_views_need_not_be_normalised(kind, place, photo_root):
    source = data.Source("Flickr25K", "I", 1, photo_root / "datasets", photo_root / "data")
    splits = pictures() if place == "tiny" else data.load_splits(source)
    if place == "memory":
        images = Images(np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3), dtype=np.uint8), np.arange(23))
        splits = Splits(images, images, images)
    options = loaders.ViewOptions(kind, 40, 12, 1)
    for a, b in zip(
        loaders.train_loader(splits, options, "cpu", 0),
        loaders.train_loader(splits, replace(options, normalized=False), "cpu", 0),
        strict=True,
    ):
        torch.testing.assert_close(as_pixels(a), b, atol=1e-5, rtol=0)
        assert -1e-5 < b.min() < 0.2
        assert 0.5 < b.max() < 1 + 1e-5


@pytest.mark.parametrize("kind", ["batched", "pil"])
def test_views_depend_on_seed_and_epoch_but_not_on_workers(kind):
    before = torch.random.get_rng_state()
    first = one_epoch(0, kind=kind)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first, one_epoch(0, workers=2, kind=kind), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], one_epoch(1, kind=kind)[0])
    assert not torch.equal(first[0], one_epoch(0, seed=2, kind=kind)[0])
    assert not torch.equal(*first[0].chunk(2))
    assert [batch.shape for batch in first] == [(10, 3, 32, 32)] * 4 + [(6, 3, 32, 32)]


def views_by_image(loader, epoch):
    """Index of an image -> both its views in an epoch."""
    loader.set_epoch(epoch)
    rows = [[index for index, _ in batch] for batch in loader.batches]
    pairs = [torch.stack(batch.chunk(2), dim=1) for batch in loader]
    return {i: pair for batch, views in zip(rows, pairs, strict=True) for i, pair in zip(batch, views, strict=True)}


@pytest.mark.parametrize("kind", ["batched", "pil"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_image_has_other_views_in_each_epoch(kind, place, photo_root):
    """Image by image, for the order of images changes anyway."""
    source = data.Source("Flickr25K", "I", 1, photo_root / "datasets", photo_root / "data")
    loader = train_loader(pictures() if place == "memory" else data.load_splits(source), kind)
    first, second, again = views_by_image(loader, 0), views_by_image(loader, 1), views_by_image(loader, 0)
    assert len(first) >= 20
    assert first.keys() == second.keys()
    for i, pair in first.items():
        assert torch.equal(pair, again[i])
        assert not torch.equal(pair[0], second[i][0])
        assert not torch.equal(pair[1], second[i][1])
        assert not torch.equal(*pair)


def one_sided(right, folder=None):
    """Images that are dark on their left or `right` `[n]`, in memory or in a folder: each crop is wide enough to show
    it, and no colour operation turns it."""
    pixels = np.full((len(right), 32, 32, 3), 60, np.uint8)
    pixels[~right, :, 16:] = 190
    pixels[right, :, :16] = 190
    images = Images(pixels, np.arange(len(right)))
    if folder is None:
        return images
    names = [f"{i}.png" for i in range(len(right))]
    for i, name in enumerate(names):
        images.picture(i).save(folder / name)
    return ImageFiles(folder, np.array(names), images.labels[:, None])


def dark_on_the_right(views):
    return views[..., :8].mean(dim=(1, 2, 3)) > views[..., 24:].mean(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", ["batched", "pil"])
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_views_are_mirrored_only_if_that_is_the_same_thing(mirrored, kind, place, tmp_path):
    images = one_sided(np.zeros(40, dtype=bool), tmp_path if place == "disk" else None)
    turned = dark_on_the_right(torch.cat(list(train_loader(Splits(images, images, images, mirrored), kind))))
    assert len(turned) == 80
    assert 25 < turned.sum() < 55 if mirrored else not turned.any()


@pytest.mark.parametrize("kind", ["batched", "pil"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_first_views_of_a_batch_come_first_in_the_order_of_the_second(kind, place, tmp_path):
    right = np.random.default_rng(0).random(43) < 0.5
    images = one_sided(right, tmp_path if place == "disk" else None)
    loader = train_loader(Splits(images, images, images, mirrored=False), kind, batch_size=10)
    rows = [[index for index, _ in batch] for batch in loader.batches]
    assert [len(row) for row in rows] == [10, 10, 10, 10, 3]
    for row, views in zip(rows, loader, strict=True):
        for half in dark_on_the_right(views).chunk(2):
            assert half.tolist() == right[row].tolist()


def test_photos_are_decoded_at_the_smallest_size_that_is_enough_for_both_crops(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((300, 500, 3), np.uint8)).save(tmp_path / "a.jpg")
    images = ImageFiles(tmp_path, np.array(["a.jpg"]), np.zeros((1, 1)))
    original, sizes = EncodedImage.decoded, []

    def decoded(image, least):
        pixels = original(image, least)
        sizes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(EncodedImage, "decoded", decoded)
    found = set()
    for seed in range(60):
        _, drawn = loaders.photo_views(images, True, 66, 0, seed)
        scale = round(300 / sizes[-1][0])
        assert sizes[-1] == (-(-300 // scale), -(-500 // scale), 3)
        least = float(drawn[:, transforms.CROP][:, 2:].min())
        assert least / scale >= 66 - 1  # whole pixels
        assert scale == 8 or least / (2 * scale) < 66 + 1
        found.add(scale)
    assert found == {2, 4}


@pytest.mark.parametrize("kind", ["batched", "pil"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_from_any_step(kind, workers):
    loader = train_loader(pictures(), kind, workers)
    loader.set_epoch(3)
    whole = list(loader)
    assert len(loader) == len(whole) == 5
    for first_step in (2, 5):
        loader.set_epoch(3, first_step)
        rest = list(loader)
        assert len(loader) == 5
        assert len(rest) == 5 - first_step
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first_step:], strict=True))
    loader.set_epoch(3)
    assert len(list(loader)) == 5


def test_an_epoch_keeps_its_workers_for_the_next_even_if_it_is_left():
    """They end with the loader."""
    loader = train_loader(pictures(), "pil", 1)
    whole, workers = [], []
    for epoch in (1, 0):
        loader.set_epoch(epoch)
        whole.append(next(iter(loader)))
        workers.append([process.pid for process in multiprocessing.active_children()])
    assert workers[0] == workers[1]
    assert len(workers[0]) == 1
    for expected, epoch in zip(whole, (1, 0), strict=True):
        assert torch.equal(one_epoch(epoch, kind="pil")[0], expected)
    del loader
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_come_in_order_however_many_workers_read_them(workers, photo_root):
    source = data.Source("Flickr25K", "I", 1, photo_root / "datasets", photo_root / "data")
    images = data.load_splits(source).database
    images = images.subset(np.arange(150) % len(images))
    batches = list(loaders.test_batches(images, loaders.Preprocessing(32, "cpu", workers)))
    assert [batch.shape for batch in batches] == [(128, 3, 32, 32), (22, 3, 32, 32)]
    transform = transforms.photo_transform(32)
    expected = torch.stack([transform(images.picture(i)) for i in range(150)])
    assert torch.equal(torch.cat(batches), expected)
    plain = loaders.test_batches(images, loaders.Preprocessing(32, "cpu", workers, normalized=False))
    torch.testing.assert_close(torch.cat(list(plain)), as_pixels(expected))


def test_test_images_in_memory_are_enlarged():
    images = pictures(130).query
    batches = list(loaders.test_batches(images, loaders.Preprocessing(48, "cpu", 4)))
    assert [batch.shape for batch in batches] == [(128, 3, 48, 48), (2, 3, 48, 48)]
    expected = transforms.enlarge(torch.from_numpy(images.pixels), 48)
    assert torch.equal(torch.cat(batches), expected)
    plain = loaders.test_batches(images, loaders.Preprocessing(48, "cpu", 4, normalized=False))
    torch.testing.assert_close(torch.cat(list(plain)), as_pixels(expected), atol=1e-6, rtol=1e-5)


def test_test_images_of_the_right_size_are_their_pixels():
    images = pictures().query
    (batch,) = loaders.test_batches(images, loaders.Preprocessing(16, "cpu", 0, normalized=False))
    assert torch.equal(batch, torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 255)


def test_random_streams_are_those_of_earlier_versions():
    """Order of images and seeds of views; the digests were taken before the loaders had a file of their own."""
    batches = loaders.ShuffledBatches(1000, 7, seed=2021)
    batches.epoch = 3
    columns = zip(*(row for batch in batches for row in batch), strict=True)
    digests = [hashlib.sha256(np.array(column, np.int64).tobytes()).hexdigest()[:16] for column in columns]
    assert digests == ["4aa4491b54f73b84", "a3a856e04c64bc20"]
