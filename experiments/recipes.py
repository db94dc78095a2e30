#!/usr/bin/env python3
"""The worth of each difference between the paper and the released code: MAP of both recipes, and of the paper's with
one flag after the other set as the release has it.

python -m experiments.recipes --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's; --hp_lambda is the entropy term's weight if it is on (default: the published script's). Nothing is
trained twice. Writes measure_recipes.csv, a row per training, and measure_recipes.md.
"""

import sys
from argparse import Namespace

import config
from experiments import flags, tables
from utils import InputError, run_script

# of no effect if the head alone is trained
IDLE = ("keep_lr_scaling", "detect_anomaly")


def settings(weight: float) -> dict[str, dict[str, object]]:
    """Name of a setting -> its flags; `weight` of the entropy term."""
    named: dict[str, dict[str, object]] = {"paper": {}, "release": {"recipe": "release", "hp_lambda": weight}}
    for flag, release in config.recipe_defaults("release").items():
        if flag not in IDLE:
            value = weight if flag == "hp_lambda" else release
            named[f"paper, {flag}={value}"] = {flag: value}
    return {name: {"hp_lambda": None} | change for name, change in named.items()}


def entropy_weight(given: float | None, dataset: str, bits: int, argv: list[str]) -> float:
    """The weight of the entropy term, if it is on: the given one, or the published script's."""
    if given is None:
        given = flags.script_values(dataset, bits, (*argv, "--recipe", "release"))["hp_lambda"]
    if given == 0:
        raise InputError("--hp_lambda must be more than 0 here")
    return given


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__, bits=(32,)), argv, "tabulate")
    values = config.parse_flags(given)
    fixed = [flag for flag in config.recipe_defaults("paper") if flag != "hp_lambda" and values[flag] is not None]
    if fixed or values["recipe"] != "paper":
        raise InputError(f"--{fixed[0] if fixed else 'recipe'}: this script sets the recipes and their flags itself")
    trials = []
    for dataset in own.datasets:
        for bits in own.bits:
            weight = entropy_weight(values["hp_lambda"], dataset, bits, given)
            trials += flags.plan(Namespace(datasets=[dataset], bits=[bits], seeds=own.seeds), given, settings(weight))
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    tables.write_csv(own.results / "measure_recipes.csv", frame)
    tables.write_markdown(own.results / "measure_recipes.md", tables.sections(frame, tables.drops))


if __name__ == "__main__":
    sys.exit(run_script(main))
