"""The interface of a method: all that the engine knows of what it trains, tests and saves."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.backbones import load_weights, read_state_dict


class Method(nn.Module):
    """A backbone and what is learned on it. A method implements `project`, `loss`, `codes` and `tables`.

    `M` and `K`: an image's code is M numbers from 0 to K - 1.

    Args:
        backbone: see `methods.backbones.Backbone`.
    """

    released_keys: ClassVar[dict[str, str]] = {}  # beginnings of keys in the authors' checkpoints -> ours
    ignored_keys: ClassVar[frozenset[str]] = frozenset()  # keys in checkpoints that nothing here needs

    def __init__(self, backbone: nn.Module, M: int, K: int) -> None:
        super().__init__()
        self.backbone, self.M, self.K = backbone, M, K

    # ------------------------------------------------------------ training

    def loss(self, views: Tensor, epoch: int) -> dict[str, Tensor]:
        """The terms of an optimisation step, scalars by TensorBoard tag; "loss/total_loss" is minimised.

        Args:
            views: `[2N, 3, S, S]`, the first views of N images, then their second ones.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Whatever follows the optimiser's step, say filling a memory."""

    def after_validation(self) -> None:
        """Whatever follows a validation of the method while it is trained."""

    def parameter_groups(self, lr: float, backbone_lr: float) -> list[dict]:
        """The optimiser's groups: what is learned besides the backbone, and the backbone's trained blocks."""
        own = [p for name, p in self.named_parameters() if not name.startswith("backbone.")]
        groups = [
            {"params": [p for p in parameters if p.requires_grad], "lr": rate}
            for parameters, rate in ((own, lr), (self.backbone.parameters(), backbone_lr))
        ]
        return [group for group in groups if group["params"]]

    def extra_state(self) -> dict | None:
        """What training needs besides the state dict in order to go on; tensors and plain values."""
        return None

    def load_extra_state(self, state: dict | None) -> None:
        """Take what `extra_state` gave."""

    # ------------------------------------------------------------ encoding and search

    def project(self, features: Tensor) -> Tensor:
        """The backbone's features `[B, backbone.dim]` -> embeddings z `[B, D]`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` -> embeddings z `[B, D]`."""
        return self.project(self.backbone(images))

    def embed(self, x: Tensor) -> Tensor:
        """What leaves the backbone's prefix `[B, ...]` -> embeddings z `[B, D]`."""
        return self.project(self.backbone.suffix(x))

    def codes(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> codes `[B, M]`, uint8 for K <= 256, else int32."""
        raise NotImplementedError

    def query(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> what `tables` takes of a query: the embeddings, if queries are not quantized."""
        return z

    def tables(self, queries: Tensor) -> Tensor:
        """What `query` gave of q queries -> tables `[q, M, K]`; an image's score is the sum of the M entries that its
        code selects, larger is nearer."""
        raise NotImplementedError

    def queries_of_codes(self, codes: Tensor) -> Tensor:
        """Codes `[q, M]` -> what `tables` takes of queries of which nothing else is known."""
        raise NotImplementedError

    def vectors(self, queries: Tensor) -> Tensor:
        """What `query` gave of q queries -> `[q, M d]`, for engines that search by inner products: those of its
        segments with `codewords_for_search` are `tables`. Here the tables themselves, d = K."""
        return self.tables(queries).flatten(1)

    def codewords_for_search(self) -> Tensor:
        """Codewords `[M, K, d]` that belong to `vectors`; here unit vectors, which select a table's entries."""
        return torch.eye(self.K, device=next(self.parameters()).device).expand(self.M, -1, -1)

    # ------------------------------------------------------------ checkpoints

    def check_state(self, state: dict[str, Tensor], path: Path) -> None:
        """Raise InputError, with the flags to give, if a checkpoint's state dict is of another configuration."""

    def load_checkpoint(self, path: Path) -> None:
        """Load `model.cpt` of a run, or of the authors' release.

        Raises InputError if it is not such a file or does not fit.
        """
        state = read_state_dict(path, "--checkpoint")
        for old, new in self.released_keys.items():
            state = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in state.items()}
        self.check_state(state, path)
        keys = set(self.state_dict()) | self.ignored_keys
        load_weights(self, state, keys, f"--checkpoint {path}: does not fit this --backbone")
