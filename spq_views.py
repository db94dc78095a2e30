"""SPQ's augmentation, in batches on the run's device: from numbers drawn before, crops, colours, grey and blur.

`SPQ-release` computes what kornia 0.5.10 does, the version that the authors' release names: brightness adds, contrast
multiplies, saturation is that of HSV, and the blur is one kernel along the rows. `SPQ` computes what kornia does since:
brightness multiplies, contrast and saturation blend with grey, and the blur is isotropic, its sigma random. Both are
made from the same numbers. kornia is imported where it is used: nothing else needs it.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

import transforms
from distributed import by_chunks
from transforms import BLUR_SIGMAS, CROP, FACTORS, FLIP, GREYED, ORDER, SIGMA, Chances

CHANCES = Chances(scale=(0.08, 1.0), margin=1, jitter=0.8, grey=0.2, blur=0.5)

# ---------------------------------------------------------------- what is drawn


def draw_views(n: int, size: tuple[int, int], mirrored: bool, generator: torch.Generator) -> Tensor:
    """Random numbers of n views of images of one size (height, width): `[n, 15]`, see `transforms.draw_views`.

    Crops of both variants are smaller than the image in both directions, as in kornia 0.5.10; in 0.9 one may be as high
    or as wide.
    """
    heights, widths = torch.tensor(size)[:, None].expand(2, n)
    return transforms.draw_views(heights, widths, mirrored, generator, CHANCES)


def with_one_order(drawn: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of a batch's views `[N, 15]`, with one random order of the colour operations for all that have any."""
    drawn = drawn.clone()
    drawn[:, ORDER] = torch.where(drawn[:, ORDER] < 0, -1.0, torch.randperm(4, generator=generator).float())
    return drawn


# ---------------------------------------------------------------- what is done


def two_views(pixels: Tensor, drawn: Tensor, image_size: int, variant: str, normalized: bool) -> Tensor:
    """Both views of images `[N, H, W, 3]`, from the numbers `[2N, 15]`: `[2N, 3, S, S]`, all first views first."""
    function = partial(augment, image_size=image_size, variant=variant, normalized=normalized)
    return by_chunks(function, pixels.repeat(2, 1, 1, 1), drawn)


def augment(pixels: Tensor, drawn: Tensor, image_size: int, variant: str, normalized: bool = False) -> Tensor:
    """Views `[B, 3, S, S]` float32 in [0, 1], or normalised by ImageNet's mean and deviation.

    Args:
        pixels: `[B, H, W, 3]`, uint8, or floats in [0, 1].
        drawn: `[B, 15]` on the CPU, so that picking images of one operation needs no word from the device.
        variant: "SPQ" or "SPQ-release".
    """
    x = cropped(pixels if pixels.is_floating_point() else pixels / 255, drawn, image_size)
    for place in range(4):
        for index, operation in enumerate(colours(variant)):
            change(x, drawn[:, ORDER][:, place] == index, operation, drawn[:, FACTORS][:, index])
    change(x, drawn[:, GREYED] > 0, grey)
    change(x, drawn[:, SIGMA] > 0, BLURS[variant], drawn[:, SIGMA])
    x.clamp_(0, 1)  # rounding
    return transforms.normalised(x) if normalized else x


def change(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *numbers: Tensor) -> None:
    """Apply an operation in place to the images of `x` `[B, 3, S, S]` that are `chosen`.

    Args:
        chosen: `[B]` bool, and `numbers`, `[B]` each and one per image: on the CPU.
    """
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        there = rows.to(x.device, non_blocking=True)
        x[there] = operation(x[there], *(values[rows] for values in numbers))


def cropped(x: Tensor, drawn: Tensor, image_size: int) -> Tensor:
    """Crops `[B, 3, S, S]` of images `[B, H, W, 3]`, resized bilinearly and mirrored: the middles of a crop's corner
    pixels become those of the view's; if it shrinks, nothing is averaged."""
    numbers = drawn.to(x.device, non_blocking=True)
    top, left, height, width = numbers[:, CROP].T
    rows = corner_weights(top, height, x.shape[1], image_size)
    columns = corner_weights(left, width, x.shape[2], image_size)
    columns = torch.where(numbers[:, FLIP, None, None] > 0, columns.flip(1), columns)
    return transforms.resized(x, rows, columns).contiguous()


def corner_weights(start: Tensor, length: Tensor, n: int, size: int) -> Tensor:
    """What each of n source pixels contributes to each of `size` pixels that lie evenly between the first and the last
    of `length` pixels from `start` on: `[B, size, n]`.

    Args:
        start, length: `[B]`, in pixels.
    """
    share = torch.linspace(0, 1, size, device=start.device)
    places = start[:, None] + (length - 1)[:, None] * share
    return (1 - (torch.arange(n, device=start.device) - places[:, :, None]).abs()).clamp(min=0)


# Images `[B, 3, S, S]` in [0, 1]; factors, or the blur's sigmas in pixels, `[B]`, on the CPU: kornia checks them there


def added_brightness(x: Tensor, factor: Tensor) -> Tensor:
    from kornia.enhance import adjust_brightness

    return adjust_brightness(x, factor - 1)


def hue(x: Tensor, factor: Tensor) -> Tensor:
    """`factor` in full turns of the colour circle."""
    return transforms.turned(x, (2 * math.pi * factor).to(x.device, non_blocking=True)[:, None, None])


def grey(x: Tensor) -> Tensor:
    from kornia.color import rgb_to_grayscale

    return rgb_to_grayscale(x).expand(-1, 3, -1, -1)


def isotropic_blur(x: Tensor, sigma: Tensor) -> Tensor:
    from kornia.filters import gaussian_blur2d

    return gaussian_blur2d(x, kernel_side(x.shape[-1]), sigma[:, None].expand(-1, 2))


def horizontal_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """A blur along the rows, nearly none along the columns: kornia 0.5.10 took the range of sigmas for these two."""
    from kornia.filters import gaussian_blur2d

    sigmas = torch.tensor([BLUR_SIGMAS]).expand(len(sigma), -1)
    return gaussian_blur2d(x, kernel_side(x.shape[-1]), sigmas)


def kernel_side(image_size: int) -> int:
    """Pixels, an odd number: a tenth of the image's side, or one more."""
    return max(image_size // 10 | 1, 3)


@cache
def colours(variant: str) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """Brightness, contrast, saturation and hue of a variant. Raises ModuleNotFoundError without kornia."""
    from kornia import enhance

    if variant == "SPQ-release":
        return added_brightness, enhance.adjust_contrast, enhance.adjust_saturation, hue
    return (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        hue,
    )


BLURS = {"SPQ": isotropic_blur, "SPQ-release": horizontal_blur}
