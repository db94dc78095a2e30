"""An index and its model as files for programs without this project: ONNX, faiss and Parquet.

python -m search export mine.index -o shared --onnx --faiss flat

Writes into the folder OUT
  --onnx          model.onnx      images [n, 3, S, S] uint8 -> vectors [n, M d], and features [n, F] of unit length
  --faiss KIND    KIND.faiss      the codes under the images' ids, searched with those vectors by inner product
                  names.csv       id,name
  --parquet       images.parquet  id, name, width, height, code, feature

docs/search.md has the six lines that search them.
"""

import csv
import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packages import need
from photos import say
from search.commands import parser_of
from utils import (
    InputError,
    Parser,
    RunError,
    atomic_write,
    check_regular,
    check_writable,
    naming_lack_of_memory,
    progress_bar,
)

if TYPE_CHECKING:
    import faiss
    import pyarrow as pa

    from search.store import Store

KINDS = ("flat", "ivf", "fastscan")
ROWS = 65_536  # images written at a time


# ---------------------------------------------------------------- command line


def build_parser() -> Parser:
    """The parser of `python -m search export`."""
    parser = parser_of("export", __doc__)
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
    names = planned(own.onnx, own.faiss, own.parquet)
    if own.dry_run:
        say("\n".join(f"would write {own.output / name}" for name in names))
        return
    need(*["onnx", "onnxscript"] * own.onnx, *["faiss"] * bool(own.faiss), *["pyarrow"] * own.parquet)
    with naming_lack_of_memory():
        run(own, names)


def planned(onnx: bool, kind: str | None, parquet: bool) -> list[str]:
    """The names of the files to write. Raises InputError if there are none."""
    names = ["model.onnx"] * onnx
    names += [f"{kind}.faiss", "names.csv"] if kind else []
    names += ["images.parquet"] * parquet
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
            f"--faiss fastscan: takes codebooks of 16 codewords, these have {codewords}; train with --K 16 and twice "
            "the --M for codes of as many bytes as by 256 codewords, or export --faiss flat"
        )


# ---------------------------------------------------------------- the model


def write_onnx(store: "Store", path: Path) -> None:
    """Write the model, once ONNX Runtime has been found to agree with PyTorch on it. Raises RunError if it does not."""
    from search import onnx_model
    from search.store import MODEL

    graph, image_size = onnx_model.query_graph(store.folder / MODEL)
    info = store.info
    properties = {name: str(info[name]) for name in ("method", "M", "K", "D", "F", "model_sha256", "transform")}
    content = onnx_model.to_onnx(graph, image_size, properties | {"S": str(image_size)})
    said = "not checked: onnxruntime is not installed"
    if importlib.util.find_spec("onnxruntime"):
        difference = onnx_model.largest_difference(content, graph, image_size)
        if not difference <= onnx_model.TOLERANCE:
            raise RunError(f"{path}: ONNX Runtime differs from PyTorch by {difference:.1e} of the largest number")
        said = f"differs from PyTorch by {difference:.1e} of the largest number"
    with atomic_write(path) as file:
        file.write(content)
    say(f"{path}: {len(content) / 1e6:.1f} MB, images [n, 3, {image_size}, {image_size}]; {said}")


# ---------------------------------------------------------------- the codes


def write_faiss(store: "Store", kind: str, path: Path) -> None:
    """Write a faiss index over the codes, whose ids are the images'."""
    import faiss

    from search.encoder import Encoder
    from search.store import MODEL

    codewords = Encoder(store.folder / MODEL).codewords
    index = faiss_index(codewords, store.codes(), store.ids, kind)
    with atomic_write(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    say(f"{path}: {index.ntotal:,} images, {path.stat().st_size / 1e6:.1f} MB; vectors of {index.d} numbers")


def faiss_index(codewords: np.ndarray, codes: np.ndarray, ids: np.ndarray, kind: str) -> "faiss.Index":
    """A faiss index of one of `KINDS` over codes `[n, M]`, whose ids are `ids` `[n]`.

    Args:
        codewords: `[M, K, d]`.
    """
    import faiss

    from search import ann

    if kind == "ivf":
        index = ann.build_ivf(codewords, codes, ann.nlist_for(len(codes)))
        for number in range(index.nlist):  # the lists carry the ids themselves: such files can be merged
            if size := index.invlists.list_size(number):
                listed = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
                listed[:] = ids[listed]
        return index
    plain = fast_scan(codewords, codes) if kind == "fastscan" else ann.build_flat(codewords, codes)
    index = faiss.IndexIDMap(faiss.IndexFlatIP(plain.d))  # it accepts empty indexes only
    index.index, index.ntotal, index.own_fields = plain, plain.ntotal, True
    plain.this.disown()
    faiss.copy_array_to_vector(ids.astype(np.int64), index.id_map)
    return index


def fast_scan(codewords: np.ndarray, codes: np.ndarray) -> "faiss.IndexPQFastScan":
    """faiss's fast scan over codes `[n, M]` of codebooks `[M, 16, d]`."""
    import faiss

    M, _, d = codewords.shape
    index = faiss.IndexPQ(M * d, M, 4, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(codewords.ravel(), index.pq.centroids)
    index.is_trained = True
    index.add_sa_codes(faiss.pack_bitstrings(codes.astype(np.int32), 4))
    return faiss.IndexPQFastScan(index)


# ---------------------------------------------------------------- the names


def parts(store: "Store") -> Iterator[slice]:
    """The images in their order, some at a time."""
    n = len(store.ids)
    with progress_bar(None, "images", total=n) as bar:
        for start in range(0, n, ROWS):
            yield slice(start, min(start + ROWS, n))
            bar.update(min(ROWS, n - start))


def write_names(store: "Store", path: Path) -> None:
    """Write id and name of each image."""
    from search.store import printable

    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "name"))
        for part in parts(store):
            ids = store.ids[part]
            writer.writerows(zip(ids.tolist(), map(printable, store.names(ids)), strict=True))
    say(f"{path}: {len(store.ids):,} names")


def write_parquet(store: "Store", path: Path) -> None:
    """Write a table of all images: id, name, width, height, code (M numbers of one or two bytes each) and feature (int8
    `[F]`, to be divided by its length), both as bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from search.store import printable
    from search.writing import stored_features

    codes = store.codes()
    columns = [("id", pa.int64()), ("name", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    columns.append(("code", pa.binary(codes.shape[1] * codes.itemsize)))
    columns += [("feature", pa.binary(store.info["F"]))] * store.has_features
    told = {name: str(store.info[name]) for name in ("method", "M", "K", "F", "model_sha256")}
    schema = pa.schema(columns, metadata=told | {"code_dtype": codes.dtype.name})
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for part in parts(store):
            ids = store.ids[part]
            names, widths, heights = zip(*store.rows(ids), strict=True)
            arrays = [pa.array(ids), pa.array(map(printable, names))]
            arrays += [pa.array(widths, pa.int32()), pa.array(heights, pa.int32()), as_binary(codes[part])]
            if store.has_features:
                arrays.append(as_binary(stored_features(store.features(np.arange(len(store.ids))[part]), "int8")))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    say(f"{path}: {len(store.ids):,} images, {path.stat().st_size / 1e6:.1f} MB")


def as_binary(rows: np.ndarray) -> "pa.Array":
    """Rows of numbers as rows of bytes, in little-endian order."""
    import pyarrow as pa

    rows = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    width = rows.shape[1] * rows.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])
