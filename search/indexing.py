"""Encode a folder of images, or a list of files, into an index.

python -m search index photos --model checkpoints/mine -o mine.index
python -m search index -o mine.index --update
python -m search index -o mine.index --remove holiday/0815.jpg drafts/

A run that was ended goes on with the same command. --update encodes what is new or has changed (another size or time
of change) and removes what is gone. Files that cannot be used stand in mine.index/skipped.csv and are tried again once
they change, or once what they lacked is there. What --remove takes out stays out until the file changes.

A list is a text file with a path per line, absolute or relative to the list's folder; the index names images by the
line, and those of a folder by their path from there.

Several processes, on one machine or on several that share the folders, divide the work:

python -m search index photos --model checkpoints/mine -o mine.index --rank 0 --world 2
"""

import json
import signal
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from packages import need
from photos import say
from search.commands import handling, parser_of
from search.making import LOCK, SHARD, Hardware, Making, Request, report_skipped
from search.parts import index_part
from search.store import SKIPPED
from search.writing import Writer
from utils import InputError, Parser, Stopped, check_writable, locked, naming_lack_of_memory, worker_count

# ---------------------------------------------------------------- flags


def build_parser() -> Parser:
    """The parser of the flags."""
    parser = parser_of("index", __doc__)
    add = parser.add_argument
    add("photos", type=Path, nargs="?", metavar="PHOTOS|LIST", help="folder of images, or text file of paths; may be "
        "left out if the index is there")  # fmt: skip
    add("--model", type=Path, metavar="RUN", help="folder of a training, checkpoints/NAME; may be left out if the "
        "index is there")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the index")
    add("--features", choices=("int8", "half", "none"), help="what is kept for reranking: the backbone's features, in "
        "one or two bytes per number, or nothing (default: int8)")  # fmt: skip
    add("--kind", choices=("auto", "flat", "ivf"), help="how codes are searched: all of them, or by an inverted file, "
        "faster and nearly exact (default: auto, by their number)")  # fmt: skip
    add("--update", action="store_true", help="encode what is new or changed, remove what is gone")
    add("--remove", nargs="+", default=[], metavar="NAME", help="take images out, by their names in the index; a name "
        "that ends in / is that of a folder")  # fmt: skip
    add("--shard", type=int, metavar="N", help=f"images per file of codes, as many as a kill may cost "
        f"(default: {SHARD})")  # fmt: skip
    add("--rank", type=int, metavar="R", help="do the R-th part, from 0, of the work; the last to end joins them")
    add("--world", type=int, metavar="W", help="in so many parts")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--num_workers", type=int, metavar="N", help="processes that decode images (default: one less than there are "
        "cores)")  # fmt: skip
    add("--decode_seconds", type=float, default=30, metavar="S", help="how long decoding an image may take (default: "
        "%(default)s)")  # fmt: skip
    add("--strict", action="store_true", help="exit code 2 if files cannot be used; the index is complete all the same")
    add("--dry_run", action="store_true", help="check the flags, print what would be done, touch nothing")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Raises InputError if they do not go together."""
    args = build_parser().parse_args(argv)
    need("faiss")
    if (args.rank is None) != (args.world is None):
        raise InputError("--rank and --world go together")
    if args.rank is not None and not 0 <= args.rank < args.world:
        raise InputError(f"--rank {args.rank}: must be from 0 to {args.world - 1}, one less than --world")
    if args.rank is not None and args.remove:
        raise InputError("--remove and --rank: one process removes images")
    for flag, value in (("shard", args.shard), ("num_workers", args.num_workers), ("world", args.world)):
        if value is not None and value < 1:
            raise InputError(f"--{flag} {value}: must be at least 1")
    if not 0 < args.decode_seconds < 1e6:
        raise InputError(f"--decode_seconds {args.decode_seconds:g}: must be more than 0, and less than 1e6")
    if args.num_workers is None:
        args.num_workers = max(worker_count(10**6) - 1, 1)
    return args


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say. Raises InputError, RunError or Stopped."""
    args = parse(argv)
    if args.dry_run:
        print(json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
                         indent=2))  # fmt: skip
        return
    request = Request(args.output, args.photos, args.model, args.features, args.kind)
    request = replace(request, shard=args.shard, update=args.update, remove=tuple(args.remove))
    hardware = Hardware(args.device, args.num_workers, args.decode_seconds)
    with stoppable(), naming_lack_of_memory():
        if args.rank is None:
            skipped = index(request, hardware)
        else:
            skipped = index_part(request, hardware, args.rank, args.world)
    if args.strict and skipped:
        raise InputError(f"{skipped} files cannot be used, and --strict is given: {args.output / SKIPPED} names them")


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at once if a signal asks to end: what is committed is safe."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number, "run the same command again to go on")

    with handling(stop, signal.SIGINT, signal.SIGTERM):
        yield


def index(request: Request, hardware: Hardware) -> int:
    """Make, go on with, or change an index. Returns the number of files that cannot be used."""
    check_writable(request.folder)
    with locked(request.folder / LOCK, f"{request.folder}: another process is at it", wait=False) as check_lock:
        making = Making(request, hardware)
        with Writer(request.folder, making.info["features"], check_lock) as writer:
            pending, gone = making.changes(writer)
            removed = writer.chosen(request.remove)
            if not (pending or gone or removed) and making.is_ready():
                say(f"{request.folder}: nothing to do, {writer.count()} images")
                return report_skipped(writer)
            making.begin(writer, pending, gone, removed)
            with making.machine() as machine:
                making.encode(machine, writer, pending)
                making.finish(machine, writer)
            say(f"{request.folder}: {writer.count()} images; {len(pending)} files were read, "
                  f"{len(gone) + len(removed)} taken out")  # fmt: skip
            return report_skipped(writer)
