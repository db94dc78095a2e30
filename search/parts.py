"""An index made by several processes: each writes a part below it, and the last to end joins them."""

import hashlib
import json
import shutil
from pathlib import Path

from photos import say
from search.making import LOCK, PARTS, Hardware, Making, Request, report_skipped
from search.store import read_info
from search.writing import File, Stretch, Writer
from utils import check_writable, locked, write_json

STATE = "part.json"


def index_part(request: Request, hardware: Hardware, rank: int, world: int) -> int:
    """Do a part of the work, and join all parts if it was the last. Returns the number of files that cannot be used, of
    the whole index if it is finished, else of the part."""
    folder = request.folder
    check_writable(folder)
    busy = f"{folder}: waiting for another process that is at it"
    with locked(folder / LOCK, busy, wait=True) as check_lock:
        making = Making(request, hardware)
        with Writer(folder, making.info["features"], check_lock) as writer:
            pending, gone = making.changes(writer)
            if not (pending or gone) and making.is_ready():
                say(f"{folder}: nothing to do, {writer.count()} images")
                return report_skipped(writer)
            making.begin(writer, pending, gone, [])
            work = _state(_part(folder, 0, world)).get("work", "")
            if not pending or not undone(folder, world, work):  # a process was ended while it joined them
                return join(making, writer, [_part(folder, rank, world) for rank in range(world if pending else 0)])
    work = digest_of(pending)
    skipped = encode_part(making, pending, work, rank, world)
    with locked(folder / LOCK, busy, wait=True) as check_lock:
        if read_info(folder)["complete"]:
            say(f"{folder}: part {rank} of {world} is done, and another process joined all")
            return skipped
        if missing := undone(folder, world, work):
            say(f"{folder}: part {rank} of {world} is done; not yet done: {', '.join(map(str, missing))}")
            return skipped
        with Writer(folder, making.info["features"], check_lock) as writer:
            return join(making, writer, [_part(folder, rank, world) for rank in range(world)])


def encode_part(making: Making, pending: list[File], work: str, rank: int, world: int) -> int:
    """Encode the part's stretch of the files. Returns the number of those that cannot be used."""
    folder = _part(making.folder, rank, world)
    stretch = pending[len(pending) * rank // world : len(pending) * (rank + 1) // world]
    check_writable(folder)
    busy = f"{making.folder}: another process is at part {rank} of {world}"
    with locked(folder / LOCK, busy, wait=False) as check_lock:
        if _state(folder).get("work") != work:  # none, or of other files
            for path in folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(folder / STATE, {"work": work, "done": False})
        with Writer(folder, making.info["features"], check_lock) as writer:
            known = writer.known()
            rest = [file for file in stretch if file.row[0] not in known]
            if rest:
                with making.machine() as machine:
                    making.encode(machine, writer, rest)
            write_json(folder / STATE, {"work": work, "done": True})
            return len(writer.skipped())


def join(making: Making, writer: Writer, parts: list[Path]) -> int:
    """Commit what the parts hold, and finish the index. Returns the number of files that cannot be used."""
    for folder in parts:
        with Writer(folder, making.info["features"], writer.check_lock) as part:
            for stretch in part.shards():
                if not writer.holds(stretch.images[0][0]):
                    writer.commit(stretch)
            writer.commit(Stretch(skipped=part.skipped()))
    with making.machine() as machine:
        making.finish(machine, writer)
    say(f"{making.folder}: {writer.count()} images, all parts are joined")
    return report_skipped(writer)


def undone(folder: Path, world: int, work: str) -> list[int]:
    """The parts of this work that are not done."""
    states = [_state(_part(folder, rank, world)) for rank in range(world)]
    return [rank for rank, state in enumerate(states) if state != {"work": work, "done": True}]


def digest_of(files: list[File]) -> str:
    """What tells one work from another: the files, and how they were when they were listed."""
    return hashlib.sha256("".join(f"{file!r}\n" for file in files).encode("utf-8", "backslashreplace")).hexdigest()


def _part(folder: Path, rank: int, world: int) -> Path:
    return folder / PARTS / f"{rank}-of-{world}"


def _state(part: Path) -> dict:
    try:
        return json.loads((part / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
