"""The published numbers beside ours: which runs, logs and tables are read, and what stands beside what."""

import csv
import json

import pandas as pd
import pytest
from helpers import call, refused

from config import parse, recorded
from experiments import published


def write_metrics(output, notes, value, flags, canonical=True):
    config = recorded(parse(flags))
    folder = output / "checkpoints" / notes
    folder.mkdir(parents=True)
    metrics = {"map": value, "bits": config["M"] * 8, "canonical_data": canonical, "config": config}
    metrics["map_by_ties"] = {"expected": value, "database": value}
    (folder / "metrics.json").write_text(json.dumps(metrics))


CIFAR_II_32 = """--dataset CIFAR10 --protocol II --M 4 --feat_dim 48 --trainable_layer_num 2 --T 0.35 --hp_beta 5e-3
    --hp_lambda 0.1 --mode debias --pos_prior 0.1 --queue_begin_epoch 15 --topK 1000""".split()  # noqa: SIM905


def test_our_numbers_stand_beside_the_published_ones(tmp_path, capsys):
    """Expected values are read off the published tables by hand."""
    for seed, value in ((1, 0.64), (2, 0.65)):
        write_metrics(tmp_path, f"seed{seed}", value, [*CIFAR_II_32, "--seed", str(seed)])
    write_metrics(tmp_path, "own", 0.6, [*CIFAR_II_32, "--recipe", "release", "--pairing", "own"])
    for notes, value, flags in (("a", 0.5, ["--memory", "none"]), ("b", 0.3, ["--topK", "10"])):
        write_metrics(tmp_path, notes, value, [*CIFAR_II_32, *flags])
    tested = ["--test_only", "--checkpoint", "their/model.cpt", "--recipe", "release"]
    write_metrics(tmp_path, "c", 0.63, [*CIFAR_II_32, *tested])
    write_metrics(tmp_path / "b", "16", 0.7, ["--dataset", "NUSWIDE", "--M", "2", "--symmetric_distance"], False)
    write_metrics(tmp_path / "b", "digits", 0.9, ["--dataset", "Digits"])
    log = tmp_path / "old-CifarI16bits.log"
    log.write_text("epoch 0: avg loss=4.9\nval mAP=0.6\n2021-08-01 test mAP=0.681300\n")
    assert call("compare_published", "--output", tmp_path, tmp_path / "b", "--logs", log) == 0
    with (tmp_path / "checkpoints" / "compare_published.csv").open() as file:
        rows = {(row["experiment"], row["setting"]): row for row in csv.DictReader(file)}
    paper = rows["CifarII32bits", "paper"]
    assert [float(paper[f"ours_{key}"]) for key in ("count", "mean", "min", "max")] == [2, 64.5, 64, 65]
    assert (float(paper["paper"]), float(paper["minus_paper"])) == (64.09, 0.41)
    assert float(paper["release_mean"]) == pytest.approx((64.0929 + 64.11 + 63.1728) / 3, abs=1e-3)
    assert (float(paper["release_min"]), float(paper["release_max"])) == (63.1728, 64.11)
    assert float(rows["CifarII32bits", "release, pairing=own"]["ours_mean"]) == 60
    assert float(rows["CifarII32bits", "paper, memory=none, queue_begin_epoch=-1"]["ours_mean"]) == 50
    assert float(rows["CifarII32bits", "paper, topK=10"]["ours_mean"]) == 30
    assert [s for e, s in rows if "test_only=True" in s and "checkpoint=their/model.cpt" in s]
    symm = next(row for (e, s), row in rows.items() if e == "Nuswide16bitsSymm")
    assert all(words in symm["setting"] for words in ("T=0.1", "topK=None", "not the published images"))
    assert (symm["paper"], float(symm["ours_mean"])) == ("", 70)
    assert float(rows["CifarI16bits", "log"]["minus_paper"]) == pytest.approx(68.13 - 68.20)
    assert len({experiment for experiment, _ in rows}) == 24
    text = capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "compare_published.md").read_text() in text
    line = next(line for line in text.splitlines() if "CifarII32bits " in line and "paper" in line)
    assert [field.strip() for field in line.split("|")[3:6]] == ["2", "64.50 (64.00-65.00)", "64.09"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("checkpoints/a/metrics.json", "{", "is not the metrics.json of a run"),
        ("checkpoints/a/metrics.json", "[]", "is not the metrics.json of a run"),
        ("checkpoints/a/metrics.json", '{"map": 0.1, "config": {}}', "of another version"),
        ("checkpoints/a/metrics.json", "[" * 100000, "is not the metrics.json of a run"),
        ("checkpoints/a/metrics.json", '{"map": 0.1, "config": {"dataset": []}}', "of another version"),
        ("checkpoints/a/metrics.json", None, "is not the metrics.json of a run"),
        ("mine.log", "test mAP=0.5", "does not say which experiment"),
        ("CifarI16bits.log", "val mAP=0.5", "no line 'test mAP=...'"),
        ("CifarI16bits.log", None, "not readable"),
    ],
)
def test_results_that_cannot_be_compared_are_named(name, content, words, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_text(content)
    elif path.suffix == ".json":
        path.mkdir()
    logs = ["--logs", path] if name.endswith(".log") else []
    error = refused(capsys, "compare_published", "--output", tmp_path, *logs)
    assert words in error
    assert str(path) in error


def test_runs_of_an_earlier_version_are_read(tmp_path):
    """A flag that a run does not have was at its default."""
    for notes, missing in (("a", ("method", "normalize_query", "alpha", "ties")), ("b", ("T",))):
        write_metrics(tmp_path, notes, 0.64, CIFAR_II_32)
        path = tmp_path / "checkpoints" / notes / "metrics.json"
        metrics = json.loads(path.read_text())
        for flag in missing:
            del metrics["config"][flag]
        if notes == "a":
            del metrics["map_by_ties"]
        path.write_text(json.dumps(metrics))
    assert call("compare_published", "--output", tmp_path) == 0
    with (tmp_path / "checkpoints" / "compare_published.csv").open() as file:
        settings = [row["setting"] for row in csv.DictReader(file) if row["setting"]]
    assert settings == ["paper, T=0.1", "paper, ties=database"]


def test_compare_published_reads_the_tables(tmp_path, capsys):
    columns = ["method", "dataset", "bits", "seed", "map", "flags", "canonical_data", "recipe", "published"]
    rows = [
        ("ITQ", "CIFAR10-II", 32, 1, 40.0, "image_size=128", False, "", 32.5),
        ("ITQ", "CIFAR10-II", 32, 2, 41.0, "image_size=128", False, "", 32.5),
        ("ITQ", "CIFAR10-II", 32, 1, 30.0, "", False, "", 32.5),
        ("exact search on the features", "CIFAR10-II", 32, 1, 45.0, "", False, "", None),
        (published.OURS, "CIFAR10-II", 32, 1, 50.0, "", False, "paper", 64.09),
    ]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "table1.csv", index=False)
    assert call("compare_published", "--output", tmp_path, "--tables", tmp_path / "table1.csv") == 0
    table = pd.read_csv(tmp_path / "checkpoints" / "compare_published.csv").set_index("experiment").loc["CifarII32bits"]
    table = table.set_index("setting")
    itq = table.loc["ITQ, image_size=128, not the published images"]
    assert (itq["ours_count"], itq["ours_mean"], itq["paper"], itq["minus_paper"]) == (2, 40.5, 32.5, 8.0)
    assert table.loc["ITQ, not the published images", "ours_mean"] == 30
    exact = table.loc["exact search on the features, not the published images"]
    assert exact[["paper", "minus_paper", "release_mean", "minus_release"]].isna().all()
    ours = table.loc[f"{published.OURS}, paper, not the published images"]
    assert ours["paper"] == 64.09
    assert ours["release_mean"] == pytest.approx(63.79, abs=0.01)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    capsys.readouterr()
    for name in ("bad.csv", "none.csv"):
        assert name in refused(capsys, "compare_published", "--output", tmp_path, "--tables", tmp_path / name)
