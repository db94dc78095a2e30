"""An index and its model as files for programs without this project: ONNX, faiss and Parquet.

python -m search export mine.index -o shared --onnx --faiss flat

Writes into the folder OUT
  --onnx          model.onnx      images [n, 3, S, S] uint8 -> vectors [n, M d], and features [n, F] of unit length
  --faiss KIND    KIND.faiss      the codes under the images' ids, searched with those vectors by inner product
                  names.csv       id,name
  --parquet       images.parquet  id, name, width, height, code, feature

docs/search.md has the six lines that search them.
"""

import argparse
import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import (
    InputError,
    Parser,
    RunError,
    atomic_write,
    check_regular,
    check_writable,
    naming_lack_of_memory,
    one_line,
    progress_bar,
)

if TYPE_CHECKING:
    import faiss

    from search.store import Store

KINDS = ("flat", "ivf", "fastscan")
NPROBE = 64  # lists that an exported ivf index reads per query, unless its user says otherwise
ROWS = 65_536  # images written at a time


# ---------------------------------------------------------------- command line


def build_parser() -> Parser:
    """The parser of `python -m search export`."""
    parser = Parser(prog="python -m search export", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("index", type=Path, metavar="DIR", help="index that python -m search index made")
    add("-o", "--output", type=Path, metavar="OUT", required=True, help="folder to write into")
    add("--onnx", action="store_true", help="the model")
    add("--faiss", choices=KINDS, help="the codes; flat: each is compared, ivf: those of the nearest lists, fastscan: "
        "each by tables of bytes, for codebooks of 16 codewords")  # fmt: skip
    add("--parquet", action="store_true", help="a table of all images")
    add("--overwrite", action="store_true", help="replace files of an earlier export")
    add("--dry_run", action="store_true", help="check the flags, print what would be written, touch nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write what the flags ask for. Raises InputError or RunError."""
    own = build_parser().parse_args(argv)
    names = planned(own)
    if own.dry_run:
        print("\n".join(f"would write {own.output / name}" for name in names))
        return
    need(own)
    with naming_lack_of_memory():
        run(own, names)


def planned(own: Namespace) -> list[str]:
    """The names of the files to write. Raises InputError if there are none."""
    names = ["model.onnx"] * own.onnx
    names += [f"{own.faiss}.faiss", "names.csv"] if own.faiss else []
    names += ["images.parquet"] * own.parquet
    if not names:
        raise InputError("nothing to export: give --onnx, --faiss KIND or --parquet")
    return names


def run(own: Namespace, names: list[str]) -> None:
    """Open the index, which checks all of it, and write the files."""
    from search.store import Store

    if own.output.resolve() == own.index.resolve():
        raise InputError(f"-o {own.output}: is the index itself; name another folder")
    store = Store.open(own.index)
    check_kind(own.faiss, store.info["K"])
    check_writable(own.output)
    for name in names:
        check_regular(own.output / name)
        if (own.output / name).exists() and not own.overwrite:
            raise InputError(f"{own.output / name} exists: give --overwrite to replace it, or name another folder")
    if own.onnx:
        write_onnx(store, own.output / "model.onnx")
    if own.faiss:
        write_faiss(store, own.faiss, own.output / f"{own.faiss}.faiss")
        write_names(store, own.output / "names.csv")
    if own.parquet:
        write_parquet(store, own.output / "images.parquet")


def check_kind(kind: str | None, codewords: int) -> None:
    """Raise InputError if faiss's fast scan is asked for codebooks of other sizes than it takes."""
    if kind == "fastscan" and codewords != 16:
        raise InputError(
            f"--faiss fastscan: takes codebooks of 16 codewords, these have {codewords}; train with --K 16 and twice the "
            "--M of 256 codewords for codes of as many bytes, or export --faiss flat"
        )
