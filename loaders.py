"""Batches on the device: two views of the training images, and test images."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import transforms as T
from torchvision.transforms.v2.functional import resize

import spq_views
import transforms
from data import Splits
from distributed import by_chunks, fits, local_processes, processes, rank, sent
from readers import ImageFiles, Images
from utils import InputError, leave_signals, sample_seed, worker_count
from vectors import VectorPairs, Vectors

TEST_BATCH = 128  # images, whatever --batch_size: rounding must not depend on it
SOME = 128  # images, from which ranges of integers are taken


@dataclass(frozen=True)
class ViewOptions:
    """How training images become views. `kind`: "pil" makes them image by image in workers; "batched" only decodes and
    crops images on disk there, all else happens on the device.

    Args:
        augmentation: "MeCoQ", or one of `spq_views.COLOURS`, whose views are always batched.
        normalized: whether views are normalised by ImageNet's mean and deviation, or in [0, 1].
        drop_last: whether a last batch that is smaller is left out.
    """

    kind: str
    image_size: int
    batch_size: int
    seed: int
    augmentation: str = "MeCoQ"
    normalized: bool = True
    drop_last: bool = False


@dataclass(frozen=True)
class Preprocessing:
    """How test images become batches, normalised by ImageNet's mean and deviation or in [0, 1]."""

    image_size: int
    device: str
    num_workers: int
    normalized: bool = True


# ---------------------------------------------------------------- training images


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (image, seed of its views) of an epoch, from the `first` one on; the last batch may be smaller, or is
    left out then.

    Order and seeds are functions of (seed, epoch) alone, so views do not depend on the number of workers.

    `share`: which part of each batch is yielded, and of how many: that of one of several processes.
    """

    def __init__(self, n: int, batch_size: int, seed: int, drop_last: bool = False) -> None:
        self.n, self.batch_size, self.seed, self.drop_last = n, batch_size, seed, drop_last
        self.epoch, self.first, self.share = 0, 0, (0, 1)

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def rows(self) -> Iterator[Tensor]:
        """The images alone, `[B]` per batch."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for step in range(self.first, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            part, parts = self.share
            yield batch.tensor_split(parts)[part]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for rows in self.rows():
            yield [(index, sample_seed(self.seed, self.epoch, index)) for index in rows.tolist()]


class SeededViews(Dataset):
    """(image, seed) -> `draw(image, seed)`, of all images of a batch; if it has none, of one that `of_batch` drops."""

    def __init__(self, draw: Callable[[int, int], tuple[Tensor, ...]]) -> None:
        self.draw = draw

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[list[tuple[Tensor, ...]], int]:
        return [self.draw(*key) for key in keys or [(0, 0)]], len(keys)


def of_batch(collate: Callable[[list], list[Tensor]], fetched: tuple[list, int]) -> list[Tensor]:
    """What `SeededViews` gives of n images, collated: tensors `[n k, ...]`."""
    items, n = fetched
    return [tensor[: n * len(tensor) // len(items)] for tensor in collate(items)]


def pil_views(images: Images | ImageFiles, transform: T.Compose, index: int, seed: int) -> tuple[Tensor]:
    """Both views of an image, `[2, 3, S, S]`."""
    picture = images.picture(index)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed)
        return (torch.stack([transform(picture), transform(picture)]),)


def photo_views(images: ImageFiles, mirrored: bool, image_size: int, index: int, seed: int) -> tuple[Tensor, Tensor]:
    """What `transforms.augment_crops` makes two views of: crops `[2, 3, S, S]` uint8 and the views' numbers `[2, 15]`.

    If all crops are larger than S, the image is decoded at a half, a quarter or an eighth of its size.
    """
    with images.opened(index) as photo:
        width, height = photo.size
        sizes = torch.tensor([[height, height], [width, width]])
        drawn = transforms.draw_views(*sizes, mirrored, torch.Generator().manual_seed(seed))
        enough = image_size / float(drawn[:, transforms.CROP][:, 2:].min())
        pixels = photo.decoded(least=(math.ceil(enough * width), math.ceil(enough * height)))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    crops = [transforms.crop_view(pixels, numbers, (height, width), image_size) for numbers in drawn]
    return torch.stack(crops), drawn


def pixels_there(images: Images, device: str) -> Callable[[Tensor], Tensor]:
    """rows `[B]` -> pixels `[B, H, W, 3]` uint8 of these images on a device. A GPU keeps those of all images if they
    fit."""
    pixels = torch.from_numpy(images.pixels)
    if fits(pixels.nbytes, device):
        there = sent(pixels, device)
        return lambda rows: there[rows.to(device, non_blocking=True)]
    return lambda rows: sent(pixels[rows], device)


class SmallViews:
    """Batches of what `transforms.augment_small` makes two views of: `[2N, H, W, 3]` uint8 and the views' numbers
    `[2N, 15]`, drawn for a whole epoch at once: image by image that takes as long as all the rest."""

    def __init__(self, images: Images, mirrored: bool, batches: ShuffledBatches, device: str) -> None:
        self.shape, self.mirrored, self.batches = images.pixels.shape, mirrored, batches
        self.pixels = pixels_there(images, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, height, width, _ = self.shape
        generator = torch.Generator().manual_seed(sample_seed(self.batches.seed, self.batches.epoch, n))
        sizes = torch.tensor([[height], [width]]).expand(2, 2 * n)
        drawn = transforms.draw_views(*sizes, self.mirrored, generator).view(2, n, -1)
        for rows in self.batches.rows():
            yield self.pixels(rows).repeat(2, 1, 1, 1), drawn[:, rows].flatten(0, 1)


class PixelsInMemory:
    """Batches of indices and pixels `[N, H, W, 3]` uint8 of small images, the latter on the device."""

    def __init__(self, images: Images, batches: ShuffledBatches, device: str) -> None:
        self.batches, self.pixels = batches, pixels_there(images, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((rows, self.pixels(rows)) for rows in self.batches.rows())


def whole_photo(images: ImageFiles, image_size: int, index: int, _: int) -> tuple[int, Tensor]:
    """An image's index and its pixels, the whole of it resized: `[S, S, 3]` uint8."""
    with images.opened(index) as photo:
        pixels = photo.decoded(least=(image_size, image_size))
    pixels = resize(torch.from_numpy(pixels).permute(2, 0, 1), [image_size, image_size], antialias=True)
    return index, pixels.permute(1, 2, 0)


class DrawnBatches:
    """Batches of what `spq_views.two_views` makes views of: `[N, H, W, 3]` uint8 and the views' numbers `[2N, 15]`,
    drawn for a whole epoch at once; the order of the colour operations is drawn for each batch and view.

    Args:
        loader: of the images of `batches` and their indices.
        size: height and width of all images.
    """

    def __init__(self, loader: Iterable, batches: ShuffledBatches, size: tuple[int, int], mirrored: bool) -> None:
        self.loader, self.batches, self.size, self.mirrored = loader, batches, size, mirrored

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, seeds = self.batches.n, (self.batches.seed, self.batches.epoch, self.batches.n)
        generator = torch.Generator().manual_seed(sample_seed(*seeds))
        drawn = spq_views.draw_views(2 * n, self.size, self.mirrored, generator).view(2, n, -1)
        for step, (rows, pixels) in enumerate(self.loader, self.batches.first):
            generator.manual_seed(sample_seed(*seeds, step))
            yield pixels, torch.cat([spq_views.with_one_order(view[rows], generator) for view in drawn])


def views_first(items: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Tensors `[2, ...]` of N images -> `[2N, ...]`: all first views, then all second ones."""
    return [torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*items, strict=True)]


class TwoViews:
    """Batches of both views of the training images, `[2N, 3, S, S]` float32 on the device, all first views first. Its
    length is that of a whole epoch."""

    def __init__(self, loader: Iterable, batches: ShuffledBatches, augment: Callable[..., Tensor], device: str) -> None:
        self.loader, self.batches, self.augment, self.device = loader, batches, augment, device

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose what the next pass yields: the epoch's batches from `first_step` on."""
        self.batches.epoch, self.batches.first = epoch, first_step

    def share_out(self) -> None:
        """Let each of the run's processes have its part of every batch. Raises InputError if a batch has fewer images
        than there are processes."""
        if self.batches.batch_size < processes():
            raise InputError(f"--batch_size {self.batches.batch_size}: less than an image for each of {processes()} "
                             "processes: start fewer of them")  # fmt: skip
        self.batches.share = rank(), processes()

    def __iter__(self) -> Iterator[Tensor]:
        for images, *drawn in self.loader:
            yield self.augment(sent(images, self.device), *drawn)


def train_loader(splits: Splits, options: ViewOptions, device: str, num_workers: int) -> TwoViews:
    """Both views of the training images, or pairs of vectors `[2N, D]`, in batches. Images in memory need no workers if
    views are batched. Raises InputError if there is no batch."""
    images, S, normalized = splits.train, options.image_size, options.normalized
    batches = ShuffledBatches(len(images), options.batch_size, options.seed, options.drop_last)
    if len(batches) == 0:
        raise InputError(
            f"{len(images)} training images make no whole batch of {options.batch_size}, and smaller ones are left "
            "out: choose a smaller --batch_size, or --no-drop_last"
        )
    if isinstance(images, Vectors):
        return TwoViews(VectorPairs(images, batches, device), batches, lambda pair: pair, device)
    if options.augmentation != "MeCoQ":
        return spq_loader(splits, options, batches, device, num_workers)
    if options.kind == "batched" and not images.on_disk:
        small = SmallViews(images, splits.mirrored, batches, device)
        augment = partial(transforms.augment_small, image_size=S, normalized=normalized)
        return TwoViews(small, batches, augment, device)
    if options.kind == "batched":
        draw = partial(photo_views, images, splits.mirrored, S)
        augment = partial(by_chunks, partial(transforms.augment_crops, normalized=normalized))
    else:
        transform = transforms.view_transform(S, splits.mirrored, normalized)
        draw, augment = partial(pil_views, images, transform), lambda x: x
    views = SeededViews(draw)
    collate, workers = partial(of_batch, views_first), _loader_options(device, num_workers, every_epoch=True)
    loader = DataLoader(views, batch_sampler=batches, collate_fn=collate, **workers)
    return TwoViews(loader, batches, augment, device)


def spq_loader(
    splits: Splits, options: ViewOptions, batches: ShuffledBatches, device: str, num_workers: int
) -> TwoViews:
    """The same by SPQ's augmentation. Of images on disk, workers resize the whole to `[S, S]` first."""
    spq_views.colours(options.augmentation)  # imports kornia, before anything of an earlier run is removed
    images, S = splits.train, options.image_size
    if images.on_disk:
        read, size = SeededViews(partial(whole_photo, images, S)), (S, S)
        collate, workers = partial(of_batch, default_collate), _loader_options(device, num_workers, every_epoch=True)
        loader = DataLoader(read, batch_sampler=batches, collate_fn=collate, **workers)
    else:
        loader, size = PixelsInMemory(images, batches, device), images.pixels.shape[1:3]
    augment = partial(spq_views.two_views, image_size=S, variant=options.augmentation, normalized=options.normalized)
    return TwoViews(DrawnBatches(loader, batches, size, splits.mirrored), batches, augment, device)


# ---------------------------------------------------------------- test images


class Photos(Dataset):
    """index -> the image as test images are seen, `[3, S, S]` float32."""

    def __init__(self, images: ImageFiles, transform: Callable[..., Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.picture(index))


class UprightPhotos(Photos):
    """index -> a user's own image, `[3, S, S]` uint8; `transform`: of an `UprightImage`."""

    def __getitem__(self, index: int) -> Tensor:
        with self.images.opened(index) as image:
            return self.transform(image)


def test_batches(images: Images | ImageFiles | Vectors, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Test images in their order, in batches `[B, 3, S, S]` of at most `TEST_BATCH`, on the device.

    Those on disk go through `photo_transform` in workers, a user's own through `photo_pixels`; those in memory are
    square and resized on the device. Vectors stay as they are, `[B, D]`.
    """
    S, device, normalized = preprocessing.image_size, preprocessing.device, preprocessing.normalized
    options = _loader_options(device, preprocessing.num_workers)
    if isinstance(images, Vectors):
        for start in range(0, len(images), TEST_BATCH):
            yield sent(torch.from_numpy(images.read(slice(start, start + TEST_BATCH))), device)
    elif images.on_disk and images.upright:
        photos = UprightPhotos(images, partial(transforms.photo_pixels, image_size=S))
        for batch in DataLoader(photos, batch_size=TEST_BATCH, **options):
            yield transforms.from_bytes(batch.to(device, non_blocking=True).float(), normalized)
    elif images.on_disk:
        photos = Photos(images, transforms.photo_transform(S, normalized))
        for batch in DataLoader(photos, batch_size=TEST_BATCH, **options):
            yield batch.to(device, non_blocking=True)
    else:
        for start in range(0, len(images), TEST_BATCH):
            pixels = sent(torch.from_numpy(images.pixels[start : start + TEST_BATCH]), device)
            yield by_chunks(partial(transforms.enlarge, image_size=S, normalized=normalized), pixels)


test_batches.__test__ = False  # not a pytest function


def some_images(images: Images | ImageFiles, preprocessing: Preprocessing) -> Tensor:
    """As test images are seen, `[B, 3, S, S]`, `SOME` of them at most, evenly spread."""
    rows = np.unique(np.linspace(0, len(images) - 1, SOME).round().astype(int))
    return torch.cat(list(test_batches(images.subset(rows), preprocessing)))


def _loader_options(device: str, num_workers: int, every_epoch: bool = False) -> dict:
    """The loader's own generator decides nothing here, it keeps the global one out of it. What is read in every epoch
    keeps its workers: they know nothing of an epoch, as seeds come with the indices."""
    workers = -(-worker_count(num_workers) // local_processes())
    return {
        "num_workers": workers,
        "persistent_workers": every_epoch and workers > 0,
        "pin_memory": device != "cpu",
        "generator": torch.Generator(),
        "worker_init_fn": leave_signals if num_workers else None,
    }
