#!/usr/bin/env python3
"""Says of each data set what is there, what is missing, how many images, and how many of each label.

python scripts/check_data.py [--dataset CIFAR10] [--data_root datasets] [--list_root data]

Exit code 0 if all that was asked for is sound, 1 if something is missing or damaged.
"""

import hashlib
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from readers import read_lines
from utils import InputError, Parser, one_line, run_script

AUTHORS = {  # SHA-256 of the lists that the authors of MeCoQ used, whatever their line ends
    "Flickr25k/img.txt": "849656def139ab91af6ea1c832173f92d89a481bbe516e426c83fa862b64fc18",
    "Flickr25k/targets.txt": "82c30c54f5fdba75c6330532a42dc02ec183491f8155879a33d8706e3a3987c1",
    "Nuswide/test.txt": "33fa053f059d5a9167d7e0b9f398670a5d3f516e09b4cd210e22ef3a0bd7513a",
}


def histogram(labels: np.ndarray, concepts: tuple[str, ...]) -> str:
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(axis=0, dtype=int)
    names = concepts if len(concepts) == len(counts) else [str(i) for i in range(len(counts))]
    return ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))


def list_digest(path: Path) -> str:
    """SHA-256 of a list's lines, in their order, which decides what is a query."""
    return hashlib.sha256("\n".join(read_lines(path, "prepare_*.py")).encode()).hexdigest()


def check(dataset: str, args: Namespace) -> bool:
    """Print what there is to say of one data set; whether it is sound."""
    print(f"{dataset}:")
    try:
        source = data.Source(dataset, "I", args.seed, args.data_root, args.list_root)
        return describe(dataset, data.DATASETS[dataset].load(source), args)
    except InputError as error:
        print(f"  not usable: {one_line(error)}")
        return False


def describe(dataset: str, splits: data.Splits, args: Namespace) -> bool:
    """Print the sizes and labels of its splits, and which image files are bad; whether none is."""
    concepts = data.class_names(dataset, args.list_root)
    parts = {"training images": splits.train, "queries": splits.query, "in the database": splits.database}
    print("  " + ", ".join(f"{len(images)} {name}" for name, images in parts.items()))
    for name, images in parts.items():
        print(f"  labels of the {name.removeprefix('in the ')}: {histogram(images.labels, concepts)}")
    print(f"  the published files: {'yes, by their checksums or counts' if splits.canonical else 'no'}")
    describe_lists(dataset, splits, args.list_root)
    return not splits.database.on_disk or images_are_sound(splits, args.num_workers)


def describe_lists(dataset: str, splits: data.Splits, list_root: Path) -> None:
    """Print whether the split lists are those that the authors used."""
    folder = data.DATASETS[dataset].lists
    lists = {name: digest for name, digest in AUTHORS.items() if folder and name.startswith(f"{folder}/")}
    for name, digest in lists.items():
        print(f"  {name}: {'' if list_digest(list_root / name) == digest else 'not '}the authors' list")
    if dataset == "NUSWIDE":
        for name, images in (("train", splits.train), ("database", splits.database)):
            as_many = len(images) == data.NUSWIDE_SIZES[1]
            verdict = "as many as the authors have" if as_many else f"the authors have {data.NUSWIDE_SIZES[1]}"
            print(f"  {folder}/{name}.txt: {len(images)} images, {verdict}")


def images_are_sound(splits: data.Splits, num_workers: int) -> bool:
    """Print how many image files are sound, and the others by name; whether there are no others."""
    root = splits.database.root
    n, bad = data.check_images(splits, num_workers)
    missing = sum(fault == "is missing" for fault in bad.values())
    print(
        f"  image files in {root}: {n} named by the lists, {n - len(bad)} sound, {missing} missing, "
        f"{len(bad) - missing} do not decode"
    )
    for name, fault in bad.items():
        print(f"    {root / name} {fault}")
    return not bad


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    choices = [name for name, row in data.DATASETS.items() if not (row.own or row.vectors)]
    parser.add_argument("--dataset", choices=choices, action="append", help="this one only; may be repeated")
    parser.add_argument("--data_root", type=Path, default=Path("datasets"), help="(default: %(default)s)")
    parser.add_argument("--list_root", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2021, help="of the splits (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="(default: one per core)")
    parser.add_argument("--dry_run", action="store_true", help="check the flags, say what would be done, do nothing")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32 or args.num_workers < 0:
        raise InputError("--seed must be from 0 to 2^32 - 1 and --num_workers not negative")
    datasets = args.dataset or choices
    if args.dry_run:
        print(f"would check {', '.join(datasets)} in {args.data_root}, lists in {args.list_root}")
        return 0
    return int(not all([check(dataset, args) for dataset in datasets]))


if __name__ == "__main__":
    sys.exit(run_script(main))
