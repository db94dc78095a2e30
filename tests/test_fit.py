"""`python -m search fit`: the flags that it gives to main.py, how it ends, and a whole run."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from helpers import HOSTILE, ROOT, wait_for, write_photos

import config
from search import fit
from search.__main__ import main
from utils import run_script


def resolved(capsys, *argv):
    main(["fit", *argv, "--dry_run"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_flags_of_mecoq(bits, capsys):
    """Those of the README's run, but for what the docstring says."""
    found = resolved(capsys, "PHOTOS", "--bits", str(bits), "--notes", "mine")
    assert (found["dataset"], found["images"], found["notes"]) == ("Folder", "PHOTOS", "mine")
    assert (found["M"], found["K"], found["feat_dim"]) == (bits // 8, 256, 12 * bits // 8)
    assert config.code_bits(found) == bits
    known = {"T": 0.35, "hp_beta": 5e-3, "mode": "debias", "pos_prior": 0.1, "backbone": "squeezenet1_0",
             "image_size": 128, "epoch_num": 15, "memory": "none", "recipe": "paper"}  # fmt: skip
    assert {name: found[name] for name in known} == known


def test_the_users_flags_win(capsys):
    found = resolved(capsys, "PHOTOS", "--backbone", "resnet50", "--T", "0.5", "--epoch_num", "3", "--M", "8")
    assert (found["backbone"], found["T"], found["epoch_num"], found["M"]) == ("resnet50", 0.5, 3, 8)


@pytest.mark.parametrize("method", ["SPQ", "CIBHash"])
def test_other_methods(method, capsys):
    found = resolved(capsys, "PHOTOS", "--method", method, "--bits", "64")
    assert (found["method"], config.code_bits(found)) == (method, 64)
    assert found.get("head_only", True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "PHOTOS"),
        (["--bits", "32", "PHOTOS"], "the folder comes first"),
        (["PHOTOS", "--bits", "12"], "--bits 12: must be a multiple of 8"),
        (["PHOTOS", "--bits", "0"], "--bits 0: must be a multiple of 8"),
        (["PHOTOS", "--bit", "16"], "unrecognized arguments: --bit 16"),
        (["PHOTOS", "--T", "-1"], "--T -1.0"),
        (["PHOTOS", "OTHERS"], "unrecognized arguments: OTHERS"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    assert run_script(lambda: main(["fit", *argv])) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "python -m search fit PHOTOS --notes mine" in capsys.readouterr().out


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.abort()", 134)])
def test_the_exit_code_is_the_programs(program, code):
    assert fit.run(["-c", program]) == code


def test_a_failed_training_ends_it(monkeypatch):
    started = []
    monkeypatch.setattr(fit, "run", lambda command: started.append(command) or 1)
    with pytest.raises(SystemExit) as ended:
        fit.main(["PHOTOS"])
    assert ended.value.code == 1
    assert len(started) == 1
    assert started[0][0] == str(ROOT / "main.py")


def test_a_report_follows(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(fit, "run", lambda command: started.append(command) or 0)
    fit.main(["PHOTOS", "--notes", "mine", "--output", "there"])
    assert started[1] == ["-m", "experiments.report", "mine", "--output", "there"]
    assert "python -m search index PHOTOS --model there/checkpoints/mine -o mine.index" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(number, tmp_path):
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    program = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: open({str(seen)!r}, 'a').write('x'))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(.01)\n"
        "time.sleep(.2); sys.exit(9)"
    )

    def send():
        wait_for(ready.exists)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    before = signal.getsignal(number)
    thread.start()
    assert fit.run(["-c", program]) == 9
    thread.join()
    assert seen.read_text() == "x"
    assert signal.getsignal(number) == before


@pytest.mark.skipif(not HOSTILE, reason="only with MECOQ_HOSTILE")
def test_a_whole_fit(tmp_path, weights):
    photos = tmp_path / "photos"
    write_photos(photos, [f"{i}.jpg" for i in range(30)])
    command = [sys.executable, "-m", "search", "fit", str(photos), "--bits", "16", "--weights", weights, "--image_size",
               "32", "--epoch_num", "1", "--num_workers", "0", "--notes", "mine", "--output", str(tmp_path),
               "--feature_cache", str(tmp_path / "cache")]  # fmt: skip
    for more in ([], ["--resume"]):
        ended = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert {"model.cpt", "config.json", "report.html"} <= {
        path.name for path in (tmp_path / "checkpoints/mine").iterdir()
    }
    assert "nothing to do" in ended.stdout
