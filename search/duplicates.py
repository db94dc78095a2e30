"""List pairs of images of an index that are nearly the same.

python -m search duplicates mine.index
python -m search duplicates mine.index --above 0.99 -o pairs.csv

Writes a row per pair: both names, the cosine of their features, both ids; the most alike first. For every image, the
--candidates images whose codes are nearest to its own are compared by their features: a pair is missed if each image
of it has as many others that are nearer. An index without features has pairs of the same code alone, cosine empty;
--above does not go with it. Of more than --candidates images with one code, not all pairs are compared.
"""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packages import need
from photos import say
from search.commands import parser_of
from search.store import printable
from utils import InputError, Parser, atomic_write, check_regular, naming_lack_of_memory, progress_bar

if TYPE_CHECKING:
    from search.searcher import Searcher
    from search.store import Store

ABOVE = 0.95
BATCH = 256  # images whose neighbours are searched at once

Pairs = tuple[np.ndarray, np.ndarray]  # positions `[p, 2]`, the smaller first, and cosines `[p]`


def build_parser() -> Parser:
    """The parser of the flags."""
    parser = parser_of("duplicates", __doc__)
    add = parser.add_argument
    add("index", type=Path, metavar="DIR", help="folder of the index")
    add("--above", type=float, metavar="COSINE", help="list pairs whose features have at least this cosine (default: "
        f"{ABOVE})")  # fmt: skip
    add("--candidates", type=int, default=50, metavar="N", help="images to compare each one with (default: "
        "%(default)s)")  # fmt: skip
    add("--nprobe", type=int, default=64, metavar="N", help="lists to visit, in an index of inverted lists (default: "
        "%(default)s)")  # fmt: skip
    add("-o", "--output", type=Path, metavar="CSV", help="file to write (default: standard output)")
    add("--dry_run", action="store_true", help="check the flags, print what would be done, touch nothing")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Raises InputError if a value makes no sense."""
    args = build_parser().parse_args(argv)
    need("faiss")
    if args.above is not None and not -1 <= args.above <= 1:
        raise InputError(f"--above {args.above:g}: is a cosine, from -1 to 1")
    for name, most in (("candidates", 10_000), ("nprobe", 1_000_000)):
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 1 to {most}")
    return args


def main(argv: list[str] | None = None) -> None:
    """List the pairs. Raises InputError if the index cannot be used."""
    args = parse(argv)
    if args.dry_run:
        say(f"would list pairs of images of {args.index} in {args.output or 'standard output'}")
        return
    if args.output:
        check_regular(args.output)
    from search.searcher import Searcher

    with naming_lack_of_memory():
        searcher = Searcher(args.index)
        store = searcher.store
        if args.above is not None and not store.has_features:
            raise InputError(f"--above: {args.index} has no features; without it, images of the same code are listed")
        positions, cosines = alike(searcher, ABOVE if args.above is None else args.above, args.candidates, args.nprobe)
    text = as_csv(store, positions, cosines if store.has_features else None)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(text.encode())
        say(f"{args.output}: {len(positions)} pairs")
    else:
        say(text.rstrip("\n"))


def alike(searcher: "Searcher", above: float, candidates: int, nprobe: int) -> Pairs:
    """The pairs that are nearly the same, those with the highest cosine first, each once.

    Args:
        above: the least cosine; without features, pairs have the same code.
        candidates: images that each one is compared with.
        nprobe: lists that are visited, in an index of inverted lists.
    """
    store = searcher.store
    found = [(np.empty((0, 2), np.int64), np.empty(0, np.float32))]
    with progress_bar(None, "compare", total=len(store.ids)) as bar:
        bar.unit = " images"
        for start in range(0, len(store.ids), BATCH):
            positions = np.arange(start, min(start + BATCH, len(store.ids)))
            neighbours = searcher.neighbours(positions, candidates + 1, nprobe)
            if store.has_features:
                cosines = compared(store, positions, neighbours)
                near = cosines >= above
            else:
                cosines = np.zeros(neighbours.shape, np.float32)
                near = (searcher.codes[neighbours] == searcher.codes[positions, None]).all(axis=2)
            row, column = np.nonzero(near & (neighbours >= 0) & (neighbours != positions[:, None]))
            pairs = np.sort(np.stack([positions[row], neighbours[row, column]], axis=1), axis=1)
            found.append((pairs, cosines[row, column]))
            bar.update(len(positions))
    pairs, cosines = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    pairs, first = np.unique(pairs, axis=0, return_index=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -cosines[first]))
    return pairs[order], cosines[first][order]


def compared(store: "Store", positions: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Cosines `[b, count]` of the features of images with those of their neighbours."""
    distinct, places = np.unique(neighbours.clip(min=0), return_inverse=True)
    features = store.features(distinct)[places.reshape(neighbours.shape)]
    return np.einsum("bf,bcf->bc", store.features(positions), features).clip(-1, 1)


def as_csv(store: "Store", pairs: np.ndarray, cosines: np.ndarray | None) -> str:
    """The pairs as text, with a heading."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "other", "cosine", "id", "other_id"])
    ids = store.ids[pairs]
    for i, (one, other) in enumerate(ids.tolist()):
        cosine = "" if cosines is None else f"{cosines[i]:.4f}"
        rows.writerow([*map(printable, store.names([one, other])), cosine, one, other])
    return text.getvalue()
