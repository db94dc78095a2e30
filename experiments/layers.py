#!/usr/bin/env python3
"""The gain of trained backbone layers: MAP with none, the last one and the last two of the backbone's blocks trained.

python -m experiments.layers --datasets CIFAR10-II --bits 32 --seeds 2021 2022 --scalings 0.1 --epoch_num 16 FLAGS

FLAGS are main.py's. Writes layers.csv, a row per training, and layers.md, and skips what is done; a training that was
interrupted goes on at the last epoch that was saved.
"""

import sys

from experiments import flags, tables
from utils import InputError, run_script


def variants(layers: list[int], scalings: list[float]) -> dict[str, dict]:
    """Name of each variant -> its flags; a frozen backbone has no learning rate."""
    named = {}
    for layer in layers:
        for scaling in scalings if layer else [None]:
            name = f"{layer} trained, at {scaling:g} of the learning rate" if layer else "frozen"
            named[name] = {"trainable_layer_num": layer, "lr_scaling": scaling}
    return named


def main(argv: list[str] | None = None) -> None:
    parser = flags.build_parser(__doc__, bits=(32,))
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    add("--scalings", type=float, nargs="+", default=[0.1], help="learning rates of these layers (default: "
        "%(default)s)")  # fmt: skip
    own, given = flags.parse(parser, argv, "tabulate")
    named = variants(own.layers, own.scalings)
    if next(iter(named)) != "frozen":
        raise InputError("--layers must begin with 0, to which the others are compared")
    trials = flags.plan(own, given, named)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    tables.write(own.results, "layers", frame, tables.drops)


if __name__ == "__main__":
    sys.exit(run_script(main))
