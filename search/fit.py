"""Train on a folder of images, without labels: `main.py --dataset Folder`, with flags that suit a user's photos.

python -m search fit PHOTOS --notes mine
python -m search fit PHOTOS --bits 64 --backbone resnet50 --device cuda:0 --notes mine64

Every flag of main.py may follow, and wins. `python main.py --help` lists them: --weights names a file of weights,
which are downloaded otherwise; --resume goes on with a run that was stopped; --limit 200 tries things out. The run's
folder is checkpoints/NOTES; a report of it is written if matplotlib is installed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import config
from methods import METHODS
from photos import say
from search.commands import handling, parser_of
from utils import InputError, Parser

ROOT = Path(__file__).resolve().parent.parent
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
COMMON = ["--dataset", "Folder", "--backbone", "squeezenet1_0", "--image_size", "128"]
# of the project's run on CIFAR-10's images, in half the epochs; without the memory, which gained nothing there
MECOQ = ["--T", "0.35", "--hp_beta", "5e-3", "--mode", "debias", "--pos_prior", "0.1", "--epoch_num", "15"]
DIMENSIONS = 12  # of the embedding, per codebook


def flags_for(photos: str, bits: int, method: str, own: list[str]) -> list[str]:
    """The flags of main.py for a folder of images; the user's `own` come last and win.

    Raises InputError if no code has that many bits.
    """
    if bits < 8 or bits % 8:
        raise InputError(f"--bits {bits}: must be a multiple of 8")
    shape = METHODS[method].of_bits(bits)
    if method == "MeCoQ":
        shape |= {"feat_dim": DIMENSIONS * shape["M"]}
    sizes = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    usual = {"MeCoQ": MECOQ, "SPQ": ["--head_only"], "CIBHash": []}[method]
    return [*COMMON, "--images", photos, "--method", method, *usual, *sizes, *own]


def run(command: list[str]) -> int:
    """Run a program of this project, passing signals on to it; its exit code, 128 + number if a signal ended it.

    It has a process group of its own: what is typed at the terminal must reach it once, not twice.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, *command], env=environment, process_group=0)  # noqa: S603

    def pass_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    with handling(pass_on, *PASSED_ON):
        code = process.wait()
    return code if code >= 0 else 128 - code


def build_parser() -> Parser:
    parser = parser_of("fit", __doc__, "python -m search fit PHOTOS [--bits N] [flags of main.py]")
    parser.add_argument("photos", metavar="PHOTOS", help="folder of images, with all its subfolders")
    parser.add_argument("--bits", type=int, default=32, help="per image, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="MeCoQ", help="what is learned (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="check the flags, print main.py's configuration")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, and write the report. Exits with main.py's code if that is not 0."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if argv and argv[0].startswith("-") and not {"-h", "--help"} & {*argv}:
        raise InputError(f"{argv[0]}: the folder comes first, the flags behind it")
    own, others = parser.parse_known_args(argv)
    flags = flags_for(own.photos, own.bits, own.method, others)
    resolved = config.parse(flags)
    if own.dry_run:
        print(json.dumps(vars(resolved), indent=2))
        return
    code = run([str(ROOT / "main.py"), *flags])
    if code:
        raise SystemExit(code)
    folder = Path(resolved.output) / "checkpoints" / resolved.notes
    if importlib.util.find_spec("matplotlib"):
        run(["-m", "experiments.report", resolved.notes, "--output", resolved.output])
    else:
        print("no report: matplotlib is needed: pip install -r requirements-extra.txt")
    say(f"next: python -m search index {own.photos} --model {folder} -o {resolved.notes}.index")
