import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import InputError, Patience, atomic_write, check_writable, learning_rate, logging_to, sample_seed


def test_golden_learning_rate(golden):
    schedule = golden("lr_schedule")
    c = json.loads(str(schedule["config"]))
    ours = [
        learning_rate(
            step, c["batch_num_per_epoch"], c["epoch_num"], c["warmup_epoch_num"],
            c["start_lr"], c["base_lr"], c["final_lr"],
        )
        for step in range(len(schedule["lr"]))
    ]  # fmt: skip
    np.testing.assert_allclose(ours, schedule["lr"], rtol=1e-12)


@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 3))
def test_learning_rate_rises_to_base_then_falls_towards_final(steps, epochs, warmup):
    rates = [learning_rate(s, steps, epochs, warmup, 1e-5, 0.01, 1e-4) for s in range(steps * epochs)]
    assert all(math.isfinite(rate) and 1e-5 <= rate <= 0.01 for rate in rates)
    peak = warmup * steps
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_patience_counts_values_that_are_not_better():
    patience = Patience(2)
    assert [patience.improved(v) for v in (0.1, 0.1, 0.2, 0.2)] == [True, False, True, False]
    assert not patience.exhausted
    assert not patience.improved(0.15)
    assert patience.exhausted
    assert patience.best == 0.2


def test_patience_matches_a_published_run():
    """A public log ends 10 evaluations after its best: 45 epochs, best at epoch 34."""
    patience = Patience(10)
    values = [0.5 + 0.001 * min(epoch, 34) for epoch in range(50)]
    epochs_run = 0
    while not patience.exhausted:
        patience.improved(values[epochs_run])
        epochs_run += 1
    assert epochs_run == 45


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as file:
        file.write("new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_check_writable_names_the_folder(tmp_path):
    (tmp_path / "a-file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*a-file"):
        check_writable(tmp_path / "a-file" / "below")
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_log_lines_are_appended_and_shown(tmp_path, capsys):
    for text in ("first", "second"):
        with logging_to(tmp_path / "a.log"):
            logging.getLogger("mecoq").info(text)
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line.split(" - ")[1] for line in lines] == ["first", "second"]
    assert capsys.readouterr().out.splitlines() == lines


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_sample_seed_is_a_valid_seed_and_tells_neighbours_apart(parts):
    seed = sample_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == sample_seed(*parts)
    assert seed != sample_seed(*parts[:-1], parts[-1] + 1)
