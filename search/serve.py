"""A page, and JSON, that search an index: drop, paste or choose an image, and go on from what is found.

python -m search serve mine.index
python -m search serve mine.index --port 8080 --device cuda

The page is at http://127.0.0.1:8000/ and loads nothing from elsewhere. What the server takes and gives as JSON:
docs/search_api.md, and /schema while it runs. Ctrl-C, or SIGTERM, ends it.
"""

import ipaddress
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from packages import need
from photos import say
from search.commands import handling, parser_of
from utils import InputError, Parser, run_script, worker_count

if TYPE_CHECKING:
    from search.api import Limits
    from search.connections import Server

DECODE_SECONDS = 20.0  # per image
ENDING = signal.SIGINT, signal.SIGTERM
GRACE_SECONDS = 5.0  # for requests that are being answered when the server is stopped
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104


def build_parser() -> Parser:
    parser = parser_of("serve", __doc__)
    add = parser.add_argument
    add("index", type=Path, help="folder that python -m search index made")
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; others than the default let other machines search "
        "and see the images (default: %(default)s)")  # fmt: skip
    add("--allow_host", nargs="+", default=[], metavar="NAME[:PORT]",
        help="further names by which the server may be called")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda or cuda:N, for encoding (default: %(default)s)")
    add("--num_workers", type=int, default=2, help="processes that decode images (default: %(default)s)")
    add("--most_at_once", type=int, default=32, help="searches at the same time; more get 503 (default: %(default)s)")
    add("--most_bytes", type=int, default=2**25, help="of an uploaded image (default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be served, open nothing")
    return parser


def check(own: Namespace) -> None:
    """Raise InputError if the flags make no sense, or a package is missing."""
    need("werkzeug", "faiss")
    if not 0 <= own.port < 2**16:
        raise InputError("--port must be from 0 to 65535")
    for name in ("num_workers", "most_at_once", "most_bytes"):
        if getattr(own, name) < 1:
            raise InputError(f"--{name} must be at least 1")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def limits_of(own: Namespace, port: int) -> "Limits":
    from search.api import Limits

    names = ["localhost", "127.0.0.1", "[::1]", bracketed(own.host.lower())]
    ours = [f"{name}:{port}" for name in names] + [*names] * (port == 80)
    hosts = frozenset(ours + [name.lower() for name in own.allow_host])
    return Limits(own.most_bytes, own.most_at_once, hosts, any_address=own.host in ANYWHERE)


@contextmanager
def until_stopped(server: "Server") -> Iterator[None]:
    """SIGINT and SIGTERM end `serve_forever`; a second one ends the program."""

    def stop(*_: object) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=server.shutdown).start()  # which waits for the loop that this handler interrupts

    with handling(stop, *ENDING):
        yield
        server.wait_for_answers(GRACE_SECONDS)


def main(argv: list[str] | None = None) -> None:
    own = build_parser().parse_args(argv)
    check(own)
    if own.dry_run:
        say(f"would serve {own.index} at http://{bracketed(own.host)}:{own.port}/, up to {own.most_at_once} searches "
              f"at once, images of up to {own.most_bytes:,} bytes")  # fmt: skip
        return
    from search.connections import listening

    if not is_loopback(own.host):
        print(f"WARNING: whoever reaches {own.host} can search the index and see its images; there is no password",
              file=sys.stderr)  # fmt: skip
    with listening(own.host, own.port) as listener:
        from search.api import Api
        from search.connections import Server
        from search.decode import DecodingPool
        from search.searcher import Searcher
        from search.thumbnails import SIDE, Thumbnails, decode_square

        searcher = Searcher(own.index, own.device)
        size, workers = searcher.encoder.image_size, worker_count(own.num_workers)
        with (
            DecodingPool(size, workers, DECODE_SECONDS) as decoder,
            DecodingPool(SIDE, 1, DECODE_SECONDS, decode_square) as thumbnails,
        ):
            port = listener.getsockname()[1]
            api = Api(searcher, decoder, Thumbnails(searcher.store, thumbnails), limits_of(own, port))
            server = Server(listener, api, own.most_bytes)
            where = f"http://{bracketed(own.host)}:{port}/"
            with until_stopped(server):
                say(f"{len(searcher.store.ids):,} images of {own.index} at {where} (Ctrl-C ends it)")
                server.serve_forever()
    print("stopped")


if __name__ == "__main__":
    sys.exit(run_script(main))
