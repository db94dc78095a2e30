"""Data sets and their protocols: which images train, which are queries, which are searched."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from photos import list_photos, shown_name
from readers import (
    ImageFiles,
    Images,
    download_cifar10,
    read_cifar10_batch,
    read_flickr25k,
    read_lines,
    read_nuswide,
)
from utils import LOG, InputError, worker_count
from vectors import EmbeddingFiles, Vectors, read_embeddings

NOT_COMPARABLE = "Results are not comparable with published ones."
NAMED = 20  # bad images in a warning
FEWEST_PHOTOS = 10
NUSWIDE_SIZES = (2100, 193734)  # queries, and all others
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Source:
    """What to load: `data_root` holds the images, `list_root` the split lists. `download`: fetch CIFAR-10 if it is not
    there. `photos`: the folder of a user's own images; `embeddings`: the files of a user's own embeddings."""

    dataset: str
    protocol: str
    seed: int
    data_root: Path
    list_root: Path
    download: bool = False
    photos: Path | None = None
    embeddings: EmbeddingFiles | None = None


@dataclass(frozen=True)
class Splits:
    """What a protocol makes of a data set. `mirrored`: whether the views may flip, as the data set's row says (a
    flipped digit is not the same thing). `canonical`: False if files are not the published ones. `validation`: the
    queries that pick the checkpoint; None: the test's own, so that its MAP is optimistic. `labelled`: False if the
    labels are zeros that say nothing, so that there is no MAP. `keeps_last`: whether labels are of the test alone, and
    the last epoch's model is kept. `classes`: names of the labels, if the images themselves tell them."""

    train: Images | ImageFiles | Vectors
    query: Images | ImageFiles | Vectors
    database: Images | ImageFiles | Vectors
    mirrored: bool = True
    canonical: bool = True
    validation: Images | ImageFiles | None = None
    labelled: bool = True
    keeps_last: bool = False
    classes: tuple[str, ...] = ()

    @property
    def validated(self) -> bool:
        """Whether MAP picks the checkpoint."""
        return self.labelled and not self.keeps_last

    @property
    def all(self) -> dict[str, Images | ImageFiles]:
        """The images by split."""
        return {"train": self.train} | self.tested

    @property
    def tested(self) -> dict[str, Images | ImageFiles]:
        """The images of validation and test, by split."""
        own = {} if self.validation is None else {"validation": self.validation}
        return {"query": self.query, "database": self.database} | own

    def each(self, change: Callable) -> "Splits":
        """The same with `change` applied to the images of every split."""
        return replace(self, **{name: change(images) for name, images in self.all.items()})


@dataclass(frozen=True)
class Dataset:
    """A row of `DATASETS`: what the program needs to be told about a data set.

    `classes`: names of the labels, if they do not stand in `concepts.txt` beside the lists. `mirrored`: see `Splits`.
    `protocols`: whether there are several. `lists`: folder of the split lists below `list_root`. `own`: whether they
    are a user's own images, of which those that cannot be used are left out. `vectors`: whether it has embeddings
    instead of images, all of which have a code even if --limit leaves few to train on.
    """

    load: Callable[[Source], Splits]
    help: str
    classes: tuple[str, ...] = ()
    mirrored: bool = True
    protocols: bool = False
    lists: str = ""
    own: bool = False
    vectors: bool = False


# ---------------------------------------------------------------- protocols


def cifar10_indices(labels: np.ndarray, protocol: str, seed: int) -> dict[str, np.ndarray]:
    """CIFAR-10's splits as indices into the file order: one `permutation(6000)` per class, classes in order.

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


def official_indices(n: int, _: np.ndarray) -> dict[str, np.ndarray]:
    """CIFAR-10's own split, which SPQ uses: the first n images train and are searched, the others are queries."""
    return {"train": np.arange(n), "database": np.arange(n), "query": np.arange(n, n + n // 5)}


def cibhash_indices(n: int, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The split of CIBHash's released code, the same for any seed: of the first n images of CIFAR-10, the official
    training set, a tenth of each class trains and all are searched; half of the others pick the checkpoint, the other
    half are the test's queries."""
    generator = np.random.RandomState(0)
    classes = [np.flatnonzero(labels[:n] == c) for c in range(10)]
    train = [of_class[generator.permutation(len(of_class))[: n // 100]] for of_class in classes]
    order = np.arange(n // 5)
    generator.shuffle(order)
    validation, query = np.split(n + order, 2)
    return {"train": np.concatenate(train), "database": np.arange(n), "validation": validation, "query": query}


def load_cifar10(source: Source) -> Splits:
    """CIFAR-10 from `data_root/CIFAR-10/cifar-10-batches-py`, or from `data_root/cifar-10-batches-py` if that is there
    and the other is not, split by a protocol.

    Raises InputError if files are missing (and cannot be downloaded), damaged or mislabelled.
    """
    from torchvision.datasets import CIFAR10

    folder, plain = source.data_root / "CIFAR-10" / CIFAR10.base_folder, source.data_root / CIFAR10.base_folder
    folder = plain if plain.is_dir() and not folder.is_dir() else folder
    checksums = dict(CIFAR10.train_list + CIFAR10.test_list)
    if source.download and not all((folder / name).exists() for name in checksums):
        download_cifar10(folder.parent)
    if not folder.is_dir():
        raise InputError(
            f"CIFAR-10 is not at {folder}: run once with --download_cifar10, or unpack cifar-10-python.tar.gz "
            f"into {folder.parent} (--data_root names another place)"
        )
    batches = [read_cifar10_batch(folder / name) for name in checksums]
    changed = [name for name, md5 in checksums.items() if _md5(folder / name) != md5]
    if changed:
        names = ", ".join(changed)
        LOG.warning("WARNING: not the published CIFAR-10 files (checksums differ): %s in %s. %s", names, folder,
                    NOT_COMPARABLE)  # fmt: skip
    images = Images(np.concatenate([b.pixels for b in batches]), np.concatenate([b.labels for b in batches]))
    counts = np.bincount(images.labels, minlength=10)
    if (counts != 6000).any():
        raise InputError(
            f"{folder}: mislabelled, CIFAR-10 has 6000 images a class but class {np.argmax(counts != 6000)} "
            f"has {counts[counts != 6000][0]}; delete the folder and run with --download_cifar10"
        )
    if source.protocol in ("I", "II"):
        indices = cifar10_indices(images.labels, source.protocol, source.seed)
    else:
        indices = {"official": official_indices, "CIBHash": cibhash_indices}[source.protocol](50000, images.labels)
    return Splits(**{name: images.subset(part) for name, part in indices.items()}, canonical=not changed)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def load_digits(source: Source) -> Splits:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey): 30 queries per class, the rest trains and is searched."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = Images(np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64))
    generator = np.random.RandomState(source.seed)
    shuffled = [generator.permutation(np.flatnonzero(images.labels == c)) for c in range(10)]
    query = images.subset(np.concatenate([of_class[:30] for of_class in shuffled]))
    rest = images.subset(np.concatenate([of_class[30:] for of_class in shuffled]))
    return Splits(train=rest, query=query, database=rest)


def flickr25k_indices(n: int, seed: int) -> dict[str, np.ndarray]:
    """Flickr25K's splits of n = 25,000 images: of one permutation, 2,000 queries, then 5,000 that train; the database
    is all but the queries. A shorter list is split in the same proportions."""
    order = np.random.RandomState(seed).permutation(n)
    queries, train = n * 2000 // 25000, n * 5000 // 25000
    return {"query": order[:queries], "train": order[queries : queries + train], "database": order[queries:]}


def load_flickr25k(source: Source) -> Splits:
    """Flickr25K from the lists in `list_root/Flickr25k` and the images in `data_root/Flickr25K/mirflickr`.

    Raises InputError if a list is missing or wrong.
    """
    images = read_flickr25k(source.list_root / "Flickr25k", source.data_root / "Flickr25K" / "mirflickr")
    canonical = len(images) == 25000
    if not canonical:
        LOG.warning("WARNING: the list has %d images, Flickr25K 25000. %s", len(images), NOT_COMPARABLE)
    parts = {name: images.subset(part) for name, part in flickr25k_indices(len(images), source.seed).items()}
    return Splits(**parts, canonical=canonical)


def load_nuswide(source: Source) -> Splits:
    """NUS-WIDE from the lists in `list_root/Nuswide` and the images in `data_root/NUS-WIDE/Flickr`.

    Raises InputError if a list is missing or wrong.
    """
    root, lists = source.data_root / "NUS-WIDE" / "Flickr", source.list_root / "Nuswide"
    splits = Splits(*(read_nuswide(lists / f"{part}.txt", root) for part in ("train", "test", "database")))
    both = np.intersect1d(splits.query.names, splits.database.names)
    if len(both):
        LOG.warning("WARNING: %d queries are in the database too, %s the first.", len(both), both[0])
    sizes = len(splits.query), len(splits.database)
    canonical = sizes == NUSWIDE_SIZES and not len(both)
    if not canonical:
        counts = *sizes, *NUSWIDE_SIZES
        LOG.warning("WARNING: %d queries and %d others, NUS-WIDE has %d and %d. %s", *counts, NOT_COMPARABLE)
    return replace(splits, canonical=canonical)


def folder_indices(n: int, seed: int) -> dict[str, np.ndarray]:
    """The splits of a user's n images or embeddings: a tenth, at most 1,000, are queries; the others train and are the
    database."""
    order = np.random.RandomState(seed).permutation(n)
    queries = np.sort(order[: min(n // 10, 1000)])
    rest = np.setdiff1d(np.arange(n), queries)
    return {"query": queries, "train": rest, "database": rest}


def subfolder_labels(names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class ids `[n]` of images, and the classes' names: the first folder of each name, if each has one and there are
    at least two; else zeros and none."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes, labels = np.unique(folders, return_inverse=True)
    if "" in folders or len(classes) < 2:
        return np.zeros(len(names), np.int64), ()
    return labels.astype(np.int64), tuple(classes.tolist())


def load_folder(source: Source) -> Splits:
    """The images below `source.photos`; a subfolder per class, if there are such, labels them for the test.

    Raises InputError if the folder cannot be listed or has too few images.
    """
    names = list_photos(source.photos)
    if len(names) < FEWEST_PHOTOS:
        raise InputError(
            f"--images {source.photos}: {len(names)} images are there, at least {FEWEST_PHOTOS} are needed"
        )
    labels, classes = subfolder_labels(names)
    if classes:
        LOG.info("MAP by subfolder (%d of them): it means something only if they are classes", len(classes))
    else:
        LOG.info("no labels: there is no subfolder per class, hence no MAP")
    images = ImageFiles(source.photos, np.array(names), labels, upright=True)
    parts = {name: images.subset(part) for name, part in folder_indices(len(images), source.seed).items()}
    return Splits(**parts, labelled=bool(classes), keeps_last=True, classes=tuple(map(shown_name, classes)))


def load_embeddings(source: Source) -> Splits:
    """A user's own embeddings. Raises InputError if no file is named, or one is missing or wrong."""
    if source.embeddings is None:
        raise InputError("--dataset Embeddings: name them, with --embeddings X.npy")
    items = read_embeddings(source.embeddings)
    parts = {name: items.subset(part) for name, part in folder_indices(len(items), source.seed).items()}
    return Splits(**parts, labelled=source.embeddings.labels is not None, keeps_last=True)


DATASETS = {
    "CIFAR10": Dataset(load_cifar10, "60,000 images of 10 classes", classes=CIFAR10_CLASSES, protocols=True),
    "Flickr25K": Dataset(load_flickr25k, "25,000 photos with 24 labels", lists="Flickr25k"),
    "NUSWIDE": Dataset(load_nuswide, "195,834 photos with 21 labels", lists="Nuswide"),
    "Digits": Dataset(
        load_digits, "1,797 handwritten digits, nothing to download", classes=tuple("0123456789"), mirrored=False
    ),
    "Folder": Dataset(load_folder, "your own images, those of --images", own=True),
    "Embeddings": Dataset(load_embeddings, "vectors of yours, see --embeddings", vectors=True),
}


def class_names(dataset: str, list_root: Path) -> tuple[str, ...]:
    """Names of a data set's labels in their order; empty if it has none. Raises InputError if the list of them
    cannot be read."""
    row = DATASETS[dataset]
    path = list_root / row.lists / "concepts.txt"
    if row.classes or not row.lists or not path.exists():
        return row.classes
    return tuple(read_lines(path, "prepare_*.py"))


# ---------------------------------------------------------------- splits


def load_splits(
    source: Source, limit: int | None = None, skip_bad_images: bool = False, num_workers: int = 0
) -> Splits:
    """The splits of a data set; with `limit`, that many images of each (of embeddings: to train on), evenly spaced so
    that all classes stay.

    Image files are checked before anyone waits for a run: with `skip_bad_images`, and always if they are a user's own,
    those that are missing or do not decode are left out. Raises InputError if the data is missing or damaged.
    """
    row = DATASETS[source.dataset]
    splits = replace(row.load(source), mirrored=row.mirrored)
    if limit is not None and row.vectors:
        splits = replace(splits, train=_spread(splits.train, limit))
    elif limit is not None:
        LOG.warning("WARNING: --limit %d: only %d images a split are used. The MAP means nothing.", limit, limit)
        splits = splits.each(lambda images: _spread(images, limit))
    splits = _only_sound(splits, row.own, skip_bad_images, num_workers)
    for name, images in splits.all.items():
        if not len(images):
            raise InputError(f"--dataset {source.dataset}: there are too few images, none is left for the {name} split")
    return splits


def _spread(images: Images | ImageFiles, limit: int) -> Images | ImageFiles:
    return images.subset(np.linspace(0, len(images), min(limit, len(images)), endpoint=False).astype(int))


def check_images(splits: Splits, num_workers: int) -> tuple[int, dict[str, str]]:
    """How many image files the splits have, and name -> what is wrong, for the bad ones; 0 and none in memory.

    Raises InputError if their folder is missing.
    """
    if not splits.database.on_disk:
        return 0, {}
    if not splits.database.root.is_dir():
        raise InputError(
            f"{splits.database.root} is missing: datasets/README.md says how to get the images that go there "
            "(--data_root names another place)"
        )
    images = reduce(lambda joined, more: joined.joined(more), splits.all.values())
    images = images.subset(np.unique(images.names, return_index=True)[1])
    return len(images), images.faults(worker_count(num_workers))


def _only_sound(splits: Splits, own: bool, skip_bad_images: bool, num_workers: int) -> Splits:
    """The splits without the images that are missing or do not decode. Raises InputError if there are any, none may be
    skipped, and they are not a user's own."""
    n, bad = check_images(splits, num_workers)
    if not bad:
        return splits
    named = [shown_name(f"{splits.database.root / name} {fault}") for name, fault in list(bad.items())[:NAMED]]
    if not skip_bad_images and not own:
        raise InputError(
            f"{len(bad)} of {n} images cannot be used, {named[0]}{' for one' if len(bad) > 1 else ''}: "
            "fetch them again, or leave them out with --skip_bad_images (scripts/check_data.py lists them)"
        )
    more = f" and {len(bad) - NAMED} more{'' if own else ' (scripts/check_data.py lists them)'}" * (len(bad) > NAMED)
    remark = "" if own else f" {NOT_COMPARABLE}"
    LOG.warning("WARNING: %d of %d images are left out: %s%s.%s", len(bad), n, "; ".join(named), more, remark)
    kept = splits.each(lambda images: images.subset(np.flatnonzero(~np.isin(images.names, list(bad)))))
    return replace(kept, canonical=own)
