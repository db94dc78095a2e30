#!/usr/bin/env python3
"""Starts a program in several processes as torchrun does, whose flags it takes:

python scripts/launch.py --standalone --nproc_per_node 4 main.py --device cuda ...

Of a process that fails torchrun says much; here only the process itself does, in its one line, and its exit code is
passed on. SIGUSR1 is passed on to the processes.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> int:
    logging.disable(logging.CRITICAL)  # torchrun's
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a warning
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # of a process that a signal has ended, as shells have it
    except SignalException as error:
        return 128 + error.sigval
    return 0


def pass_on(number: int, _: object) -> None:
    """Send a signal to the processes that this one has started."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main())
