#!/usr/bin/env python3
"""What is each difference between the paper and the released code worth? MAP of both recipes, and of the paper's with
one flag after the other set as the release has it.

python scripts/measure_recipes.py --seeds 2021 2022 2023 --results docs/results FLAGS

FLAGS are main.py's; --hp_lambda is the entropy term's weight where it is on. The backbone must be frozen
(squeezenet1_0, resnet18, resnet50), so that all settings of a seed share the features of its views, kept below --bank
(20 MB an epoch and seed for 5,000 images). What is done is not done again; several calls may share the seeds among
them. Writes measure_recipes.md and .csv.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main as program
from bank import build_bank, train_on_bank
from results import read_metrics
from utils import InputError, Parser, atomic_write, check_writable, progress_bar, run_script, write_json

try:
    import pandas as pd
    import tabulate  # noqa: F401, to_markdown needs it
except ImportError:
    pd = None

# of no effect where the head alone is trained
IDLE = ("keep_lr_scaling", "detect_anomaly")


def settings(weight: float) -> dict[str, tuple[str, dict[str, object]]]:
    """Name of a setting -> its recipe and the flags that are not that recipe's; `weight` of the entropy term."""
    single = {
        flag: ("paper", {flag: weight if flag == "hp_lambda" else release})
        for flag, (_, release) in program.DIFFERENCES.items()
        if flag not in IDLE
    }
    named = {f"paper, {flag}={change[flag]}": (recipe, change) for flag, (recipe, change) in single.items()}
    return {"paper": ("paper", {}), "release": ("release", {"hp_lambda": weight})} | named


def resolve(flags: list[str], seed: int, name: str, recipe: str, change: dict[str, object]) -> Namespace:
    options = program.build_parser().parse_args([*flags, "--seed", str(seed), "--recipe", recipe])
    options.hp_lambda = None
    vars(options).update(change | {"notes": f"{name.replace(', ', '-')}-seed{seed}"})
    return program.resolve(options)


def cell(name: str, options: Namespace, bank: Path) -> dict:
    """Train one setting with one seed on the features of its views, unless that was done before."""
    path = bank / "cells" / f"{options.notes}.json"
    if path.exists():
        result = read_metrics(path)
        if result["config"] == vars(options):
            return result
        raise InputError(f"{path} was made with other flags: name another --bank")
    splits, model = program.build(options)
    folder = bank / f"seed{options.seed}"
    build_bank(folder, splits, model.backbone, options)
    history = train_on_bank(folder, splits, model, options, bank / "cells")
    value = max(epoch["val_mAP"] for epoch in history if "val_mAP" in epoch)
    result = {"setting": name, "seed": options.seed, "map": value, "history": history, "config": vars(options)}
    write_json(path, result)
    return result


def table(results: list[dict]) -> "pd.DataFrame":
    """MAP in percent by setting: each seed, mean, lowest, highest, and the mean difference to the paper's recipe."""
    frame = pd.DataFrame([{key: result[key] for key in ("setting", "seed", "map")} for result in results])
    seeds = 100 * frame.pivot_table(index="setting", columns="seed", values="map", sort=False)
    summary = pd.DataFrame({"mean": seeds.mean(axis=1), "min": seeds.min(axis=1), "max": seeds.max(axis=1)})
    summary["minus paper"] = (seeds - seeds.loc["paper"]).mean(axis=1)
    return pd.concat([seeds.add_prefix("seed "), summary], axis=1)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2021, 2022, 2023], help="(default: %(default)s)")
    parser.add_argument("--bank", type=Path, default=Path(".cache/views"), help="features (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    args, flags = parser.parse_known_args(argv)
    if pd is None:
        raise InputError("pandas and tabulate are needed: pip install -r requirements-extra.txt")
    given = program.build_parser().parse_args(flags)
    own = [flag for flag in program.DIFFERENCES if flag != "hp_lambda" and getattr(given, flag) is not None]
    if own or given.recipe != "paper":
        raise InputError(f"--{own[0] if own else 'recipe'}: this script sets the recipes and their flags itself")
    if given.dry_run or given.test_only or given.resume or given.overwrite:
        raise InputError(
            "--dry_run, --test_only and --resume, --overwrite have no place here: every cell is trained once"
        )
    if given.hp_lambda == 0 or given.epoch_num < 1:
        raise InputError("--hp_lambda and --epoch_num must be more than 0 here")
    chosen = settings(program.DIFFERENCES["hp_lambda"][1] if given.hp_lambda is None else given.hp_lambda)
    runs = [
        (name, resolve(flags, seed, name, recipe, change))
        for seed in args.seeds
        for name, (recipe, change) in chosen.items()
    ]
    program.check_device(runs[0][1].device)
    for folder in (args.results, args.bank / "cells"):
        check_writable(folder)
    results = []
    bar = progress_bar(runs, "settings and seeds")
    for name, options in bar:
        results.append(cell(name, options, args.bank))
        bar.set_postfix(map=f"{results[-1]['map']:.4f}")
    frame = table(results)
    with atomic_write(args.results / "measure_recipes.md", "w") as file:
        file.write(frame.to_markdown(floatfmt=".2f") + "\n")
    with atomic_write(args.results / "measure_recipes.csv", "w") as file:
        frame.to_csv(file, float_format="%.4f")
    print(frame.to_markdown(floatfmt=".2f"))


if __name__ == "__main__":
    sys.exit(run_script(main))
