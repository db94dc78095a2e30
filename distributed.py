"""The device that a run is on: whether it is there, what it is called, and work in chunks that fit it."""

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils import InputError

CPU_CHUNK = 32  # images: about what a CPU's caches hold the activations of
KEPT_BLOCK = 2**25  # bytes: the largest block that glibc keeps when it is freed
KEPT_MEMORY = 2**30  # bytes that are kept at most


def keep_freed_memory() -> None:
    """Let the process keep memory that it frees. As a rule glibc gives large blocks back to the system, and the next
    activations get new pages one by one, each of which is zeroed first: up to a third of the time of a frozen
    network. Other C libraries are left as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(-3, KEPT_BLOCK)  # M_MMAP_THRESHOLD
    mallopt(-1, KEPT_MEMORY)  # M_TRIM_THRESHOLD


def by_chunks(function: Callable[..., Tensor], *tensors: Tensor, rows: int = CPU_CHUNK) -> Tensor:
    """`function` of tensors with a row per image; on a CPU of `rows` rows at a time, which is two to three times as
    fast."""
    if tensors[0].device.type != "cpu":
        rows = max(len(tensors[0]), 1)
    return torch.cat([function(*part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])


def check_device(device: str) -> None:
    """Raise InputError if the device is not there."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        found = f"this machine has {count} usable" if count else "no usable CUDA device was found"
        raise InputError(f"--device {device}: {found}; use --device cpu or another number")


def use_device(device: str, precision: str) -> str:
    """Make a device the current one; on a CPU, the process keeps memory that it frees. Returns the precision to run
    in: "fp32" if a GPU has no bfloat16. With "fp32", convolutions on a GPU do not round to TF32 either.

    Raises InputError if the device is not there.
    """
    check_device(device)
    if device == "cpu":
        keep_freed_memory()
        return precision
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision if torch.cuda.is_bf16_supported(False) else "fp32"


def sent(tensor: Tensor, device: str) -> Tensor:
    """A tensor on a device; from the host to a GPU it goes from pinned memory, without the host waiting."""
    if device == "cpu" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fits(size: int, device: str) -> bool:
    """Whether `size` bytes are to be kept on a device throughout: at most a quarter of what a GPU has free."""
    return device != "cpu" and size <= torch.cuda.mem_get_info(device)[0] // 4


def device_name(device: str) -> str:
    """The device's name, for people."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def processor_name(device: str) -> str:
    """The kind of processor and its settings, on which the rounding of features depends."""
    if device != "cpu":
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}, TF32 {tf32}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
