#!/usr/bin/env python3
"""Writes data/Flickr25k/{img,targets,concepts}.txt from the annotations of MIRFLICKR-25000.

python scripts/prepare_flickr25k.py mirflickr25k_annotations_v080.zip     (or the folder it unpacks to)

The labels are the 24 potential ones (animals.txt ... water.txt, a list of image numbers each); the files that end
in _r1, the relevant labels, are not used. Images im1.jpg ... im25000.jpg stay in this order.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from readers import claim_folder, read_texts, write_lists
from utils import InputError, Parser, run_script

CONCEPTS = (
    "animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor", "lake", "male", "night",
    "people", "plant_life", "portrait", "river", "sea", "sky", "structures", "sunset", "transport", "tree", "water",
)  # fmt: skip


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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("annotations", type=Path, help="the makers' annotations, a zip archive or a folder")
    parser.add_argument("--output", type=Path, default=Path("data/Flickr25k"), help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=25000, help="images of the data set (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write over lists that are there")
    args = parser.parse_args(argv)
    if not 1 <= args.count <= 10**7:
        raise InputError(f"--count {args.count}: must be from 1 to ten million")
    claim_folder(args.output, ["img.txt", "targets.txt", "concepts.txt"], args.force)
    labels = read_labels(args.annotations, args.count)
    contents = {
        "img.txt": [f"im{number}.jpg" for number in range(1, args.count + 1)],
        "targets.txt": [" ".join(map(str, row)) for row in labels.tolist()],
        "concepts.txt": list(CONCEPTS),
    }
    write_lists(args.output, contents)
    print(
        f"{args.count} images in {args.output}, {(~labels.any(axis=1)).sum()} of them without a label; images a label:"
    )
    print(", ".join(f"{concept} {n}" for concept, n in zip(CONCEPTS, labels.sum(axis=0, dtype=int), strict=True)))


if __name__ == "__main__":
    sys.exit(run_script(main))
