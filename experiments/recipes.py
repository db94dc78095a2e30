#!/usr/bin/env python3
"""What is each difference between the paper and the released code worth? MAP of both recipes, and of the paper's with
one flag after the other set as the release has it.

python -m experiments.recipes --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's; --hp_lambda is the entropy term's weight where it is on (default: the published script's). What is
done is not done again. Writes measure_recipes.csv, a row each training, and measure_recipes.md.
"""

import sys
from argparse import Namespace

import main as program
from experiments import sweep
from utils import InputError, run_script

# of no effect where the head alone is trained
IDLE = ("keep_lr_scaling", "detect_anomaly")


def settings(weight: float) -> dict[str, dict[str, object]]:
    """Name of a setting -> its flags; `weight` of the entropy term."""
    named: dict[str, dict[str, object]] = {"paper": {}, "release": {"recipe": "release", "hp_lambda": weight}}
    for flag, (_, release) in program.DIFFERENCES.items():
        if flag not in IDLE:
            value = weight if flag == "hp_lambda" else release
            named[f"paper, {flag}={value}"] = {flag: value}
    return {name: {"hp_lambda": None} | change for name, change in named.items()}


def main(argv: list[str] | None = None) -> None:
    own, flags = sweep.parse(sweep.build_parser(__doc__, bits=[32]), argv)
    given = program.build_parser().parse_args(flags)
    fixed = [flag for flag in program.DIFFERENCES if flag != "hp_lambda" and getattr(given, flag) is not None]
    if fixed or given.recipe != "paper":
        raise InputError(f"--{fixed[0] if fixed else 'recipe'}: this script sets the recipes and their flags itself")
    plan = []
    for dataset in own.datasets:
        for bits in own.bits:
            weight = given.hp_lambda
            if weight is None:
                weight = sweep.parsed(dataset, bits, [*flags, "--recipe", "release"]).hp_lambda
            if weight == 0:
                raise InputError("--hp_lambda must be more than 0 here")
            one = Namespace(datasets=[dataset], bits=[bits], seeds=own.seeds)
            plan += sweep.plan(one, flags, settings(weight))
    frame = sweep.run_cells(plan, own)
    sweep.write_csv(own.results / "measure_recipes.csv", frame.drop(columns="result"))
    parts = [part for name in own.datasets for part in (sweep.heading(frame, name), sweep.drops(frame, name))]
    sweep.write_markdown(own.results / "measure_recipes.md", *parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
