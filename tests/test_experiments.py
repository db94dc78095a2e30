"""Tables and figures: what stands in them is what was trained, with the flags that they name."""

import json
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import HOSTILE, ROOT, call, load, refused
from PIL import Image
from test_sweep import flags_in, results_in

import config
from experiments import flags, published
from experiments.profiling import FirstBatches
from utils import run_script

EXPERIMENTS = ("table1", "table2", "table3", "conditions", "layers", "recipes", "figure2", "figure3", "figure4")


@pytest.fixture(scope="module")
def place(weights, tmp_path_factory):
    """The flags of all tables and figures here, and the folder they share."""
    folder = tmp_path_factory.mktemp("tables")
    return flags_in(folder, weights), folder


def of(folder, callback=False, **wanted):
    """The results of the finished trials that have these flags, with a callback or without."""
    trainings = [result for result in results_in(folder / "trials") if "config" in result]
    found = [result for result in trainings if ("rows" in result) == callback]
    return [result for result in found if wanted.items() <= result["config"].items()]


# ---------------------------------------------------------------- tables


def test_table2_holds_the_trainings_and_their_mean_drops(place, capsys):
    given, folder = place
    assert call("table2", *given) == 0
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
            (trial,) = of(folder, seed=seed, **changed)
            row = frame[(frame["method"] == method) & (frame["seed"] == seed)].iloc[0]
            assert row["map"] == pytest.approx(100 * trial["map"], abs=1e-3)
            assert trial["map"] == max(epoch["val_mAP"] for epoch in trial["history"])
    by_seed = frame.pivot_table(index="method", columns="seed", values="map")
    drop = (by_seed.loc["MeCoQ (full)"] - by_seed.loc["hard-code memory"]).mean()
    line = next(x for x in (folder / "results/table2.md").read_text().splitlines() if x.startswith("| hard-code"))
    assert float(line.split("|")[3]) == pytest.approx(drop, abs=0.006)


def test_table1_has_our_row_and_the_baselines(place, capsys):
    given, folder = place
    table1 = load("table1")
    table1.BASELINES = ("LSH", "PQ")  # OPQ takes long on as many dimensions
    assert run_script(lambda: table1.main(given)) == 0
    frame = pd.read_csv(folder / "results" / "table1.csv")
    assert list(frame["method"].unique()) == ["LSH", "PQ", table1.EXACT, *table1.OTHERS, "MeCoQ (Ours)"]
    (full,) = of(folder, seed=1, memory="soft", queue_begin_epoch=1, hp_gamma=0.5, pos_prior=0.1)
    ours = frame[(frame["method"] == "MeCoQ (Ours)") & (frame["seed"] == 1)]
    assert ours["map"].item() == pytest.approx(100 * full["map"], abs=1e-3)
    others = [("CIBHash", {"code_length": 16, "batch_size": 64, "sampling": kind}) for kind in ("bernoulli", "sign")]
    others += [("SPQ", {"M": 4, "head_only": True, "pairs": kind}) for kind in ("cross", "all")]
    for method, own in others:
        (trial,) = of(folder, seed=1, method=method, **own)
        for flag in ("backbone", "image_size", "augmentation", "protocol", "epoch_num", "topK", "ties", "limit"):
            assert trial["config"][flag] == full["config"][flag], flag
        assert trial["config"]["optimizer"] == "Adam"
    times = {path: path.stat().st_mtime_ns for path in (folder / "trials").glob("*.json")}
    assert run_script(lambda: table1.main(given)) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    keys = [json.loads(path.read_text())["key"] for path in times]
    keys = [key for key in keys if key.get("baseline") == "PQ"]
    assert len(keys) == 2
    assert all(key["bits"] == 16 and key["image_size"] == 32 and key["topK"] == 20 for key in keys)
    capsys.readouterr()
    table1.BASELINES = ("PQ",)
    assert run_script(lambda: table1.main([*given, "--limit", "60"])) == 2
    assert "PQ and OPQ need 256 training images" in capsys.readouterr().err
    assert "convnet: it has no frozen layers" in refused(capsys, "table1", *given[:-2], "--backbone", "convnet")


def test_another_method_is_trained_and_tested_as_the_one_beside_it(capsys):
    given = ["--backbone", "squeezenet1_0", "--lr", "0.5", "--T", "0.2", "--limit", "300"]

    def trials(*more):
        own = ["--datasets", "Digits", "--bits", "16", "--seeds", "3"]
        assert run_script(lambda: load("table1").main([*own, *given, *more, "--dry_run"])) == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        return {line.partition(";")[0]: set(line.partition(": ")[2].split()) for line in lines}

    for more in ([], ["--recipe", "release"]):
        found = trials(*more)
        assert len({frozenset(key) for key in found.values()}) == 5
        for name, key in found.items():
            assert not any(flag.startswith("topK") for flag in key), name
            assert {"dataset=Digits", "limit=300", "seed=3"} <= key
            assert ("ties=database" in key) == bool(more)
            assert ("lr=0.5" in key) == ("T=0.2" in key) == (name == "MeCoQ (Ours)")
            assert ("recipe=release" in key) == ("released" in name or (bool(more) and name == "MeCoQ (Ours)"))
    label = load("table1").other_trials(Namespace(datasets=["Digits"], bits=[16], seeds=[3]), given)[0].labels["flags"]
    assert "limit=300" in label
    assert "T=0.2" not in label


def test_table3_counts_negatives_and_costs(place, capsys):
    given, folder = place
    table3 = load("table3")
    expected = [[128, 0, 254], [256, 0, 510], [128, 128, 382], [128, 384, 638], [128, 896, 1150]]
    assert [[*size, table3.negatives(*size)] for size in table3.SIZES] == expected
    table3.SIZES = table3.SIZES[: 1 + HOSTILE]
    assert run_script(lambda: table3.main([*given, "--steps", "2", "--seeds", "1"])) == 0
    frame = pd.read_csv(folder / "results" / "table3.csv")
    assert len(frame) == 1 + HOSTILE
    assert (frame["seconds_per_epoch"] > 0).all()
    assert (frame["peak_mib"] > 1).all()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [[int(x) for x in line[1:4]] for line in lines] == expected[: 1 + HOSTILE]


def test_profiling_takes_the_first_batches():
    batches = FirstBatches([torch.tensor(i) for i in range(5)], 3)
    assert len(batches) == 3
    assert [int(batch) for batch in batches] == [int(batch) for batch in batches] == [0, 1, 2]
    assert len(FirstBatches([1, 2], 3)) == 2


def test_conditions_compare_four_variants(place, capsys):
    given, folder = place
    assert call("conditions", *given, "--settings", "as published", "lr 0.1") == 0
    frame = pd.read_csv(folder / "results" / "conditions.csv")
    assert len(frame) == 2 * 2 * 4
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| as published"))
    seeds = frame[frame["setting"] == "as published"].pivot_table(index="seed", columns="variant", values="map")
    gain = (seeds["full"] - seeds["w/o memory"]).mean()
    assert float(line.split("|")[7].split()[0]) == pytest.approx(gain, abs=0.006)


def test_recipes_sets_one_flag_at_a_time(place):
    given, folder = place
    assert call("recipes", *given, "--hp_lambda", "0.2", "--seeds", "1") == 0
    assert load("recipes").entropy_weight(None, "CIFAR10-II", 32, []) == 0.1
    frame = pd.read_csv(folder / "results" / "measure_recipes.csv")
    assert len(frame) == 12
    paper, release = config.recipe_defaults("paper"), config.recipe_defaults("release")
    for flag in set(paper) - {"hp_lambda", "keep_lr_scaling", "detect_anomaly"}:
        (trial,) = of(folder, seed=1, recipe="paper", hp_lambda=0, **{flag: release[flag]})
        departing = {name: trial["config"][name] for name in paper if trial["config"][name] != paper[name]}
        assert departing == {flag: release[flag]}
    assert len(of(folder, recipe="release", hp_lambda=0.2)) == 1


def test_recipes_are_of_any_method_and_either_way(capsys):
    def settings(*flags):
        assert call("recipes", "--seeds", "1", "--backbone", "squeezenet1_0", *flags, "--dry_run") == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line.partition(";")[0]: set(line.partition(": ")[2].split()) for line in lines}

    around = settings("--around", "release", "--only", "codebook_init", "ties")
    assert set(around) == {"paper", "release", "release, codebook_init=sphere", "release, ties=expected"}
    assert around["release"] - around["release, codebook_init=sphere"] == {"codebook_init=xavier"}
    assert around["release"] - around["release, ties=expected"] == {"ties=database"}
    bits = settings("--method", "CIBHash", "--bits", "32")
    assert set(bits) == {"paper", "release", *(f"paper, {x}" for x in (
        "ties=database", "sampling=sign", "alphabet=pm", "detach_kl=True"))}  # fmt: skip
    assert bits["release"] - bits["paper"] == {
        "recipe=release", "ties=database", "sampling=sign", "alphabet=pm", "detach_kl=True"
    }  # fmt: skip
    head = settings("--method", "SPQ", "--head_only", "--augmentation", "MeCoQ", "--no-freeze_bn")
    assert {name.rpartition(" ")[2].partition("=")[0] for name in head} == {
        "paper", "release", "ties", "schedule", "head_init", "pairs", "anchors"
    }  # fmt: skip
    assert "--only lr" in refused(capsys, "recipes", "--only", "lr")
    assert "--recipe" in refused(capsys, "recipes", "--recipe", "release")


# ---------------------------------------------------------------- figures


def test_figures_have_their_curves_and_pictures(place):
    given, folder = place
    for script in ("figure2", "figure3", "figure4"):
        assert call(script, *given) == 0
        with Image.open(folder / "results" / f"{script}.png") as image:
            image.load()
            assert image.width > 600
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    figure2 = pd.read_csv(folder / "results" / "figure2.csv")
    assert len(figure2) == 2 * 2 * 2
    for name in ("vanilla_loss", "omega", "lr", "used", "map"):
        assert figure2[name].notna().all()
    without = figure2[figure2["method"] == "without"]
    trials = [t for t in of(folder, callback=True, seed=1, hp_gamma=0.0, lr=0.01) if "vanilla_loss" in t["rows"][0]]
    omega = [epoch["loss/codeword_reg_loss"] for epoch in trials[0]["history"]]
    np.testing.assert_allclose(without[without["seed"] == 1]["omega"], omega, atol=1e-4)
    assert {"embedding_1", "soft_1", "hard_1", "soft_error", "hard_error"} <= set(
        pd.read_csv(folder / "results" / "figure3.csv")
    )
    figure4 = pd.read_csv(folder / "results" / "figure4.csv")
    assert set(figure4["flag"]) == {"pos_prior", "queue_size"}
    assert len(figure4) == 2 * 12


# ---------------------------------------------------------------- flags


def test_flags_are_the_published_scripts_then_the_users():
    configured = flags.configured("CIFAR10-II", 64, 7, ["--trainable_layer_num", "0", "--T", "0.2"], hp_gamma=0.0)
    expected = {
        "dataset": "CIFAR10", "protocol": "II", "M": 8, "feat_dim": 96, "hp_beta": 0.01, "pos_prior": 0.1, "T": 0.2,
        "seed": 7, "queue_begin_epoch": 15, "trainable_layer_num": 0, "hp_lambda": 0.0, "hp_gamma": 0.0, "topK": 1000,
    }  # fmt: skip
    assert {flag: getattr(configured, flag) for flag in expected} == expected
    assert flags.configured("CIFAR10-II", 64, 7, ["--recipe", "release"]).hp_lambda == 0.05
    for given in (["--hp_lambda", "0.3"], ["--hp_lambda=0.3"]):
        assert flags.configured("CIFAR10-II", 64, 7, given).hp_lambda == 0.3
    told = flags.departures("CIFAR10-II", 64, ["--trainable_layer_num", "0", "--T", "0.35", "--num_workers", "3"])
    assert told == "trainable_layer_num=0"  # the script's T, and what makes no difference, are not told
    assert flags.configured("NUSWIDE", 16, 7, [], memory="none").queue_begin_epoch == -1


@pytest.mark.parametrize(
    ("given", "words"),
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
        (["--results", "/dev/null/x"], "cannot write to"),
        (["--trials", "/dev/null/x"], "cannot write to"),
    ],
)
def test_wrong_flags_end_in_one_line(given, words, place, capsys):
    for script in ("table1", "table2", "figure2"):
        assert words in refused(capsys, script, *place[0], *given)


HEAVY = ("torch", "pandas", "matplotlib", "sklearn", "faiss", "cv2", "scipy")
DRY = [
    *((f"experiments.{name}", ["--device", "cuda:7", "--data_root", "nowhere"]) for name in EXPERIMENTS),
    ("experiments.report", ["nothing", "--device", "cuda:7"]),
    ("experiments.compare_published", ["--output", "nowhere", "--logs", "no.log", "--tables", "no.csv"]),
    ("experiments.check_gpu", ["--device", "cuda:7", "--data_root", "nowhere"]),
    ("scripts.benchmark", ["run", "--device", "cuda:7", "--data_root", "nowhere"]),
    ("scripts.inspect_checkpoint", ["nowhere"]),
]  # fmt: skip


@pytest.mark.parametrize("last", ["--dry_run", *["--help"] * HOSTILE, "--wrong_flag"])
@pytest.mark.parametrize(("module", "given"), DRY, ids=[module for module, _ in DRY])
def test_questions_are_answered_at_once(module, given, last, tmp_path):
    """By an interpreter of its own: without the libraries that take long to import, and without touching anything."""
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'x'\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"finally: print('HEAVY', [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program, *given, last], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert time.perf_counter() - start < 5  # 0.3 s on an idle machine
    assert result.returncode == (2 if last == "--wrong_flag" else 0), result.stderr
    *errors, heavy = result.stderr.splitlines()
    assert heavy == "HEAVY []"
    assert len(errors) == (1 if last == "--wrong_flag" else 0)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_would_be_trained(capsys):
    assert call("table2", "--bits", "16", "--seeds", "1", "2", "--T", "0.2", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("14 trials, 14 of them different")
    assert lines[1].startswith("MeCoQ (full); CIFAR10-II, 16, 1: ")
    assert all(" T=0.2" in line for line in lines[1:])
    assert call("figure4", "--seeds", "1", "--bits", "32", "--dry_run") == 0
    assert capsys.readouterr().out.startswith("12 trials, 11 of them different")  # both curves have the script's own
    assert call("table1", "--seeds", "1", "--bits", "32", "--dry_run") == 0
    assert "and 7 baselines: LSH, " in capsys.readouterr().out


def test_published_numbers_are_found():
    assert published.map_of("paper_table1_map", "ITQ+VGG", "CIFAR10-II", 32) == 32.5
    assert published.map_of("paper_table2_ablation_map", "w/o code memory", "NUSWIDE", 64) == 81.43
    assert published.map_of("paper_table1_map", "UTH", "Flickr25K", 16) is None
    assert published.map_of("paper_table1_map", "no such", "Flickr25K", 16) is None
    assert load("table3").published_map("batch 256, memory 0", "CIFAR10-I", 32) == 68.66
