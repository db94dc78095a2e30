"""Batched views against Pillow's, seed by seed and as distributions."""

import numpy as np
import pytest
import torch
from kornia.enhance import adjust_hue
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms as T
from torchvision.transforms import functional as TF

import loaders
import transforms
from data import Splits
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
def test_views_of_tiny_images_are_pillows_with_the_same_numbers(source, size, device):
    pixels = np.random.default_rng(0).integers(0, 256, (60, *source, 3), dtype=np.uint8)
    numbers = drawn(60, *source)
    ours = transforms.augment_small(torch.from_numpy(pixels).to(device), numbers, size).cpu()
    difference = (ours - by_pillow(pixels, numbers, size)).mul(STD * 255).abs()
    assert ours.shape == (60, 3, size, size)
    assert difference.mean() < 0.5  # Pillow's hues are bytes
    untouched = numbers[:, 5] < 0
    assert 5 < untouched.sum() < 35
    assert difference[untouched].max() < 1.01
    assert difference[untouched].mean() < 0.1


@pytest.mark.parametrize("size", [32, 96, 128])
def test_views_of_small_photos_are_pillows_within_a_level(size, device):
    """Colours come before the enlargement here. 150 views of a photograph at 32 x 32 pixels."""
    pixels = np.repeat(photo((32, 32))[None], 150, axis=0)
    numbers = drawn(150, 32, 32)
    ours = transforms.augment_small(torch.from_numpy(pixels).to(device), numbers, size).cpu()
    difference = levels(ours, by_pillow(pixels, numbers, size))
    assert difference.mean() < 1.2
    assert difference.max() < 5
    untouched = numbers[:, 5] < 0
    assert 30 < untouched.sum() < 60
    assert difference[untouched].max() < 0.6


@pytest.mark.parametrize("path", ["large.jpg", "small.jpg", "grey.png"])
def test_views_of_photos_on_disk_are_pillows_within_a_level(path, device, tmp_path):
    """A JPEG that is much larger than what is needed is decoded at half its size, which blurs it otherwise."""
    picture = Image.fromarray(photo((640, 480) if path == "large.jpg" else (120, 90)))
    picture.convert("L" if path == "grey.png" else "RGB").save(tmp_path / path, quality=95)
    images = ImageFiles(tmp_path, np.array([path]), np.ones((1, 3), dtype=np.uint8))
    for seed in range(12):
        crops, numbers = loaders.photo_views(images, True, 64, 0, seed)
        theirs = by_pillow([np.asarray(images.picture(0))] * 2, numbers, 64)
        ours = transforms.augment_crops(crops.to(device), numbers).cpu()
        assert levels(ours, theirs).max() < (5 if path == "large.jpg" else 2)
    options = loaders.ViewOptions("batched", image_size=64, batch_size=1, seed=1)
    assert [len(pair) for pair in loaders.train_loader(Splits(images, images, images), options, "cpu", 0)] == [2]


def test_hues_are_kornias_to_the_bit():
    """All angles up to a turn; greys, black, white, pure colours and reds that are hardly bluish among the pixels."""
    levels = torch.tensor([0.0, 1, 2, 51, 128, 254, 255]) / 255
    corners = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 7, 49)
    x = torch.cat([corners.expand(80, -1, -1, -1), torch.rand(80, 3, 20, 49)], dim=2)
    x[:, :, -1] = torch.tensor([1, 0.5, 0.5 + 2**-24])[:, None]
    angles = torch.cat([torch.linspace(-2 * np.pi, 2 * np.pi, 41), torch.tensor([0.0, -1e-8, 1e-7]), torch.randn(36)])
    assert torch.equal(transforms.turned(x, angles[:, None, None]), adjust_hue(x, angles))


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
    """Kolmogorov and Smirnov on statistics of views, against the transforms of `--views pil`."""
    n, size = 700, 48
    pixels = np.repeat(photo((32, 32))[None], n, axis=0)
    numbers = drawn(n, 32, 32)
    ours = transforms.augment_small(torch.from_numpy(pixels), numbers, size)
    transform = transforms.view_transform(size, mirrored=True)
    theirs = torch.stack([transform(Image.fromarray(picture)) for picture in pixels])
    statistics = {
        "brightness": lambda x: x.mean(dim=(1, 2, 3)),
        "contrast": lambda x: x.std(dim=(1, 2, 3)),
        "red against blue": lambda x: (x[:, 0] - x[:, 2]).mean(dim=(1, 2)),
        "colour": lambda x: (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean(dim=(1, 2, 3)),
        "left against right": lambda x: (x[..., : size // 2] - x[..., size // 2 :]).mean(dim=(1, 2, 3)),
        "top against bottom": lambda x: (x[..., : size // 2, :] - x[..., size // 2 :, :]).mean(dim=(1, 2, 3)),
    }
    for name, statistic in statistics.items():
        p = stats.ks_2samp(statistic(ours * STD).numpy(), statistic(theirs * STD).numpy()).pvalue
        assert p > 0.01, name
    numbers[:, transforms.ORDER] = -1  # no colour operations: it can tell
    plain, contrast = transforms.augment_small(torch.from_numpy(pixels), numbers, size), statistics["contrast"]
    assert stats.ks_2samp(contrast(plain * STD).numpy(), contrast(theirs * STD).numpy()).pvalue < 1e-6


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
def test_test_images_are_pillows(source, size, device):
    pixels = np.random.default_rng(0).integers(0, 256, (5, *source, 3), dtype=np.uint8)
    ours = transforms.enlarge(torch.from_numpy(pixels).to(device), size).cpu()
    transform = T.Compose(
        [
            T.Resize((size, size)),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    theirs = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    difference = ((ours - theirs) * STD * 255).abs()
    assert difference.max() < 1.01  # a level if a sum lies between two
    assert (difference > 0.5).float().mean() < 0.03


# ---------------------------------------------------------------- image by image


def share(transform, picture, test, n=400):
    return sum(bool(test(transform(picture))) for _ in range(n)) / n


def test_views_are_drawn_as_described():
    """Shares of grey and of mirrored views, on pictures that show each."""
    red = Image.new("RGB", (32, 32), (200, 40, 40))
    view = transforms.view_transform(32, mirrored=True)
    std, mean = (torch.tensor(values)[:, None, None] for values in (transforms.IMAGENET_STD, transforms.IMAGENET_MEAN))
    undo = lambda x: x * std + mean  # noqa: E731
    grey = share(view, red, lambda x: (undo(x).amax(0) - undo(x).amin(0)).max() < 0.02)
    assert grey == pytest.approx(0.2, abs=0.07)
    colour = torch.tensor([200, 40, 40])[:, None, None] / 255
    untouched = share(view, red, lambda x: (undo(x) - colour).abs().max() < 0.01)
    assert untouched == pytest.approx(0.3 * 0.8, abs=0.07)
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2))
    rising = lambda x: x[:, :, -1].mean() > x[:, :, 0].mean()  # noqa: E731
    assert share(view, ramp, rising) == pytest.approx(0.5, abs=0.08)
    assert share(transforms.view_transform(32, mirrored=False), ramp, rising) == 1.0


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
@pytest.mark.parametrize("size", [(48, 32), (3, 5), (224, 224)])
def test_the_blur_is_torchvisions_within_a_level(sigma, size, monkeypatch):
    picture = Image.fromarray(photo(size))
    monkeypatch.setattr(transforms, "BLUR_SIGMAS", (sigma, sigma))
    theirs = T.GaussianBlur(3, (sigma, sigma))(picture)
    difference = np.abs(np.asarray(transforms.Blur()(picture), int) - np.asarray(theirs))
    assert difference.max() <= 1
    assert difference.mean() < 0.4
    if sigma > 0.5:
        assert np.abs(np.asarray(picture, int) - np.asarray(theirs)).max() > 3  # it does something


def test_the_blur_draws_as_torchvisions_does():
    """One number, so that the views of a seed differ from those of torchvision's blur by rounding alone."""
    after = []
    for blur in (transforms.Blur(), T.GaussianBlur(3, (0.1, 2.0))):
        torch.manual_seed(5)
        blur(Image.fromarray(photo((32, 32))))
        after.append(torch.rand(3))
    assert torch.equal(*after)
    before = transforms.view_transform(32, True)
    torch.manual_seed(5)
    ours = torch.stack([before(Image.fromarray(photo((32, 32)))) for _ in range(20)])
    before.transforms[4].transforms = [T.GaussianBlur(3, (0.1, 2.0))]
    torch.manual_seed(5)
    theirs = torch.stack([before(Image.fromarray(photo((32, 32)))) for _ in range(20)])
    assert ((ours - theirs) * STD * 255).abs().max() < 1.01


def test_photos_are_resized_by_their_shorter_side_and_cut():
    """A picture twice as wide as high: its outer quarters are cut off, and an eighth of what is left on each side."""
    picture = Image.new("RGB", (512, 256), (0, 0, 255))
    picture.paste((255, 0, 0), (144, 16, 368, 240))  # the 224 x 224 in the middle
    x = transforms.photo_transform(224)(picture)
    assert x.shape == (3, 224, 224)
    np.testing.assert_allclose(x[0], (1 - 0.485) / 0.229, rtol=1e-5)
    assert transforms.photo_transform(64)(picture).shape == (3, 64, 64)
