#!/usr/bin/env python3
"""Table 2: what each part of the method is worth, by leaving it out.

python -m experiments.table2 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. The published script's flags for the data set and code length stand below them; the recipe is
`paper` unless FLAGS say otherwise. Writes table2.csv, a row per training, and table2.md, and skips what is done.
"""

import sys

from experiments import flags, published, tables
from utils import run_script

# variant, as the published table calls it -> the flags that make it
VARIANTS: dict[str, dict[str, object]] = {
    "MeCoQ (full)": {},
    "w/o debiasing": {"mode": "simple", "pos_prior": 0.0},
    "w/o codeword diversity": {"hp_gamma": 0.0},
    "w/o code memory": {"memory": "none"},
    "feature memory": {"memory": "feature"},
    "hard-code memory": {"memory": "hard"},
    "w/o delaying memory": {"queue_begin_epoch": 0},
}
TABLE = "paper_table2_ablation_map"


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__), argv, "tabulate")
    trials = flags.plan(own, given, VARIANTS)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    frame["published"] = [published.map_of(TABLE, *row) for row in frame[["method", "dataset", "bits"]].to_numpy()]
    tables.write(own.results, "table2", frame, lambda frame, dataset: tables.drops(frame, dataset, TABLE))


if __name__ == "__main__":
    sys.exit(run_script(main))
