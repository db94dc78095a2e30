#!/usr/bin/env python3
"""Writes Flickr25k/{img,targets,concepts}.txt from the annotations of MIRFLICKR-25000.

python scripts/prepare_flickr25k.py mirflickr25k_annotations_v080.zip     (or the folder it unpacks to)

Only needed to rebuild the lists: data/Flickr25k holds them already. The labels are the 24 potential ones (animals.txt
... water.txt, a list of image numbers each); the files that end in _r1, the relevant labels, are not used. Images
im1.jpg ... im25000.jpg stay in this order, the labels are in that of the authors' list.
"""

import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readers import claim_folder, read_texts, write_lists
from utils import InputError, Parser, run_script

COUNT = 25000  # images of MIRFLICKR-25000
CONCEPTS = {  # in the order of the authors' list: how many images have the potential label
    "people": 10373, "plant_life": 8763, "car": 1177, "portrait": 3931, "female": 6184, "indoor": 8313, "night": 2711,
    "baby": 259, "structures": 9992, "clouds": 3700, "tree": 4683, "flower": 1823, "transport": 2895, "animals": 3216,
    "water": 3331, "dog": 684, "sunset": 2135, "male": 6081, "food": 990, "sea": 1322, "lake": 791, "river": 894,
    "sky": 7912, "bird": 742,
}  # fmt: skip
FILES = ("img.txt", "targets.txt", "concepts.txt")


def read_labels(source: Path, count: int) -> np.ndarray:
    """`[count, 24]` zeros and ones. Raises InputError naming file and line of what is wrong."""
    texts = read_texts(source, rf"({'|'.join(CONCEPTS)})\.txt")
    missing = [concept for concept in CONCEPTS if f"{concept}.txt" not in texts]
    if missing:
        raise InputError(f"{source}: {len(missing)} of the 24 label files are not in it: {', '.join(missing)}")
    labels = np.zeros((count, len(CONCEPTS)), dtype=np.uint8)
    for column, concept in enumerate(CONCEPTS):
        for i, line in enumerate(texts[f"{concept}.txt"].split("\n"), start=1):
            number = line.strip()
            if not number:
                continue
            place = f"{source}, {concept}.txt:{i}"
            if not (re.fullmatch(r"[0-9]{1,9}", number) and 1 <= int(number) <= count):
                raise InputError(f"{place}: {number[:20]!r} is no image number from 1 to {count}")
            if labels[int(number) - 1, column]:
                raise InputError(f"{place}: image {number} stands there twice")
            labels[int(number) - 1, column] = 1
        if not labels[:, column].any():
            raise InputError(f"{source}: {concept}.txt is empty")
    return labels


def comparison(counts: np.ndarray) -> str:
    """Whether these are the makers' counts of images per potential label, in any order."""
    if sorted(counts.tolist()) == sorted(CONCEPTS.values()):
        return "the makers' counts of the 24 potential labels"
    wrong = [f"{c} {n} (not {CONCEPTS[c]})" for c, n in zip(CONCEPTS, counts.tolist(), strict=True) if n != CONCEPTS[c]]
    return f"WARNING: not the makers' counts of the 24 potential labels: {', '.join(wrong)}"


def prepare(args: Namespace) -> None:
    """Write the lists and say what is in them."""
    claim_folder(args.output, FILES)
    labels = read_labels(args.annotations, args.count)
    contents = {
        "img.txt": [f"im{number}.jpg" for number in range(1, args.count + 1)],
        "targets.txt": [" ".join(map(str, row)) for row in labels.tolist()],
        "concepts.txt": list(CONCEPTS),
    }
    write_lists(args.output, contents, args.force)
    counts, bare = labels.sum(axis=0, dtype=int), (~labels.any(axis=1)).sum()
    print(f"{args.count} images in {args.output}, {bare} of them without a label; images per label:")
    print(", ".join(f"{concept} {n}" for concept, n in zip(CONCEPTS, counts, strict=True)))
    if args.count == COUNT:
        print(comparison(counts))


def main(argv: list[str] | None = None) -> None:
    description = f"{__doc__.splitlines()[0]} Only needed to rebuild the lists: the project comes with them."
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("annotations", type=Path, help="the makers' annotations, a zip archive or a folder")
    parser.add_argument(
        "--output", type=Path, default=Path("data/Flickr25k"),
        help="folder of the lists (default: %(default)s, where they are already: other ones need --force)",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=COUNT, help="images of the data set (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write over lists that differ")
    parser.add_argument("--dry_run", action="store_true", help="check the flags, say what would be done, do nothing")
    args = parser.parse_args(argv)
    if not 1 <= args.count <= 10**7:
        raise InputError(f"--count {args.count}: must be from 1 to ten million")
    if args.dry_run:
        print(f"would read {args.annotations} and write {', '.join(FILES)} of {args.count} images to {args.output}")
        return
    prepare(args)


if __name__ == "__main__":
    sys.exit(run_script(main))
