#!/usr/bin/env python3
"""The conditions under which the diversity term and the memory matter: the full method, and without either, in one
setting after another.

python -m experiments.conditions --datasets CIFAR10-II --bits 32 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's; a setting's own flags win. Writes conditions.csv, a row per training, and conditions.md: MAP with
and without the term and the memory, and what became of the codebooks: Omega, its mean in the last epoch, and the share
of codewords that code any training image before it.
"""

import sys
from typing import TYPE_CHECKING

from experiments import flags, tables
from utils import run_script

if TYPE_CHECKING:
    import pandas as pd

# setting -> the flags that differ from the published script's
SETTINGS: dict[str, dict[str, object]] = {
    "as published": {},
    "lr 0.1": {"lr": 0.1},
    "lr 1": {"lr": 1.0},
    "Adam, lr 0.001": {"optimizer": "Adam", "lr": 0.001},
    "Adam, lr 0.01": {"optimizer": "Adam", "lr": 0.01},
    "T 0.1": {"T": 0.1},
    "T 1": {"T": 1.0},
    "alpha 1": {"alpha": 1.0},
    "alpha 3": {"alpha": 3.0},
    "alpha 30": {"alpha": 30.0},
    "no weight decay": {"hp_beta": 0.0},
    "weight decay 0.05": {"hp_beta": 0.05},
    "rho+ 0.3": {"mode": "debias", "pos_prior": 0.3},
    "batch 16": {"batch_size": 16},
    "batch 32": {"batch_size": 32},
    "K 16, half the bits": {"K": 16},
    "memory of 1024": {"queue_size": 1024},
    "entropy term 0.1": {"hp_lambda": 0.1},
    "entropy term 0.3": {"hp_lambda": 0.3},
    "entropy term 1": {"hp_lambda": 1.0},
    "lr 0.1, alpha 30": {"lr": 0.1, "alpha": 30.0},
    "lr 1, T 1": {"lr": 1.0, "T": 1.0},
    "alpha 1, T 0.1": {"alpha": 1.0, "T": 0.1},
    "no debiasing": {"mode": "simple", "pos_prior": 0.0},
    "no debiasing, T 0.1": {"mode": "simple", "pos_prior": 0.0, "T": 0.1},
    "lr 0.001": {"lr": 0.001},
}
VARIANTS = {
    "full": {},
    "w/o diversity": {"hp_gamma": 0.0},
    "w/o memory": {"memory": "none"},
    "w/o both": {"hp_gamma": 0.0, "memory": "none"},
}


def summary(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A row per setting: MAP of the four variants; what the memory adds, and the term with memory and without; Omega
    and the codewords in use at the end, with the term and without it."""
    import pandas as pd

    rows = []
    for setting, part in frame.groupby("setting", sort=False):
        seeds = part.pivot_table(index="seed", columns="variant", values="map").reindex(columns=list(VARIANTS))
        mean = part.groupby("variant")[["omega", "used"]].mean()
        gains = {
            "+ memory": seeds["full"] - seeds["w/o memory"],
            "+ diversity": seeds["full"] - seeds["w/o diversity"],
            "+ diversity, w/o memory": seeds["w/o memory"] - seeds["w/o both"],
        }
        omega, used = ([f"{mean.loc[v, name]:.3f}" for v in ("full", "w/o diversity")] for name in ("omega", "used"))
        rows.append(
            {"setting": setting, "seeds": len(seeds)}
            | {name: seeds[name].mean() for name in VARIANTS}
            | {name: tables.spread(gain) for name, gain in gains.items()}
            | {"Omega, with / w/o": " / ".join(omega), "used, with / w/o": " / ".join(used)}
        )
    return pd.DataFrame(rows)


def with_last_values(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The trials with the values of their last epochs as columns, and setting and variant instead of the method."""
    frame[["setting", "variant"]] = frame["method"].tolist()
    last = [(result["history"] or [{}])[-1] | (result["rows"] or [{}])[-1] for result in frame["result"]]
    frame["omega"] = [values.get("loss/codeword_reg_loss") for values in last]
    for name in ("used", "perplexity", "hard_error"):
        frame[name] = [values.get(name) for values in last]
    return frame.drop(columns=["result", "method"])


def main(argv: list[str] | None = None) -> None:
    parser = flags.build_parser(__doc__, bits=(32,))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING",
                        help=f"some of {', '.join(SETTINGS)} (default: all)")  # fmt: skip
    own, given = flags.parse(parser, argv, "tabulate")
    variants = {
        (setting, variant): SETTINGS[setting] | change
        for setting in own.settings
        for variant, change in VARIANTS.items()
    }
    trials = flags.plan(own, given, variants)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = with_last_values(sweep.run_trials(trials, own, "CodebookUse"))
    tables.write_csv(own.results / "conditions.csv", frame)
    parts = [
        part
        for (dataset, bits), rows in frame.groupby(["dataset", "bits"], sort=False)
        for part in (f"{tables.heading(rows, dataset)}; {bits} bits", summary(rows))
    ]
    tables.write_markdown(own.results / "conditions.md", parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
