#!/usr/bin/env python3
"""Checks a machine, a GPU or a CPU, before anything else runs there: does it compute what it should, does it wait, and
how fast is it? One table on the screen, and the same in check_gpu.md and check_gpu.json.

bash scripts/check_gpu.sh 0
bash scripts/check_gpu.sh cpu --only "golden numbers"

It needs neither a network nor data: weights are random, and so are the images if CIFAR-10 is not in --data_root. What
cannot run is skipped, and the table says why. Exit code 1 if something failed. A CPU has a smaller version.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from config import parse
from utils import InputError, Parser, check_writable, load_object, run_script

MINUTES = 8.0  # after which no further section begins
SECTIONS = {  # name -> "module:function", which yields rows
    "machine": "experiments.check_report:machine",
    "golden numbers": "experiments.check_numbers:golden_numbers",
    "small runs": "experiments.check_numbers:small_runs",
    "ranking": "experiments.check_numbers:ranking",
    "waits": "experiments.check_numbers:waits",
    "same bits": "experiments.check_numbers:same_bits",
    "kill and resume": "experiments.check_numbers:resuming",
    "step": "experiments.check_speed:step",
    "run": "experiments.check_speed:run",
    "encoding": "experiments.check_speed:encoding",
    "ranking speed": "experiments.check_speed:ranking_speed",
    "memory": "experiments.check_speed:memory",
    "candidates": "experiments.check_speed:candidates",
}


def functions(names: Iterable[str]) -> dict[str, Callable]:
    """The sections with these names."""
    return {name: load_object(SECTIONS[name]) for name in names}


def build_parser() -> Parser:
    parser = Parser(
        prog="bash scripts/check_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--device", default="cuda:0", help="the script's first argument (default: %(default)s)")
    add("--results", type=Path, default=Path("runs/check"), help="(default: %(default)s)")
    add("--data_root", type=Path, default=Path("datasets"), help="(default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be done, touch no device")
    add("--small", action="store_true", help="the sizes of a CPU on a GPU, too")
    add("--minutes", type=float, default=MINUTES, help="after which no section begins (default: %(default)s)")
    add("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 if a section failed, 2 for wrong input."""
    own = build_parser().parse_args(argv)
    if not 0 < own.minutes <= 1000:
        raise InputError(f"--minutes {own.minutes}: must be above 0, and at most 1000")
    own.device = parse(["--device", own.device]).device
    if own.dry_run:
        named = ", ".join(own.only or SECTIONS)
        print(f"would check {own.device} and write {own.results / 'check_gpu.md'} and .json: {named}")
        return 0
    from distributed import check_device  # with PyTorch, which --help need not wait for
    from experiments import check_report

    check_device(own.device)
    check_writable(own.results)
    return check_report.check_all(own, functions(own.only or SECTIONS))


if __name__ == "__main__":
    sys.exit(run_script(main))
