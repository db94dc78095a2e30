"""The best model's file, written while a GPU trains on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor, nn

from utils import write_tensors


def save_model(model: nn.Module, path: Path) -> None:
    """The state dict, on the CPU: readable without a GPU."""
    save_state(model.state_dict(), path)


def save_state(state: dict[str, Tensor], path: Path) -> None:
    write_tensors({name: tensor.cpu() for name, tensor in state.items()}, path)


class BackgroundWriter:
    """A thread that writes one model after the other, so that a GPU need not wait for the disk. As a context, it ends
    once all is written."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def save(self, model: nn.Module, path: Path, done: Callable[[], object]) -> None:
        """Begin to write a model as it stands now; `done` is called once the file is there."""
        self.wait()
        state = {name: tensor.detach() for name, tensor in copied(model).items()}
        self.writing = self.pool.submit(lambda: (save_state(state, path), done()))

    def wait(self) -> None:
        """Return once nothing is being written. Raises what the last writing met."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.wait()


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with copies on the device of all but frozen parameters, which never change."""
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else tensor.clone()
        for name, tensor in state.items()
    }
