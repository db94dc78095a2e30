"""The random augmentation that makes views, image by image with Pillow, or in batches on the run's device; and what
test images go through.

Both draw from the same distributions, and from the same numbers make the same view but for rounding, and for one
liberty of the batches: the colours of small photos in memory change before they are enlarged. Colour operations work
pixel by pixel and (but for hue and clipping) linearly, as resizing does, so the order hardly matters to them.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2.functional import center_crop, resize, resized_crop

from decoding import UprightImage, opencv

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of the crop: its share of the area, its width / height
JITTER = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
BLUR_SIGMAS = (0.1, 2.0)  # pixels, of a kernel of 3 x 3
P_JITTER, P_GREY, P_BLUR = 0.7, 0.2, 0.5
COLOURS_FIRST = 32  # pixels
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow has it
LONGEST = 4  # times the shorter side: of a longer image only the middle is resized
# of `photo_pixels`; the number is to be raised with every change of what it computes
PHOTO_TRANSFORM = (
    "photo 1: upright; JPEG decoded at 1, 1/2, 1/4 or 1/8 of its size, at least twice the resized one; shorter side to "
    "round(256/224 S), of smaller images to S, bilinear with antialiasing; centre S x S"
)


class Blur:
    """Gaussian blur of 3 x 3 pixels by a random sigma, as OpenCV rounds it. PIL RGB image -> the same."""

    def __init__(self) -> None:
        opencv()  # imported here once, not in every worker of every epoch

    def __call__(self, picture: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*BLUR_SIGMAS).item()
        cv2 = opencv()
        return Image.fromarray(cv2.GaussianBlur(np.asarray(picture), (3, 3), sigma, borderType=cv2.BORDER_REFLECT_101))

    def __repr__(self) -> str:
        return f"Blur(sigma={BLUR_SIGMAS})"


def view_transform(image_size: int, mirrored: bool, normalized: bool = True) -> transforms.Compose:
    """The random augmentation that makes a view: PIL image -> `[3, S, S]` float32."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, SCALE, RATIO),
            transforms.RandomHorizontalFlip(p=0.5 if mirrored else 0.0),
            transforms.RandomApply([JITTER], p=P_JITTER),
            transforms.RandomGrayscale(p=P_GREY),
            transforms.RandomApply([Blur()], p=P_BLUR),
            *to_tensor(normalized),
        ]
    )


def photo_transform(image_size: int, normalized: bool = True) -> transforms.Compose:
    """What queries and database images on disk go through: the shorter side is resized to 256 / 224 S and the centre
    cut out. PIL image -> `[3, S, S]` float32."""
    return transforms.Compose(
        [
            transforms.Resize(round(image_size * 256 / 224)),
            transforms.CenterCrop(image_size),
            *to_tensor(normalized),
        ]
    )


def photo_pixels(image: UprightImage, image_size: int) -> Tensor:
    """What a user's own image goes through, as `PHOTO_TRANSFORM` says: `[3, S, S]` uint8.

    Raises nearly anything if the image is damaged.
    """
    shorter, longer = sorted(image.size)
    side = round(image_size * 256 / 224)
    side = side if shorter >= side else image_size  # a small image's border is not worth losing
    least = tuple(2 * math.ceil(length * side / shorter) for length in image.size)
    pixels = torch.from_numpy(image.decoded(least)).permute(2, 0, 1)
    most = LONGEST * min(pixels.shape[1:])
    pixels = center_crop(pixels, [min(length, most) for length in pixels.shape[1:]])
    longer = min(side * longer // shorter, LONGEST * side)
    size = [side, longer] if image.size[0] > image.size[1] else [longer, side]
    return center_crop(resize(pixels, size, antialias=True), [image_size, image_size]).contiguous()


def to_tensor(normalized: bool) -> list[Callable]:
    """PIL image -> `[3, H, W]` float32 in [0, 1], or normalised by ImageNet's mean and deviation, step by step."""
    return [transforms.ToTensor(), *[transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)] * normalized]


# ---------------------------------------------------------------- what is drawn

# a view's numbers, a row `[15]`: of the crop, the order of the four colour operations (0 brightness, 1 contrast,
# 2 saturation, 3 hue; -1: none), their factors, whether it turns grey, and the blur's sigma in pixels (0: none)
CROP, FLIP, ORDER, FACTORS, GREYED, SIGMA = slice(0, 4), 4, slice(5, 9), slice(9, 13), 13, 14


class Chances(NamedTuple):
    """What random numbers of views are drawn by; the defaults are of MeCoQ's augmentation."""

    scale: tuple[float, float] = SCALE  # of the crop: its share of the area
    margin: int = 0  # pixels, by which both sides of a crop are shorter than the image's, at least
    jitter: float = P_JITTER  # probabilities
    grey: float = P_GREY
    blur: float = P_BLUR


MECOQ = Chances()


def draw_views(
    heights: Tensor, widths: Tensor, mirrored: bool, generator: torch.Generator, chances: Chances = MECOQ
) -> Tensor:
    """Random numbers of one view of each image, `[B, 15]` float32, see `CROP` ... `SIGMA`; distributed as in
    `view_transform`, unless `chances` are others.

    Args:
        heights, widths: of the images, `[B]`, in pixels.
    """

    def uniform(low: float, high: float, n: int = 1) -> Tensor:
        return torch.empty(len(heights), n).uniform_(low, high, generator=generator)

    crops = draw_crops(heights[:, None], widths[:, None], uniform, chances)
    flips = uniform(0, 1) < (0.5 if mirrored else 0.0)
    orders = torch.where(uniform(0, 1) < chances.jitter, uniform(0, 1, 4).argsort(dim=1), -1)
    ranges = (JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)
    factors = [uniform(*limits) for limits in ranges]
    greyed = uniform(0, 1) < chances.grey
    sigmas = torch.where(uniform(0, 1) < chances.blur, uniform(*BLUR_SIGMAS), 0)
    return torch.cat([crops, flips, orders, *factors, greyed, sigmas], dim=1)


def draw_crops(heights: Tensor, widths: Tensor, uniform: Callable[..., Tensor], chances: Chances) -> Tensor:
    """Tops, lefts, heights and widths `[B, 4]` of crops: share of the area and logarithm of the ratio are uniform; what
    does not fit is drawn again, ten times at most, and the largest crop in the middle is taken then (as torchvision's
    RandomResizedCrop does).

    Args:
        heights, widths: of the images, `[B, 1]`.
        uniform: (low, high, n) -> `[B, n]`.
    """
    areas = heights * widths * uniform(*chances.scale, 10)
    ratios = uniform(math.log(RATIO[0]), math.log(RATIO[1]), 10).exp()
    high, wide = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (high > 0) & (high <= heights - chances.margin) & (wide > 0) & (wide <= widths - chances.margin)
    first = fits.int().argmax(dim=1, keepdim=True)
    largest = (widths / RATIO[0]).round().minimum(heights), (heights * RATIO[1]).round().minimum(widths)
    chosen = fits.any(dim=1, keepdim=True)
    crops = []
    for sides, tried, most in ((heights, high, largest[0]), (widths, wide, largest[1])):
        length = torch.where(chosen, tried.gather(1, first), most)
        anywhere = (uniform(0, 1) * (sides - length + 1)).floor().minimum(sides - length)
        crops.append((torch.where(chosen, anywhere, ((sides - length) / 2).floor()), length))
    (tops, high), (lefts, wide) = crops
    return torch.cat([tops, lefts, high, wide], dim=1)


def crop_view(photo: Tensor, drawn: Tensor, size: tuple[int, int], image_size: int) -> Tensor:
    """The crop that `drawn` describes of a photo, resized and mirrored: `[3, S, S]` uint8.

    Args:
        photo: `[3, H, W]` uint8, perhaps decoded at less than its size.
        size: height and width that the photo really has.
    """
    edges = []
    for start, length, whole, decoded in zip(*drawn[CROP].view(2, 2).tolist(), size, photo.shape[1:], strict=True):
        first = min(round(start * decoded / whole), decoded - 1)
        edges.append((first, max(min(round((start + length) * decoded / whole), decoded) - first, 1)))
    (top, height), (left, width) = edges
    crop = resized_crop(photo, top, left, height, width, [image_size, image_size], antialias=True)
    return crop.flip(2) if drawn[FLIP] else crop


# ---------------------------------------------------------------- what is done, in batches


def augment_small(pixels: Tensor, drawn: Tensor, image_size: int, normalized: bool = True) -> Tensor:
    """Views of small images: `[B, H, W, 3]` uint8 and their numbers `[B, 15]` (on the CPU) -> `[B, 3, S, S]` float32,
    channels last.

    Crop, enlargement, mirroring and blur are one pair of matrices an image, R x C^T, whose rows sum to 1: colours and
    normalisation, being per pixel, come first, on few pixels. Not so for images of fewer than `COLOURS_FIRST` pixels a
    side: from one pixel to the next they jump from black to white, and clipping before that is bridged differs.
    """
    numbers = drawn.to(pixels.device, non_blocking=True)
    top, left, height, width = numbers[:, CROP].T
    rows = resize_weights(top, height, pixels.shape[1], image_size)  # [B, S, H]
    columns = resize_weights(left, width, pixels.shape[2], image_size)  # [B, S, W]
    columns = torch.where(numbers[:, FLIP, None, None] > 0, columns.flip(1), columns)
    if min(pixels.shape[1:3]) < COLOURS_FIRST:
        return augment_crops(resized(pixels.float(), rows, columns, round_to_bytes=True), drawn, normalized)
    rows, columns = (blurred(weights, numbers[:, SIGMA], dim=1) for weights in (rows, columns))
    x = pixels.permute(0, 3, 1, 2).contiguous().float()
    x = adjust_colours(x, drawn, rows.mean(dim=1)[:, None, :, None] * columns.mean(dim=1)[:, None, None, :])
    return resized(from_bytes(x, normalized).permute(0, 2, 3, 1), rows, columns)


def augment_crops(crops: Tensor, drawn: Tensor, normalized: bool = True) -> Tensor:
    """Views from crops `[B, 3, S, S]`, whole numbers from 0 to 255 (see `crop_view`): colours and blur.
    `[B, 3, S, S]` float32."""
    S = crops.shape[-1]
    x = crops.contiguous().float()
    x = adjust_colours(x, drawn, torch.full((len(crops), 1, 1, 1), 1 / S**2, device=crops.device))
    rows = drawn[:, SIGMA].nonzero()[:, 0]
    sigma = drawn[rows, SIGMA].to(x.device, non_blocking=True)
    rows = rows.to(x.device, non_blocking=True)
    x[rows] = blurred(blurred(x[rows], sigma, dim=2), sigma, dim=3).round()
    return from_bytes(x, normalized)


def enlarge(pixels: Tensor, image_size: int, normalized: bool = True) -> Tensor:
    """Test images in memory, `[B, H, W, 3]` uint8, resized as Pillow does (bilinear, bytes in between), and normalised
    or not: `[B, 3, S, S]` float32, channels last."""
    _, H, W, _ = pixels.shape
    zero = torch.zeros(1, device=pixels.device)
    rows, columns = (resize_weights(zero, zero + n, n, image_size).expand(len(pixels), -1, -1) for n in (H, W))
    return from_bytes(resized(pixels.float(), rows, columns, round_to_bytes=True), normalized)


def adjust_colours(x: Tensor, drawn: Tensor, weights: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, then grey. Changes `x` in place.

    Args:
        x: `[B, 3, H, W]`, bytes as float32; they are rounded as Pillow rounds them after each operation.
        drawn: `[B, 15]` on the CPU, so that picking images of one operation needs no word from the device.
        weights: `[B, 1, H, W]`, or what expands to it: of each pixel in the mean grey that contrast turns around; they
            sum to 1.
    """
    weights = weights.expand(-1, -1, *x.shape[2:])
    for place in range(4):
        for index, operation in enumerate((brightness, contrast, saturation, hue)):
            rows = (drawn[:, ORDER][:, place] == index).nonzero()[:, 0]
            factor = drawn[rows, FACTORS][:, index, None, None, None].to(x.device, non_blocking=True)
            rows = rows.to(x.device, non_blocking=True)
            x[rows] = operation(x[rows], factor, weights[rows])
    rows = drawn[:, GREYED].nonzero()[:, 0].to(x.device, non_blocking=True)
    x[rows] = grey(x[rows]).expand(-1, 3, -1, -1)
    return x


# Images `[B, 3, H, W]` of bytes as float32, factors `[B, 1, 1, 1]`, weights of the pixels `[B, 1, H, W]`


def grey(x: Tensor) -> Tensor:
    """`[B, 1, H, W]`."""
    return torch.einsum("bchw,c->bhw", x, on_device(GREY, x.device))[:, None].round()


def brightness(x: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return (x * factor).clamp(0, 255).floor()


def contrast(x: Tensor, factor: Tensor, weights: Tensor) -> Tensor:
    mean = (grey(x) * weights).sum(dim=(2, 3), keepdim=True).round()
    return torch.lerp(mean, x, factor).clamp(0, 255).floor()


def saturation(x: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return torch.lerp(grey(x), x, factor).clamp(0, 255).floor()


def hue(x: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """`factor` in full turns of the colour circle."""
    return (turned(x / 255, 2 * torch.pi * factor[:, 0]) * 255).round() if len(x) else x


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1], the hues of their HSV turned by `angles` `[B, 1, 1]`; to the last bit what
    kornia 0.9 makes of them."""
    turn, largest = 2 * math.pi, x.amax(dim=1)
    spread = largest - x.amin(dim=1)
    saturation = spread / torch.where(largest == 0, 1.0, largest + 1e-8)
    spread = torch.where(spread == 0, 1.0, spread)
    (red, green, blue), (no_red, no_green, no_blue) = x.unbind(dim=1), (largest[:, None] - x).unbind(dim=1)
    sixths = torch.where(green >= blue, no_red - no_blue + 2 * spread, no_green - no_red + 4 * spread)
    sixths = torch.where((red >= green) & (red >= blue), no_blue - no_green, sixths)
    angle = turn * (sixths / spread / 6 % 1)
    angle = angle.masked_fill(angle >= turn, 0.0)  # of a small negative one, rounding made a whole turn
    sixths = torch.remainder(angle + angles, turn) / turn * 6
    sextant = sixths.floor() % 6
    within = sixths % 6 - sextant
    low = largest * (1 - saturation)
    falling, rising = largest * (1 - within * saturation), largest * (1 - (1 - within) * saturation)
    channels = []
    for values in (
        (largest, falling, low, low, rising, largest),
        (rising, largest, largest, falling, low, low),
        (low, low, rising, largest, largest, falling),
    ):
        channel = values[-1]
        for number, value in enumerate(values[:-1]):
            channel = torch.where(sextant == number, value, channel)
        channels.append(channel)
    return torch.stack(channels, dim=1)


def from_bytes(x: Tensor, normalized: bool) -> Tensor:
    """Images `[B, 3, H, W]` of bytes as float32 -> in [0, 1], or normalised; in place."""
    x = x.div_(255)
    return normalised(x) if normalized else x


def normalised(x: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] by ImageNet's mean and deviation, in place."""
    mean, std = (on_device(values, x.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return x.sub_(mean).div_(std)


@cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants, brought to a device once: the host waits for that."""
    return torch.tensor(values, device=device)


def resize_weights(start: Tensor, length: Tensor, n: int, size: int) -> Tensor:
    """What each of n source pixels contributes to each of `size` pixels, when those from `start` on, `length` of them,
    are resized: `[B, size, n]`, bilinear, and averaging if they shrink, as Pillow does.

    Args:
        start, length: `[B]`, in pixels.
    """
    scale = (length / size)[:, None, None]
    source = torch.arange(n, device=start.device) + 0.5
    centres = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale + start[:, None, None]
    weights = (1 - (source - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (source > start[:, None, None]) & (source < (start + length)[:, None, None])
    weights *= inside
    return weights.div_(weights.sum(dim=2, keepdim=True))


def blurred(x: Tensor, sigma: Tensor, dim: int) -> Tensor:
    """Gaussian blur of three pixels along a dimension of `x` `[B, ...]`, borders reflected; sigma `[B]`, 0: none.

    Of a matrix that resizes, it makes one that resizes and blurs.
    """
    side = torch.where(sigma > 0, torch.exp(-0.5 / sigma.clamp(min=1e-3) ** 2), 0.0)
    side = (side / (1 + 2 * side)).view(-1, *[1] * (x.dim() - 1))
    n = x.shape[dim]
    before = torch.cat([x.narrow(dim, 1, 1), x.narrow(dim, 0, n - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, n - 2, 1)], dim)
    return torch.lerp(x, (before + after) / 2, 2 * side)


def resized(x: Tensor, rows: Tensor, columns: Tensor, round_to_bytes: bool = False) -> Tensor:
    """Images `[B, H, W, 3]` -> R x C^T `[B, 3, S, S]`, channels last; R `[B, S, H]` and C `[B, S, W]` are `rows` and
    `columns`."""
    B, H, W, _ = x.shape
    S = rows.shape[1]
    x = columns @ x.transpose(1, 2).reshape(B, W, H * 3)
    x = x.add_(0.5).floor_() if round_to_bytes else x
    x = rows @ x.view(B, S, H, 3).transpose(1, 2).reshape(B, H, S * 3)
    x = x.add_(0.5).floor_() if round_to_bytes else x
    return x.view(B, S, S, 3).permute(0, 3, 1, 2)
