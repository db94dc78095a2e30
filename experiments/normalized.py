#!/usr/bin/env python3
"""The worth of --normalize_features: MAP with the backbone's features as they are, and centred and of one length.

python -m experiments.normalized --datasets CIFAR10-II --bits 16 32 64 --seeds 2021 2022 2023 FLAGS

FLAGS are main.py's, --method too. Writes normalized.csv, a row per training, and normalized.md: the means over seeds
with their lowest and highest, and the gain with the same seed.
"""

import sys
from typing import TYPE_CHECKING

from experiments import flags, tables
from utils import run_script

if TYPE_CHECKING:
    import pandas as pd

VARIANTS = {"as they are": {}, "centred, of one length": {"normalize_features": True}}


def table(frame: "pd.DataFrame", dataset: str) -> "pd.DataFrame":
    """A row per code length: MAP of both variants, and what the second gains."""
    import pandas as pd

    rows = []
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        by_seed = part.pivot_table(index="seed", columns="method", values="map")
        before, after = (by_seed[name] for name in VARIANTS)
        spreads = {name: tables.spread(by_seed[name]) for name in VARIANTS}
        rows.append({"bits": bits} | spreads | {"gain": tables.spread(after - before)})
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    own, given = flags.parse(flags.build_parser(__doc__), argv, "tabulate", any_method=True)
    trials = flags.plan(own, given, VARIANTS)
    if own.dry_run:
        flags.announce(trials)
        return
    from experiments import sweep

    frame = sweep.run_trials(trials, own)
    tables.write(own.results, "normalized", frame, table)


if __name__ == "__main__":
    sys.exit(run_script(main))
