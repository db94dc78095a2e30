"""The device that a run is on, and the processes, one per GPU, that torchrun lets share a run."""

import ctypes
import io
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import LOG, InputError, RunError, Stopped, end_workers, one_line, sample_seed

# ---------------------------------------------------------------- the device

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
    in: "fp32" if a GPU has no bfloat16. On a GPU, matrix products do not round to TF32, nor, with "fp32", convolutions;
    and cuDNN adds in a fixed order.

    Raises InputError if the device is not there.
    """
    check_device(device)
    if device == "cpu":
        keep_freed_memory()
        return precision
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False  # which an environment variable may have turned on
    torch.backends.cudnn.deterministic = True
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


# ---------------------------------------------------------------- processes


def rank() -> int:
    """This process's number in the run; the first, 0, writes its files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_processes() -> int:
    """How many of them are on this machine."""
    return 1 if processes() == 1 else int(os.environ["LOCAL_WORLD_SIZE"])


def is_first() -> bool:
    return rank() == 0


def launched() -> bool:
    """Whether torchrun started several processes, of which this is one."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def own_device(device: str) -> str:
    """The device of this process: one GPU for each on a machine. Raises InputError if all of them were to take one."""
    if not launched() or device == "cpu":
        return device
    if device not in ("cuda", "cuda:0"):
        raise InputError(f"--device {device}: torchrun's processes take a GPU each: give --device cuda, and name the "
                         "GPUs in CUDA_VISIBLE_DEVICES")  # fmt: skip
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Let the processes that torchrun started share a run; all but the first keep quiet. A process of its own stays so.

    Raises RunError if another process is gone.
    """
    if not launched():
        yield
        return
    end_with_parent()
    with naming_lost_process():
        # a process that waits for a lock, or for a disk, is not lost; one that has ended is found at once
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(days=1))
    quiet, LOG.disabled = LOG.disabled, LOG.disabled or not is_first()
    try:
        with naming_lost_process():
            yield
        dist.destroy_process_group()  # after an error, `leave` does without: it could wait for a process that is gone
    finally:
        LOG.disabled = quiet


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached: gloo and NCCL have no type for it alone."""
    if not launched():
        return False
    if "out of memory" in str(error):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    lost = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return isinstance(error, RuntimeError) and not isinstance(error, RunError) and lost


@contextmanager
def naming_lost_process() -> Iterator[None]:
    """Raise RunError in one line if another process of the run cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise RunError(lost_process(error)) from error


def lost_process(error: BaseException) -> str:
    """What to say of it: NCCL's own reason, or the error's first sentence, without places in gloo's code."""
    text = one_line(error)
    _, _, last = text.partition("Last error:")
    if last and "remote process" not in last:
        return f"the processes of this run cannot reach one another: NCCL says {last.strip()[:200]}"
    reason = re.sub(r"\[[^]]*\.\w+:\d+\] *", "", text).partition(". ")[0]
    return f"another process of this run has ended or cannot be reached ({reason[:200]})"


def end_with_parent() -> None:
    """Let the system send this process SIGTERM when torchrun is killed; Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def said_once() -> Iterator[None]:
    """Let only the first of the processes that fail say so; the others, which fail of that one's end or of the same
    input, leave with its exit code and without a word."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _code_of_first(error) if launched() else None
        if code is not None:
            leave(code)
        raise


def leave(code: int) -> NoReturn:
    """End this process at once: NCCL would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    end_workers()
    os._exit(code)


def _code_of_first(error: BaseException) -> int | None:
    """The exit code of the process that failed first; None if that is this one, or no other can be asked."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    code = error.number + 128 if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        if store.add(f"failed, start {start}", 1) > 1:
            return int(store.get(f"exit code, start {start}"))
        store.set(f"exit code, start {start}", str(code))
    except (RuntimeError, KeyError, ValueError):
        pass
    return None


# ---------------------------------------------------------------- what processes do together


def share(n: int) -> slice:
    """Which of n pieces of work are this process's; if there are fewer than processes, each does all."""
    if each_does_all(n):
        return slice(0, n)
    return slice(n * rank() // processes(), n * (rank() + 1) // processes())


def each_does_all(n: int) -> bool:
    return processes() == 1 or n < processes()


def joined(own: Tensor, n: int) -> Tensor:
    """The rows of n pieces of work, of those that each process's `share` gave it."""
    return own if each_does_all(n) else gathered(own)


def total(own: Tensor, n: int) -> Tensor:
    """The sum over n pieces of work, of those of each process's `share`."""
    return own if each_does_all(n) else summed(own)


def largest(*numbers: int) -> list[int]:
    """Each number's largest value in any process. The host does not wait for the device."""
    if processes() == 1:
        return list(numbers)
    values = torch.tensor(numbers)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def gathered(x: Tensor) -> Tensor:
    """Rows `[b, ...]` of each process -> those of all `[B, ...]`, in the processes' order; with their gradients."""
    if processes() == 1:
        return x
    sizes = [0] * processes()
    sizes[rank()] = len(x)
    sizes = largest(*sizes)
    rows = [x.new_zeros(size, *x.shape[1:]) for size in sizes]
    rows[rank()] = x
    return summed(torch.cat(rows))


def gathered_views(z: Tensor) -> Tensor:
    """Embeddings `[2n, D]` of both views of a process's images -> of the whole batch `[2N, D]`, first views first."""
    if processes() == 1:
        return z
    return gathered(torch.stack(z.chunk(2), dim=1)).transpose(0, 1).flatten(0, 1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def summed(x: Tensor) -> Tensor:
    """The sum over processes of tensors of one shape. Its gradient is that of the sum of all processes' losses."""
    return x if processes() == 1 else _Sum.apply(x)


def in_row(x: Tensor) -> Tensor:
    """A tensor in this process's row, zeros in all others'."""
    return torch.stack([x if row == rank() else torch.zeros_like(x) for row in range(processes())])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let each process have the mean of all processes' gradients: as every one has the loss of the whole batch, that is
    its gradient."""
    if processes() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    parts = (whole / processes()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def copy_from_first(*tensors: Tensor) -> None:
    """Overwrite tensors by those of the first process."""
    if processes() > 1:
        largest(0)  # if that process is gone, gloo says so; NCCL would wait
        with torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


def check_same(digest: str, what: str) -> None:
    """Raise InputError if this process's digest of `what` is not the first process's."""
    if bytes_of_first(digest.encode()) != digest.encode():
        raise InputError(f"process {rank()} has other {what} than process 0: let all have the same")


@contextmanager
def one_for_all(matters: bool = True) -> Iterator[None]:
    """Let the first process of each machine do what is within before the others, say a download, if that matters."""
    waits = matters and processes() > 1
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if waits and not first:
        largest(0)
    yield
    if waits and first:
        largest(0)


def bytes_of_first(content: bytes) -> bytes:
    """What the first process has; the others' content counts for nothing."""
    if processes() == 1:
        return content
    size = largest(len(content) if is_first() else 0)[0]
    own = bytearray(content if is_first() else size)
    if size:
        dist.broadcast(torch.frombuffer(own, dtype=torch.uint8), 0)
    return bytes(own)


def content_of_first(content: dict | None, path: Path) -> dict | None:
    """What the first process has read from a file of tensors, for all of them; None if it has read nothing."""
    if processes() == 1:
        return content
    stored = bytes_of_first(path.read_bytes() if content is not None else b"")
    return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True) if stored else None


def draw_apart(*seeds: int) -> None:
    """Let the numbers that processes draw next, say for dropout, differ; the first one's are those of a run alone.

    Args:
        seeds: numbers that together are new at each call: nothing need be kept of generators to go on from there.
    """
    if not is_first():
        torch.manual_seed(sample_seed(*seeds, rank()))
