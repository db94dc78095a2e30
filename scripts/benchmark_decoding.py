#!/usr/bin/env python3
"""Time the decoding of photographs on one core: as the published data sets are read, and as a user's own images are.

python scripts/benchmark_decoding.py
python scripts/benchmark_decoding.py --model checkpoints/real32 --copies 100

The photographs are crops of the two that come with scikit-learn, enlarged to 640 x 480 and to 12 megapixels, saved as
JPEG. With --model, a run's folder, it also says how many of their codes are those of a full decoding by Pillow,
resized alike.
"""

import argparse
import io
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, Parser, progress_bar, run_script

SIZES = {"640 x 480": (640, 480), "12 megapixels": (4000, 3000)}
QUALITIES = (75, 85, 92, 97)
PASSES = 7  # over the images, of which the shortest counts


def photographs(size: tuple[int, int], n: int) -> list[bytes]:
    """n different JPEG files of a size (width, height): crops, mirrored or not, of several qualities."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator, found = np.random.default_rng(0), []
    for i in range(n):
        photo = photos[i % len(photos)]
        width = generator.uniform(0.35, 0.85) * photo.width
        height = width * size[1] / size[0]
        left, top = (
            generator.uniform(0, whole - part) for whole, part in zip(photo.size, (width, height), strict=True)
        )
        picture = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        if generator.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # what a camera adds: without noise, an enlarged crop has no detail that decoding could lose
        noisy = np.asarray(picture) + generator.normal(0, 3, (*size[::-1], 1)).astype(np.float32)
        content = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITIES[i % 4])
        found.append(content.getvalue())
    return found


def ways(image_size: int) -> dict[str, Callable]:
    """JPEG -> `[3, S, S]` of each way that is timed."""
    from decoding import EncodedImage, UprightImage
    from transforms import photo_pixels, photo_transform

    transform = photo_transform(image_size)
    return {
        "before": lambda content: transform(EncodedImage(content).by_pillow()),
        "now": lambda content: photo_pixels(UprightImage(content), image_size),
    }


def seconds(decode: Callable, contents: list[bytes], repeats: int) -> float:
    """Seconds of a core per image: the shortest pass over all. What else the machine does counts little so."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for content in contents:
            decode(content)
        found.append(time.process_time() - start)
    return min(found) / len(contents)


class WholeImage:
    """An image decoded whole by Pillow, whatever size is asked for."""

    def __init__(self, content: bytes) -> None:
        from decoding import UprightImage

        self.image = UprightImage(content)
        self.size = self.image.size

    def decoded(self, _: object = None) -> object:
        import numpy as np

        return np.array(self.image.by_pillow())


def agreement(folder: Path, contents: list[bytes]) -> dict[str, float]:
    """How the codes of a run's model agree between `photo_pixels` and the same of whole images: the share of images
    whose codes are equal, the share of code bytes, and the largest and mean difference of a pixel.

    Raises InputError if there is no such run.
    """
    import torch

    import engine
    from config import Config
    from decoding import UprightImage
    from transforms import from_bytes, photo_pixels

    try:
        config = Config(json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"test_only": True})
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not the folder of a run ({error})") from error
    method = engine.build_method(config.replace(checkpoint=str(folder / "model.cpt"), device="cpu")).eval()
    codes, pixels = [], []
    for kind in (UprightImage, WholeImage):
        images = torch.stack([photo_pixels(kind(content), config.image_size) for content in contents])
        with torch.inference_mode():
            normalised = from_bytes(images.float(), engine.preprocessing(config).normalized)
            codes.append(torch.cat([method.codes(method(batch)) for batch in normalised.split(32)]))
        pixels.append(images.float())
    equal = (codes[0] == codes[1]).double()
    difference = (pixels[0] - pixels[1]).abs()
    return {
        "images with equal codes": float(equal.all(dim=1).double().mean()),
        "equal code numbers": float(equal.mean()),
        "mean pixel difference": float(difference.mean()),
    }


def measure(args: Namespace) -> None:
    """Print a line per size."""
    import torch

    torch.set_num_threads(1)
    for name, size in SIZES.items():
        n = math.ceil(args.copies / (1 if size[0] < 1000 else 10))
        contents = list(progress_bar(photographs(size, n), name))
        rates = {way: 1 / seconds(decode, contents[:50], PASSES) for way, decode in ways(args.image_size).items()}
        print(f"{name}: {rates['before']:.1f} -> {rates['now']:.1f} images/s, {rates['now'] / rates['before']:.2f}x")
        if args.model:
            found = agreement(args.model, contents)
            print("  " + ", ".join(f"{what} {value:.4f}" for what, value in found.items()) + f" of {n} images")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--image_size", type=int, default=224, help="S (default: %(default)s)")
    add("--copies", type=int, default=50, help="photographs of 640 x 480, a tenth of 12 megapixels (default: "
        "%(default)s)")  # fmt: skip
    add("--model", type=Path, help="folder of a run, checkpoints/NOTES: compare its codes, too")
    add("--dry_run", action="store_true", help="check the flags, say what would be measured")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.image_size < 1 or args.copies < 1:
        raise InputError("--image_size and --copies must be at least 1")
    if args.dry_run:
        print(f"would decode photographs of {' and '.join(SIZES)} to {args.image_size} pixels")
        return
    measure(args)


if __name__ == "__main__":
    sys.exit(run_script(main))
