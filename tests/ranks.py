"""Lets several forked processes share a run of main.py, as torchrun would, without the seconds that imports take.

Reads a line of JSON for each run, {"argv": [...], "processes": W, "double": path or null, "kill": [rank, signal,
seconds] or null, "signal": [rank, point, count, signal] (see forks.py) or null, "later": more flags of all but the
first process, "timeout": seconds}, and answers with another:
{"rc": exit codes, or minus the signals, "out": ..., "err": ..., "seconds": to the end of the last process, from the
signal if there was one}. With "double" nothing is written but, by each process, the losses of its steps, its codes,
weights and memory, all in float64.
"""

import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import forks  # what a run imports is here already
import numpy as np
import torch
import torch.distributed as dist

import distributed
import engine
import evaluation
import feature_cache
import loaders
from config import parse
from methods.batch_norm import synchronize_batch_norm

PATIENCE = 10  # seconds after which a process that outlives another gets the SIGTERM that torchrun sends at once


def train_in_double(argv: list[str], path: Path) -> int:
    """Train by the flags and encode the database in batches of 16 images."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    loaders.TEST_BATCH = feature_cache.TEST_BATCH = 16
    config = parse(argv)
    with distributed.process_group("cpu"):
        splits, method = engine.build(config)
        loader = engine.build_loader(config, splits)
        loader.share_out()
        synchronize_batch_norm(method)
        training = engine.start(config, method, loader)
        losses, note = [], training.note
        training.note = lambda step, scalars: (losses.append(scalars["loss/total_loss"]), note(step, scalars))
        for training.epoch in range(config.epoch_num):
            training.step = 0
            loader.set_epoch(training.epoch)
            engine.train_epoch(training, loader)
        features = engine.build_features(config, method.backbone, splits.tested)
        codes = evaluation.encode_database(method, features["database"])
    arrays = {f"weight {name}": tensor.numpy() for name, tensor in method.state_dict().items()}
    if getattr(method, "memory", None) is not None:
        arrays["memory"] = method.memory.entries().numpy()
    np.savez(f"{path}_{os.environ['RANK']}.npz", losses=losses, codes=codes.numpy(), **arrays)
    return 0


def process(request: dict, rank: int, port: int, folder: Path) -> None:
    count = str(request["processes"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "forked"}
    if request.get("double"):
        forks.main.main = lambda argv: train_in_double(argv, Path(request["double"]))
    victim, *moment = request.get("signal") or [None]
    argv = request["argv"] + request.get("later", []) * (rank > 0)
    forks.child({"argv": argv, "kill": moment if victim == rank else None}, folder)


def run(request: dict) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, pids, codes, killed = Path(name), [], {}, time.monotonic()
        for rank in range(request["processes"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                process(request, rank, port, folder)
        # only now: its threads would not survive a fork
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
        if request.get("kill"):
            victim, number, seconds = request["kill"]
            time.sleep(seconds)
            os.kill(pids[victim], number)
            killed = time.monotonic()
        deadline, ended = time.monotonic() + request.get("timeout", 60), math.inf
        while len(codes) < len(pids):
            for pid in set(pids) - set(codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid] < 0:
                        ended = min(ended, time.monotonic())
                elif time.monotonic() > deadline:
                    os.killpg(pid, signal.SIGKILL)
                elif time.monotonic() > ended + PATIENCE:
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.01)
        texts = {name: (folder / name).read_text() for name in ("out", "err") if (folder / name).exists()}
    del store
    return {"rc": [codes[pid] for pid in pids], "seconds": time.monotonic() - killed} | texts


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
