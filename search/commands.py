"""What the commands of `python -m search` share: how their flags are read, and what they do on a signal."""

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils import Parser


def parser_of(verb: str, text: str, usage: str | None = None) -> Parser:
    """The parser of a command, without flags.

    Args:
        text: what `--help` says of it, with an example.
        usage: None: made of the flags.
    """
    return Parser(prog=f"python -m search {verb}", usage=usage, description=text, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip


@contextmanager
def handling(handler: Callable, *numbers: int) -> Iterator[None]:
    """Call `handler` on these signals, while the context lasts."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
