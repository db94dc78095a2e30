"""Tables of trials: means over seeds with the lowest and the highest, drops against the first method, CSV and Markdown.

pandas is imported inside the functions that need it: `--dry_run` must not wait for it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import published
from utils import atomic_write

if TYPE_CHECKING:
    import pandas as pd


def spread(values: "pd.Series") -> str:
    """Mean, and in brackets the lowest and the highest."""
    if len(values) < 2:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ({values.min():.2f}{' to ' if values.min() < 0 else '-'}{values.max():.2f})"


def drops(frame: "pd.DataFrame", dataset: str, published_as: str | None = None) -> "pd.DataFrame":
    """A row per method: for each code length the mean over seeds with its lowest and highest, and the mean drop against
    the first method with the same seed, in points of MAP.

    Args:
        published_as: the published table whose drop stands beside it, see `published.map_of`.
    """
    import pandas as pd

    names = list(dict.fromkeys(frame["method"]))
    columns = {"method": names}
    for bits, part in frame[frame["dataset"] == dataset].groupby("bits"):
        by_seed = part.pivot_table(index="method", columns="seed", values="map").reindex(names)
        columns[f"{bits} bits"] = by_seed.apply(spread, axis=1).tolist()
        columns[f"{bits}: drop"] = (by_seed.loc[names[0]] - by_seed).mean(axis=1).tolist()
        if published_as:
            theirs = [published.map_of(published_as, name, dataset, bits) for name in names]
            columns[f"{bits}: published drop"] = [None if x is None else theirs[0] - x for x in theirs]
    return pd.DataFrame(columns)


def heading(frame: "pd.DataFrame", dataset: str) -> str:
    """The title of a table: its data set, and the flags with which it was made."""
    told = "; ".join(dict.fromkeys(flags for flags in frame[frame["dataset"] == dataset]["flags"] if flags))
    return f"{dataset}, MAP in percent; {f'as published but for {told}' if told else 'flags as published'}"


def sections(frame: "pd.DataFrame", table: Callable[["pd.DataFrame", str], "pd.DataFrame"]) -> list:
    """For each data set the heading and `table(frame, dataset)`, as `write_markdown` takes them."""
    datasets = dict.fromkeys(frame["dataset"])
    return [part for dataset in datasets for part in (heading(frame, dataset), table(frame, dataset))]


def exploded(frame: "pd.DataFrame", rows: Callable[[dict], list[dict]]) -> "pd.DataFrame":
    """Each trial's labels with each of the `rows` that its result holds."""
    import pandas as pd

    labels = frame[["method", "dataset", "bits", "seed", "flags"]].to_dict("records")
    pairs = zip(labels, frame["result"], strict=True)
    return pd.DataFrame([label | row for label, result in pairs for row in rows(result)])


def write(folder: Path, name: str, frame: "pd.DataFrame", table: Callable) -> None:
    """Write a row per training as `name.csv`, and print and write `sections` of them as `name.md`."""
    write_csv(folder / f"{name}.csv", frame)
    write_markdown(folder / f"{name}.md", sections(frame, table))


def write_csv(path: Path, frame: "pd.DataFrame") -> None:
    """All columns but `result`, numbers with six digits."""
    with atomic_write(path, "w") as file:
        frame.drop(columns="result", errors="ignore").to_csv(file, index=False, float_format="%.6g")


def write_markdown(path: Path, parts: "list[str | pd.DataFrame]") -> None:
    """Write and print paragraphs and tables; missing values are left empty."""
    texts = [
        part
        if isinstance(part, str)
        else part.astype(object).where(part.notna(), "").to_markdown(index=False, floatfmt=".2f")
        for part in parts
    ]
    with atomic_write(path, "w") as file:
        file.write("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))
