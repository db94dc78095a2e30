#!/usr/bin/env python3
"""Benchmarks of this project and, in the same process, of a plain version of what the release does.

python scripts/benchmark.py {decode,views,frozen,encode,step,evaluate,run} [--repeats 5] FLAGS

FLAGS are main.py's: data set, backbone, image size, device ... Prints the medians of both sides, their ratio, images
per second, and the share of what the hardware can do: of a matrix product measured here (frozen, encode, step), of a
copy in memory (evaluate). Writes benchmark_<what>.json into --results.

  decode    --photos JPEG files of 640 x 480, made here: OpenCV against Pillow
  views     both views of all training images
  frozen    random images through the frozen blocks; the plain side runs them as they are, under autocast; and how long
            each layer takes, in benchmark_frozen.md, too. On a CPU, in seconds of a core
  encode    images to codes: nothing computed before, and from the feature cache
  step      an optimisation step on views that are there already
  evaluate  --queries against --database random codes; the plain side ranks --plain_queries of them (its time per
            query does not depend on how many there are); then ours, MAP over all orders of equal scores, against MAP in
            database order
  run       a whole run of ours against --plain_epochs epochs of the plain side, whose time is then extrapolated
"""

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
from config import Config
from utils import InputError, Parser, atomic_write, check_writable, run_script, write_json

WHAT = ("decode", "views", "frozen", "encode", "step", "evaluate", "run")


def show(rows: list[dict]) -> None:
    """Print what was measured."""
    for result in rows:
        print(
            f"{result['what']}: ours {result['ours_seconds']:.3f} s ({result['ours_per_second']:.1f}/s), plain "
            f"{result['plain_seconds']:.3f} s ({result['plain_per_second']:.1f}/s): {result['ratio']:.1f} times as "
            f"fast (medians of {result['repeats']})"
        )
        for share in ("share_of_matmul_peak", "plain_share_of_matmul_peak", "share_of_copy_bandwidth"):
            if share in result:
                print(f"  {share.replace('_', ' ')}: {100 * result[share]:.1f} %")
        if "plain_phases_once" in result:
            print(f"  ours: {_phases(result['ours_phases'])}; MAP {result['map']:.4f}")
            print(f"  plain, one epoch and one test, extrapolated: {_phases(result['plain_phases_once'])}")


def _phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in phases.items())


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=WHAT)
    add("--results", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    add("--dry_run", action="store_true", help="check the flags, print what would be timed, touch neither data nor "
        "device")  # fmt: skip
    add("--repeats", type=int, default=5, help="(default: %(default)s)")
    add("--photos", type=int, default=50, help="of decode (default: %(default)s)")
    add("--queries", type=int, default=10000, help="of evaluate (default: %(default)s)")
    add("--database", type=int, default=50000, help="codes, of evaluate (default: %(default)s)")
    add("--labels", type=int, default=0, help="multi-hot, of evaluate; 0: ten classes (default: 0)")
    add("--plain_queries", type=int, default=200, help="of evaluate (default: %(default)s)")
    add("--plain_epochs", type=int, default=2, help="of run (default: %(default)s)")
    return parser


def parse(argv: list[str] | None) -> tuple[Namespace, Config]:
    """The benchmark's own flags, and the configuration of what is timed. Raises InputError."""
    own, flags = build_parser().parse_known_args(argv)
    for name in ("repeats", "photos", "queries", "database", "plain_queries", "plain_epochs"):
        if not 1 <= getattr(own, name) <= 10**7:
            raise InputError(f"--{name} {getattr(own, name)}: must be from 1 to 10,000,000")
    if not 0 <= own.labels <= 1000:
        raise InputError(f"--labels {own.labels}: must be from 0 to 1000")
    configuration = config.parse(flags)
    if configuration.method != "MeCoQ":
        raise InputError(f"--method {configuration.method}: the plain side of the benchmark is MeCoQ's")
    refused = ("test_only", "resume", "overwrite")
    if any(getattr(configuration, name) for name in refused) or configuration.recipe != "paper":
        raise InputError("--test_only, --resume, --overwrite and --recipe have no place here")
    return own, configuration


def main(argv: list[str] | None = None) -> None:
    own, configuration = parse(argv)
    path = own.results / f"benchmark_{own.what}.json"
    changed = " ".join(f"{name}={value}" for name, value in config.key(configuration).items())
    if own.dry_run:
        print(f"would time {own.what}, {own.repeats} times, on {configuration.device}, and write {path}: {changed}")
        return
    from distributed import device_name, use_device
    from experiments import benchmarks, frozen
    from results import versions

    device = configuration.device
    configuration = configuration.replace(precision=use_device(device, configuration.precision))
    check_writable(own.results)
    options = {name: value for name, value in vars(own).items() if name not in ("what", "results", "dry_run")}
    work = frozen.frozen if own.what == "frozen" else getattr(benchmarks, own.what)
    rows = work(configuration, benchmarks.Options(**options))
    show(rows)
    if "layers" in rows[0]:
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(frozen.markdown(rows[0]).encode())
    recorded = config.recorded(configuration)
    write_json(path, {"rows": rows, "device": device_name(device), "versions": versions(), "config": recorded})
    print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    sys.exit(run_script(main))
