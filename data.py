"""What goes in? Data sets and their protocols, loaders."""

import hashlib
import math
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import transforms as T
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor

import transforms
from readers import ImageFiles, find_bad_images, read_flickr25k, read_nuswide
from utils import LOG, InputError, by_chunks, leave_signals, sample_seed

NOT_COMPARABLE = "Results are not comparable with published ones."
TEST_BATCH = 128  # images, whatever --batch_size: rounding must not depend on it


@dataclass(frozen=True)
class Images:
    """Images in memory: `pixels` `[n, H, W, 3]` uint8; `labels` `[n]` int64 class ids or `[n, L]` uint8 multi-hot."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def subset(self, indices: np.ndarray) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])

    def joined(self, other: "Images") -> "Images":
        return Images(np.concatenate([self.pixels, other.pixels]), np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class Splits:
    """What a protocol makes of a data set. `mirrored`: whether a mirror image is the same thing (a flipped digit
    is not), so that the views may flip. `canonical`: False where files are not the published ones."""

    train: Images | ImageFiles
    query: Images | ImageFiles
    database: Images | ImageFiles
    mirrored: bool = True
    canonical: bool = True

    def each(self, change: Callable) -> "Splits":
        """The same, with `change` done to the images of all three."""
        return replace(self, train=change(self.train), query=change(self.query), database=change(self.database))


# ---------------------------------------------------------------- protocols


def cifar10_indices(labels: np.ndarray, protocol: str, seed: int) -> dict[str, np.ndarray]:
    """CIFAR-10's splits as indices into the file order: one `permutation(6000)` a class, classes in order.

    The first 1,000 of a class are queries, the others the database; of these all (I) or the first 500 (II) train.

    Args:
        labels: `[60000]` class ids in file order: five training batches, then the test batch.
    """
    generator = np.random.RandomState(seed)
    classes = [np.flatnonzero(labels == c) for c in range(10)]
    shuffled = [of_class[generator.permutation(len(of_class))] for of_class in classes]
    last_train = {"I": None, "II": 1500}[protocol]
    return {
        "query": np.concatenate([of_class[:1000] for of_class in shuffled]),
        "train": np.concatenate([of_class[1000:last_train] for of_class in shuffled]),
        "database": np.concatenate([of_class[1000:] for of_class in shuffled]),
    }


def load_cifar10(data_root: Path, protocol: str, seed: int, download: bool) -> Splits:
    """CIFAR-10 from `data_root/CIFAR-10/cifar-10-batches-py`, split by protocol I or II.

    Raises InputError where files are missing (and can not be downloaded), damaged or mislabelled.
    """
    folder = data_root / "CIFAR-10" / CIFAR10.base_folder
    checksums = dict(CIFAR10.train_list + CIFAR10.test_list)
    if download and not all((folder / name).exists() for name in checksums):
        download_cifar10(folder.parent)
    if not folder.is_dir():
        raise InputError(
            f"CIFAR-10 is not at {folder}: run once with --download_cifar10, or unpack cifar-10-python.tar.gz "
            f"into {folder.parent} (--data_root names another place)"
        )
    batches = [read_cifar10_batch(folder / name) for name in checksums]
    changed = [
        name
        for name, md5 in checksums.items()
        if hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() != md5
    ]
    if changed:
        LOG.warning(
            "WARNING: not the published CIFAR-10 files (checksums differ): %s in %s. %s",
            ", ".join(changed),
            folder,
            NOT_COMPARABLE,
        )
    images = Images(np.concatenate([b.pixels for b in batches]), np.concatenate([b.labels for b in batches]))
    counts = np.bincount(images.labels, minlength=10)
    if (counts != 6000).any():
        raise InputError(
            f"{folder}: mislabelled, CIFAR-10 has 6000 images a class but class {np.argmax(counts != 6000)} "
            f"has {counts[counts != 6000][0]}; delete the folder and run with --download_cifar10"
        )
    parts = {name: images.subset(part) for name, part in cifar10_indices(images.labels, protocol, seed).items()}
    return Splits(**parts, canonical=not changed)


def download_cifar10(folder: Path) -> None:
    """Let torchvision download and unpack CIFAR-10 into `folder`. Raises InputError where that fails."""
    try:
        CIFAR10(str(folder), download=True)
    except Exception as error:  # network, proxy, checksum, disk
        raise InputError(
            f"--download_cifar10 failed ({error}): check the network, or fetch cifar-10-python.tar.gz elsewhere "
            f"and unpack it into {folder}"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR-10's batches are made of, NumPy arrays and plain containers, and nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_cifar10_batch(path: Path) -> Images:
    """One file of CIFAR-10's python version: 10,000 images.

    Raises InputError naming the file where it is missing, damaged, unsafe or mislabelled.
    """
    advice = "delete the folder and run with --download_cifar10"
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {advice}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"{path} is not a readable CIFAR-10 batch ({error}): {advice}") from error
    fault = _batch_fault(batch, path.name)
    if fault:
        raise InputError(f"{path}: {fault}; {advice}")
    pixels = batch["data"].reshape(10000, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(pixels, np.asarray(batch["labels"], dtype=np.int64))


def _batch_fault(batch: object, name: str) -> str | None:
    """What is wrong with an unpickled batch, or None."""
    if not isinstance(batch, dict) or not {"data", "labels", "batch_label"} <= batch.keys():
        return "not a CIFAR-10 batch (no data, labels and batch_label in it)"
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (10000, 3072):
        return "data is not an array of 10000 x 3072 bytes"
    if not isinstance(labels, list) or len(labels) != 10000:
        return "there are not 10000 labels"
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        return "mislabelled, a label is not a whole number from 0 to 9"
    title = "testing batch 1 of 1" if name == "test_batch" else f"training batch {name[-1]} of 5"
    found = batch["batch_label"]
    if not isinstance(found, str) or found != title:
        return f"mislabelled, the file says it is {str(found)[:40]!r} instead of {title!r}"
    return None


def load_digits(seed: int) -> Splits:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey): 30 queries a class, the rest trains and is searched."""
    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = Images(np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64))
    generator = np.random.RandomState(seed)
    shuffled = [generator.permutation(np.flatnonzero(images.labels == c)) for c in range(10)]
    query = images.subset(np.concatenate([of_class[:30] for of_class in shuffled]))
    rest = images.subset(np.concatenate([of_class[30:] for of_class in shuffled]))
    return Splits(train=rest, query=query, database=rest, mirrored=False)


def flickr25k_indices(n: int, seed: int) -> dict[str, np.ndarray]:
    """Flickr25K's splits of n = 25,000 images: of one permutation, 2,000 queries, then 5,000 that train; the database
    is all but the queries. A shorter list is split in the same proportions."""
    order = np.random.RandomState(seed).permutation(n)
    queries, train = n * 2000 // 25000, n * 5000 // 25000
    return {"query": order[:queries], "train": order[queries : queries + train], "database": order[queries:]}


def load_flickr25k(data_root: Path, list_root: Path, seed: int) -> Splits:
    """Flickr25K from the lists in `list_root/Flickr25k` and the images in `data_root/Flickr25K/mirflickr`.

    Raises InputError where a list is missing or wrong.
    """
    images = read_flickr25k(list_root / "Flickr25k", data_root / "Flickr25K" / "mirflickr")
    canonical = len(images) == 25000
    if not canonical:
        LOG.warning("WARNING: the list has %d images, Flickr25K 25000. %s", len(images), NOT_COMPARABLE)
    parts = {name: images.subset(part) for name, part in flickr25k_indices(len(images), seed).items()}
    return Splits(**parts, canonical=canonical)


def load_nuswide(data_root: Path, list_root: Path) -> Splits:
    """NUS-WIDE from the lists in `list_root/Nuswide` and the images in `data_root/NUS-WIDE/Flickr`.

    Raises InputError where a list is missing or wrong.
    """
    root = data_root / "NUS-WIDE" / "Flickr"
    splits = Splits(
        *(read_nuswide(list_root / "Nuswide" / f"{part}.txt", root) for part in ("train", "test", "database"))
    )
    both = np.intersect1d(splits.query.names, splits.database.names)
    if len(both):
        LOG.warning("WARNING: %d queries are in the database too, %s the first.", len(both), both[0])
    canonical = (len(splits.query), len(splits.database)) == (2100, 193734) and not len(both)
    if not canonical:
        sizes = len(splits.query), len(splits.database)
        LOG.warning("WARNING: %d queries and %d others, NUS-WIDE has 2100 and 193734. %s", *sizes, NOT_COMPARABLE)
    return replace(splits, canonical=canonical)


def load_splits(
    dataset: str,
    protocol: str,
    seed: int,
    data_root: Path,
    list_root: Path = Path("data"),
    *,
    download_cifar10: bool = False,
    limit: int | None = None,
    skip_bad_images: bool = False,
    num_workers: int = 0,
) -> Splits:
    """The splits of a data set; with `limit`, that many images of each, evenly spaced so that all classes stay.

    Image files are looked at before anyone waits for a run: with `skip_bad_images` those that are missing or do not
    decode are left out. Raises InputError where the data is not there or not sound.
    """
    if dataset == "Digits":
        splits = load_digits(seed)
    elif dataset == "CIFAR10":
        splits = load_cifar10(data_root, protocol, seed, download_cifar10)
    elif dataset == "Flickr25K":
        splits = load_flickr25k(data_root, list_root, seed)
    else:
        splits = load_nuswide(data_root, list_root)
    if limit is not None:
        LOG.warning("WARNING: --limit %d: only %d images a split are used. The MAP means nothing.", limit, limit)
        splits = splits.each(lambda images: _spread(images, limit))
    if isinstance(splits.database, ImageFiles):
        splits = _only_sound(splits, skip_bad_images, num_workers)
    for name in ("train", "query", "database"):
        if not len(getattr(splits, name)):
            raise InputError(f"--dataset {dataset}: there are too few images, none is left for the {name} split")
    return splits


def _spread(images: Images | ImageFiles, limit: int) -> Images | ImageFiles:
    return images.subset(np.linspace(0, len(images), min(limit, len(images)), endpoint=False).astype(int))


def look_at_images(splits: Splits, num_workers: int) -> tuple[np.ndarray, dict[str, str]]:
    """The names of all image files of the splits, and of the bad ones what is wrong with them."""
    names = np.unique(np.concatenate([splits.train.names, splits.query.names, splits.database.names]))
    return names, find_bad_images(splits.database.root, names, worker_count(num_workers))


def _only_sound(splits: Splits, skip_bad_images: bool, num_workers: int) -> Splits:
    """The splits without the images that are missing or do not decode; InputError where there are any and none may
    be skipped."""
    root = splits.database.root
    names, bad = look_at_images(splits, num_workers)
    if not bad:
        return splits
    named = [f"{root / name} {fault}" for name, fault in bad.items()]
    if not skip_bad_images:
        raise InputError(
            f"{len(bad)} of {len(names)} images can not be used, {named[0]}{' for one' if len(bad) > 1 else ''}: "
            "fetch them again, or leave them out with --skip_bad_images (scripts/check_data.py lists them)"
        )
    LOG.warning("WARNING: %d of %d images are left out: %s. %s", len(bad), len(names), "; ".join(named), NOT_COMPARABLE)
    kept = splits.each(lambda images: images.subset(np.flatnonzero(~np.isin(images.names, list(bad)))))
    return replace(kept, canonical=False)


# ---------------------------------------------------------------- loaders


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (image, seed of its views) for one epoch after another, from the `first` one on; the last batch may be
    smaller.

    Order and seeds are functions of (seed, epoch) alone, so views do not depend on the number of workers.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed, self.epoch, self.first = n, batch_size, seed, 0, 0

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator).tolist()
        for start in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(index, sample_seed(self.seed, self.epoch, index)) for index in batch]


class SeededViews(Dataset):
    """(image, seed) -> `draw(image, seed)`."""

    def __init__(self, draw: Callable[[int, int], tuple[Tensor, ...]]) -> None:
        self.draw = draw

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        return self.draw(*key)


def pil_views(images: Images | ImageFiles, transform: T.Compose, index: int, seed: int) -> tuple[Tensor]:
    """Both views of an image, `[2, 3, S, S]`."""
    picture = images.picture(index)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed)
        return (torch.stack([transform(picture), transform(picture)]),)


def photo_views(images: ImageFiles, mirrored: bool, image_size: int, index: int, seed: int) -> tuple[Tensor, Tensor]:
    """What `views.augment_crops` makes two views of: crops `[2, 3, S, S]` uint8 and the views' numbers."""
    with images.opened(index) as photo:
        width, height = photo.size
        sizes = torch.tensor([[height, height], [width, width]])
        drawn = transforms.draw_views(*sizes, mirrored, torch.Generator().manual_seed(seed))
        enough = image_size / float(
            drawn[:, transforms.CROP][:, 2:].min()
        )  # a crop that is larger than S may be decoded at
        photo.draft("RGB", (math.ceil(enough * width), math.ceil(enough * height)))  # a half, a quarter or an eighth
        pixels = pil_to_tensor(photo.convert("RGB"))
    crops = [transforms.crop_view(pixels, numbers, (height, width), image_size) for numbers in drawn]
    return torch.stack(crops), drawn


class SmallViews(IterableDataset):
    """Batches of what `views.augment_small` makes two views of: `[2N, H, W, 3]` uint8 and the views' numbers, which are
    drawn for a whole epoch at once: image by image that takes as long as all the rest."""

    def __init__(self, images: Images, mirrored: bool, batches: ShuffledBatches) -> None:
        self.images, self.mirrored, self.batches = images, mirrored, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, height, width, _ = self.images.pixels.shape
        generator = torch.Generator().manual_seed(sample_seed(self.batches.seed, self.batches.epoch, n))
        sizes = torch.tensor([[height], [width]]).expand(2, 2 * n)
        drawn = transforms.draw_views(*sizes, self.mirrored, generator).view(2, n, -1)
        for batch in self.batches:
            rows = [index for index, _ in batch]
            yield torch.from_numpy(self.images.pixels[rows]).repeat(2, 1, 1, 1), drawn[:, rows].flatten(0, 1)


def views_first(items: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Tensors `[2, ...]` of N images -> `[2N, ...]`: all first views, then all second ones."""
    return [torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*items, strict=True)]


class TwoViews:
    """Batches of both views of the training images, `[2N, 3, S, S]` float32 on a device, all first views first; set
    `batch_sampler.epoch` before each pass."""

    def __init__(
        self, loader: DataLoader, batch_sampler: ShuffledBatches, augment: Callable[..., Tensor], device: str
    ) -> None:
        self.loader, self.batch_sampler, self.augment, self.device = loader, batch_sampler, augment, device

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Tensor]:
        for images, *drawn in self.loader:
            yield self.augment(images.to(self.device, non_blocking=True), *drawn)


def train_loader(splits: Splits, args: Namespace) -> TwoViews:
    """Both views of the training images, in batches, as `--views`, `--image_size`, `--batch_size`, `--num_workers`,
    `--seed` and `--device` say.

    "pil": views are made image by image in workers. "batched": workers decode and crop images on disk, all else happens
    on the device; images in memory need no workers.
    """
    images, S = splits.train, args.image_size
    batches = ShuffledBatches(len(images), args.batch_size, args.seed)
    if args.views == "batched" and isinstance(images, Images):
        augment = partial(transforms.augment_small, image_size=S)
        small = SmallViews(images, splits.mirrored, batches)
        loader = DataLoader(small, batch_size=None, **_loader_options(args) | {"num_workers": 0})
    else:
        if args.views == "batched":
            draw, augment = (
                partial(photo_views, images, splits.mirrored, S),
                partial(by_chunks, transforms.augment_crops),
            )
        else:
            draw, augment = partial(pil_views, images, transforms.view_transform(S, splits.mirrored)), lambda x: x
        loader = DataLoader(SeededViews(draw), batch_sampler=batches, collate_fn=views_first, **_loader_options(args))
    return TwoViews(loader, batches, augment, args.device)


def photo_transform(image_size: int) -> T.Compose:
    """What queries and database images on disk go through: the shorter side is resized to 256 / 224 S and the centre
    cut out. PIL image -> `[3, S, S]` float32."""
    return T.Compose(
        [
            T.Resize(round(image_size * 256 / 224)),
            T.CenterCrop(image_size),
            T.ToTensor(),
            T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD),
        ]
    )


class Photos(Dataset):
    """index -> the image as test images are seen."""

    def __init__(self, images: ImageFiles, transform: T.Compose) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.picture(index))


def test_batches(images: Images | ImageFiles, args: Namespace) -> Iterator[Tensor]:
    """Test images in their order, in batches `[B, 3, S, S]` of at most `TEST_BATCH`, on the device.

    Those on disk go through `photo_transform` in workers; those in memory are square and resized on the device.
    """
    if isinstance(images, ImageFiles):
        photos = Photos(images, photo_transform(args.image_size))
        for batch in DataLoader(photos, batch_size=TEST_BATCH, **_loader_options(args)):
            yield batch.to(args.device, non_blocking=True)
    else:
        for start in range(0, len(images), TEST_BATCH):
            pixels = torch.from_numpy(images.pixels[start : start + TEST_BATCH]).to(args.device)
            yield by_chunks(partial(transforms.enlarge, image_size=args.image_size), pixels)


test_batches.__test__ = False  # not a pytest function


def worker_count(num_workers: int) -> int:
    """Never more workers than cores: they would only wait for each other."""
    return min(num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def _loader_options(args: Namespace) -> dict:
    """The loader's own generator decides nothing here, it keeps the global one out of it."""
    return {
        "num_workers": worker_count(args.num_workers),
        "pin_memory": args.device != "cpu",
        "generator": torch.Generator(),
        "worker_init_fn": leave_signals if args.num_workers else None,
    }
