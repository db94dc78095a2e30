#!/usr/bin/env python3
"""Writes data/Nuswide/{train,database,test,concepts}.txt from the annotations of NUS-WIDE.

python scripts/prepare_nuswide.py Groundtruth.zip ImageList.zip     (or the folders they unpack to)

Of the 81 concepts in Groundtruth/AllLabels the 21 most frequent are kept, of ImageList/Imagelist.txt the images with
one of these at least: 195,834. Queries are the authors' 2,100, which the project comes with, or, with --draw, so many a
concept, drawn with --seed, rarest concept first, no image twice; all others are both training set and database.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readers import NUSWIDE_CONCEPTS, ImageFiles, checked_names, claim_folder, read_nuswide, read_texts, write_lists
from utils import InputError, Parser, run_script

COUNT, KEPT = 269648, 195834  # images of NUS-WIDE, and those with one of the 21 concepts
QUERIES = Path(__file__).resolve().parent.parent / "data" / "Nuswide" / "test.txt"
FILES = ("train.txt", "database.txt", "test.txt", "concepts.txt")


def read_names(source: Path, count: int) -> np.ndarray:
    """`concept/file.jpg` of all images, `[count]` str, in the makers' order, such as a list may hold them."""
    texts = read_texts(source, r"Imagelist\.txt")
    if not texts:
        raise InputError(f"{source}: there is no Imagelist.txt in it")
    names = [line.strip().replace("\\", "/") for line in texts["Imagelist.txt"].split("\n") if line.strip()]
    if len(names) != count:
        raise InputError(f"{source}: Imagelist.txt has {len(names)} images instead of {count} (--count says otherwise)")
    return checked_names(names, f"{source}, Imagelist.txt", spaces=False)


def read_concepts(source: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The 21 most frequent concepts by name, `[21]` str, and their labels `[count, 21]`, zeros and ones."""
    texts = read_texts(source, r"AllLabels/Labels_\w+\.txt")
    if len(texts) < NUSWIDE_CONCEPTS:
        raise InputError(f"{source}: {len(texts)} files AllLabels/Labels_*.txt are in it, 81 should be")
    columns = {}
    for name, text in sorted(texts.items()):
        fields = text.split()
        if len(fields) != count:
            raise InputError(f"{source}, {name}: {len(fields)} labels for {count} images")
        if not set(fields) <= {"0", "1"}:
            wrong = next(i for i, field in enumerate(fields, start=1) if field not in ("0", "1"))
            raise InputError(f"{source}, {name}:{wrong}: a label is {fields[wrong - 1][:20]!r} instead of 0 or 1")
        columns[name.removeprefix("Labels_").removesuffix(".txt")] = np.array(fields) == "1"
    frequent = sorted(sorted(columns, key=lambda name: (-columns[name].sum(), name))[:NUSWIDE_CONCEPTS])
    return np.array(frequent), np.stack([columns[name] for name in frequent], axis=1).astype(np.uint8)


def draw_queries(labels: np.ndarray, per_concept: int, seed: int) -> np.ndarray:
    """Rows of `labels` `[n, 21]` that are queries, in their order: `per_concept` a concept, none twice."""
    order = np.random.RandomState(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), dtype=bool)
    for column in np.argsort(labels.sum(axis=0, dtype=int), kind="stable"):
        candidates = order[(labels[order, column] == 1) & ~chosen[order]]
        if len(candidates) < per_concept:
            raise InputError(f"--queries {per_concept}: a concept has only {len(candidates)} images left to draw from")
        chosen[candidates[:per_concept]] = True
    return np.flatnonzero(chosen)


def find_queries(given: ImageFiles, names: np.ndarray, path: Path) -> np.ndarray:
    """Rows of `names` `[n]` that are the given queries, in the order of their list. Raises InputError if one is not
    there."""
    row = {name: i for i, name in enumerate(names)}
    missing = [name for name in given.names if name not in row]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(given)} queries are not among the {len(names)} images with one of the 21 "
            f"concepts, {missing[0]} the first; --queries_from names another list, --draw draws one"
        )
    return np.array([row[name] for name in given.names])


def column_order(given: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """The order of the columns of `labels` `[n, 21]` that makes them the given ones, if there is one."""
    left, order = list(range(labels.shape[1])), []
    for column in given.T:
        same = [i for i in left if np.array_equal(labels[:, i], column)]
        if not same:
            return None
        order.append(same[0])
        left.remove(same[0])
    return np.array(order)


def prepare(args: Namespace) -> None:
    """Write the lists and say what is in them."""
    given = None if args.draw else read_nuswide(args.queries_from, Path())
    claim_folder(args.output, FILES)
    names = read_names(args.imagelist, args.count)
    concepts, labels = read_concepts(args.groundtruth, args.count)
    kept = np.flatnonzero(labels.any(axis=1))
    if args.count == COUNT and len(kept) != KEPT:
        raise InputError(f"{args.groundtruth}: {len(kept)} images have one of the 21 concepts, {KEPT} should")
    names, labels = names[kept], labels[kept]
    if given is None:
        query = draw_queries(labels, args.queries, args.seed)
    else:
        query = find_queries(given, names, args.queries_from)
        order = column_order(given.labels, labels[query])
        if order is None:
            print(f"WARNING: in no order of their columns are the labels in {args.queries_from} those of "
                  f"{args.groundtruth}, which are used")  # fmt: skip
        else:  # the given list stays as it is
            concepts, labels = concepts[order], labels[:, order]
    lines = np.array([f"{name} {' '.join(map(str, row))}" for name, row in zip(names, labels, strict=True)], object)
    rest = np.delete(lines, query).tolist()
    contents = {"test.txt": lines[query].tolist(), "train.txt": rest, "database.txt": rest, "concepts.txt": concepts}
    write_lists(args.output, contents, args.force)
    print(f"{len(query)} queries and {len(rest)} others in {args.output}; images per concept:")
    print(", ".join(f"{concept} {n}" for concept, n in zip(concepts, labels.sum(axis=0, dtype=int), strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("groundtruth", type=Path, help="Groundtruth with its AllLabels, a zip archive or a folder")
    parser.add_argument("imagelist", type=Path, help="ImageList with its Imagelist.txt, a zip archive or a folder")
    parser.add_argument("--output", type=Path, default=Path("data/Nuswide"), help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="images of the data set (default: %(default)s)")
    parser.add_argument("--queries_from", type=Path, metavar="LIST", help="queries (default: the authors' 2,100)")
    parser.add_argument("--draw", action="store_true", help="draw queries of one's own instead")
    parser.add_argument("--queries", type=int, metavar="N", help="with --draw: queries a concept (default: 100)")
    parser.add_argument("--seed", type=int, metavar="N", help="with --draw: of the draw (default: 2021)")
    parser.add_argument("--force", action="store_true", help="write over lists that differ")
    parser.add_argument("--dry_run", action="store_true", help="check the flags, say what would be done, do nothing")
    args = parser.parse_args(argv)
    check(args)
    if args.dry_run:
        queries = f"{args.queries} drawn queries a concept" if args.draw else f"the queries in {args.queries_from}"
        print(f"would read {args.groundtruth} and {args.imagelist} and write {', '.join(FILES)} to {args.output}, with "
              f"{queries}")  # fmt: skip
        return
    prepare(args)


def check(args: Namespace) -> None:
    """Fill in the defaults. Raises InputError if a flag is wrong or does not go with another."""
    if args.draw and args.queries_from:
        raise InputError("--draw and --queries_from: give one of them")
    for flag in ("queries", "seed"):
        if getattr(args, flag) is not None and not args.draw:
            raise InputError(f"--{flag}: only with --draw; without it the queries are given")
    args.queries_from = args.queries_from or QUERIES
    args.queries = 100 if args.queries is None else args.queries
    args.seed = 2021 if args.seed is None else args.seed
    if args.queries < 1:
        raise InputError(f"--queries {args.queries}: must be at least 1")
    if args.count < 1:
        raise InputError(f"--count {args.count}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")


if __name__ == "__main__":
    sys.exit(run_script(main))
