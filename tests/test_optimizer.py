"""The optimiser's groups and settings, and the learning rate of each step."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import config_of, method_of
from hypothesis import given
from hypothesis import strategies as st

from optimizer import Schedule, build_optimizer, build_scheduler

ONE_BLOCK = ["--backbone", "squeezenet1_0", "--weights", "random", "--image_size", "32", "--trainable_layer_num", "1"]

# ---------------------------------------------------------------- the schedule


def test_golden_learning_rate(golden):
    numbers = golden("lr_schedule")
    c = json.loads(str(numbers["config"]))
    schedule = Schedule(c["epoch_num"], c["warmup_epoch_num"], c["start_lr"], c["base_lr"], c["final_lr"])
    ours = [schedule.rate(step, c["batch_num_per_epoch"]) for step in range(len(numbers["lr"]))]
    np.testing.assert_allclose(ours, numbers["lr"], rtol=1e-12)


def test_golden_learning_rate_of_spq(golden):
    """195 steps an epoch: it has fallen to 0 in epoch 205 and is back in epoch 400."""
    schedule = Schedule(5000, 10, start=3e-4, base=3e-4, final=0.0, kind="returning")
    ours = [schedule.rate(195 * epoch + step, 195) for epoch in range(1000) for step in (0, 194)]
    np.testing.assert_allclose(ours, np.repeat(golden("spq")["lr/epoch"], 2), rtol=1e-12, atol=1e-18)
    assert ours[2 * 205] == 0
    assert ours[2 * 400] == pytest.approx(3e-4)


def test_a_rate_by_epoch_falls_once_over_the_whole_training():
    schedule = Schedule(50, 10, start=3e-4, base=3e-4, final=0.0, kind="epoch")
    rates = np.array([schedule.rate(step, 4) for step in range(200)]).reshape(50, 4)
    assert (rates == rates[:, :1]).all()
    expected = 1.5e-4 * (1 + np.cos(np.pi * np.maximum(np.arange(50) - 10, 0) / 40))
    np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-12)


def test_a_rate_by_epoch_warms_up_batch_by_batch():
    rates = [Schedule(5, 1, start=0.1, base=1.0, final=0.0, kind="epoch").rate(step, 4) for step in range(8)]
    np.testing.assert_allclose(rates, [0.1, 0.4, 0.7, 1.0, 1.0, 1.0, 1.0, 1.0])


@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 3))
def test_learning_rate_rises_to_base_then_falls_towards_final(steps, epochs, warmup):
    schedule = Schedule(epochs, warmup, start=1e-5, base=0.01, final=1e-4)
    rates = [schedule.rate(step, steps) for step in range(steps * epochs)]
    assert all(math.isfinite(rate) and 1e-5 <= rate <= 0.01 for rate in rates)
    peak = warmup * steps
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_learning_rates_follow_the_schedule_and_keep_their_scale():
    config = config_of(*ONE_BLOCK, "--lr_scaling", "0.01", "--epoch_num", "3")
    optimizer = build_optimizer(method_of(config), config)
    scheduler = build_scheduler(optimizer, config, 4)
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rates = np.array(rates)
    np.testing.assert_allclose(rates[:, 1], rates[:, 0] * 0.01)
    assert rates[0, 0] == pytest.approx(1e-5)
    assert rates[:, 0].max() == rates[3, 0] == pytest.approx(0.05)
    counts = [len(group["params"]) for group in optimizer.param_groups]
    assert counts == [3, 6]  # projection and codebooks; one Fire module


def test_warm_up_and_both_ends_of_the_rate_are_as_asked():
    config = config_of(
        "--lr", "0.2", "--start_lr", "0.004", "--final_lr", "0.01", "--warmup_epoch_num", "2", "--epoch_num", "6"
    )
    optimizer = build_optimizer(method_of(config), config)
    scheduler = build_scheduler(optimizer, config, 5)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates[:10], np.linspace(0.004, 0.2, 10))
    np.testing.assert_allclose(rates[10:], 0.01 + 0.19 * (1 + np.cos(np.pi * np.arange(20) / 20)) / 2)


@pytest.mark.parametrize(
    ("flags", "share"),
    [([], 0.01), (["--recipe", "release"], 1.0), (["--recipe", "release", "--disable_scheduler"], 0.01)],
)
def test_the_released_scheduler_overwrites_the_scaling(flags, share):
    config = config_of(*ONE_BLOCK, "--lr_scaling", "0.01", *flags)
    optimizer = build_optimizer(method_of(config), config)
    scheduler = build_scheduler(optimizer, config, 4)
    for _ in range(6):
        head, backbone = (group["lr"] for group in optimizer.param_groups)
        assert backbone == pytest.approx(head * share)
        optimizer.step()
        scheduler.step()


# ---------------------------------------------------------------- the steps


def steps_taken(*flags):
    """The projection's weights before and after two steps down a gradient of ones, without a scheduler."""
    config = config_of("--disable_scheduler", "--lr", "0.1", *flags)
    method = method_of(config)
    optimizer = build_optimizer(method, config)
    weight = method.projection.weight
    found = [weight.detach().clone()]
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        found.append(weight.detach().clone())
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_sgd_has_the_momentum_and_the_weight_decay_asked_for(momentum, beta):
    start, first, second = steps_taken("--momentum", str(momentum), "--hp_beta", str(beta))
    velocity = 1 + beta * start
    torch.testing.assert_close(first, start - 0.1 * velocity)
    torch.testing.assert_close(second, first - 0.1 * (momentum * velocity + 1 + beta * first))


@pytest.mark.parametrize("beta", [0.0, 30.0])
def test_adam_has_the_weight_decay_asked_for(beta):
    """Its first step is a learning rate down the sign of the gradient, decay included."""
    start, first, second = steps_taken("--optimizer", "Adam", "--hp_beta", str(beta))
    gradients = 1 + beta * start, 1 + beta * first
    if beta:
        assert ((gradients[0] < 0).float().mean() > 0.1).item()  # decay turns the direction of a good part
    torch.testing.assert_close(first, start - 0.1 * gradients[0].sign(), atol=1e-5, rtol=1e-4)
    m = (0.9 * 0.1 * gradients[0] + 0.1 * gradients[1]) / (1 - 0.9**2)
    v = (0.999 * 0.001 * gradients[0] ** 2 + 0.001 * gradients[1] ** 2) / (1 - 0.999**2)
    torch.testing.assert_close(second, first - 0.1 * m / (v.sqrt() + 1e-8), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_decay_is_the_same_for_all_that_learns(optimizer):
    config = config_of(*ONE_BLOCK, "--optimizer", optimizer, "--hp_beta", "0.07")
    groups = build_optimizer(method_of(config), config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.07, 0.07]
    assert config_of().hp_beta == 5e-6
