"""The report of `check_gpu`: its sections one after the other, whatever becomes of each, in a table and two files."""

import gc
import logging
import os
import platform
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision

from distributed import device_name, use_device
from experiments.check_base import BATCHES, CPU_SIZES, Check, Row, Sizes, Skipped, kept_apart, write_images
from results import git_commit, versions
from utils import LOG, atomic_write, one_line, write_json

DEFAULT = Sizes()
OPTIONAL = ("kornia", "faiss", "tabulate", "tensorboard", "cv2", "sklearn", "matplotlib", "pandas", "pytest")


def machine(check: Check) -> Iterator[Row]:
    """What runs where."""
    yield Row("device", device_name(check.device))
    yield Row("versions", f"Python {platform.python_version()}, PyTorch {torch.__version__}, torchvision "
              f"{torchvision.__version__}, CUDA {torch.version.cuda or 'none'}")  # fmt: skip
    if check.on_gpu:
        driver = Path("/proc/driver/nvidia/version")
        first = driver.read_text(errors="replace").partition("\n")[0] if driver.exists() else "unknown"
        yield Row("driver", first.removeprefix("NVRM version: "))
        yield Row("cuDNN", str(torch.backends.cudnn.version()))
        free, total = torch.cuda.mem_get_info(check.device)
        yield Row("memory", f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}", value=free / 2**20)
        for precision in ("bf16", "fp32"):
            used = use_device(check.device, precision)
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            found = f"runs in {used}; TF32 in convolutions {flags[0]}, in matrix products {flags[1]}"
            exact = precision == "fp32"  # a GPU without bfloat16 runs in fp32 throughout
            yield Row(f"--precision {precision}", found, "no TF32" * exact, not any(flags) if exact else None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Row("cores", f"{cores}, {torch.get_num_threads()} threads of PyTorch", value=cores)
    yield Row("not installed", ", ".join(name for name in OPTIONAL if find_spec(name) is None) or "nothing")
    synthetic = check.data_root.is_relative_to(check.folder)
    yield Row("images", "random, in CIFAR-10's files" if synthetic else f"CIFAR-10 in {check.data_root}")
    small = check.sizes is not DEFAULT
    yield Row("sizes", "THE SMALL VERSION: its times say little of real runs" if small else "run0015's")


# ---------------------------------------------------------------- the table


class Report:
    """What was found so far, by section, and its files in a folder; each section's `state` is "done", "skipped: why",
    "FAILED: why" or "interrupted"."""

    def __init__(self, folder: Path, head: dict) -> None:
        self.folder, self.head = folder, head
        self.sections: dict[str, dict] = {}

    @property
    def failed(self) -> bool:
        states = [section["state"] for section in self.sections.values()]
        rows = [row for section in self.sections.values() for row in section["rows"]]
        return any(state.startswith("FAILED") for state in states) or any(row["ok"] is False for row in rows)

    def table(self) -> str:
        """Markdown."""
        lines = ["| section | what | found | expected |", "|---|---|---|---|"]
        for name, section in self.sections.items():
            for row in section["rows"]:
                found = f"FAILED: {row['found']}" if row["ok"] is False else row["found"]
                lines.append(f"| {name} | {kept_apart(row['what'])} | {kept_apart(found)} | {row['expected']} |")
            if section["state"] != "done":
                lines.append(f"| {name} | | {kept_apart(section['state'])} | |")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        write_json(self.folder / "check_gpu.json", self.head | {"failed": self.failed, "sections": self.sections})
        with atomic_write(self.folder / "check_gpu.md", "w") as file:
            file.write(self.table())


@contextmanager
def settings_restored() -> Iterator[None]:
    """What a section changes of PyTorch's switches ends with it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = before


def carry_out(name: str, function: Callable[[Check], Iterator[Row]], check: Check, report: Report) -> None:
    """Add a section to the report, whatever becomes of it; Ctrl-C goes on upwards, what was found stays."""
    section = report.sections[name] = {"state": "done", "seconds": 0.0, "rows": []}
    start = time.perf_counter()
    try:
        with settings_restored():
            if check.on_gpu:
                use_device(check.device, "bf16")
                torch.cuda.reset_peak_memory_stats(check.device)
            for row in function(check):
                section["rows"].append(vars(row))
        if check.on_gpu and name != "memory":
            check.peaks[name] = torch.cuda.max_memory_allocated(check.device) / 2**20
    except Skipped as why:
        section["state"] = f"skipped: {why}"
    except Exception as error:  # the other sections must not suffer
        section["state"] = f"FAILED: {type(error).__name__}: {one_line(error)}"
    except KeyboardInterrupt:
        section["state"] = "interrupted"
        raise
    finally:
        section["seconds"] = round(time.perf_counter() - start, 2)
        report.write()
        gc.collect()
        bad = any(row["ok"] is False for row in section["rows"])
        state = "FAILED, see the table" if bad and section["state"] == "done" else section["state"]
        print(f"{name}: {kept_apart(state)} ({section['seconds']:.1f} s)", file=sys.stderr, flush=True)


def check_all(own: Namespace, sections: dict[str, Callable[[Check], Iterator[Row]]]) -> int:
    """Carry out the sections. Returns the exit code.

    Args:
        own: the flags of `check_gpu`.
    """
    sizes = CPU_SIZES if own.small or own.device == "cpu" else DEFAULT
    LOG.addHandler(logging.NullHandler())  # no warnings that few images mean nothing
    head = {"device": device_name(own.device), "versions": versions(), "git_commit": git_commit(),
            "small": sizes is not DEFAULT}  # fmt: skip
    report, start = Report(own.results, head), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check_gpu-", ignore_cleanup_errors=True) as folder:
        root = own.data_root
        if not (root / BATCHES).is_dir():
            root = Path(folder) / "datasets"
            write_images(root)
        check = Check(own.device, sizes, root, Path(folder))
        try:
            for name, section in sections.items():
                if time.monotonic() - start > 60 * own.minutes:
                    report.sections[name] = {"state": f"skipped: {own.minutes:g} minutes are over", "seconds": 0.0,
                                             "rows": []}  # fmt: skip
                else:
                    carry_out(name, section, check, report)
        finally:
            report.write()
            print(report.table(), end="")
            print(f"{own.results / 'check_gpu.md'} and .json have it, too", file=sys.stderr)
    return 1 if report.failed else 0
