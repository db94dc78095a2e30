#!/usr/bin/env python3
"""Writes data/Nuswide/{train,database,test,concepts}.txt from the annotations of NUS-WIDE.

python scripts/prepare_nuswide.py Groundtruth.zip ImageList.zip     (or the folders they unpack to)

Of the 81 concepts in Groundtruth/AllLabels the 21 most frequent are kept, of ImageList/Imagelist.txt the images with
one of these at least: 195,834. Queries are 100 a concept, drawn with --seed, rarest concept first, no image twice;
all others are both training set and database.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readers import NUSWIDE_CONCEPTS, claim_folder, read_texts, write_lists
from utils import InputError, Parser, run_script

COUNT, KEPT = 269648, 195834  # images of NUS-WIDE, and those with one of the 21 concepts


def read_names(source: Path, count: int) -> list[str]:
    """`concept/file.jpg` of all images, in the makers' order."""
    texts = read_texts(source, r"Imagelist\.txt")
    if not texts:
        raise InputError(f"{source}: there is no Imagelist.txt in it")
    names = [line.strip().replace("\\", "/") for line in texts["Imagelist.txt"].split("\n") if line.strip()]
    if len(names) != count:
        raise InputError(f"{source}: Imagelist.txt has {len(names)} images instead of {count} (--count says otherwise)")
    if len(set(names)) != count:
        raise InputError(f"{source}: an image stands in Imagelist.txt twice")
    return names


def read_concepts(source: Path, count: int) -> tuple[list[str], np.ndarray]:
    """The 21 most frequent concepts by name, and their labels `[count, 21]`, zeros and ones."""
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
    return frequent, np.stack([columns[name] for name in frequent], axis=1).astype(np.uint8)


def draw_queries(labels: np.ndarray, per_concept: int, seed: int) -> np.ndarray:
    """Which rows of `labels` `[n, 21]` are queries, `[n]` bool: `per_concept` a concept, none twice."""
    order = np.random.RandomState(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), dtype=bool)
    for column in np.argsort(labels.sum(axis=0, dtype=int), kind="stable"):
        candidates = order[(labels[order, column] == 1) & ~chosen[order]]
        if len(candidates) < per_concept:
            raise InputError(f"--queries {per_concept}: a concept has only {len(candidates)} images left to draw from")
        chosen[candidates[:per_concept]] = True
    return chosen


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("groundtruth", type=Path, help="Groundtruth with its AllLabels, a zip archive or a folder")
    parser.add_argument("imagelist", type=Path, help="ImageList with its Imagelist.txt, a zip archive or a folder")
    parser.add_argument("--output", type=Path, default=Path("data/Nuswide"), help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="images of the data set (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=100, help="queries a concept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2021, help="draws the queries (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write over lists that are there")
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise InputError(f"--queries {args.queries}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    claim_folder(args.output, ["train.txt", "database.txt", "test.txt", "concepts.txt"], args.force)
    names = read_names(args.imagelist, args.count)
    concepts, labels = read_concepts(args.groundtruth, args.count)
    kept = np.flatnonzero(labels.any(axis=1))
    if args.count == COUNT and len(kept) != KEPT:
        raise InputError(f"{args.groundtruth}: {len(kept)} images have one of the 21 concepts, {KEPT} should")
    lines = np.array([f"{names[i]} {' '.join(map(str, labels[i]))}" for i in kept], dtype=object)
    query = draw_queries(labels[kept], args.queries, args.seed)
    rest = lines[~query].tolist()
    contents = {"test.txt": lines[query].tolist(), "train.txt": rest, "database.txt": rest, "concepts.txt": concepts}
    write_lists(args.output, contents)
    print(f"{query.sum()} queries and {len(rest)} others in {args.output}; images a concept:")
    print(", ".join(f"{concept} {n}" for concept, n in zip(concepts, labels.sum(axis=0, dtype=int), strict=True)))


if __name__ == "__main__":
    sys.exit(run_script(main))
