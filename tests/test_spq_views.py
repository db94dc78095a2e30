"""SPQ's augmentation: against what kornia 0.5.10 gave (golden numbers), and against the installed kornia's own."""

import math
import sys

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import crop_and_resize
from PIL import Image
from scipy import stats

import data
import loaders
import spq_views
import transforms
from data import Splits
from readers import ImageFiles, Images
from transforms import CROP, FACTORS, FLIP, GREYED, ORDER, SIGMA

VARIANTS = ("SPQ", "SPQ-release")


def untouched(n, height, width):
    """Numbers of views that are the whole image."""
    numbers = torch.zeros(n, 15)
    numbers[:, CROP] = torch.tensor([0.0, 0, height, width])
    numbers[:, ORDER] = -1
    return numbers


def drawn(n, size, seed=1, mirrored=True):
    generator = torch.Generator().manual_seed(seed)
    return spq_views.with_one_order(spq_views.draw_views(n, size, mirrored, generator), generator)


def random_pixels(n, height, width):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- golden numbers


@pytest.fixture(scope="module")
def views(golden, device):
    """name -> an array of the golden views; images come `[B, H, W, 3]`. `views.device`: where they are made."""
    arrays = golden("spq")
    given = lambda name: torch.from_numpy(arrays[f"views/{name}"])  # noqa: E731
    given.device = device
    return given


def assert_golden(views, numbers, name):
    images = views("image").permute(0, 2, 3, 1).to(views.device)
    ours = spq_views.augment(images, numbers, 32, "SPQ-release").cpu()
    torch.testing.assert_close(ours, views(name), atol=1e-4, rtol=0)
    assert (views("image") - views(name)).abs().mean() > 0.01  # it does something


@pytest.mark.parametrize("order", ["0123", "3102"])
def test_golden_colours(order, views):
    numbers = untouched(2, 32, 32)
    numbers[:, ORDER] = torch.tensor([float(digit) for digit in order])
    names = ("brightness", "contrast", "saturation", "hue")
    numbers[:, FACTORS] = torch.stack([views(f"{name}_factor") for name in names], dim=1)
    assert_golden(views, numbers, f"jitter_{order}")


def test_golden_grey(views):
    numbers = untouched(2, 32, 32)
    numbers[:, GREYED] = 1
    assert_golden(views, numbers, "gray")


def test_golden_blur_is_the_same_whatever_sigma_was_drawn(views):
    numbers = untouched(2, 32, 32)
    numbers[:, SIGMA] = torch.tensor([0.3, 1.7])
    assert_golden(views, numbers, "blur")


def test_golden_crop(views):
    left, top, right, bottom = views("box").float().T
    numbers = untouched(2, 32, 32)
    numbers[:, CROP] = torch.stack([top, left, bottom - top, right - left], dim=1)
    assert_golden(views, numbers, "crop")


# ---------------------------------------------------------------- the installed kornia


def by_kornia(pixels, numbers, size, variant):
    """Views with given numbers, image by image, by kornia's own augmentations: `ColorJiggle` kept the old formulas."""
    jitter = (K.ColorJiggle if variant == "SPQ-release" else K.ColorJitter)(0.4, 0.4, 0.4, 0.1)
    made = []
    for image, row in zip(pixels, numbers, strict=True):
        top, left, height, width = row[CROP].tolist()
        right, bottom = left + width - 1, top + height - 1
        corners = torch.tensor([[[left, top], [right, top], [right, bottom], [left, bottom]]])
        x = image.permute(2, 0, 1)[None] / 255
        x = crop_and_resize(x, corners, (size, size), align_corners=True)
        x = x.flip(3) if row[FLIP] else x
        if row[ORDER][0] >= 0:
            names = ("brightness", "contrast", "saturation", "hue")
            factors = {f"{name}_factor": row[FACTORS][i : i + 1] for i, name in enumerate(names)}
            x = jitter.apply_transform(x, factors | {"order": row[ORDER].long()}, {})
        x = rgb_to_grayscale(x).repeat(1, 3, 1, 1) if row[GREYED] else x
        if row[SIGMA]:
            side = {16: 3, 32: 3, 20: 3, 96: 9}[size]
            sigma = row[SIGMA].item()
            x = gaussian_blur2d(x, (side, side), (0.1, 2.0) if variant == "SPQ-release" else (sigma, sigma))
        made.append(x[0])
    return torch.stack(made)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("source", "size"), [((32, 32), 32), ((8, 8), 16), ((32, 32), 96), ((24, 40), 20)])
def test_views_are_kornias_with_the_same_numbers(source, size, variant, device):
    pixels = random_pixels(60, *source)
    numbers = drawn(60, source)
    ours = spq_views.augment(pixels.to(device), numbers, size, variant).cpu()
    assert ours.shape == (60, 3, size, size)
    assert ours.dtype == torch.float32
    assert ours.min() >= 0
    assert ours.max() <= 1
    torch.testing.assert_close(ours, by_kornia(pixels, numbers, size, variant), atol=1e-4, rtol=0)


def test_both_variants_differ_in_colours_and_blur_alone():
    pixels, numbers = random_pixels(60, 32, 32), drawn(60, (32, 32))
    new, old = (spq_views.augment(pixels, numbers, 32, variant) for variant in VARIANTS)
    same = (new - old).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert torch.equal(same, (numbers[:, ORDER][:, 0] < 0) & (numbers[:, SIGMA] == 0))
    assert same.any()


def test_pixels_may_be_floats_and_views_normalised():
    pixels, numbers = random_pixels(9, 32, 32), drawn(9, (32, 32))
    views = spq_views.augment(pixels, numbers, 32, "SPQ")
    assert torch.equal(spq_views.augment(pixels.float() / 255, numbers, 32, "SPQ"), views)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = spq_views.augment(pixels, numbers, 32, "SPQ", normalized=True)
    torch.testing.assert_close(normalised, (views - mean) / std)


@pytest.mark.parametrize(("size", "side"), [(8, 3), (16, 3), (32, 3), (64, 7), (96, 9), (128, 13), (224, 23)])
def test_the_blurs_kernel_is_a_tenth_of_the_side_and_odd(size, side):
    assert spq_views.kernel_side(size) == side


@pytest.mark.parametrize("variant", VARIANTS)
def test_augmenting_reads_nothing_from_the_device(variant):
    """See `test_a_step_reads_nothing_from_the_device`."""
    pixels = torch.empty(20, 32, 32, 3, dtype=torch.uint8, device="meta")
    assert spq_views.augment(pixels, drawn(20, (32, 32)), 48, variant, True).shape == (20, 3, 48, 48)


def test_that_kornia_is_missing_is_said_before_a_run_begins(images, monkeypatch):
    spq_views.colours.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ModuleNotFoundError, match="kornia"):
        train_loader(images)


# ---------------------------------------------------------------- what is drawn


def crops_by_rejection(n, height, width):
    """Heights, widths, tops and lefts of crops, one by one: smaller than the image, the whole image after ten tries."""
    rng, found = np.random.default_rng(5), []
    for _ in range(n):
        h, w = height, width
        for _ in range(10):
            area, ratio = rng.uniform(0.08, 1) * height * width, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            tried = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < tried[0] < height and 0 < tried[1] < width:
                h, w = tried
                break
        found.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
    return np.array(found, float)


@pytest.mark.parametrize("side", [8, 32, 96])
def test_crops_are_drawn_as_described(side):
    ours = drawn(6000, (side, side))[:, CROP].double().numpy()
    theirs = crops_by_rejection(6000, side, side)
    for statistic in (
        lambda crop: crop[:, 0],
        lambda crop: crop[:, 1],
        lambda crop: crop[:, 2],
        lambda crop: crop[:, 3],
        lambda crop: crop[:, 2] * crop[:, 3],
        lambda crop: crop[:, 3] / crop[:, 2],
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()
    assert ((ours[:, 2:] < side).all(axis=1) | (ours[:, 2:] == side).all(axis=1)).all()
    assert (ours[:, 2:] == side).mean() < 0.01


def test_numbers_are_drawn_as_described():
    numbers = drawn(4000, (32, 32)).double().numpy()
    jittered, blurred = numbers[:, ORDER][:, 0] >= 0, numbers[:, SIGMA] > 0
    for share, expected in (
        (numbers[:, FLIP].mean(), 0.5),
        (jittered.mean(), 0.8),
        (numbers[:, GREYED].mean(), 0.2),
        (blurred.mean(), 0.5),
    ):
        assert share == pytest.approx(expected, abs=0.025)
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        values = numbers[jittered, FACTORS][:, column]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 0.001
    assert stats.kstest(numbers[blurred, SIGMA], "uniform", (0.1, 1.9)).pvalue > 0.001
    assert not drawn(200, (32, 32), mirrored=False)[:, FLIP].any()


def test_a_batch_has_one_order_of_colours():
    orders = []
    for seed in range(1200):
        rows = drawn(12, (32, 32), seed)[:, ORDER]
        assert len({tuple(row) for row in rows[rows[:, 0] >= 0].tolist()}) <= 1
        orders.append(tuple(rows.amax(dim=0).tolist()))
    seen, counts = np.unique(orders, axis=0, return_counts=True)
    assert [sorted(order) for order in seen.tolist()] == [[0, 1, 2, 3]] * 24
    assert stats.chisquare(counts).pvalue > 0.001


# ---------------------------------------------------------------- batches


def train_loader(images, variant="SPQ", workers=0, seed=1, mirrored=True, **options):
    options = {"normalized": False, "batch_size": 5} | options
    options = loaders.ViewOptions("batched", 32, seed=seed, augmentation=variant, **options)
    return loaders.train_loader(Splits(images, images, images, mirrored), options, "cpu", workers)


@pytest.fixture(params=["memory", "disk"])
def images(request, photo_root):
    """23 images."""
    if request.param == "memory":
        return Images(random_pixels(23, 16, 16).numpy(), np.arange(23))
    source = data.Source("Flickr25K", "I", 1, photo_root / "datasets", photo_root / "data")
    return data.load_splits(source).database.subset(np.arange(23))


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_depend_on_seed_and_epoch_but_not_on_workers(variant, images):
    def one_epoch(epoch, **options):
        loader = train_loader(images, variant, **options)
        loader.set_epoch(epoch)
        return list(loader)

    before = torch.random.get_rng_state()
    first = one_epoch(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [batch.shape for batch in first] == [(10, 3, 32, 32)] * 4 + [(6, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(first, one_epoch(0, workers=2), strict=True))
    assert not torch.equal(first[0], one_epoch(1)[0])
    assert not torch.equal(first[0], one_epoch(0, seed=2)[0])
    assert not torch.equal(*first[0].chunk(2))


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_goes_on_from_any_step(drop_last, images):
    loader = train_loader(images, drop_last=drop_last)
    loader.set_epoch(3)
    whole = list(loader)
    assert len(loader) == len(whole) == (4 if drop_last else 5)
    for first_step in (2, 4):
        loader.set_epoch(3, first_step)
        rest = list(loader)
        assert len(rest) == len(whole) - first_step
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first_step:], strict=True))


def test_each_batch_and_view_has_its_own_order_and_numbers(images):
    numbers = {}
    for epoch in (0, 1):
        loader = train_loader(images)
        loader.set_epoch(epoch)
        numbers[epoch] = [part for _, drawn in loader.loader for part in drawn.chunk(2)]
    orders = [tuple(part[:, ORDER].amax(dim=0).tolist()) for parts in numbers.values() for part in parts]
    assert len(orders) == 20
    assert len(set(orders)) > 9  # of 24
    for parts in numbers.values():
        crops, factors = torch.cat(parts)[:, CROP], torch.cat(parts)[:, FACTORS]
        assert (crops[:, :2] + crops[:, 2:]).amax(dim=0).tolist() == [32 if images.on_disk else 16] * 2
        assert len(factors.unique(dim=0)) == 46
    assert not set(map(tuple, torch.cat(numbers[0])[:, FACTORS].tolist())) & set(
        map(tuple, torch.cat(numbers[1])[:, FACTORS].tolist())
    )


@pytest.fixture
def only_crops(monkeypatch):
    """Crops and mirroring are all that is left of the augmentation."""
    monkeypatch.setattr(spq_views, "CHANCES", transforms.Chances((0.08, 1.0), 1, 0.0, 0.0, 0.0))


def written(images, folder):
    """The same images on disk."""
    names = [f"{i}.png" for i in range(len(images))]
    for i, name in enumerate(names):
        images.picture(i).save(folder / name)
    return ImageFiles(folder, np.array(names), images.labels[:, None])


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_first_views_of_a_batch_come_first_in_the_order_of_the_second(place, only_crops, tmp_path):
    """Images of one grey each: what their index is shows in every view."""
    shades = np.arange(0, 230, 10, dtype=np.uint8)
    images = Images(np.broadcast_to(shades[:, None, None, None], (23, 32, 32, 3)).copy(), np.arange(23))
    loader = train_loader(written(images, tmp_path) if place == "disk" else images)
    rows = [[index for index, _ in batch] for batch in loader.batches]
    assert sorted(index for row in rows for index in row) == list(range(23))
    for row, views in zip(rows, loader, strict=True):
        for half in views.mean(dim=(1, 2, 3)).chunk(2):
            np.testing.assert_allclose(half * 255, shades[row], atol=1e-3)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_views_are_mirrored_only_if_that_is_the_same_thing(mirrored, place, only_crops, tmp_path):
    ramp = np.arange(0, 256, 8, dtype=np.uint8)[None, None, :, None]
    images = Images(np.broadcast_to(ramp, (40, 32, 32, 3)).copy(), np.arange(40))
    loader = train_loader(written(images, tmp_path) if place == "disk" else images, mirrored=mirrored)
    views = torch.cat(list(loader))
    turned = views[..., 0].mean(dim=(1, 2)) > views[..., -1].mean(dim=(1, 2))
    assert len(turned) == 80
    assert 25 < turned.sum() < 55 if mirrored else not turned.any()


def test_photos_are_resized_as_a_whole(tmp_path, photo_root):
    path = next((photo_root / "datasets").rglob("im1.jpg"))
    picture = Image.open(path).resize((300, 170), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.jpg", quality=95)
    images = ImageFiles(tmp_path, np.array(["a.png", "a.jpg"]), np.zeros((2, 1)))
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR), int)
    for index, most in ((0, 0.5), (1, 3)):
        at, pixels = loaders.whole_photo(images, 64, index, 0)
        assert (at, pixels.shape, pixels.dtype) == (index, (64, 64, 3), torch.uint8)
        assert np.abs(pixels.numpy() - expected).mean() < most


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loader_makes_the_variant_normalised_or_not(variant, images):
    loader = train_loader(images, variant)
    plain = next(iter(loader))
    (pixels, numbers), *_ = loader.loader
    expected = spq_views.augment(pixels.repeat(2, 1, 1, 1), numbers, 32, variant)
    torch.testing.assert_close(plain, expected)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = next(iter(train_loader(images, variant, normalized=True)))
    torch.testing.assert_close(normalised, (plain - mean) / std)
