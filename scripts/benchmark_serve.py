#!/usr/bin/env python3
"""How long a running `python -m search serve` takes to answer, by many clients at the same time.

python scripts/benchmark_serve.py http://127.0.0.1:8000 --images photos/a.jpg photos/b.jpg

Sends three kinds of requests in turn: an image to search with, /like/ of an image, and a thumbnail. Prints how many
failed, and for each kind the milliseconds within which half and 99 % were answered. On one machine, clients and server
share its cores.
"""

import argparse
import random
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError, Parser, run_script

SECONDS = 120  # until an answer that does not come counts as failed


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("url", help="of the server")
    add("--images", type=Path, nargs="+", required=True, help="files that are sent in turn")
    add("--requests", type=int, default=1000, help="(default: %(default)s)")
    add("--clients", type=int, default=20, help="at the same time (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the ids that are asked for (default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be sent, send nothing")
    return parser


def answered(host: str, method: str, path: str, body: bytes | None) -> tuple[int, float]:
    """Status of a request's answer, 0 if there is none, and the seconds until it was there."""
    start = time.perf_counter()
    try:
        with closing(HTTPConnection(host, timeout=SECONDS)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"} if body else {})
            response = connection.getresponse()
            response.read()
            status = response.status
    except (OSError, HTTPException):
        status = 0
    return status, time.perf_counter() - start


def planned(own: argparse.Namespace, contents: list[bytes], images: int) -> list[tuple]:
    """Kind, method, path and body of each request; the first `images` ids are taken to be there."""
    generator, requests = random.Random(own.seed), []
    for i in range(own.requests):
        image = generator.randrange(images)
        kinds = (
            ("image", "POST", "/search", contents[i // 3 % len(contents)]),
            ("like", "GET", f"/like/{image}", None),
            ("thumbnail", "GET", f"/thumb/{image}", None),
        )
        requests.append(kinds[i % 3])
    return requests


def report(results: list[tuple[str, int, float]], seconds: float) -> None:
    """Print what came of the requests: kind, status and seconds of each."""
    statuses, times = Counter(status for _, status, _ in results), defaultdict(list)
    for kind, _, duration in results:
        times[kind].append(duration)
        times["all"].append(duration)
    failed = sum(count for status, count in statuses.items() if status != 200)
    print(f"{len(results)} requests in {seconds:.1f} s, {len(results) / seconds:.0f} per second; {failed} failed")
    for kind, durations in sorted(times.items()):
        durations.sort()
        p50, p99 = (1000 * durations[min(int(share * len(durations)), len(durations) - 1)] for share in (0.5, 0.99))
        print(f"{kind:10} {len(durations):5}  p50 {p50:6.0f} ms  p99 {p99:6.0f} ms")


def main(argv: list[str] | None = None) -> None:
    own = build_parser().parse_args(argv)
    host = urlsplit(own.url).netloc
    if not host or own.requests < 1 or own.clients < 1:
        raise InputError("the URL must be like http://127.0.0.1:8000, --requests and --clients at least 1")
    if own.dry_run:
        print(f"would send {own.requests} requests to {host}, {own.clients} at a time")
        return
    import json
    from urllib.request import urlopen

    with urlopen(f"http://{host}/info", timeout=SECONDS) as response:
        images = json.load(response)["images"]
    requests = planned(own, [path.read_bytes() for path in own.images], images)

    def ask(request: tuple) -> tuple[str, int, float]:
        return request[0], *answered(host, *request[1:])

    start = time.perf_counter()
    with ThreadPoolExecutor(own.clients) as clients:
        results = list(clients.map(ask, requests))
    report(results, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_script(main))
