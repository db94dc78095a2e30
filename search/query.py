"""Find the images of an index that are most like some others.

python -m search query mine.index holiday.jpg
python -m search query mine.index cat.jpg dog.jpg -k 5 --json
python -m search query mine.index cat.jpg --under 2024/spring --html found.html

Prints a table per image: the score of the code (larger is nearer), the cosine of the features, the id and the name.
--html writes a page that holds the pictures themselves. --json prints an object:

index     the folder of the index                         images   their number in it
queries   a list: {"image": the file, "results": [{"id", "name", "score", "cosine", "width", "height"}, ...]}
unusable  a list: {"image": the file, "reason": why it cannot be used}

"cosine" is null if features were not compared. In names, what is no UTF-8 is a backslash escape. An image that cannot
be used is named in a line of standard error; the exit code is 2 if none can be used.
"""

import base64
import html
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from packages import need
from photos import say, shown_name
from search.commands import parser_of
from search.store import printable
from utils import InputError, Parser, atomic_write, check_regular, naming_lack_of_memory

if TYPE_CHECKING:
    from search.decode import Decoded
    from search.searcher import Hit, Searcher

SECONDS = 30  # that decoding an image may take
COUNTS = {"k": (1, 100_000), "rerank": (0, 1_000_000), "nprobe": (1, 1_000_000)}

# ---------------------------------------------------------------- flags


def build_parser() -> Parser:
    """The parser of the flags."""
    parser = parser_of("query", __doc__)
    add = parser.add_argument
    add("index", type=Path, metavar="DIR", help="folder of the index")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image file to search for")
    add("-k", type=int, default=20, metavar="N", help="images to find (default: %(default)s)")
    add("--rerank", type=int, default=1000, metavar="N", help="images, the best by their codes, to sort by their "
        "features, at least -k; 0: codes alone (default: %(default)s)")  # fmt: skip
    add("--nprobe", type=int, default=64, metavar="N", help="lists to visit, in an index of inverted lists: more find "
        "more, and take longer (default: %(default)s)")  # fmt: skip
    add("--under", metavar="SUBFOLDER", help="find images below this folder only, as the index names it")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page with thumbnails")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be done, touch nothing")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """The flags. Raises InputError if a value makes no sense."""
    args = build_parser().parse_args(argv)
    need("faiss")
    for name, (least, most) in COUNTS.items():
        if not least <= getattr(args, name) <= most:
            flag = f"-{name}" if len(name) == 1 else f"--{name}"
            raise InputError(f"{flag} {getattr(args, name)}: must be from {least} to {most}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Search for each image. Raises InputError if none of them can be used."""
    args = parse(argv)
    if args.dry_run:
        say(f"would search {args.index} for the {args.k} images most like {', '.join(map(str, args.images))}")
        return
    if args.html:
        check_regular(args.html)
    from search.decode import start_server

    start_server()  # it imports for seconds, and so does this process
    from search.searcher import Options, Searcher

    with naming_lack_of_memory():
        searcher = Searcher(args.index, args.device)
        images = decoded(args.images, searcher.encoder.image_size)
        unusable = [(path, image.reason) for path, image in zip(args.images, images, strict=True) if image.reason]
        for path, reason in unusable:
            print(shown_name(f"{path}: {reason}"), file=sys.stderr)
        if len(unusable) == len(images):
            raise InputError("none of the images can be used")
        options = Options(args.k, args.rerank, args.nprobe, args.under)
        found = {}
        for path, image in zip(args.images, images, strict=True):
            if image.pixels is not None:
                found[path] = searcher.of_pixels(image.pixels, options)
    if args.json:
        say(json.dumps(as_json(searcher, found, unusable), indent=2))
    elif args.html:
        page = as_html(searcher, found)
        with atomic_write(args.html) as file:
            file.write(page.encode())
        say(f"{args.html}: {len(found)} queries")
    else:
        say("\n\n".join(as_table(path, hits) for path, hits in found.items()))


def decoded(paths: list[Path], image_size: int) -> list["Decoded"]:
    """The images of some files, each in a process that may crash."""
    from search.decode import DecodingPool

    with DecodingPool(image_size, workers=1, seconds=SECONDS) as pool:
        return list(pool.paths(paths))


# ---------------------------------------------------------------- output


def as_json(searcher: "Searcher", found: dict[Path, list["Hit"]], unusable: list[tuple[Path, str]]) -> dict:
    """What `--json` prints."""
    return {
        "index": printable(str(searcher.store.folder)),
        "images": len(searcher.store.ids),
        "queries": [
            {"image": printable(str(path)), "results": [vars(hit) | {"name": printable(hit.name)} for hit in hits]}
            for path, hits in found.items()
        ],
        "unusable": [{"image": printable(str(path)), "reason": reason} for path, reason in unusable],
    }


def as_table(path: Path, hits: list["Hit"]) -> str:
    """A heading and a line per found image."""
    width = max((len(str(hit.id)) for hit in hits), default=2)
    lines = [shown_name(str(path)), f"  {'score':>8}  {'cosine':>6}  {'id':>{width}}  name"]
    for hit in hits:
        cosine = "" if hit.cosine is None else f"{hit.cosine:.4f}"
        lines.append(f"  {hit.score:8.4f}  {cosine:>6}  {hit.id:>{width}}  {shown_name(hit.name)}")
    return "\n".join(lines)


STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}h2{font-size:1.05em;
overflow-wrap:anywhere}section{display:flex;flex-wrap:wrap;gap:.6em;margin-bottom:2em}figure{margin:0;width:160px}
img,.gone{width:160px;height:160px;object-fit:contain;background:#eee;border-radius:4px}.query img{outline:3px solid
#06c}figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}.gone{display:flex;align-items:center;
justify-content:center;color:#555}@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}
figcaption,.gone{color:#aaa}img,.gone{background:#2a2a2a}}"""


def as_html(searcher: "Searcher", found: dict[Path, list["Hit"]]) -> str:
    """A page of all queries and what was found, which needs no other file."""
    files = {*found, *(searcher.store.path(hit.id) for hits in found.values() for hit in hits)}
    pictures = thumbnails(sorted(files))
    sections = []
    for path, hits in found.items():
        figures = [figure(pictures[path], shown_name(str(path)), "query", "query")]
        for hit in hits:
            numbers = f"score {hit.score:.3f}" + ("" if hit.cosine is None else f", cosine {hit.cosine:.3f}")
            figures.append(figure(pictures[searcher.store.path(hit.id)], shown_name(hit.name), numbers, "found"))
        sections.append(f"<h2>{html.escape(shown_name(str(path)))}</h2><section>{''.join(figures)}</section>")
    title = f"Images like {', '.join(shown_name(path.name) for path in found)}"[:200]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'\"><title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def figure(picture: str, name: str, numbers: str, kind: str) -> str:
    """A picture, its name and its numbers."""
    name = html.escape(name)
    shown = f'<img src="{picture}" alt="{name}">' if picture else '<div class="gone">file is gone</div>'
    return f'<figure class="{kind}">{shown}<figcaption>{html.escape(numbers)}<br>{name}</figcaption></figure>'


def thumbnails(paths: list[Path]) -> dict[Path, str]:
    """The images as data URLs; empty if a file is gone or cannot be decoded any more."""
    from search.decode import DecodingPool
    from search.thumbnails import SIDE, as_jpeg, decode_square

    urls = {}
    with DecodingPool(SIDE, workers=1, seconds=SECONDS, decode=decode_square) as pool:
        for path, image in zip(paths, pool.paths(paths), strict=True):
            urls[path] = ""
            if image.pixels is not None:
                urls[path] = f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(image.pixels)).decode()}"
    return urls
