"""Tables and figures: what stands in them is what was trained, and nothing is trained twice."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import FROZEN, ROOT
from PIL import Image
from test_scripts import call, load, refused

import engine
import loss
import main
from experiments import baselines, published, sweep
from utils import InputError, RunError, run_script

FLAGS = [*FROZEN[:-2], "--limit", "300", "--epoch_num", "2", "--queue_begin_epoch", "1", "--queue_size", "48",
         "--mode", "debias", "--pos_prior", "0.1", "--T", "0.3", "--topK", "20", "--num_workers", "0"]  # fmt: skip
WHICH = ("--datasets", "Digits", "--bits", "16", "--seeds", "1", "2")


@pytest.fixture(scope="module")
def place(weights, tmp_path_factory):
    """The flags of all tables and figures here, and the folder they share."""
    folder = tmp_path_factory.mktemp("tables")
    where = [f"--{name}={folder / name}" for name in ("results", "cells", "bank", "feature_cache")]
    return [*WHICH, *where, *FLAGS, "--weights", weights], folder


def of(folder, **wanted):
    """The finished cells that have these flags."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    return [c for c in found if all(c["config"].get(flag) == value for flag, value in wanted.items())]


def interrupted(monkeypatch, owner, name, call_number):
    """Let one call of a function be interrupted as by Ctrl-C; returns a list that grows with every call."""
    real, calls = getattr(owner, name), []

    def counted(*arguments, **more):
        calls.append(1)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_table2_holds_the_trainings_and_their_mean_drops(place, capsys):
    flags, folder = place
    assert call("table2", *flags) == 0
    assert "w/o delaying memory" in capsys.readouterr().out
    frame = pd.read_csv(folder / "results" / "table2.csv")
    assert len(frame) == 14
    flags_of = {
        "MeCoQ (full)": {"memory": "soft", "queue_begin_epoch": 1, "hp_gamma": 0.5, "pos_prior": 0.1},
        "w/o debiasing": {"memory": "soft", "mode": "simple"},
        "w/o codeword diversity": {"memory": "soft", "hp_gamma": 0.0},
        "w/o code memory": {"memory": "none"},
        "feature memory": {"memory": "feature"},
        "hard-code memory": {"memory": "hard"},
        "w/o delaying memory": {"memory": "soft", "queue_begin_epoch": 0},
    }
    assert set(frame["method"]) == set(flags_of)
    for method, changed in flags_of.items():
        for seed in (1, 2):
            (cell,) = of(folder, seed=seed, watch=None, **changed)
            row = frame[(frame["method"] == method) & (frame["seed"] == seed)].iloc[0]
            assert row["map"] == pytest.approx(100 * cell["map"], abs=1e-3)
            assert cell["map"] == max(epoch["val_mAP"] for epoch in cell["history"])
    by_seed = frame.pivot_table(index="method", columns="seed", values="map")
    drop = (by_seed.loc["MeCoQ (full)"] - by_seed.loc["hard-code memory"]).mean()
    line = next(x for x in (folder / "results/table2.md").read_text().splitlines() if x.startswith("| hard-code"))
    assert float(line.split("|")[3]) == pytest.approx(drop, abs=0.006)


def test_a_cell_is_the_run_that_main_makes_of_its_flags(place, weights, tmp_path):
    flags, folder = place
    assert call("table2", *flags) == 0
    cell = of(folder, seed=2, memory="feature")[0]
    own = ["--dataset", "Digits", "--M", "2", "--seed", "2", "--memory", "feature", "--weights", weights]
    argv = ["--output", str(tmp_path), "--notes", "a", "--feature_cache", "off", *FLAGS, *own]
    assert main.main(argv) == 0
    metrics = json.loads((tmp_path / "checkpoints/a/metrics.json").read_text())
    assert cell["map"] == pytest.approx(metrics["map"], abs=5e-3)
    others = {flag for flag, value in cell["config"].items() if metrics["config"].get(flag, value) != value}
    assert not others


def test_table1_has_our_row_and_the_shallow_ones(place, monkeypatch, capsys):
    flags, folder = place
    monkeypatch.setattr(baselines, "METHODS", ("LSH", "PQ"))  # OPQ takes long on as many dimensions
    assert call("table1", *flags) == 0
    frame = pd.read_csv(folder / "results" / "table1.csv")
    assert list(frame["method"].unique()) == ["LSH", "PQ", "exact search on the features", "MeCoQ (Ours)"]
    full = of(folder, seed=1, memory="soft", queue_begin_epoch=1, hp_gamma=0.5, pos_prior=0.1, watch=None)
    ours = frame[(frame["method"] == "MeCoQ (Ours)") & (frame["seed"] == 1)]
    assert ours["map"].item() == pytest.approx(100 * full[0]["map"], abs=1e-3)
    times = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert call("table1", *flags) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    capsys.readouterr()
    assert "PQ and OPQ need 256 training images" in refused(capsys, "table1", *flags, "--limit", "60")


def test_nothing_is_trained_twice(place, monkeypatch):
    flags, folder = place
    assert call("table2", *flags) == 0
    trained = []
    monkeypatch.setattr(sweep, "train", lambda args, *_: trained.append(vars(args)) or {"map": 0.5, "history": []})
    monkeypatch.setattr(baselines, "METHODS", ())
    for script in ("table2", "table1"):
        assert call(script, *flags) == 0
    assert not trained  # MeCoQ of Table 1 is the full method of Table 2
    assert call("figure4", *flags, "--priors", "0.1", "--sizes", "0", "48", "96", f"--cells={folder / 'x'}") == 0
    assert len(trained) == 2 * 3  # rho+ of 0.1 and a memory of 48 are the same


def test_a_banked_cell_goes_on_within_an_epoch(place, tmp_path, monkeypatch):
    flags, _ = place
    there = [*flags, "--seeds", "1", "--layers", "0", "--save_interval", "4", f"--results={tmp_path}"]
    assert call("layers", *there, f"--cells={tmp_path}/a") == 0
    calls = interrupted(monkeypatch, loss, "contrastive_loss", 13 + 6)  # an epoch has 13 steps
    assert call("layers", *there, f"--cells={tmp_path}/b") == 130
    assert call("layers", *there, f"--cells={tmp_path}/b") == 0
    assert len(calls) == 13 + 6 + 13 - 4
    ended = [json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in "ab"]
    assert ended[0]["history"] == ended[1]["history"]


def test_a_training_that_fails_leaves_its_place_empty(place, tmp_path, monkeypatch, caplog):
    flags, _ = place
    real = sweep.train

    def diverging(args, *others):
        if args.hp_gamma == 0:
            raise RunError("epoch 1, step 2: the loss became nan") from RunError("the loss became nan")
        return real(args, *others)

    monkeypatch.setattr(sweep, "train", diverging)
    for script in ("table2", "figure2"):
        assert call(script, *flags, "--seeds", "1", f"--cells={tmp_path}", f"--results={tmp_path}") == 0
    assert "the loss became nan" in caplog.text
    frame = pd.read_csv(tmp_path / "table2.csv").set_index("method")["map"]
    assert frame.isna().sum() == 1
    assert np.isnan(frame["w/o codeword diversity"])
    monkeypatch.setattr(sweep, "train", lambda *_: (_ for _ in ()).throw(RunError("no space left on device")))
    assert call("table2", *flags, "--seeds", "2", f"--cells={tmp_path}", f"--results={tmp_path}") == 1


def test_a_stopped_table_goes_on(place, tmp_path, monkeypatch):
    flags, _ = place
    count = interrupted(monkeypatch, sweep, "train", 4)
    there = [*flags, f"--cells={tmp_path}"]
    assert call("table2", *there) == 130
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert call("table2", *there) == 0
    assert len(count) == 4 + 11


def test_a_training_of_the_backbone_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Nothing can be banked of a backbone that learns: its cells train on images, and are saved as runs are."""
    flags = ["--backbone", "convnet", "--image_size", "16", "--limit", "100", "--batch_size", "16",
             "--feat_dim", "8", "--topK", "20", "--lr", "0.05", "--num_workers", "0", "--epoch_num", "3",
             "--queue_begin_epoch", "1", "--queue_size", "30", "--feature_cache", "off"]  # fmt: skip
    own = ["--datasets", "Digits", "--bits", "16", "--seeds", "5", f"--results={tmp_path}", "--layers", "0"]
    calls = interrupted(monkeypatch, engine, "validate", 3)
    assert call("layers", *own, *flags, f"--cells={tmp_path}/a") == 130
    assert list((tmp_path / "a").glob("checkpoints/*/last.cpt"))
    assert call("layers", *own, *flags, f"--cells={tmp_path}/a") == 0
    assert len(calls) < 3 + 3  # it did not begin anew
    assert call("layers", *own, *flags, f"--cells={tmp_path}/b") == 0
    ended = [json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in "ab"]
    assert ended[0]["history"] == ended[1]["history"]
    argv = [*flags, "--dataset", "Digits", "--M", "2", "--seed", "5", "--output", str(tmp_path), "--notes", "run"]
    assert main.main(argv) == 0
    assert ended[0]["map"] == json.loads((tmp_path / "checkpoints/run/metrics.json").read_text())["map"]
    assert not list((tmp_path / "a").glob("checkpoints/*"))


def test_table3_counts_negatives_and_costs(place, capsys):
    flags, folder = place
    table3 = load("table3")
    expected = [[128, 0, 254], [256, 0, 510], [128, 128, 382], [128, 384, 638], [128, 896, 1150]]
    assert [[*size, table3.negatives(*size)] for size in table3.SIZES] == expected
    table3.SIZES = table3.SIZES[:2]
    assert run_script(lambda: table3.main([*flags, "--steps", "9", "--seeds", "1"])) == 0
    frame = pd.read_csv(folder / "results" / "table3.csv")
    assert len(frame) == 2
    assert (frame["seconds_per_epoch"] > 0).all()
    assert (frame["peak_mib"] > 1).all()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [[int(x) for x in line[1:4]] for line in lines] == expected[:2]


def test_figures_have_their_curves_and_pictures(place):
    flags, folder = place
    for script in ("figure2", "figure3", "figure4"):
        assert call(script, *flags) == 0
        with Image.open(folder / "results" / f"{script}.png") as image:
            image.load()
            assert image.width > 600
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    figure2 = pd.read_csv(folder / "results" / "figure2.csv")
    assert len(figure2) == 2 * 2 * 2
    for name in ("vanilla_loss", "omega", "lr", "used", "map"):
        assert figure2[name].notna().all()
    without = figure2[figure2["method"] == "without"]
    (cell,) = of(folder, seed=1, hp_gamma=0.0, watch="CodebookWatch")
    omega = [epoch["loss/codeword_reg_loss"] for epoch in cell["history"]]
    np.testing.assert_allclose(without[without["seed"] == 1]["omega"], omega, atol=1e-4)
    assert {"embedding_1", "soft_1", "hard_1", "soft_error", "hard_error"} <= set(
        pd.read_csv(folder / "results" / "figure3.csv")
    )
    figure4 = pd.read_csv(folder / "results" / "figure4.csv")
    assert set(figure4["flag"]) == {"pos_prior", "queue_size"}
    assert len(figure4) == 2 * 12


def test_conditions_compare_four_variants(place, capsys):
    flags, folder = place
    assert call("conditions", *flags, "--settings", "as published", "lr 0.1") == 0
    frame = pd.read_csv(folder / "results" / "conditions.csv")
    assert len(frame) == 2 * 2 * 4
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| as published"))
    seeds = frame[frame["setting"] == "as published"].pivot_table(index="seed", columns="variant", values="map")
    gain = (seeds["full"] - seeds["w/o memory"]).mean()
    assert float(line.split("|")[7].split()[0]) == pytest.approx(gain, abs=0.006)


def test_measure_recipes_sets_one_flag_at_a_time(place):
    flags, folder = place
    assert call("recipes", *flags, "--hp_lambda", "0.2", "--seeds", "1") == 0
    weight = load("recipes").sweep.parsed("CIFAR10-II", 32, ["--recipe", "release"]).hp_lambda
    assert weight == 0.1
    frame = pd.read_csv(folder / "results" / "measure_recipes.csv")
    assert len(frame) == 9
    for flag in ("codebooks", "pairing", "debias_memory", "negative_bound", "normalize_memory", "normalize_query"):
        release = main.RECIPES["release"][flag]
        (config,) = (
            c["config"] for c in of(folder, seed=1, recipe="paper", **{flag: release}) if c["config"]["hp_lambda"] == 0
        )
        departing = {name: config[name] for name in main.DIFFERENCES if name in config}
        departing = {name: value for name, value in departing.items() if value != main.RECIPES["paper"][name]}
        assert departing == {flag: release}
    assert len(of(folder, recipe="release", hp_lambda=0.2)) == 1


def test_flags_are_the_published_scripts_then_the_users():
    args = sweep.options("CIFAR10-II", 64, 7, ["--trainable_layer_num", "0", "--T", "0.2"], hp_gamma=0.0)
    expected = {
        "dataset": "CIFAR10", "protocol": "II", "M": 8, "feat_dim": 96, "hp_beta": 0.01, "pos_prior": 0.1, "T": 0.2,
        "seed": 7, "queue_begin_epoch": 15, "trainable_layer_num": 0, "hp_lambda": 0.0, "hp_gamma": 0.0, "topK": 1000,
    }  # fmt: skip
    assert {flag: getattr(args, flag) for flag in expected} == expected
    assert sweep.options("CIFAR10-II", 64, 7, ["--recipe", "release"]).hp_lambda == 0.05
    for flags in (["--hp_lambda", "0.3"], ["--hp_lambda=0.3"]):
        assert sweep.options("CIFAR10-II", 64, 7, flags).hp_lambda == 0.3
    told = sweep.departures("CIFAR10-II", 64, ["--trainable_layer_num", "0", "--T", "0.35", "--num_workers", "3"])
    assert told == "trainable_layer_num=0"  # the script's T, and what makes no difference, are not told
    assert sweep.options("NUSWIDE", 16, 7, [], memory="none").queue_begin_epoch == -1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume"], "--resume has no place here"),
        (["--M", "4"], "--M: --datasets, --bits and --seeds say it here"),
        (["--seed=4"], "--seed=4: --datasets"),
        (["--K", "16"], "--K: --datasets"),
        (["--output", "x"], "--output has no place here"),
        (["--epoch_num", "0"], "--epoch_num must be at least 1"),
        (["--device", "cuda:x"], "must be cpu, cuda or cuda:N"),
        (["--lr", "-1"], "--lr -1.0: must be positive"),
        (["--bits", "20"], "invalid choice"),
        (["--datasets", "MNIST"], "invalid choice"),
        (["--device", "cuda:99"], "CUDA"),
        (["--nothing"], "--nothing"),
        (["--weights", "no/such/file"], "no/such/file"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words, place, capsys):
    for script in ("table1", "table2", "figure2"):
        assert words in refused(capsys, script, *place[0], *flags)


def test_a_damaged_cell_is_named(tmp_path):
    sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.5})
    (path,) = tmp_path.glob("*.json")
    assert sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.7})["map"] == 0.5
    for content in ("{", "{}", "[1]", '{"map": 1, "config": {"a": 2}}', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(InputError, match=f"{path.name} is damaged"):
            sweep.kept(tmp_path, {"a": 1}, lambda: {"map": 0.7})


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


def test_published_numbers_are_found():
    assert published.map_of("paper_table1_map", "ITQ+VGG", "CIFAR10-II", 32) == 32.5
    assert published.map_of("paper_table2_ablation_map", "w/o code memory", "NUSWIDE", 64) == 81.43
    assert published.map_of("paper_table1_map", "UTH", "Flickr25K", 16) is None
    assert published.map_of("paper_table1_map", "no such", "Flickr25K", 16) is None
    assert load("table3").published_map("batch 256, memory 0", "CIFAR10-I", 32) == 68.66


def test_two_processes_share_the_work(tmp_path):
    """The second waits for the cell that the first is at, and takes it."""
    program = (
        "import sys, time, json; from pathlib import Path; from experiments import sweep\n"
        "folder = Path(sys.argv[1])\n"
        "def compute():\n"
        "    (folder / f'began-{sys.argv[2]}').touch(); time.sleep(1); return {'by': sys.argv[2]}\n"
        "print(sweep.kept(folder, {'a': 1}, compute)['by'])"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert len(list(tmp_path.glob("began-*"))) == 1
    assert said[0] == said[1] in ("0", "1")
