"""What callbacks record of a model while it learns, against float64 loops; and that they change nothing."""

import numpy as np
import pytest
import torch
from helpers import FROZEN, config_of, method_of, splits_of

import engine
from experiments import callbacks, sweep
from methods.mecoq import CodebookAttention, Codebooks, used_codewords


def nearest(codewords, segment):
    return codewords[np.argmax(codewords @ segment)]


def test_codewords_in_use_are_counted():
    codes = torch.tensor([[0, 1], [0, 1], [2, 1], [3, 1]])
    used, perplexity = used_codewords(codes, 4)
    assert used == pytest.approx((3 / 4 + 1 / 4) / 2)
    entropies = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)), 0.0
    assert perplexity == pytest.approx(np.mean([np.exp(e) / 4 for e in entropies]))
    assert used_codewords(torch.arange(4)[:, None], 4) == (1.0, pytest.approx(1.0))


def test_reconstructions_and_distances():
    quantizer = CodebookAttention(Codebooks(2, 5, 6, 10.0))
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


class Both:
    """Both callbacks in one, and snapshots of all representations."""

    def __init__(self, images, configuration):
        self.images, self.rows, self.snapshots = images(1000), [], []
        kinds = ("CodebookUse", "FeatureDrift")
        self.parts = [callbacks.CALLBACKS[kind](images, configuration) for kind in kinds]

    def __call__(self, method, epoch, step, views):
        for part in self.parts:
            part(method, epoch, step, views)
        z = method.embed(self.images)
        self.snapshots.append({kind: x.clone() for kind, x in callbacks.quantized(method.quantizer, z).items()})


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """A training with both callbacks, and one without."""
    folder = tmp_path_factory.mktemp("callbacks")
    configuration = config_of(*FROZEN, "--weights", weights)
    shared, made = sweep.Shared(configuration, folder / "views"), []

    def make(images, configuration):
        made.append(Both(images, configuration))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(callbacks.CALLBACKS, "Both", make)
        recorded = sweep.train(configuration, shared, folder, "Both")
    return recorded, sweep.train(configuration, shared, folder), made[0]


def test_callbacks_change_nothing(trained):
    recorded, plain, _ = trained
    assert recorded["history"] == plain["history"]


def test_batch_statistics_and_dropout_are_as_without_callbacks():
    """The callbacks see the method as it encodes, the steps between them as it learns."""
    config, found = config_of(), []
    loader = engine.build_loader(config, splits_of("Digits", limit=40))
    for called in (False, True):
        seen = []
        call = [lambda method, *_, seen=seen: seen.append((method.training, torch.is_grad_enabled()))] if called else []
        method = method_of(config)
        training = engine.start(config, method, loader, callbacks=call)
        means = engine.train_epoch(training, loader)
        assert seen == [(False, False)] * len(loader) * called
        found.append((means, {name: x.clone() for name, x in method.state_dict().items()}))
    (plain_means, plain), (means, state) = found
    assert means == plain_means
    assert all(torch.equal(x, plain[name]) for name, x in state.items())


def test_an_epoch_has_a_row(trained):
    recorded, _, both = trained
    use, _ = both.parts
    assert [row["epoch"] for row in use.rows] == [0, 1, 2]
    for row, entry in zip(use.rows, recorded["history"], strict=True):
        assert 0 < row["perplexity"] <= row["used"] <= 1
        # with debiasing and a memory the loss is another one
        assert 0 < row["vanilla_loss"] != entry["loss/simclr_loss"]


def test_the_vanilla_loss_is_that_of_a_training_without_debiasing_and_memory(weights, tmp_path):
    flags = [*FROZEN, "--weights", weights, "--mode", "simple", "--queue_begin_epoch", "-1"]
    configuration = config_of(*flags)
    result = sweep.train(configuration, sweep.Shared(configuration, tmp_path / "views"), tmp_path, "CodebookUse")
    for row, entry in zip(result["rows"], result["history"], strict=True):
        assert row["vanilla_loss"] == pytest.approx(entry["loss/simclr_loss"], rel=1e-5)


def test_drift_is_the_distance_between_two_moments(trained):
    """Eq. 11, of snapshots that are all kept."""
    _, _, both = trained
    _, drift = both.parts
    assert [row["step"] for row in drift.rows] == list(range(0, len(both.snapshots), drift.EVERY))
    for row in drift.rows:
        for interval in drift.INTERVALS:
            for kind in ("embedding", "soft", "hard"):
                name = f"{kind}_{interval}"
                if row["step"] < interval:
                    assert name not in row
                    continue
                now, then = (both.snapshots[row["step"] - back][kind].double().numpy() for back in (0, interval))
                assert row[name] == pytest.approx(((now - then) ** 2).sum(axis=2).mean(), rel=1e-4, abs=1e-9)


def test_a_backbone_that_learns_is_left_as_it_is(tmp_path):
    """Its batch statistics would change in training mode."""
    configuration = config_of()
    shared = sweep.Shared(configuration, tmp_path / "views")
    modes = []

    class Recorder:
        rows: tuple = ()

        def __call__(self, method, epoch, step, views):
            modes.append((method.training, torch.is_grad_enabled()))
            method(views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(callbacks.CALLBACKS, "Recorder", lambda images, configuration: Recorder())
        recorded = sweep.train(configuration, shared, tmp_path, "Recorder")
    assert recorded["history"] == sweep.train(configuration, shared, tmp_path)["history"]
    assert modes == [(False, False)] * 2 * 7  # two epochs of seven steps
