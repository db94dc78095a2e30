"""A GPU that is none, so that CUDA's paths can be tested on a CPU.

Tensors "on cuda:0" have their numbers in the host's memory. To PyTorch's C++ they are CPU tensors, so that autograd,
autocast, inference mode and every kernel work as ever; to Python they say `device == cuda:0`. A dispatch mode sees
every operation, those of a backward pass too: it refuses what a GPU would refuse (tensors of two devices in one
operation, NumPy), and counts what would make the host wait.

It does not see kernels that CUDA lacks for a dtype, how CUDA rounds, streams, `--compile`, and processes of workers.

It uses interfaces of PyTorch that are private, see `PRIVATE`: if one is gone, `MISSING` names it, and tests that need a
pretended GPU are skipped.
"""

import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import ties
import transforms
from experiments.check_report import settings_restored
from utils import load_object

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = (
    "torch._C:_disabled_torch_function_impl", "torch._C:_DisableTorchDispatch", "torch._C:_only_lift_cpu_tensors",
    "torch._C:_set_only_lift_cpu_tensors", "torch._C:_dispatch_has_kernel_for_dispatch_key", "torch._C._nn:_parse_to",
    "torch.utils._python_dispatch:TorchDispatchMode", "torch.utils._pytree:tree_leaves",
    "torch.utils._pytree:tree_map_only", "torch.utils.data._utils.pin_memory:pin_memory",
    "torch.optim.optimizer:_foreach_supported_types", "torch.autograd.graph:_engine_run_backward",
)  # fmt: skip


def missing() -> list[str]:
    """The private interfaces that this PyTorch does not have."""
    gone = []
    for name in PRIVATE:
        try:
            load_object(name)
        except (ImportError, AttributeError):
            gone.append(name)
    return gone


MISSING = missing()
if not MISSING:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only
else:
    TorchDispatchMode = object

GPU = torch.device("cuda:0")
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
UNORDERED = {  # see torch.use_deterministic_algorithms
    "index_add", "index_add_", "scatter_add", "scatter_add_", "_adaptive_avg_pool2d_backward", "put_", "histc",
    "max_pool2d_with_indices_backward", "upsample_bilinear2d_backward", "embedding_dense_backward",
    "_embedding_bag_dense_backward", "grid_sampler_2d_backward", "reflection_pad2d_backward", "median", "kthvalue",
}  # fmt: skip
TAKES_NUMBERS = {"copy_", "index_put_", "index_put", "_index_put_impl_", "_foreach_add_"}  # of the host
SMALL = 2**16  # bytes: copied from pageable memory without waiting


class OnDevice(torch.Tensor):
    """A tensor that says it is on the GPU. What C++ would answer for the CPU, this answers."""

    __torch_function__ = getattr(torch._C, "_disabled_torch_function_impl", None)
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy()

    def __array__(self, *_: object) -> np.ndarray:
        return self.numpy()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def cpu(self, *_: object, **__: object) -> Tensor:
        return PretendedGPU.active.to_host(self)

    def cuda(self, *_: object, **__: object) -> Tensor:
        return self

    def to(self, *args: object, **kwargs: object) -> Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        x = PretendedGPU.active.to_host(self, non_blocking) if device is not None and device.type == "cpu" else self
        if dtype in (None, x.dtype) and layout is None:
            return x.clone() if copy and x is self else x
        return torch.Tensor.to(x, dtype=dtype or x.dtype, memory_format=layout or torch.preserve_format, copy=copy)

    def __reduce_ex__(self, protocol: int) -> tuple:  # torch.save
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, _: dict) -> Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)


class PretendedGPU(TorchDispatchMode):
    """While it is entered there is a GPU.

    `waits`: where the host would wait for it, (file, function, why) -> how often; `unordered`: where it would add in no
    particular order; `kernels`: (operation, dtype) -> how often; `sent`: bytes from the
    host; `free`: bytes of its memory that are free.
    """

    active: "PretendedGPU | None" = None

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.pinned, self.free, self.warns = str(root), [], 2**33, "default"
        self.seed(0)
        self.forget()

    def forget(self) -> None:
        self.waits, self.unordered, self.kernels = Counter(), Counter(), Counter()
        self.sent = 0

    # ------------------------------------------------------------ notes

    def place(self) -> tuple[str, str]:
        """File and function of the project that asked for what happens."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.root) and name != __file__ and "site-packages" not in name:
                return Path(name).relative_to(self.root).as_posix(), frame.f_code.co_name
            frame = frame.f_back
        return "?", "?"

    def wait(self, why: str) -> None:
        self.waits[(*self.place(), why)] += 1
        if self.warns == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def to_host(self, x: Tensor, non_blocking: bool = False) -> Tensor:
        with torch._C._DisableTorchDispatch():
            out = torch.Tensor.clone(x)
        out.__class__ = torch.Tensor
        if not non_blocking:
            self.wait("copy to the host")
        return out

    def from_host(self, x: Tensor, non_blocking: bool) -> None:
        self.sent += x.nbytes
        if not non_blocking:
            self.wait("blocking copy to the GPU")
        elif x.nbytes > SMALL and not self.is_pinned(x):
            self.wait("copy from pageable memory")

    def is_pinned(self, x: Tensor) -> bool:
        place = x.untyped_storage().data_ptr()
        return any(kept.untyped_storage().data_ptr() == place for kept in self.pinned)

    def pin(self, batch: object, _: object = None) -> object:
        self.pinned = [*self.pinned[-63:], *(x for x in tree_leaves(batch) if isinstance(x, torch.Tensor))]
        return batch

    # ------------------------------------------------------------ every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode they come here whole
                return func.decompose(*args, **kwargs)
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        to_gpu = target is not None and torch.device(target).type == "cuda"
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if not ours and not to_gpu:
            out = func(*args, **kwargs)
            return self.labelled(out, ()) if target is not None and _in_backward() else out
        if name == "_to_copy":
            if not ours:
                self.from_host(args[0], kwargs.get("non_blocking", False))
        elif name == "copy_" and not isinstance(args[0], OnDevice):
            self.wait("copy to the host")
        elif name == "copy_" and not isinstance(args[1], OnDevice):
            if args[1].dim():
                self.from_host(args[1], bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            self.check(func, name, args, tensors)
        if name in WAITS:
            self.wait(name)
        if name in UNORDERED or (name.startswith("index_put") and len(args) > 3 and args[3]):
            self.unordered[(*self.place(), name)] += 1
        if not func.is_view:
            self.kernels[name, (ours[0] if ours else tensors[0]).dtype if tensors else None] += 1
        with self.own_numbers() if torch.Tag.nondeterministic_seeded in func.tags else ExitStack():
            out = func(*args, **kwargs)
        return out if name == "_local_scalar_dense" else self.labelled(out, tensors)

    def check(self, func, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Raise what CUDA raises for tensors of two devices; note waits for indices."""
        strangers = [x for x in tensors if not isinstance(x, OnDevice)]
        if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):  # x[i]: i may be the host's
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            if not isinstance(args[0], OnDevice):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            fills = name.startswith("index_put") and args[2].numel() == 1 and len(indices) == 1
            for index in indices:
                if not isinstance(index, OnDevice):
                    self.wait("index of the host")
                elif index.dtype in (torch.bool, torch.uint8) and not fills:
                    self.wait("boolean index")
            strangers = [x for x in strangers if all(x is not i for i in indices)]
            if strangers and not fills:
                self.wait("number of the host")  # a copy of four bytes, which is waited for
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        changed = func._schema.is_mutable and any(x is first for x in strangers)
        numbers = torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS
        if changed or any(x.dim() or not numbers for x in strangers):
            found = [(str(x.device), list(x.shape)) for x in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu: {name} {found}")

    @staticmethod
    def labelled(out: object, inputs: tuple | list) -> object:
        def label(x: Tensor) -> Tensor:
            if type(x) is torch.Tensor and all(x is not i for i in inputs):
                x.__class__ = OnDevice
            return x

        return tree_map_only(torch.Tensor, label, out)

    # ------------------------------------------------------------ its own random numbers

    def seed(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed).get_state()

    def set_rng_state(self, state: Tensor, _: object = None) -> None:
        self.rng = state.clone()

    @contextmanager
    def own_numbers(self) -> Iterator[None]:
        with torch._C._DisableTorchDispatch():
            before = torch.default_generator.get_state()
            torch.default_generator.set_state(self.rng)
        try:
            yield
        finally:
            with torch._C._DisableTorchDispatch():
                self.rng = torch.default_generator.get_state()
                torch.default_generator.set_state(before)


def _in_backward() -> bool:
    """Whether autograd asks, in a backward pass of the GPU: some of its formulas make tensors on the device that C++
    sees."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame is None or frame.f_code.co_name == "_engine_run_backward":
            break
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_engine_run_backward":
        return False
    return any(isinstance(x, OnDevice) for x in frame.f_locals["t_outputs"])


# ---------------------------------------------------------------- what PyTorch says of the machine


def _set_device(device: object) -> None:
    if isinstance(device, str) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


class _Autocast(torch.autocast):
    """Of the GPU's tensors, which C++ takes for those of the CPU; the CPU's own does nothing to them."""

    def __init__(self, device_type: str, *args: object, **kwargs: object) -> None:
        super().__init__("cpu", *args, **kwargs | ({} if device_type == "cuda" else {"enabled": False}))


_one_hot = torch.nn.functional.one_hot


def _one_hot_there(x: Tensor, num_classes: int = -1) -> Tensor:
    """`one_hot` as on a GPU; on a CPU it looks at the values first."""
    if not isinstance(x, OnDevice) or num_classes < 0:
        return _one_hot(x, num_classes)
    return torch.zeros(*x.shape, num_classes, dtype=x.dtype, device=GPU).scatter_(-1, x.unsqueeze(-1), 1)


def _nothing(*_: object, **__: object) -> None:
    pass


def _fakes(gpu: PretendedGPU) -> dict[object, dict[str, object]]:
    """What is replaced while the GPU is there: module or class -> name -> substitute."""
    return {
        torch.cuda: {
            "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
            "current_device": lambda: 0, "set_device": _set_device, "is_bf16_supported": lambda *_, **__: True,
            "is_current_stream_capturing": lambda: False, "get_device_name": lambda *_: "a pretended GPU",
            "get_rng_state": lambda *_: gpu.rng.clone(), "set_rng_state": gpu.set_rng_state, "manual_seed": gpu.seed,
            "manual_seed_all": gpu.seed, "reset_peak_memory_stats": _nothing, "max_memory_allocated": lambda *_: 2**20,
            "mem_get_info": lambda *_: (gpu.free, 2**34), "synchronize": _nothing, "_lazy_init": _nothing,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "warns", mode),
        },
        torch.accelerator: {
            "is_available": lambda: True, "current_accelerator": lambda *_, **__: torch.device("cuda"),
            "current_device_index": lambda: 0, "set_device_index": _nothing,
            "current_stream": lambda *_: Namespace(is_capturing=lambda: False),
        },
        torch.backends.cudnn: {"version": lambda: 90000},
        torch.utils.data._utils.pin_memory: {"pin_memory": gpu.pin},
        torch.Tensor: {"pin_memory": lambda x, *_: gpu.pin(x)},
        torch.nn.functional: {"one_hot": _one_hot_there},
        torch: {"autocast": _Autocast},
        sys.modules["torch.optim.optimizer"]: {
            "_foreach_supported_types": [torch.Tensor, torch.nn.Parameter, OnDevice]
        },
    }  # fmt: skip


@contextmanager
def nothing_left() -> Iterator[None]:
    """On one thread; PyTorch's switches, and constants on a GPU that is gone, do not outlive it."""
    threads, constants = torch.get_num_threads(), (transforms.on_device, ties.harmonic_numbers)
    torch.set_num_threads(1)
    for kept in constants:
        kept.cache_clear()
    try:
        with settings_restored():
            yield
    finally:
        for kept in constants:
            kept.cache_clear()
        torch.set_num_threads(threads)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A machine with one GPU, `cuda:0`; tests that enter it must be skipped if anything is `MISSING`."""
    gpu = PretendedGPU(ROOT)
    overwrite = torch.__future__
    switches = (
        (overwrite.get_overwrite_module_params_on_conversion, overwrite.set_overwrite_module_params_on_conversion),
        (torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors),  # for torch.tensor(..., device=...)
    )
    with ExitStack() as stack:
        for module, names in _fakes(gpu).items():
            for name, fake in names.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fake))
        for get, change in switches:
            stack.callback(change, get())
            change(True)
        stack.enter_context(gpu)
        PretendedGPU.active = gpu
        stack.callback(setattr, PretendedGPU, "active", None)
        yield gpu
