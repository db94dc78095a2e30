"""The state of a training, saved and gone on from as if nothing had happened, and the signals that stop a run."""

import hashlib
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from config import RESULTS, Config, differing
from data import Splits
from distributed import is_first, largest, processes
from methods.backbones import Backbone
from methods.base import Method
from model_file import BackgroundWriter
from results import Events, Files, Stopwatch, read_metrics
from utils import LOG, InputError, NonFiniteError, Stopped, load_tensors, sha256, write_tensors

SHARE = 0.02  # of a run's time, that saves at the end of epochs may take
FORMAT = 3  # to be raised with every change of what `last.cpt` holds

Callback = Callable[[Method, int, int, Tensor], object]  # method, epoch, step of the epoch, the views of that step


# ---------------------------------------------------------------- signals


class Signals:
    """SIGTERM and SIGINT end a run by `Stopped`: at once, or, while they are deferred, when `check` is called. SIGUSR1
    asks for the state to be saved.

    `pending` is the number of the signal that waits, `save` whether SIGUSR1 came; `agreed` are both as `waiting` found
    them, in whichever process. A second signal does not wait.
    """

    def __init__(self) -> None:
        self.deferring = self.save = False
        self.pending, self.agreed = 0, [0, 0]
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
        elif self.deferring and (not self.pending or processes() > 1):  # torchrun sends another to all of them
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
        if self.pending and not self.deferring:
            raise Stopped(self.pending)

    def waiting(self) -> bool:
        """Whether a signal waits, in any of the run's processes; all of them know of it then."""
        self.agreed = largest(int(self.save), self.pending)
        return any(self.agreed)

    def check(self) -> None:
        """Once the state is saved. Raises Stopped if `waiting` found a signal: of later ones only one process knows."""
        save, number = self.agreed
        if save:
            LOG.info("state saved, as SIGUSR1 asks")
            self.save = False
        if number:
            raise Stopped(number)


# ---------------------------------------------------------------- the state


class Patience:
    """The best value seen, and whether `limit` values in a row were no better."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.best = -math.inf
        self.worse_in_a_row = 0

    def improved(self, value: float) -> bool:
        """Take the next value; True if it is strictly better than all before it."""
        if value > self.best:
            self.best, self.worse_in_a_row = value, 0
            return True
        self.worse_in_a_row += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.worse_in_a_row >= self.limit


@dataclass(frozen=True)
class Loop:
    """How long a training goes on, and how often it is validated, read and saved (steps, but for `eval_interval`)."""

    epochs: int
    eval_interval: int = 1
    patience: int = 10
    log_interval: int = 20
    save_interval: int = 500
    detect_anomaly: bool = False

    @classmethod
    def of(cls, config: Config) -> "Loop":
        return cls(
            epochs=config.epoch_num,
            eval_interval=config.eval_interval,
            patience=config.monitor_counter,
            log_interval=config.log_interval,
            save_interval=config.save_interval,
            detect_anomaly=config.detect_anomaly,
        )


@dataclass(frozen=True)
class StateFile:
    """`last.cpt`: its path, the configuration, and the `fingerprint` of what is trained on, which it holds."""

    path: Path
    config: dict
    fingerprint: str


@dataclass
class Training:
    """All that changes while a method is trained.

    `epoch` is the one that is being trained, `step` counts those of it that are done, `sums` adds up their losses by
    tag; `history` holds the means of the epochs before. `events` is TensorBoard's writer, if there is one.

    Args:
        file: what `save` writes; None: nothing is saved.
        callbacks: called before each step, in evaluation mode and without gradients.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loop: Loop
    steps_per_epoch: int
    file: StateFile | None = None
    callbacks: Sequence[Callback] = ()
    signals: Signals = field(default_factory=Signals)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    check_lock: Callable[[], None] = lambda: None  # raises RunError if the run is no longer this process's
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)  # of the best model
    events: Events | None = None
    validated: bool = True  # whether MAP picks the checkpoint; else the last epoch's is kept
    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    saved_best: float = -math.inf  # MAP of the model in `model.cpt`
    began: float = field(default_factory=time.perf_counter)
    saving: float = 0.0  # seconds spent on it

    def __post_init__(self) -> None:
        self.patience = Patience(self.loop.patience)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.loop.epochs or self.patience.exhausted

    @property
    def best_is_now(self) -> bool:
        """Whether the model, as it stands, is the best one so far, or the last one if that is kept."""
        if not self.validated:
            return self.finished and bool(self.history)
        just_validated = self.step == 0 and bool(self.history) and "val_mAP" in self.history[-1]
        return just_validated and self.patience.worse_in_a_row == 0

    @property
    def seed(self) -> int:
        return self.file.config["seed"] if self.file else 0

    @property
    def device(self) -> torch.device:
        return next(self.method.parameters()).device

    @torch.no_grad()
    def call_back(self, views: Tensor) -> None:
        """Let the callbacks see the method as it stands before a step."""
        if self.callbacks:
            self.method.eval()
            for callback in self.callbacks:
                callback(self.method, self.epoch, self.step, views)
            self.method.train()

    def note(self, step: int, scalars: dict[str, float]) -> None:
        """Add up the losses of a step, by tag, and tell TensorBoard. Raises NonFiniteError if the loss is not finite.

        Args:
            step: of the epoch.
        """
        total = scalars["loss/total_loss"]
        if not math.isfinite(total):
            self.step = step  # an earlier one than that which is being done
            raise NonFiniteError(f"the loss became {total}: try a smaller --lr or a larger --T")
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            if self.events:
                self.events.add_scalar(name, value, self.epoch * self.steps_per_epoch + step)

    def summary(self) -> dict:
        """What `metrics.json` says of the training."""
        validated = [epoch for epoch in self.history if "val_mAP" in epoch]
        return {
            "epochs_run": len(self.history),
            "best_epoch": max(validated, key=lambda epoch: epoch["val_mAP"], default={}).get("epoch"),
            "history": self.history,
            "seconds": self.stopwatch.seconds,
        }

    def state(self) -> dict:
        return {
            "format": FORMAT,
            "config": self.file.config,
            "fingerprint": self.file.fingerprint,
            "model": {name: tensor.detach().cpu() for name, tensor in changing(self.method).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "extra": self.method.extra_state(),
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.scheduler.last_epoch,  # of all epochs
            "sums": self.sums,
            "history": self.history,
            "best": self.patience.best,
            "worse_in_a_row": self.patience.worse_in_a_row,
            "seconds": self.stopwatch.seconds,
        }

    def save(self, if_cheap: bool = False) -> None:
        """Write `last.cpt`; `if_cheap`: unless that has taken more than `SHARE` of the time so far. Only the first of
        the run's processes does."""
        if is_first():
            self._write(if_cheap)
        largest(0)  # the others wait: if one left, torchrun would end the first

    def _write(self, if_cheap: bool) -> None:
        start = time.perf_counter()
        dear = self.saving > SHARE * (start - self.began) and not self.finished
        if self.file and not (if_cheap and dear):
            self.check_lock()
            self.writer.wait()  # a state that names a better model must not be there before that model is
            if self.events:
                self.events.flush()  # what is told of the steps so far must not be lost either
            write_tensors(self.state(), self.file.path)
            self.saving += time.perf_counter() - start

    def restore(self, state: dict) -> None:
        """Go on from a state that `read_state` gave for the same flags. Raises InputError if it is of other images or
        weights, or damaged."""
        path = self.file.path
        if state["fingerprint"] != self.file.fingerprint:
            raise InputError(f"--resume: {path} is of a run on other images, labels or weights: give the same ones")
        try:
            if set(state["model"]) != set(changing(self.method)):
                raise damaged(path)
            self.method.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.method.load_extra_state(state["extra"])
            torch.set_rng_state(state["generators"]["cpu"])
            if self.device.type == "cuda" and state["generators"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path) from error
        self.epoch, self.step, self.sums, self.history = (state[k] for k in ("epoch", "step", "sums", "history"))
        self.patience.best, self.patience.worse_in_a_row = state["best"], state["worse_in_a_row"]
        self.stopwatch.seconds, self.saved_best = state["seconds"], state["best"]


def changing(method: Method) -> dict[str, Tensor]:
    """The entries of a method's state dict that training can change: all but the frozen blocks."""
    blocks = method.backbone.blocks[: method.backbone.split]
    frozen = {id(tensor) for block in blocks for tensor in block.state_dict(keep_vars=True).values()}
    return {name: x for name, x in method.state_dict(keep_vars=True).items() if id(x) not in frozen}


def fingerprint(splits: Splits, backbone: Backbone) -> str:
    """A digest of the backbone's weights, the splits' images (their pixels, or the names and sizes of their files) and
    their labels."""
    digest = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for images in splits.all.values():
        images.update(digest)
        digest.update(np.ascontiguousarray(images.labels).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- reading it back


def damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged, or not the state of a run: begin anew with --overwrite")


STATE = {
    "config": dict, "fingerprint": str, "model": dict, "optimizer": dict, "scheduler": dict, "generators": dict,
    "epoch": int, "step": int, "steps": int, "sums": dict, "history": list, "best": float, "worse_in_a_row": int,
    "seconds": dict,
}  # fmt: skip


def load_state(path: Path) -> dict:
    """The content of `last.cpt`. Raises InputError if it is not such a file, of another version, or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's about other kinds of files; one line says it here
            state = load_tensors(path)
        version = state["format"]
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise damaged(path) from error
    if version != FORMAT:
        raise InputError(f"{path} was written by another version of this program: begin anew with --overwrite")
    if not all(isinstance(state.get(name), kind) for name, kind in STATE.items()) or "extra" not in state:
        raise damaged(path)
    return state


def read_state(path: Path, config: Config) -> dict:
    """The content of `last.cpt`. Raises InputError, too, if it is of a run with other flags that change results;
    those are named. The fingerprint tells whether weights are the same."""
    state = load_state(path)
    stored = state["config"]
    others = differing(config, stored)
    if others:
        values = ", ".join(f"--{flag} {stored.get(flag)} (now {getattr(config, flag)})" for flag in others)
        raise InputError(f"--resume: {path} is of a run with {values}: give the same flags, or another --notes")
    return state


def find_state(files: Files, config: Config) -> dict | None:
    """The state that a run goes on from; None: it begins anew.

    Raises InputError if there is a run already, unless it is to go on (`--resume`) and can.
    """
    if not files.present() or config.overwrite:
        return None
    if not config.resume:
        raise InputError(f"{files.checkpoints} holds a run: go on with --resume, replace it with --overwrite, or name "
                         "another --notes or --output")  # fmt: skip
    if config.test_only or files.present() == ["config.json"]:
        return None  # there is nothing that could be lost
    if not files.last.exists():
        raise InputError(
            f"--resume: {files.last}, which tells where to go on, is not there: begin anew with --overwrite"
        )
    return read_state(files.last, config)


def is_finished(files: Files, config: Config) -> bool:
    """Whether the folder of this run holds the results of the same flags, and of the model that is there now.

    Raises InputError if it holds those of other flags: they must not be mistaken for these, nor lost.
    """
    if not files.metrics.exists():
        return False
    metrics = read_metrics(files.metrics)
    stored = metrics["config"]
    others = differing(config, stored, *RESULTS, "weights")
    if others:
        values = ", ".join(f"{flag}={stored.get(flag)}" for flag in others)
        raise InputError(f"{files.checkpoints} holds a run with {values}: give this one another --output or --notes")
    model = Path(config.checkpoint) if config.test_only else files.model
    return model.exists() and metrics.get("model_sha256") == sha256(model)
