"""--test_only: a trained model with the codes beside it or without, of this version or an older one."""

import json
import shutil
import tokenize

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIVELY, SMALL, config_of, method_of, small_run

import evaluation
import main

# ---------------------------------------------------------------- what is encoded, what is taken


def test_only_gives_the_map_of_the_run_with_its_codes_or_without(finished, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "small"
    shutil.copytree(finished / "checkpoints" / "small", folder)
    expected = json.loads((folder / "metrics.json").read_text())
    flags = (*LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt"))
    encoded = small_run(tmp_path, *flags, notes="encoded")  # --limit: the database is encoded
    metrics = json.loads((encoded / "metrics.json").read_text())
    assert metrics["map"] == expected["map"]
    assert metrics["epochs_run"] == 0
    assert (encoded / "db_codes.npy").read_bytes() == (folder / "db_codes.npy").read_bytes()
    np.testing.assert_array_equal(np.loadtxt(encoded / "PR_curve.txt"), np.loadtxt(folder / "PR_curve.txt"))
    assert not (encoded / "model.cpt").exists()
    assert main.main([*SMALL, *flags, "--output", str(tmp_path), "--notes", "small"]) == 2
    assert "holds a trained model" in capsys.readouterr().err
    assert main.main([*SMALL, *LIVELY, "--M", "4", *flags[-3:], "--output", str(tmp_path)]) == 2
    assert "give --M 2 --K 64 --feat_dim 8" in capsys.readouterr().err
    assert main.main([*SMALL, *flags, "--backbone", "resnet18", "--image_size", "32", "--output", str(tmp_path)]) == 2
    assert "does not fit this --backbone" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole_digits(tmp_path_factory):
    """A finished run over all digits: codes beside a checkpoint are taken for a whole database only."""
    return small_run(tmp_path_factory.mktemp("whole"), *LIVELY, "--limit", "99999", "--epoch_num", "1")


def only_test(whole_digits, tmp_path, change):
    """The exit code of a test of that run, after a change to its folder, and the folder of the test's results."""
    folder = tmp_path / "trained"
    shutil.copytree(whole_digits, folder)
    change(folder)
    flags = [flag for flag in SMALL if flag not in ("--limit", "100")]
    flags += [*LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt"), "--output", str(tmp_path)]
    return main.main(flags), tmp_path / "checkpoints" / "trained-test"


def test_codes_beside_a_checkpoint_are_taken(whole_digits, tmp_path, monkeypatch):
    encoded = []
    original = evaluation.encode
    monkeypatch.setattr(evaluation, "encode", lambda m, batches, *a: encoded.append(len(batches.images)) or
                        original(m, batches, *a))  # fmt: skip

    def otherwise_written(folder):
        np.save(folder / "db_codes.npy", np.load(folder / "db_codes.npy").astype(np.int64))
        np.save(folder / "db_targets.npy", np.eye(10)[np.load(folder / "db_targets.npy")])

    code, results = only_test(whole_digits, tmp_path, otherwise_written)
    assert code == 0
    assert encoded == [64, 300]  # the probe and the queries, not the 1,497
    expected = json.loads((whole_digits / "metrics.json").read_text())
    assert json.loads((results / "metrics.json").read_text())["map"] == expected["map"]
    assert np.load(results / "db_codes.npy").dtype == np.uint8


# ---------------------------------------------------------------- what does not fit


def claims_too_much(folder):
    """A .npy file whose head speaks of 2e14 rows."""
    with (folder / "db_codes.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2 * 10**14, 2)})


def headed(header):
    """A .npy file whose header is damaged, its content whole."""

    def change(folder):
        padded = header + b" " * (-(len(header) + 11) % 64) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(1497 * 2)
        (folder / "db_codes.npy").write_bytes(content)

    return change


UNCLOSED = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1497, 2, }"
UNINDENTED = b"{'descr': 1}\n  1\n 2"


def saved(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def stored(change):
    """A checkpoint whose state dict was changed."""

    def in_folder(folder):
        state = torch.load(folder / "model.cpt", weights_only=True)
        change(state)
        torch.save(state, folder / "model.cpt")

    return in_folder


def zero_codebooks(state):
    state["quantizer.codebooks"].zero_()


def bytes_for_weights(state):
    state["projection.weight"] = (state["projection.weight"] * 100).to(torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (saved("db_codes.npy", lambda codes: codes[:-1]), "not a code of 2 numbers for each of 1497 images"),
        (saved("db_codes.npy", lambda codes: codes[:, :1]), "not a code of 2 numbers"),
        (saved("db_codes.npy", lambda codes: codes.astype(float)), "holds float64"),
        (saved("db_codes.npy", lambda codes: codes + 64), "codewords are 0 to 63"),
        (saved("db_codes.npy", lambda codes: 63 - codes), "of the codes of 64 images are the checkpoint's"),
        (saved("db_targets.npy", lambda labels: labels[::-1]), "other labels than those of this data set"),
        (lambda folder: (folder / "db_codes.npy").write_bytes(b"no array"), "db_codes.npy is not a readable .npy"),
        (lambda folder: (folder / "db_codes.npy").write_bytes(b"PK\3\4 no zip"), "db_codes.npy is not a readable .npy"),
        (headed(UNCLOSED), "db_codes.npy is not a readable .npy"),
        (headed(UNINDENTED), "db_codes.npy is not a readable .npy"),
        (headed(b"{'descr': '|u1' \0"), "db_codes.npy is not a readable .npy"),
        (claims_too_much, "is not a readable .npy"),
        (lambda folder: torch.save({0: torch.ones(1)}, folder / "model.cpt"), "is not a state dict"),
        (lambda folder: (folder / "model.cpt").write_bytes(b"no model"), "model.cpt is not a readable PyTorch state"),
        (lambda folder: (folder / "model.cpt").unlink(), "model.cpt does not exist"),
        (lambda folder: torch.save({"w": torch.ones(1)}, folder / "model.cpt"), "there are no codebooks"),
        (stored(zero_codebooks), "model.cpt: a codeword is zero: it has no direction"),
        (stored(bytes_for_weights), "projection.weight does not hold plain finite numbers"),
    ],
)
def test_codes_and_checkpoints_that_do_not_fit_are_refused(change, words, whole_digits, tmp_path, capsys):
    code, results = only_test(whole_digits, tmp_path, change)
    assert code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (results / "metrics.json").exists()


@pytest.mark.parametrize(("header", "kind"), [(UNCLOSED, tokenize.TokenError), (UNINDENTED, SyntaxError)])
def test_damaged_headers_raise_what_numpy_does_not_promise(header, kind, tmp_path):
    """Otherwise the two tests of them above would prove nothing."""
    headed(header)(tmp_path)
    with pytest.raises(kind):
        np.load(tmp_path / "db_codes.npy")


def test_codes_of_another_model_are_refused_even_if_they_are_alike(whole_digits, tmp_path, capsys):
    """The model changes by a hair, as from one epoch to the next: nearly all its codes stay."""

    def a_hair(state):
        state["projection.weight"] *= 1.0001

    code, _ = only_test(whole_digits, tmp_path, stored(a_hair))
    assert code == 2
    assert "db_codes.npy was made with another model" in capsys.readouterr().err


def test_codes_without_a_history_are_probed_beyond_chance(whole_digits, tmp_path, capsys):
    """Codes that nearly all agree because nearly all are equal prove nothing."""

    def collapsed(folder):
        (folder / "metrics.json").unlink()
        state = torch.load(folder / "model.cpt", weights_only=True)
        state["projection.weight"] *= 0
        state["projection.bias"][:] = 1
        torch.save(state, folder / "model.cpt")
        codes = np.load(folder / "db_codes.npy")
        words = F.normalize(state["quantizer.codebooks"], dim=-1)
        codes[:] = (words.sum(dim=-1)).argmax(dim=1).numpy()
        codes[::30] += 1  # a few are wrong
        np.save(folder / "db_codes.npy", codes % 64)

    code, _ = only_test(whole_digits, tmp_path, collapsed)
    assert code == 2
    assert "are the checkpoint's" in capsys.readouterr().err


# ---------------------------------------------------------------- older runs

# the state dict of a run with --backbone convnet --M 2 --K 64 --feat_dim 8, as it was before there was a registry of
# methods; of a batch norm, the first four entries have a number per channel
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
OLDER = {"projection.weight": (8, 512), "projection.bias": (8,), "quantizer.codebooks": (2, 64, 4)}
for block, (inputs, outputs) in enumerate(((3, 32), (32, 64), (64, 128))):
    for layer, width in ((0, inputs), (3, outputs)):
        OLDER[f"backbone.net.{block}.{layer}.weight"] = (outputs, width, 3, 3)
        OLDER |= {f"backbone.net.{block}.{layer + 1}.{name}": (outputs,) for name in NORM[:4]}
        OLDER[f"backbone.net.{block}.{layer + 1}.{NORM[4]}"] = ()


def test_a_model_of_an_older_run_is_tested(finished, tmp_path):
    """Its configuration and its metrics do not name a method, and hold a flag that is gone."""
    folder = tmp_path / "older"
    shutil.copytree(finished / "checkpoints" / "small", folder)
    state = torch.load(folder / "model.cpt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == OLDER
    torch.save(dict(state), folder / "model.cpt")
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    for older in (config, metrics["config"]):
        del older["method"]
        older["dry_run"] = False
    del metrics["method"], metrics["model_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    flags = [*LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt")]
    again = json.loads((small_run(tmp_path, *flags, notes="again") / "metrics.json").read_text())
    assert again["map"] == metrics["map"]
    assert again["method"] == "MeCoQ"


def test_state_dicts_have_the_names_they_have_always_had():
    state = method_of(config_of("--K", "64")).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == OLDER
