"""What is seen of a model while it learns, against float64 loops; and that looking changes nothing."""

import numpy as np
import pytest
import torch
from conftest import FROZEN
from test_engine import SMALL

import main
from experiments import callbacks, sweep
from methods.mecoq import CodebookAttention


def nearest(codewords, segment):
    return codewords[np.argmax(codewords @ segment)]


def test_codewords_in_use_are_counted():
    codes = torch.tensor([[0, 1], [0, 1], [2, 1], [3, 1]])
    used, perplexity = callbacks.used_codewords(codes, 4)
    assert used == pytest.approx((3 / 4 + 1 / 4) / 2)
    entropies = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)), 0.0
    assert perplexity == pytest.approx(np.mean([np.exp(e) / 4 for e in entropies]))
    assert callbacks.used_codewords(torch.arange(4)[:, None], 4) == (1.0, pytest.approx(1.0))


def test_reconstructions_and_distances():
    quantizer = CodebookAttention(2, 5, 6, 10.0)
    z = torch.randn(7, 6)
    made = callbacks.quantized(quantizer, z)
    codewords = torch.nn.functional.normalize(quantizer.codebooks.double(), dim=-1).detach().numpy()
    total = 0.0
    for i in range(7):
        for m in range(2):
            segment = z[i, 3 * m : 3 * m + 3].double().numpy()
            segment /= np.linalg.norm(segment)
            weights = np.exp(10 * codewords[m] @ segment)
            soft = (weights / weights.sum()) @ codewords[m]
            hard = nearest(codewords[m], segment)
            for kind, expected in (("embedding", segment), ("soft", soft), ("hard", hard)):
                np.testing.assert_allclose(made[kind][i, m].detach().numpy(), expected, atol=1e-5)
            total += ((segment - hard) ** 2).sum() / 14
    assert callbacks.distance(made["embedding"], made["hard"]) == pytest.approx(total, rel=1e-5)


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """A training that is looked at by both, and one that is not."""
    folder = tmp_path_factory.mktemp("watch")
    args = main.resolve(main.build_parser().parse_args([*SMALL, *FROZEN, "--weights", weights]))
    del args.resume, args.overwrite
    ground = sweep.Ground(args, folder / "bank")
    snapshots = []

    def both(model, epoch, step, views):
        for look in looks:
            look(model, epoch, step, views)
        z = model.embed(ground.images(1000))
        snapshots.append({kind: x.clone() for kind, x in callbacks.quantized(model.quantizer, z).items()})

    looks = [kind(ground.images(kind.IMAGES), args) for kind in (callbacks.CodebookWatch, callbacks.DriftWatch)]
    watched, plain = (sweep.train(args, ground, folder, look) for look in (both, None))
    return watched, plain, looks, snapshots


def test_looking_changes_nothing(trained):
    watched, plain, _, _ = trained
    assert watched["history"] == plain["history"]


def test_an_epoch_has_a_row(trained):
    watched, _, (codebooks, _), _ = trained
    assert [row["epoch"] for row in codebooks.rows] == [0, 1, 2]
    for row, entry in zip(codebooks.rows, watched["history"], strict=True):
        assert 0 < row["perplexity"] <= row["used"] <= 1
        # with debiasing and a memory the loss is another one
        assert 0 < row["vanilla_loss"] != entry["loss/simclr_loss"]


def test_the_vanilla_loss_is_that_of_a_training_without_debiasing_and_memory(weights, tmp_path):
    flags = [*SMALL, *FROZEN, "--weights", weights, "--mode", "simple", "--queue_begin_epoch", "-1"]
    args = main.resolve(main.build_parser().parse_args(flags))
    del args.resume, args.overwrite
    ground = sweep.Ground(args, tmp_path / "bank")
    look = callbacks.CodebookWatch(ground.images(10), args)
    history = sweep.train(args, ground, tmp_path, look)["history"]
    for row, entry in zip(look.rows, history, strict=True):
        assert row["vanilla_loss"] == pytest.approx(entry["loss/simclr_loss"], rel=1e-5)


def test_drift_is_the_distance_between_two_moments(trained):
    """Eq. 11, of snapshots that are all kept."""
    _, _, (_, drift), snapshots = trained
    assert [row["step"] for row in drift.rows] == list(range(0, len(snapshots), drift.EVERY))
    for row in drift.rows:
        for interval in drift.INTERVALS:
            for kind in ("embedding", "soft", "hard"):
                name = f"{kind}_{interval}"
                if row["step"] < interval:
                    assert name not in row
                    continue
                now, then = (snapshots[row["step"] - back][kind].double().numpy() for back in (0, interval))
                assert row[name] == pytest.approx(((now - then) ** 2).sum(axis=2).mean(), rel=1e-4, abs=1e-9)
