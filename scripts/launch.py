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
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before PyTorch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, run

from utils import one_line

SHUTDOWN = 600  # seconds in which a step, a validation or a save ends that a signal came into


def main(argv: list[str] | None = None) -> int:
    logging.disable(logging.CRITICAL)  # torchrun's
    parser = get_args_parser()
    if "--shutdown_timeout" in parser._option_string_actions:  # older versions have none, and wait for 30 seconds
        parser.set_defaults(shutdown_timeout=SHUTDOWN)
    args = parser.parse_args(argv)
    count = int(args.nproc_per_node) if args.nproc_per_node.isdigit() else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(count, 1))))
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        run(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # of a process that a signal has ended, as shells have it
    except SignalException as error:
        return 128 + error.sigval
    except (dist.DistError, RendezvousError, OSError, ValueError) as error:
        print(f"error: torchrun cannot start the processes ({one_line(error)[:200]})", file=sys.stderr)
        return 1
    return 0


def pass_on(number: int, _: object) -> None:
    """Send a signal to the processes that this one has started."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main())
