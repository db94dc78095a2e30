#!/usr/bin/env python3
"""Table 2: what each part of the method is worth, by leaving it out.

python -m experiments.table2 --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's. The published script's flags for the data set and code length stand below them; the recipe is
`paper` unless FLAGS say otherwise. Writes table2.csv, a row each training, and table2.md, and skips what is done.
"""

import sys

from experiments import published, sweep
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
    own, flags = sweep.parse(sweep.build_parser(__doc__), argv)
    frame = sweep.run_cells(sweep.plan(own, flags, VARIANTS), own)
    frame["published"] = [published.map_of(TABLE, *row) for row in frame[["method", "dataset", "bits"]].to_numpy()]
    sweep.write_csv(own.results / "table2.csv", frame.drop(columns="result"))
    parts = [part for name in own.datasets for part in (sweep.heading(frame, name), sweep.drops(frame, name, TABLE))]
    sweep.write_markdown(own.results / "table2.md", *parts)


if __name__ == "__main__":
    sys.exit(run_script(main))
