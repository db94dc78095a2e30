"""What the sections of `check_gpu` share: rows of the table, sizes, images, and trainings with run0015's flags."""

import pickle
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import engine
from checkpoint import Training
from config import Config, parse
from distributed import use_device
from experiments import published
from experiments.benchmarks import seconds
from experiments.profiling import FirstBatches
from loaders import TwoViews

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ["--dataset", "Digits", "--weights", "random", "--num_workers", "0", "--feature_cache", "off", "--topK", "50",
          "--disable_writer"]  # fmt: skip
MECOQ = ["--M", "2", "--K", "16", "--feat_dim", "8", "--T", "0.3", "--mode", "debias", "--pos_prior", "0.1",
         "--queue_begin_epoch", "0"]  # fmt: skip
BATCHES = Path("CIFAR-10") / "cifar-10-batches-py"  # below --data_root


class Skipped(Exception):  # noqa: N818, it is no error
    """A section, or what is left of it, cannot run here; the message says why."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what was done, what was found, what was expected. `ok`: whether that is it; None: nothing
    was expected. `value`: the number in `found`."""

    what: str
    found: str
    expected: str = ""
    ok: bool | None = None
    value: float | None = None


@dataclass(frozen=True)
class Sizes:
    """How much is computed; that of a GPU by default.

    Args:
        flags: beside run0015's.
        small: beside those of the runs on Digits.
        steps: of a training that is timed or compared; `repeats`: how often all that is timed is.
        encoded: images.
        searches: queries, codes, labels (0: ten classes) and K of each ranking.
    """

    flags: tuple[str, ...] = ()
    small: tuple[str, ...] = ("--limit", "200", "--image_size", "32", "--batch_size", "16")
    steps: int = 10
    repeats: int = 3
    encoded: int = 10000
    searches: tuple[tuple[int, int, int, int], ...] = ((10000, 50000, 0, 1000), (2100, 193734, 21, 5000))


CPU_SIZES = Sizes(
    flags=("--limit", "64", "--image_size", "64", "--batch_size", "16"),
    small=("--limit", "100", "--image_size", "32", "--batch_size", "16"),
    steps=3,
    repeats=3,
    encoded=64,
    searches=((500, 20000, 0, 1000), (100, 20000, 21, 5000)),
)


@dataclass(frozen=True)
class Check:
    """Where and on what is checked.

    Args:
        data_root: with CIFAR-10, or with what stands for it.
        folder: for files that may go afterwards.
        peaks: the most that tensors held on the GPU, MiB, by section.
    """

    device: str
    sizes: Sizes
    data_root: Path
    folder: Path
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def config(self, *flags: str) -> Config:
        """The configuration of run0015 with random weights; its device becomes the current one."""
        given = ["--weights", "random", "--data_root", str(self.data_root), "--disable_writer", *self.sizes.flags]
        return self.ready(parse([*published.script_flags("CifarII32bits"), *given, "--device", self.device, *flags]))

    def small_flags(self, *flags: str, device: str | None = None) -> list[str]:
        """The flags of a small run on Digits. Raises Skipped without scikit-learn, which has them."""
        if find_spec("sklearn") is None:
            raise Skipped("scikit-learn is not installed: the data set Digits comes with it")
        own = [] if "--method" in flags else MECOQ
        return [*DIGITS, *own, *self.sizes.small, "--device", device or self.device, *flags]

    @staticmethod
    def ready(config: Config) -> Config:
        """The configuration that runs on its device, which becomes the current one."""
        return config.replace(precision=use_device(config.device, config.precision))

    def training(self, *flags: str) -> tuple[Training, TwoViews]:
        """A training with run0015's flags and a memory that is used, and its batches."""
        config = self.config("--queue_begin_epoch", "0", *flags)
        splits, method = engine.build(config)
        loader = engine.build_loader(config, splits)
        return engine.start(config, method, loader), loader

    def median(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes, the device's part included, after one time that does not count."""
        times = [seconds(work, self.device) for _ in range(self.sizes.repeats + 1)]
        return statistics.median(times[1:])


def first_steps(training: Training, loader: TwoViews, steps: int) -> FirstBatches:
    """Train the first steps of the first epoch. Returns their batches."""
    training.epoch, training.step, training.sums = 0, 0, {}
    loader.set_epoch(0)
    batches = FirstBatches(loader, steps)
    engine.train_epoch(training, batches)
    return batches


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def kept_apart(text: str, longest: int = 160) -> str:
    """A text as a field of a Markdown table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def write_images(root: Path) -> None:
    """Random images in the files and the number of CIFAR-10: of each class a coarse pattern, under noise."""
    folder = root / BATCHES
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 180, (10, 3, 8, 8), np.uint8).repeat(4, axis=2).repeat(4, axis=3)
    for k in range(6):
        labels = np.arange(10000) % 10
        pixels = patterns[labels] + generator.integers(0, 76, (10000, 3, 32, 32), np.uint8)
        title = f"training batch {k + 1} of 5" if k < 5 else "testing batch 1 of 1"
        content = {"batch_label": title, "labels": labels.tolist(), "data": pixels.reshape(10000, -1), "filenames": []}
        (folder / (f"data_batch_{k + 1}" if k < 5 else "test_batch")).write_bytes(pickle.dumps(content, protocol=2))
