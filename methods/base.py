"""The interface of a method: all that the engine knows of what it trains, tests and saves."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones import load_weights, read_state_dict
from utils import InputError


class Method(nn.Module):
    """A backbone and what is learned on it. A method implements `project`, `loss`, `codes` and `tables`.

    `M` and `K`: an image's code is M numbers from 0 to K - 1. `feature_mean`: what the backbone's features are centred
    by before all are brought to one length (`--normalize_features`), `[backbone.dim]`; None: they stay as they are.

    Args:
        backbone: see `methods.backbones.Backbone`.
    """

    released_keys: ClassVar[dict[str, str]] = {}  # beginnings of keys in the authors' checkpoints -> ours
    ignored_keys: ClassVar[frozenset[str]] = frozenset()  # keys in checkpoints that nothing here needs

    def __init__(self, backbone: nn.Module, M: int, K: int) -> None:
        super().__init__()
        self.backbone, self.M, self.K = backbone, M, K
        self.register_buffer("feature_mean", None)

    # ------------------------------------------------------------ features

    def normalize_features(self) -> None:
        """Let features be normalised from now on; `centre_features` or a checkpoint says what they are centred by."""
        self.feature_mean = torch.zeros(self.backbone.dim)

    @torch.inference_mode()
    def centre_features(self, batches: Iterable[Tensor]) -> None:
        """Centre features by their mean over images.

        Args:
            batches: what leaves the backbone's prefix for these images, `[B, ...]` each.
        """
        self.eval()
        sums = [(self.backbone.suffix(batch.float()).double().sum(dim=0), len(batch)) for batch in batches]
        totals, counts = zip(*sums, strict=True)
        self.feature_mean.copy_(sum(totals) / sum(counts))

    def normalized(self, features: Tensor) -> Tensor:
        """Features `[B, backbone.dim]` as `project` takes them: if normalised, of length sqrt(dim), so that a number is
        about 1, as layers are initialised for; with those of unit length the projection's bias would outweigh them."""
        if self.feature_mean is None:
            return features
        return math.sqrt(self.backbone.dim) * F.normalize(features - self.feature_mean, dim=-1)

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
        """The backbone's features `[B, backbone.dim]`, normalised if they are to be -> embeddings z `[B, D]`."""
        raise NotImplementedError

    def of_features(self, features: Tensor) -> Tensor:
        """The backbone's features `[B, backbone.dim]`, as it gives them -> embeddings z `[B, D]`."""
        return self.project(self.normalized(features))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, S, S]` -> embeddings z `[B, D]`."""
        return self.of_features(self.backbone(images))

    def embed(self, x: Tensor) -> Tensor:
        """What leaves the backbone's prefix `[B, ...]` -> embeddings z `[B, D]`."""
        return self.of_features(self.backbone.suffix(x))

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

    def quantization_error(self, z: Tensor) -> Tensor | None:
        """The mean squared difference of embeddings `[B, D]` and what they are quantized to; None if nothing is."""

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
        if ("feature_mean" in state) != (self.feature_mean is not None):
            advice = "give" if "feature_mean" in state else "leave out"
            raise InputError(f"--checkpoint {path}: of another configuration; {advice} --normalize_features")
        self.check_state(state, path)
        keys = set(self.state_dict()) | self.ignored_keys
        load_weights(self, state, keys, f"--checkpoint {path}: does not fit this --backbone")
