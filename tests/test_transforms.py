"""Batched views against Pillow's, seed by seed and as distributions."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms as T
from torchvision.transforms import functional as TF

import data
import transforms
from readers import ImageFiles

STD = torch.tensor(transforms.IMAGENET_STD)[:, None, None]


def photo(size):
    """The flower that comes with scikit-learn, as a small photograph."""
    return np.asarray(Image.fromarray(load_sample_images().images[1]).resize(size, Image.Resampling.BOX))


def drawn(n, height, width, seed=1, mirrored=True):
    generator = torch.Generator().manual_seed(seed)
    return transforms.draw_views(torch.full((n,), height), torch.full((n,), width), mirrored, generator)


def by_pillow(pictures, numbers, size):
    """Views with given numbers, by torchvision's functions of Pillow images."""
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    made = []
    for picture, (*crop, flip, a, b, c, d, _, _, _, _, grey, sigma) in zip(pictures, numbers.tolist(), strict=True):
        factors = numbers[len(made), 9:13].tolist()
        x = TF.resized_crop(Image.fromarray(picture), *map(int, crop), [size, size])
        x = TF.hflip(x) if flip else x
        for operation in (a, b, c, d):
            x = x if operation < 0 else adjust[int(operation)](x, factors[int(operation)])
        x = TF.to_grayscale(x, 3) if grey else x
        x = TF.gaussian_blur(x, 3, sigma) if sigma else x
        made.append(TF.normalize(TF.to_tensor(x), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return torch.stack(made)


def levels(a, b):
    """Mean absolute difference of each view, in levels of 255."""
    return ((a - b) * STD * 255).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("source", "size"), [((8, 8), 16), ((8, 8), 5), ((20, 30), 48)])
def test_views_of_tiny_images_are_pillows_with_the_same_numbers(source, size):
    pixels = np.random.default_rng(0).integers(0, 256, (60, *source, 3), dtype=np.uint8)
    numbers = drawn(60, *source)
    ours = transforms.augment_small(torch.from_numpy(pixels), numbers, size)
    difference = (ours - by_pillow(pixels, numbers, size)).mul(STD * 255).abs()
    assert ours.shape == (60, 3, size, size)
    assert difference.mean() < 0.5  # Pillow's hues are bytes
    untouched = numbers[:, 5] < 0
    assert 5 < untouched.sum() < 35
    assert difference[untouched].max() < 1.01
    assert difference[untouched].mean() < 0.1


@pytest.mark.parametrize("size", [32, 96, 128])
def test_views_of_small_photos_are_pillows_within_a_level(size):
    """Colours come before the enlargement here. 150 views of a photograph at 32 x 32 pixels."""
    pixels = np.repeat(photo((32, 32))[None], 150, axis=0)
    numbers = drawn(150, 32, 32)
    difference = levels(
        transforms.augment_small(torch.from_numpy(pixels), numbers, size), by_pillow(pixels, numbers, size)
    )
    assert difference.mean() < 1.2
    assert difference.max() < 5
    untouched = numbers[:, 5] < 0
    assert 30 < untouched.sum() < 60
    assert difference[untouched].max() < 0.6


@pytest.mark.parametrize("path", ["large.jpg", "small.jpg", "grey.png"])
def test_views_of_photos_on_disk_are_pillows_within_a_level(path, tmp_path):
    """A JPEG that is much larger than what is needed is decoded at half its size, which blurs it otherwise."""
    picture = Image.fromarray(photo((640, 480) if path == "large.jpg" else (120, 90)))
    picture.convert("L" if path == "grey.png" else "RGB").save(tmp_path / path, quality=95)
    images = ImageFiles(tmp_path, np.array([path]), np.ones((1, 3), dtype=np.uint8))
    for seed in range(12):
        crops, numbers = data.photo_views(images, True, 64, 0, seed)
        theirs = by_pillow([np.asarray(images.picture(0))] * 2, numbers, 64)
        assert levels(transforms.augment_crops(crops, numbers), theirs).max() < (5 if path == "large.jpg" else 2)
    args = Namespace(image_size=64, batch_size=1, num_workers=0, device="cpu", views="batched", seed=1)
    assert [len(pair) for pair in data.train_loader(data.Splits(images, images, images), args)] == [2]


def test_crops_of_reduced_photos_stay_inside():
    """A white photo, decoded at half its size: a pixel from outside would be black."""
    for width, height, numbers in (
        (998, 998, (3, 3, 995, 995)),
        (750, 501, (299, 10, 202, 700)),
        (501, 750, (0, 0, 750, 501)),
    ):
        decoded = torch.full((3, (height + 1) // 2, (width + 1) // 2), 255, dtype=torch.uint8)
        row = torch.zeros(15)
        row[transforms.CROP] = torch.tensor(numbers, dtype=torch.float)
        crop = transforms.crop_view(decoded, row, (height, width), 300)
        assert crop.shape == (3, 300, 300)
        assert crop.min() == 255


def test_distributions_are_pillows():
    """Kolmogorov and Smirnov on what views look like, against the transforms of `--views pil`."""
    n, size = 700, 48
    pixels = np.repeat(photo((32, 32))[None], n, axis=0)
    numbers = drawn(n, 32, 32)
    ours = transforms.augment_small(torch.from_numpy(pixels), numbers, size)
    transform = transforms.view_transform(size, mirrored=True)
    theirs = torch.stack([transform(Image.fromarray(picture)) for picture in pixels])
    looks = {
        "brightness": lambda x: x.mean(dim=(1, 2, 3)),
        "contrast": lambda x: x.std(dim=(1, 2, 3)),
        "red against blue": lambda x: (x[:, 0] - x[:, 2]).mean(dim=(1, 2)),
        "colour": lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean(dim=(1, 2, 3)),
        "left against right": lambda x: (x[..., : size // 2] - x[..., size // 2 :]).mean(dim=(1, 2, 3)),
        "top against bottom": lambda x: (x[..., : size // 2, :] - x[..., size // 2 :, :]).mean(dim=(1, 2, 3)),
    }
    for name, look in looks.items():
        p = stats.ks_2samp(look(ours * STD).numpy(), look(theirs * STD).numpy()).pvalue
        assert p > 0.01, name
    numbers[:, transforms.ORDER] = -1  # no colour operations: it can tell
    plain, look = transforms.augment_small(torch.from_numpy(pixels), numbers, size), looks["contrast"]
    assert stats.ks_2samp(look(plain * STD).numpy(), look(theirs * STD).numpy()).pvalue < 1e-6


@pytest.mark.parametrize("source", [8, 40])
def test_augmenting_reads_nothing_from_the_device(source):
    """See `test_a_step_reads_nothing_from_the_device`."""
    pixels = torch.empty(20, source, source, 3, dtype=torch.uint8, device="meta")
    assert transforms.augment_small(pixels, drawn(20, source, source), 48).shape == (20, 3, 48, 48)
    crops = torch.empty(20, 3, 48, 48, dtype=torch.uint8, device="meta")
    assert transforms.augment_crops(crops, drawn(20, source, source)).shape == (20, 3, 48, 48)


@pytest.mark.parametrize(("height", "width"), [(100, 100), (32, 32), (60, 120), (90, 30)])
def test_crops_are_torchvisions(height, width):
    """The last two are so long that the crop in the middle is common."""
    ours = drawn(4000, height, width)[:, transforms.CROP].double().numpy()
    image, crop = torch.empty(3, height, width), T.RandomResizedCrop.get_params
    theirs = np.array([crop(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 0.001
    assert stats.ks_2samp(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_numbers_are_drawn_as_described():
    numbers = drawn(3000, 100, 100).double().numpy()
    jittered = numbers[:, 5] >= 0
    for share, expected in (
        (numbers[:, transforms.FLIP].mean(), 0.5),
        (jittered.mean(), 0.7),
        (numbers[:, transforms.GREYED].mean(), 0.2),
        ((numbers[:, transforms.SIGMA] > 0).mean(), 0.5),
    ):
        assert share == pytest.approx(expected, abs=0.03)
    for column, low, high in ((9, 0.6, 1.4), (10, 0.6, 1.4), (11, 0.6, 1.4), (12, -0.1, 0.1), (14, 0.1, 2.0)):
        values = numbers[numbers[:, transforms.SIGMA] > 0, 14] if column == 14 else numbers[jittered, column]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 0.001
    orders = {tuple(row) for row in numbers[jittered, 5:9]}
    assert len(orders) == 24
    assert not drawn(50, 8, 8, mirrored=False)[:, transforms.FLIP].any()


@pytest.mark.parametrize(("source", "size"), [((32, 32), 128), ((32, 32), 224), ((8, 8), 32), ((32, 32), 20)])
def test_test_images_are_pillows(source, size):
    pixels = np.random.default_rng(0).integers(0, 256, (5, *source, 3), dtype=np.uint8)
    ours = transforms.enlarge(torch.from_numpy(pixels), size)
    transform = T.Compose(
        [
            T.Resize((size, size)),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    difference = ((ours - theirs) * STD * 255).abs()
    assert difference.max() < 1.01  # a level where a sum lies between two
    assert (difference > 0.5).float().mean() < 0.03
