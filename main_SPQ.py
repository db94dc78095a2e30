#!/usr/bin/env python3
"""Command line with the names of SPQ's released code: translates them into main.py's and starts main.py --method SPQ.

python main_SPQ.py --gpu_id=0 --batch_size=256 --N_books=8 --N_words=16 --eval_epoch=100
"""

import argparse
import os
import sys
from pathlib import Path

from config import rows
from utils import InputError, Parser, run_script

# SPQ's name -> main.py's
NAMES = {
    "data_dir": "data_root",
    "batch_size": "batch_size",
    "num_workers": "num_workers",
    "input_size": "image_size",
    "N_books": "M",
    "N_words": "K",
    "L_word": "L",
    "soft_quantization_scale": "soft_quantization_scale",
    "contrastive_temperature": "T",
    "eval_epoch": "eval_interval",
    "output_dir": "output",
    "Top_N": "topK",
}
CLASSES = 10  # of CIFAR-10, SPQ's only data set
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def build_parser() -> Parser:
    """The parser of SPQ's flags; those that are not given are None."""
    parser = Parser(
        description=__doc__,
        epilog="All further flags are main.py's, say --recipe release, --epoch_num or --notes, and are passed on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpu_id", default="0", help="number of the GPU, or cpu (default: 0)")
    parser.add_argument("--if_download", default="False", help="True: download CIFAR-10 if it is not there")
    parser.add_argument("--num_cls", type=int, default=CLASSES, help=f"classes: CIFAR-10 has {CLASSES}")
    table = rows("SPQ")
    for theirs, ours in NAMES.items():
        flag = table[ours]
        usual = 32 if ours == "image_size" else flag.default
        kind = flag.type or type(flag.default)
        words = "folder of the images" if ours == "data_root" else flag.help
        told = f"main.py's --{ours}: {words} (default: {usual})".replace("%", "%%")
        parser.add_argument(f"--{theirs}", type=kind, metavar=theirs.upper(), help=told)
    return parser


def translated(argv: list[str] | None) -> list[str]:
    """The flags of main.py that SPQ's flags describe. Raises InputError, in SPQ's names, if one makes no sense."""
    given, further = build_parser().parse_known_args(argv)
    device = "cpu" if given.gpu_id == "cpu" else f"cuda:{given.gpu_id}"
    fault = rows("SPQ")["device"].fault(device)
    if fault:
        raise InputError(f"--gpu_id {given.gpu_id}: must be the number of one GPU, or cpu")
    if given.if_download.lower() not in TRUTHS:
        raise InputError(f"--if_download {given.if_download}: must be True or False")
    names = {flag.partition("=")[0] for flag in further}
    if "--method" in names:
        raise InputError("--method: this is SPQ's command line; main.py has all methods")
    if given.num_cls != CLASSES and "--dataset" not in names:
        raise InputError(f"--num_cls {given.num_cls}: CIFAR-10 has {CLASSES} classes")
    flags = ["--method=SPQ", f"--device={device}"]
    flags += ["--download_cifar10"] if TRUTHS[given.if_download.lower()] else []
    for theirs, ours in NAMES.items():
        value = getattr(given, theirs)
        if value is not None:
            fault = rows("SPQ")[ours].fault(value)
            if fault:
                raise InputError(f"--{theirs} {value}: {fault}")
            flags.append(f"--{ours}={value}")
    return flags + further


def main(argv: list[str] | None = None) -> None:
    """Become main.py."""
    command = [sys.executable, str(Path(__file__).resolve().with_name("main.py")), *translated(argv)]
    os.execv(sys.executable, command)  # noqa: S606, the interpreter that runs this


if __name__ == "__main__":
    sys.exit(run_script(main))
