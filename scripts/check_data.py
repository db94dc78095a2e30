#!/usr/bin/env python3
"""Says of each data set what is there, what is missing, how many images, and how many of each label.

python scripts/check_data.py [--dataset CIFAR10] [--data_root datasets] [--list_root data]

Exit code 0 where all that was asked for is sound, 1 where something is missing or damaged.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from readers import ImageFiles, read_lines
from utils import InputError, Parser, one_line, run_script

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def histogram(labels: np.ndarray, concepts: list[str]) -> str:
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(axis=0, dtype=int)
    names = concepts if len(concepts) == len(counts) else [str(i) for i in range(len(counts))]
    return ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))


def check(dataset: str, args: Namespace) -> bool:
    """Print what there is to say of one data set; whether it is sound."""
    print(f"{dataset}:")
    try:
        if dataset == "CIFAR10":
            splits = data.load_cifar10(args.data_root, "I", args.seed, download=False)
        elif dataset == "Flickr25K":
            splits = data.load_flickr25k(args.data_root, args.list_root, args.seed)
        else:
            splits = data.load_nuswide(args.data_root, args.list_root)
        return describe(dataset, splits, args)
    except InputError as error:
        print(f"  not usable: {one_line(error)}")
        return False


def describe(dataset: str, splits: data.Splits, args: Namespace) -> bool:
    """Print the sizes and labels of its splits, and which image files are bad; whether none is."""
    concepts = list(CIFAR10_CLASSES)
    parts = {"training images": splits.train, "queries": splits.query, "in the database": splits.database}
    print("  " + ", ".join(f"{len(images)} {name}" for name, images in parts.items()))
    if isinstance(splits.database, ImageFiles):
        path = args.list_root / {"Flickr25K": "Flickr25k", "NUSWIDE": "Nuswide"}[dataset] / "concepts.txt"
        concepts = read_lines(path, "prepare_*.py") if path.exists() else []
    for name, images in parts.items():
        print(f"  labels of the {name.removeprefix('in the ')}: {histogram(images.labels, concepts)}")
    print(f"  the published files: {'yes, by their checksums or counts' if splits.canonical else 'no'}")
    return not isinstance(splits.database, ImageFiles) or images_are_sound(splits, args.num_workers)


def images_are_sound(splits: data.Splits, num_workers: int) -> bool:
    root = splits.database.root
    names, bad = data.look_at_images(splits, num_workers)
    missing = sum(fault == "is missing" for fault in bad.values())
    print(
        f"  image files in {root}: {len(names)} named by the lists, {len(names) - len(bad)} sound, {missing} missing, "
        f"{len(bad) - missing} do not decode"
    )
    for name, fault in bad.items():
        print(f"    {root / name} {fault}")
    return not bad


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    choices = ["CIFAR10", "Flickr25K", "NUSWIDE"]
    parser.add_argument("--dataset", choices=choices, action="append", help="this one only; may be repeated")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="(default: %(default)s)")
    parser.add_argument("--list_root", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2021, help="of the splits (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="(default: one a core)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32 or args.num_workers < 0:
        raise InputError("--seed must be from 0 to 2^32 - 1 and --num_workers not negative")
    return int(not all([check(dataset, args) for dataset in args.dataset or choices]))


if __name__ == "__main__":
    sys.exit(run_script(main))
