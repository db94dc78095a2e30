"""The shell scripts: run0001.sh ... run0024.sh hold the published flags, run_all.sh runs them all."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, wait_for

from config import code_bits, parse

# ---------------------------------------------------------------- run0001.sh ... run0024.sh


@pytest.fixture
def stub(tmp_path):
    """An interpreter that writes down its arguments, one per line, and fails if --notes is Flickr32bits."""
    path = tmp_path / "python"
    path.write_text(
        f"#!/bin/bash\n{{ flock 9; printf '%s\\n' \"$@\" --; }} 9>{tmp_path}/lock >>{tmp_path}/calls\n"
        '[[ "$*" != *"Flickr32bits "* ]] || { echo "error: no data" >&2; exit 2; }\n'
    )
    path.chmod(0o755)
    (tmp_path / "calls").touch()

    def run(*command, cwd=ROOT):
        environment = os.environ | {"MECOQ_PYTHON": str(path)}
        result = subprocess.run(
            ["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        calls = [call.split("\n")[1:-1] for call in (tmp_path / "calls").read_text().split("--\n")[:-1]]
        return result, calls

    return run


def run_configs():
    with (ROOT / "tests" / "golden" / "run_configs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", run_configs(), ids=lambda row: row["script"])
def test_scripts_hold_the_published_flags_and_nothing_else(row, stub):
    inside = int(row["M"]) == 4
    script, cwd = (row["script"], ROOT / "scripts") if inside else (f"scripts/{row['script']}", ROOT)
    result, calls = stub(script, "0", cwd=cwd)
    assert result.returncode in (0, 2)  # the stub's
    config = vars(parse(calls[0]))
    assert config["notes"] == row["notes"]
    assert config["symmetric_distance"] == (row["symmetric_distance"] == "1")
    for flag in ("dataset", "mode"):
        assert config[flag] == row[flag]
    if row["protocol"]:
        assert config["protocol"] == row["protocol"]
    for flag in ("trainable_layer_num", "M", "feat_dim", "queue_begin_epoch", "topK"):
        assert config[flag] == int(row[flag])
    for flag in ("T", "hp_beta", "hp_lambda", "pos_prior"):
        assert config[flag] == float(row[flag])
    same = ("notes", "dataset", "protocol", "trainable_layer_num", "M", "feat_dim", "T", "hp_beta", "hp_lambda", "mode",
            "pos_prior", "queue_begin_epoch", "topK", "symmetric_distance", "device", "memory")  # fmt: skip
    defaults = vars(parse([]))
    assert {k: v for k, v in config.items() if k not in same} == {k: v for k, v in defaults.items() if k not in same}
    assert (config["device"], config["memory"]) == ("cuda:0", "soft")


def test_there_is_a_script_for_each_row_and_no_other():
    scripts = sorted((ROOT / "scripts").glob("run[0-9]*.sh"))
    assert [path.name for path in scripts] == [row["script"] for row in run_configs()]
    published, golden = (ROOT / folder / "run_configs.csv" for folder in ("docs/published", "tests/golden"))
    assert published.read_bytes() == golden.read_bytes()


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_scripts_of_spq_and_cibhash(bits, stub):
    _, calls = stub(f"scripts/spq_cifar10_{bits}bits.sh", "0")
    spq = parse(calls[-1])
    assert (spq.method, spq.protocol, spq.M, spq.K, spq.L) == ("SPQ", "official", bits // 4, 16, 16)
    _, calls = stub(f"scripts/cibhash_cifar10_{bits}bits.sh", "1", "--recipe", "release")
    cibhash = parse(calls[-1])
    assert (cibhash.method, cibhash.protocol, cibhash.sampling) == ("CIBHash", "CIBHash", "sign")
    assert (cibhash.epoch_num, cibhash.device) == (80 if bits == 16 else 60, "cuda:1")
    assert code_bits(vars(spq)) == code_bits(vars(cibhash)) == bits


def test_further_flags_are_passed_on_and_win(stub):
    _, calls = stub(
        "scripts/run0015.sh", "3", "--recipe", "release", "--seed", "7", "--notes", "mine", "--hp_lambda", "0"
    )
    config = parse(calls[0])
    assert (config.device, config.recipe, config.seed, config.notes) == ("cuda:3", "release", 7, "mine")
    assert (config.hp_lambda, config.pairing) == (0, "all")
    _, calls = stub("scripts/run0015.sh", "cpu")
    assert parse(calls[1]).device == "cpu"


@pytest.mark.parametrize("arguments", [[], ["cuda"], ["--seed", "7"], ["0a"], [""]])
def test_scripts_say_how_they_are_called(arguments, stub):
    result, calls = stub("scripts/run0001.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith("error: usage: ")
    assert result.stderr.count("\n") == 1


def test_a_script_really_starts_main():
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    command = ["bash", "run0008.sh", "1", "--dry_run"]
    result = subprocess.run(command, cwd=ROOT / "scripts", env=environment, capture_output=True, text=True, check=True)
    config = json.loads(result.stdout)
    assert (config["notes"], config["device"], config["symmetric_distance"]) == ("CifarI16bitsSymm", "cuda:1", True)


# ---------------------------------------------------------------- run_all.sh


def test_run_all_runs_each_script_once_and_reports_failures(stub):
    result, calls = stub("scripts/run_all.sh", "0,2,cpu", "1-5,0009", "--recipe", "release")
    configs = [parse(call) for call in calls]
    rows = run_configs()
    assert sorted(c.notes for c in configs) == sorted(rows[i - 1]["notes"] for i in (1, 2, 3, 4, 5, 9))
    assert all(c.recipe == "release" and c.resume for c in configs)
    assert {c.device for c in configs} <= {"cuda:0", "cuda:2", "cpu"}
    assert result.returncode == 1
    assert "run0003.sh: error: no data" in result.stderr
    assert result.stderr.rstrip().endswith("failed: run0003.sh")
    result, calls = stub("scripts/run_all.sh", "1", "7-8")
    assert result.returncode == 0
    assert [parse(call).device for call in calls[-2:]] == ["cuda:1"] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["0"],
        ["0", "x"],
        ["a", "1"],
        ["0", "1-"],
        ["0", "0"],
        ["0", "23-25"],
        ["0", "5-1"],
        ["0", "1,9-7"],
        ["0", "1", "--help"],
        ["0", "1", "--notes", "x"],
    ],
)
def test_run_all_refuses_what_it_cannot_run(arguments, stub):
    result, calls = stub("scripts/run_all.sh", *arguments)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_run_all_interrupted_ends_its_runs_and_starts_no_other(number, tmp_path):
    """With an interpreter that, like main.py, ends by itself when it is interrupted."""
    python, pids = tmp_path / "python", tmp_path / "pids"
    python.write_text(f"#!/bin/bash\ntrap 'exit 130' INT\necho $$ >>{pids}\nwhile :; do sleep 0.1; done\n")
    python.chmod(0o755)
    pids.touch()
    process = subprocess.Popen(
        ["bash", "scripts/run_all.sh", "0,1", "1-6"], cwd=ROOT, env=os.environ | {"MECOQ_PYTHON": str(python)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored where the tests run in background
    )  # fmt: skip
    try:
        wait_for(lambda: len(pids.read_text().split()) == 2)
        process.send_signal(number)
        assert process.wait(timeout=20) == 130
        time.sleep(0.5)
        started = pids.read_text().split()
        assert len(started) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    finally:
        process.kill()
        for pid in pids.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_run_all_says_what_it_would_run():
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    command = ["bash", "scripts/run_all.sh", "0,1", "3,7-8", "--recipe", "release", "--dry_run"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "would run on 0 1: run0003.sh run0007.sh run0008.sh\n"
    result = subprocess.run([*command, "--lr", "fast"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_the_quick_start_can_be_tried_without_training(tmp_path):
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    command = ["bash", "scripts/quickstart.sh", "--output", str(tmp_path), "--dry_run"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.count('"dataset": "Digits"') == 2
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- check_gpu.sh


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ([], "cuda:0"),
        (["cpu"], "cpu"),
        (["2"], "cuda:2"),
        (["--results", "x"], "cuda:0"),
        (["1", "--results", "x"], "cuda:1"),
    ],
)  # fmt: skip
def test_the_first_argument_of_the_check_is_the_device_if_there_is_one(arguments, device, stub):
    call = stub("scripts/check_gpu.sh", *arguments)[1][-1]
    assert call[:3] == ["experiments.check_gpu", "--device", device]
    assert call[3:] == [argument for argument in arguments if argument in ("--results", "x")]


@pytest.mark.parametrize("argument", ["", "cuda", "0a"])
def test_the_check_says_how_it_is_called(argument, stub):
    result, calls = stub("scripts/check_gpu.sh", argument)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith("error: usage: ")
    assert result.stderr.count("\n") == 1


def test_the_check_names_what_it_cannot_do_without(tmp_path):
    """In an environment in which two packages cannot be found."""
    hidden = "import sys\nsys.modules['tqdm'] = sys.modules['PIL'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    environment = os.environ | {"MECOQ_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = ["bash", "scripts/check_gpu.sh", "cpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: {sys.executable} has no PIL tqdm: pip install -r requirements.txt\n"


# ---------------------------------------------------------------- the environment


@pytest.fixture
def project(tmp_path):
    """A copy of what venv.sh needs, with an interpreter that notes what pip is asked to install."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/venv.sh", "requirements.txt", "requirements-extra.txt", "requirements-test.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n')
    python.chmod(0o755)

    def source(*files):
        environment = {name: value for name, value in os.environ.items() if name != "MECOQ_PYTHON"}
        (tmp_path / "calls").write_text("")
        command = f"set -euo pipefail; source scripts/venv.sh {' '.join(files)}"
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
        return [line for line in (tmp_path / "calls").read_text().splitlines() if "install" in line]

    return tmp_path, source


def test_requirements_are_installed_once_and_when_they_change(project):
    folder, source = project
    assert len(source("requirements.txt")) == 1
    assert source("requirements.txt") == []
    (installed,) = source("requirements-test.txt")
    assert installed.endswith("--requirement=requirements-test.txt")
    assert source("requirements.txt") == source("requirements-test.txt") == []
    with (folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert len(source("requirements.txt")) == len(source("requirements-test.txt")) == 1


def test_run_all_tells_of_scripts_that_never_ran(tmp_path):
    """A worker that is killed leaves its queue undone."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nkill -9 -- -$(ps -o pgid= -p $$ | tr -d ' ')\n")  # the worker's whole group
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", "scripts/run_all.sh", "0", "1-3"], cwd=ROOT, env=os.environ | {"MECOQ_PYTHON": str(python)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "failed: run0001.sh run0002.sh run0003.sh"
