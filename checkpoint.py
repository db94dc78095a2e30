"""Where was a run stopped? The signals that stop it, and the state from which it goes on as if nothing had been."""

import hashlib
import json
import math
import re
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # keeps values as they are
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import Tensor

import data
from methods.mecoq import Backbone, MeCoQ
from readers import ImageFiles
from results import NEUTRAL, Files, other_flags, write_tensors
from utils import LOG, InputError, Patience, Stopped, load_tensors

SHARE = 0.02  # of a run's time, that saves at the end of epochs may take
FORMAT = 1  # to be raised with every change of what `last.cpt` holds

# flags that may differ when a run goes on; `fingerprint` tells whether what they name is the same
MOVABLE = NEUTRAL | {"weights"}


# ---------------------------------------------------------------- signals


class Signals:
    """SIGTERM and SIGINT end a run by `Stopped`: at once, or, while they are deferred, where `check` is called. SIGUSR1
    asks for the state to be saved.

    `pending` is the number of the signal that waits, `save` whether SIGUSR1 came. A second signal does not wait.
    """

    def __init__(self) -> None:
        self.deferring = self.save = False
        self.pending: int | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, _: FrameType | None = None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.deferring and self.pending is None:
            self.pending = number
        else:
            raise Stopped(number)

    @contextmanager
    def deferred(self, deferring: bool = True) -> Iterator[None]:
        """Signals wait until the next `check` (or, with False, within `deferred`, do not)."""
        before, self.deferring = self.deferring, deferring
        try:
            self._stop_unless_deferring()
            yield
        finally:
            self.deferring = before
        self._stop_unless_deferring()

    def _stop_unless_deferring(self) -> None:
        if self.pending is not None and not self.deferring:
            raise Stopped(self.pending)

    @property
    def waiting(self) -> bool:
        return self.save or self.pending is not None

    def check(self) -> None:
        """Once the state is saved. Raises Stopped where a signal waits for it."""
        if self.save:
            LOG.info("state saved, as SIGUSR1 asks")
        self.save = False
        if self.pending is not None:
            raise Stopped(self.pending)


# ---------------------------------------------------------------- the state


class Training:
    """All that changes while a model is trained.

    `epoch` is the one that is being trained, `step` counts those of it that are done, `sums` adds up their losses by
    tag; `history` holds what is known of the epochs before.

    `events` is TensorBoard's writer, if there is one.

    Args:
        path: `last.cpt`, which `save` writes; None: it saves nothing.
        fingerprint: see the function of that name, of what was trained on.
    """

    def __init__(
        self,
        model: MeCoQ,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        args: Namespace,
        path: Path | None,
        fingerprint: str,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.args = model, optimizer, scheduler, args
        self.path, self.fingerprint, self.events = path, fingerprint, None
        self.patience = Patience(args.monitor_counter)
        self.epoch = self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict] = []
        self.seconds: dict[str, float] = {}
        self.saved_best = -math.inf  # MAP of the model in `model.cpt`
        self.began, self.saving = time.perf_counter(), 0.0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.args.epoch_num or self.patience.exhausted

    @property
    def best_is_now(self) -> bool:
        """Whether the model, as it stands, is the best one so far."""
        just_validated = self.step == 0 and bool(self.history) and "val_mAP" in self.history[-1]
        return just_validated and self.patience.worse_in_a_row == 0

    def state(self) -> dict:
        memory, device = self.model.memory, self.args.device
        return {
            "format": FORMAT,
            "config": vars(self.args),
            "fingerprint": self.fingerprint,
            "model": {name: tensor.detach().cpu() for name, tensor in changing(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "memory": memory and {"codes": memory.codes, "next": memory.next, "filled": memory.filled},
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": None if device == "cpu" else torch.cuda.get_rng_state(device),
            },
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.scheduler.last_epoch,  # of all epochs
            "sums": self.sums,
            "history": self.history,
            "best": self.patience.best,
            "worse_in_a_row": self.patience.worse_in_a_row,
            "seconds": self.seconds,
        }

    def save(self, if_cheap: bool = False) -> None:
        """Write `last.cpt`; `if_cheap`: not where that has taken more than `SHARE` of the time so far."""
        start = time.perf_counter()
        dear = self.saving > SHARE * (start - self.began) and not self.finished
        if self.path and not (if_cheap and dear):
            if self.events:
                self.events.flush()  # what is told of the steps so far must not be lost either
            write_tensors(self.state(), self.path)
            self.saving += time.perf_counter() - start

    def restore(self, state: dict) -> None:
        """Go on from a state that `read_state` gave for the same flags."""
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                f"--resume: {self.path} is of a run on other images, labels or weights: give the same ones"
            )
        try:
            if set(state["model"]) != set(changing(self.model)):
                raise damaged(self.path)
            self.model.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.model.memory:
                self.model.memory.codes.copy_(state["memory"]["codes"])
                self.model.memory.next, self.model.memory.filled = state["memory"]["next"], state["memory"]["filled"]
            torch.set_rng_state(state["generators"]["cpu"])
            if self.args.device != "cpu" and state["generators"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["generators"]["cuda"], self.args.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.path) from error
        self.epoch, self.step, self.sums, self.history = (state[k] for k in ("epoch", "step", "sums", "history"))
        self.patience.best, self.patience.worse_in_a_row = state["best"], state["worse_in_a_row"]
        self.seconds, self.saved_best = state["seconds"], state["best"]


def changing(model: MeCoQ) -> dict[str, Tensor]:
    """What of a model's state dict training can change: all but the frozen blocks."""
    blocks = model.backbone.blocks[: model.backbone.split]
    frozen = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if id(x) not in frozen}


def fingerprint(splits: data.Splits, backbone: Backbone) -> str:
    """Of the backbone's weights and the splits' images: their pixels, or the names and sizes of their files; and of
    their labels."""
    digest = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for images in (splits.train, splits.query, splits.database):
        if isinstance(images, ImageFiles):
            sizes = [(images.root / name).stat().st_size for name in images.names]
            digest.update(json.dumps([images.names.tolist(), sizes]).encode())
        else:
            digest.update(np.ascontiguousarray(images.pixels).tobytes())
        digest.update(np.ascontiguousarray(images.labels).tobytes())
    return digest.hexdigest()


def damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged, or not the state of a run: begin anew with --overwrite")


STATE = {
    "format": int, "config": dict, "fingerprint": str, "model": dict, "optimizer": dict, "scheduler": dict,
    "generators": dict, "epoch": int, "step": int, "steps": int, "sums": dict, "history": list, "best": float,
    "worse_in_a_row": int, "seconds": dict,
}  # fmt: skip


def load_state(path: Path) -> dict:
    """The content of `last.cpt`. Raises InputError where it is no such file, or damaged."""
    try:
        state = load_tensors(path)
        whole = all(isinstance(state[name], kind) for name, kind in STATE.items()) and "memory" in state
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise damaged(path) from error
    if state.get("format") != FORMAT:
        raise InputError(f"{path} was written by another version of this program: begin anew with --overwrite")
    if not whole:
        raise damaged(path)
    return state


def read_state(path: Path, args: Namespace) -> dict:
    """The content of `last.cpt`. Raises InputError, too, where it is of a run with other flags, which are named, that
    would end otherwise."""
    state = load_state(path)
    config = state["config"]
    others = other_flags(args, config, MOVABLE)
    if others:
        values = ", ".join(f"--{flag} {config.get(flag)} (now {getattr(args, flag)})" for flag in others)
        raise InputError(f"--resume: {path} is of a run with {values}: give the same flags, or another --notes")
    return state


def find_state(files: Files, args: Namespace, going_on: bool) -> dict | None:
    """The state that a run goes on from; None: it begins anew.

    Raises InputError where there is a run already, unless it is to go on and can.
    """
    if not files.present():
        return None
    if not going_on:
        raise InputError(f"{files.checkpoints} holds a run: go on with --resume, replace it with --overwrite, or name "
                         "another --notes or --output")  # fmt: skip
    if args.test_only or files.present() == ["config.json"]:
        return None  # there is nothing that could be lost
    if not files.last.exists():
        raise InputError(
            f"--resume: {files.last}, which tells where to go on, is not there: begin anew with --overwrite"
        )
    return read_state(files.last, args)


def begin(files: Files, log: Path, state: dict | None) -> None:
    """A run takes its place, now that it has all it needs: what an earlier one left is removed, or, where it goes on
    from a state, what the log and TensorBoard tell beyond that: it will be told again. `log` is where the run writes
    its log until now; it becomes `files.log`."""
    kept = []
    if state:
        kept = _log_before(files.log, state["epoch"])
        _cut_events(files, state["epoch"], state["steps"])
    else:
        files.clear()
    if log != files.log:
        log.write_text("".join(kept) + log.read_text(encoding="utf-8"), encoding="utf-8")  # it is open, to append
        log.replace(files.log)


# ---------------------------------------------------------------- what a run says twice

EPOCH_LINE = re.compile(r" - epoch (\d+): avg loss=")
OF_EPOCH = re.compile(r" - (epoch \d+: avg loss=|val mAP=|early stop: )")
OF_TEST = re.compile(r" - test (mAP=|P@)")


def _log_before(path: Path, epoch: int) -> list[str]:
    """The lines of a log but for those of epochs from `epoch` on and of the test."""
    kept, again = [], False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        found = EPOCH_LINE.search(line)
        again = int(found[1]) >= epoch if found else again
        if not (again and OF_EPOCH.search(line)) and not OF_TEST.search(line):
            kept.append(line + "\n")
    return kept


def _cut_events(files: Files, epoch: int, step: int) -> None:
    """Leave TensorBoard's values of earlier steps and epochs, once each."""
    old = files.events()
    if not old:
        return
    shutil.rmtree(files.new_events, ignore_errors=True)
    writer, seen = EventFileWriter(str(files.new_events)), set()
    for path in old:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                known = (value.tag, event.step) in seen
                seen.add((value.tag, event.step))
                if not known and event.step < (epoch if value.tag == "val_mAP" else step):
                    writer.add_event(event)
    writer.flush()
    writer.close()
    for path in list(files.new_events.iterdir()):
        shutil.move(path, files.tensorboard / path.name)
    for path in old:
        path.unlink()
    files.new_events.rmdir()
