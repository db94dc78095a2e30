"""Runs main.py's `main` in one forked process after the other: a run each, without the seconds that imports take.

Reads a line of JSON for each run, {"argv": [...], "kill": [point, count, signal] or null, "timeout": seconds}, and
answers with another: {"rc": exit code or minus the signal, "out": ..., "err": ..., "points": how often it came to each
point}. Without a signal in "kill" it is SIGKILL.
"""

import itertools
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sklearn.datasets  # noqa: F401, what runs import late is here already
import torch
import torch.utils.tensorboard

import checkpoint
import engine  # noqa: F401
import main
import results
import retrieval
from methods.mecoq import MeCoQ

# a run comes to a point before it calls the function
POINTS = {
    "step": (MeCoQ, "loss"),
    "log": (logging.Logger, "info"),
    "event": (results.Events, "add_scalar"),
    "sync": (os, "fsync"),  # of a temporary file
    "rename": (Path, "replace"),  # onto its final name
    "rank": (retrieval, "ranking"),
    "save": (checkpoint.Training, "save"),
}


def count_points(kill: list | None, path: Path) -> None:
    """Count calls of the functions in `POINTS`, into a file; at the one that `kill` names, end without warning, or send
    the signal that it names too."""
    counts = dict.fromkeys(POINTS, 0)

    def counting(name: str, original):
        def function(*arguments, **named):
            counts[name] += 1
            if kill and kill[:2] == [name, counts[name]]:
                os.kill(os.getpid(), *(kill[2:] or [signal.SIGKILL]))
            path.write_text(json.dumps(counts))
            return original(*arguments, **named)

        return function

    for name, (owner, function) in POINTS.items():
        setattr(owner, function, counting(name, getattr(owner, function)))


def child(request: dict, folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setsid()  # its workers die with it
    count_points(request.get("kill"), folder / "points")
    checkpoint.SHARE = math.inf  # runs are so short that few epochs would be saved
    code = 99
    try:
        code = main.main(request["argv"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request: dict) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()
        if pid == 0:
            child(request, folder)
        deadline = time.monotonic() + request.get("timeout", 60)
        for pause in itertools.repeat(0.01):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return {"rc": None, "out": "", "err": "it hangs", "points": {}}
            time.sleep(pause)
        text = {name: (folder / name).read_text(errors="replace") for name in ("out", "err")}
        points = folder / "points"
        counts = json.loads(points.read_text() or "{}") if points.exists() else {}
        return {"rc": os.waitstatus_to_exitcode(status), **text, "points": counts}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
