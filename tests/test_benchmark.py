"""The plain version computes the same as the project does, and every benchmark runs and writes what it found."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HOSTILE, SMALL, call, config_of, method_of, refused, splits_of, written_below
from torch.utils.flop_counter import FlopCounterMode

import engine
import evaluation
import retrieval
from experiments import frozen, naive
from feature_cache import Computed
from optimizer import build_optimizer

FP32 = ["--precision", "fp32"]
FROZEN = ["--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32"]


@pytest.mark.parametrize("topK", [7, 120])
@pytest.mark.parametrize("multi_label", [False, True])
def test_plain_metrics_are_ours(multi_label, topK):
    """No two codes are equal here, so that no ties are left to chance."""
    codewords = F.normalize(torch.randn(4, 32, 3), dim=-1)
    queries, codes = torch.randn(9, 12), torch.randint(32, (120, 4)).to(torch.uint8)
    assert len(codes.unique(dim=0)) == 120
    if multi_label:
        labels = [(torch.rand(n, 5) < 0.3).to(torch.uint8) for n in (9, 120)]
    else:
        labels = [torch.randint(4, (n,)) for n in (9, 120)]
    tables = partial(retrieval.lookup_tables, codewords=codewords)
    ours = retrieval.evaluate(tables, queries, codes, labels, topK)
    database = {"codewords": codewords, "db_codes": codes, "db_labels": labels[1]}
    value, pr, p_at_k = naive.evaluate(queries, labels[0], topK, **database)
    assert value == pytest.approx(ours.map, abs=1e-6)
    np.testing.assert_allclose(pr, ours.pr, atol=1e-6)
    np.testing.assert_allclose(p_at_k, ours.p_at_k[1], atol=1e-6)


def test_a_plain_step_has_our_loss_and_moves_the_weights_as_ours():
    config = config_of(*FP32, *FROZEN)  # no batch statistics, which views would have each for themselves
    views = torch.rand(12, 3, 32, 32)
    ours, theirs = method_of(config), method_of(config)
    for method in (ours, theirs):
        method.memory.enqueue(torch.rand(20, 2, 8, generator=torch.Generator().manual_seed(0)).softmax(-1))
    terms = ours.loss(views, epoch=1)
    optimizers = [build_optimizer(method, config) for method in (ours, theirs)]
    terms["loss/total_loss"].backward()
    optimizers[0].step()
    pairs = torch.stack(views.chunk(2), dim=1)
    value = naive.step(theirs, naive.strip(theirs.backbone), pairs, optimizers[1], True)
    assert value == pytest.approx(float(terms["loss/total_loss"].detach()), abs=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert int(theirs.memory.written.sum()) == 32


def test_plain_embeddings_are_ours():
    config = config_of(*FP32, "--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "48")
    method, images, how = method_of(config), splits_of("Digits", seed=1, limit=20).query, engine.preprocessing(config)
    ours = evaluation.encode_queries(method, Computed(method.backbone, images, how))
    theirs = naive.encode(method, naive.strip(method.backbone), images, how, config.batch_size)
    assert (theirs - ours).std() < 0.02 * (ours - ours.mean(dim=0)).std()  # half precision; a level here and there


FLAGS = [*SMALL, "--repeats", "2"]
FEW = ["--queries", "30", "--database", "500", "--plain_queries", "5"]


slow = pytest.mark.skipif(not HOSTILE, reason="two processes: bash scripts/test.sh --hostile")


@pytest.mark.parametrize(
    ("what", "flags", "rows"),
    [
        ("decode", ["--photos", "3"], ["1/1 of its size, OpenCV", "1/2 of its size", "1/4 of its", "1/8 of its"]),
        ("views", [], ["views at 16 px"]),
        pytest.param("frozen", [*FROZEN, "--int8_views"], ["frozen blocks at 32 px", "8-bit integers"], marks=slow),
        ("encode", FROZEN, ["computed", "cached"]),
        ("step", [], ["10 steps"]),
        ("evaluate", FEW, ["MAP, PR", "MAP alone", "expected and in database order"]),
        ("evaluate", [*FEW, "--labels", "3"], ["MAP, PR", "MAP alone", "expected and in database order"]),
        ("run", ["--plain_epochs", "1"], ["run of 2 epochs, 2 validations"]),
    ],
)  # fmt: skip
def test_benchmarks_run(what, flags, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("benchmark", what, *FLAGS, *flags, "--results", tmp_path / "results") == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "results" / f"benchmark_{what}.json").read_text())
    tables = ["results/benchmark_frozen.md"] * (what == "frozen")
    assert written_below(tmp_path) == [f"results/benchmark_{what}.json", *tables]
    assert len(found["rows"]) == len(rows)
    for name, row in zip(rows, found["rows"], strict=True):
        assert name in row["what"]
        assert row["what"] in output
        assert row["ratio"] == pytest.approx(row["ours_per_second"] / row["plain_per_second"])
        assert row["repeats"] == (1 if what == "run" else 2)
    if what == "run":
        (row,) = found["rows"]
        once = row["plain_phases_once"]
        assert row["plain_seconds"] == pytest.approx(2 * once["train"] + 2 * once["validate"] + once["test"])
        assert 0 < row["map"] <= 1


def test_the_layer_table_counts_all_operations():
    config = config_of(*FROZEN)
    backbone = method_of(config).backbone.eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        frozen.as_they_are(backbone, torch.zeros(32, 3, 32, 32))
    table = frozen.layers(backbone, config, 1, peak=1e9)
    assert sum(layer["flops"] for layer in table) == counter.get_total_flops()
    kinds = [layer["kind"] for layer in table]
    assert kinds.count("convolution 3x3 and ReLU") == kinds.count("cat") == backbone.cut - 1
    assert kinds.count("Pooling") == 3
    first = table[0]
    assert first["bytes"] == 2 * (32 * 3 * 32 * 32 * 2 + 32 * 96 * 13 * 13 + 96 * 3 * 7 * 7)  # float32 comes in
    assert first["share_of_matmul_peak"] == pytest.approx(first["flops"] / first["seconds"] / 1e9)
    assert frozen.markdown({"layers": table}).count("\n") == len(table) + 2


def test_benchmarks_are_of_mecoq(capsys):
    assert "--method CIBHash: the plain side" in refused(capsys, "benchmark", "evaluate", "--method", "CIBHash")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "invalid choice"),
        (["views", "--repeats", "0"], "--repeats 0"),
        (["decode", "--photos", "0"], "--photos 0"),
        (["evaluate", "--plain_queries", "-1"], "--plain_queries -1"),
        (["evaluate", "--queries", "1000000000000"], "--queries 1000000000000"),
        (["evaluate", "--labels", "-1"], "--labels -1"),
        (["step", "--nonsense"], "--nonsense"),
        (["run", "--recipe", "release"], "no place here"),
        (["views", "--device", "cuda:77"], "--device cuda:77"),
        (["views", "--results", "/dev/null/x"], "cannot write to"),
        (["step", "--data_root", "nowhere", "--dataset", "CIFAR10"], "nowhere"),
    ],
)
def test_benchmarks_refuse_what_they_cannot_time(arguments, words, capsys, tmp_path):
    results = [] if "--results" in arguments else ["--results", tmp_path]
    what, *flags = arguments
    assert words in refused(capsys, "benchmark", what, *SMALL, *results, *flags)
