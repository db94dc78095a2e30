#!/usr/bin/env python3
"""The worth of each difference between a paper and its released code: MAP of both recipes, and of one of them with one
flag after the other set as the other has it.

python -m experiments.recipes --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's, --method too; a flag of the recipe among them is held at its value in all settings, but for
--hp_lambda, which is the entropy term's weight if it is on (default: the published script's). Nothing is trained twice.
Writes measure_recipes.csv, a row per training, and measure_recipes.md, with the method's name if it is not MeCoQ.
"""

import sys
from argparse import Namespace

import config
from experiments import flags, tables
from utils import InputError, run_script

# of no effect if the head alone is trained; or of other test images, whose MAP does not compare
IDLE = ("keep_lr_scaling", "detect_anomaly", "protocol")


def settings(values: dict[str, object], around: str, only: list[str] | None) -> dict[str, dict[str, object]]:
    """Name of a setting -> its flags: both recipes, and `around` with each flag of the other one.

    Args:
        values: the flags as given, unresolved, and `hp_lambda` if it is the entropy term's weight.
        only: flags to try; None: all.
    """
    method = values["method"]
    recipes = {name: config.recipe_defaults(name, method) for name in ("paper", "release")}
    held = [flag for flag in recipes["paper"] if flag in IDLE or (values[flag] is not None and flag != "hp_lambda")]
    held += ["freeze_bn"] if values.get("head_only") else []
    if "hp_lambda" in recipes["release"]:
        recipes["release"]["hp_lambda"] = values["hp_lambda"]
    named: dict[str, dict[str, object]] = {
        "paper": {"recipe": "paper", "hp_lambda": None},
        "release": {"recipe": "release", "hp_lambda": values.get("hp_lambda")},
    }
    other = recipes["release" if around == "paper" else "paper"]
    for flag, value in other.items():
        if flag not in held and (only is None or flag in only):
            named[f"{around}, {flag}={value}"] = named[around] | {flag: value}
    return {name: {key: v for key, v in change.items() if key in values} for name, change in named.items()}


def entropy_weight(given: float | None, dataset: str, bits: int, argv: list[str]) -> float:
    """The weight of the entropy term, if it is on: the given one, or the published script's."""
    if given is None:
        given = flags.script_values(dataset, bits, (*argv, "--recipe", "release"))["hp_lambda"]
    if given == 0:
        raise InputError("--hp_lambda must be more than 0 here")
    return given


def parse(argv: list[str] | None) -> tuple[Namespace, list[str], dict[str, object]]:
    """The script's own flags, main.py's, and the latter's values. Raises InputError if they do not go together."""
    parser = flags.build_parser(__doc__, bits=(32,))
    parser.add_argument("--around", choices=("paper", "release"), default="paper", help="the recipe whose flags are "
                        "changed one by one (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="FLAG", help="flags to change (default: all of the recipe)")
    own, given = flags.parse(parser, argv, "tabulate", any_method=True)
    values = config.parse_flags(given)
    changeable = [flag for flag in config.recipe_defaults("paper", values["method"]) if flag not in IDLE]
    for flag in own.only or []:
        if flag not in changeable:
            raise InputError(f"--only {flag}: is none of {', '.join(changeable)}")
    if values["recipe"] != "paper":
        raise InputError("--recipe: this script sets the recipes itself; --around says which one is changed")
    return own, given, values


def main(argv: list[str] | None = None) -> None:
    own, given, values = parse(argv)
    trials = []
    for dataset in own.datasets:
        for bits in own.bits:
            if "hp_lambda" in values:
                values["hp_lambda"] = entropy_weight(config.parse_flags(given)["hp_lambda"], dataset, bits, given)
            chosen = settings(values, own.around, own.only)
            trials += flags.plan(Namespace(datasets=[dataset], bits=[bits], seeds=own.seeds), given, chosen)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    name = "measure_recipes" + ("" if values["method"] == "MeCoQ" else f"_{values['method']}")
    tables.write(own.results, name, frame, tables.drops)


if __name__ == "__main__":
    sys.exit(run_script(main))
