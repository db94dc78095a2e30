"""SPQ's augmentation: against what kornia 0.5.10 gave (golden numbers), and against the installed kornia's own."""

import math

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import crop_and_resize
from scipy import stats

import spq_views
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
def views(golden):
    """name -> an array of the golden views; images come `[B, H, W, 3]`."""
    arrays = golden("spq")
    return lambda name: torch.from_numpy(arrays[f"views/{name}"])


def assert_golden(views, numbers, name):
    ours = spq_views.augment(views("image").permute(0, 2, 3, 1), numbers, 32, "SPQ-release")
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
def test_views_are_kornias_with_the_same_numbers(source, size, variant):
    pixels = random_pixels(60, *source)
    numbers = drawn(60, source)
    ours = spq_views.augment(pixels, numbers, size, variant)
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
