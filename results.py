"""What does a run leave? Its files, and how they are read again."""

import errno
import io
import json
import math
import platform
import resource
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from retrieval import Metrics
from utils import LOG, InputError, atomic_write, one_line, sha256

RUN_FILES = (
    "config.json", "last.cpt", "model.cpt", "db_codes.npy", "db_targets.npy", "PR_curve.txt", "P_at_topK_curve.txt",
    "metrics.json",
)  # fmt: skip


@dataclass
class Files:
    """Where a run writes: `logs/<notes>.log`, `logs/<notes>/` and `checkpoints/<notes>/` below the output folder."""

    output: Path
    notes: str

    @property
    def log(self) -> Path:
        return self.output / "logs" / f"{self.notes}.log"

    @property
    def tensorboard(self) -> Path:
        return self.output / "logs" / self.notes

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints" / self.notes

    @property
    def model(self) -> Path:
        return self.checkpoints / "model.cpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.cpt"

    @property
    def new_events(self) -> Path:
        """Where TensorBoard's files are written anew."""
        return self.checkpoints / ".events.tmp"

    def present(self) -> list[str]:
        """Which files of a run there are."""
        found = [name for name in RUN_FILES if (self.checkpoints / name).exists()]
        return found + [path.name for path in self.events()]

    def events(self) -> list[Path]:
        """TensorBoard's files, oldest first."""
        return sorted(self.tensorboard.glob("events.out.tfevents.*"))

    def clear(self) -> None:
        """Remove what an earlier run left, but for its log."""
        for name in RUN_FILES:
            (self.checkpoints / name).unlink(missing_ok=True)
        for path in self.events():
            path.unlink()
        shutil.rmtree(self.new_events, ignore_errors=True)


def write_tensors(content: dict, path: Path) -> None:
    """`torch.save`, atomically; what is there is replaced only once the new file has been read back. Raises OSError."""
    buffer = io.BytesIO()  # torch.save itself does not end well on a full disk
    torch.save(content, buffer)
    with atomic_write(path, "w+b") as file:
        file.write(buffer.getbuffer())
        file.flush()
        file.seek(0)
        buffer.seek(0)
        while part := buffer.read(2**24):
            if file.read(2**24) != part:
                raise OSError(errno.EIO, "what was written does not read back")


def save_model(model: nn.Module, path: Path) -> None:
    write_tensors({name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)  # readable without a GPU


def save_results(metrics: Metrics, db_codes: Tensor, db_labels: np.ndarray, args: Namespace, files: Files) -> None:
    """`db_codes.npy` (uint8 for K <= 256, else uint16), `db_targets.npy` and the two curves, two rows each."""
    codes = db_codes.numpy().astype(np.uint8 if args.K <= 256 else np.uint16)
    for name, array in (("db_codes.npy", codes), ("db_targets.npy", db_labels)):
        with atomic_write(files.checkpoints / name) as file:
            np.save(file, array, allow_pickle=False)
    for name, curve in (("PR_curve.txt", metrics.pr), ("P_at_topK_curve.txt", metrics.p_at_k)):
        with atomic_write(files.checkpoints / name) as file:
            np.savetxt(file, curve.numpy())


def read_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable .npy file ({one_line(error)}): move it away") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is not a .npy file but an archive of them: move it away")
    return array


def read_metrics(path: Path) -> dict:
    """A run's `metrics.json`. Raises InputError where it is none."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(metrics["config"], dict) and isinstance(metrics["map"], float):
            return metrics
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        pass
    raise InputError(f"{path} is not the metrics.json of a run: move it away")


class Events:
    """TensorBoard's files. Where one can not be written, that is said once and the run goes on without."""

    def __init__(self, folder: Path) -> None:
        self.writer: SummaryWriter | None = SummaryWriter(str(folder))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._try(lambda writer: writer.add_scalar(tag, value, step))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable[[SummaryWriter], object]) -> None:
        try:
            if self.writer:
                action(self.writer)
        except Exception as error:  # whatever its thread met
            self.writer = None
            LOG.warning("WARNING: TensorBoard's files can not be written (%s): going on without them", one_line(error))


# flags that say where and how a run goes, not what comes out
NEUTRAL = {
    "data_root", "detect_anomaly", "device", "disable_writer", "download_cifar10", "feature_cache", "list_root",
    "log_interval", "notes", "num_workers", "output", "save_interval",
}  # fmt: skip


def other_flags(args: Namespace, config: dict, ignored: set[str]) -> list[str]:
    """The flags, but for those `ignored`, that a run with this `config` had otherwise."""
    return [flag for flag, value in vars(args).items() if flag not in ignored and config.get(flag) != value]


def is_finished(files: Files, args: Namespace) -> bool:
    """Whether the folder of this run holds the results of the same flags, and of the model that is there now.

    Raises InputError where it holds those of other flags: they must not be mistaken for these, nor lost.
    """
    path = files.checkpoints / "metrics.json"
    if not path.exists():
        return False
    metrics = read_metrics(path)
    config = metrics["config"]
    others = other_flags(args, config, NEUTRAL)
    if others:
        values = ", ".join(f"{flag}={config.get(flag)}" for flag in others)
        raise InputError(f"{files.checkpoints} holds a run with {values}: give this one another --output or --notes")
    model = Path(args.checkpoint) if args.test_only else files.model
    return model.exists() and metrics.get("model_sha256") == sha256(model)


def code_bits(args: Namespace) -> int:
    """Bits of an image's code: M log2 K."""
    return round(args.M * math.log2(args.K))


# ---------------------------------------------------------------- where it ran


def peak_memory(device: str) -> dict[str, float | None]:
    """Most memory ever held, in MiB: by this process, by its largest worker, and by tensors on the GPU."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    process, worker = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else None
    return {"process": process, "largest_worker": worker, "gpu": gpu}


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
