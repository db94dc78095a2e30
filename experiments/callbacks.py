"""Callbacks: what happens inside a method while it learns, recorded before its steps without changing anything.

The engine calls them in evaluation mode, without gradients; their `rows` are kept with the trial.
"""

from collections import deque
from collections.abc import Callable

from torch import Tensor

import loss
from config import Config
from methods.mecoq import CodebookAttention, MeCoQ, hard_reconstruction, used_codewords


def quantized(quantizer: CodebookAttention, z: Tensor) -> dict[str, Tensor]:
    """Embeddings `[B, D]` as the quantizer sees them, and what it makes of them, each `[B, M, d]`."""
    return {
        "embedding": quantizer.segments(z),
        "soft": quantizer(z)[1],
        "hard": hard_reconstruction(quantizer, z),
    }


def distance(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of segments `[B, M, d]`."""
    return (a - b).square().sum(dim=2).mean().item()


class CodebookUse:
    """Use of the codebooks, Figure 2: `rows`, one per epoch.

    `vanilla_loss`: the contrastive loss of Eq. 6 without debiasing, memory and regulariser, so that variants can be
    compared; the mean over the epoch's steps. Of the images at the epoch's start: `used` and `perplexity`, see
    `used_codewords`, and `soft_error` and `hard_error`, the mean squared distance of unit segments to what the
    quantizer makes of them.

    Args:
        images: what leaves the backbone's prefix for these images, `[n, ...]`.
    """

    IMAGES = 5000  # at most

    def __init__(self, images: Tensor, T: float) -> None:
        self.images, self.T = images, T
        self.rows: list[dict] = []
        self.losses: list[float] = []

    def __call__(self, method: MeCoQ, epoch: int, step: int, views: Tensor) -> None:
        if step == 0:
            z = method.embed(self.images)
            made = quantized(method.quantizer, z)
            used, perplexity = used_codewords(method.codes(z), method.K)
            errors = {f"{kind}_error": distance(made["embedding"], made[kind]) for kind in ("soft", "hard")}
            self.rows.append({"epoch": epoch, "used": used, "perplexity": perplexity} | errors | {"vanilla_loss": 0.0})
            self.losses = []
        reconstruction = method.quantizer(method(views))[1].flatten(1)
        self.losses.append(float(loss.contrastive_loss(*reconstruction.chunk(2), T=self.T)))
        self.rows[-1]["vanilla_loss"] = sum(self.losses) / len(self.losses)


class FeatureDrift:
    """Movement of the same images' representations within several steps, Eq. 11 and Figure 3: `rows`, one in `EVERY`
    steps, with a column `<kind>_<interval>` for embeddings, soft and hard reconstructions and each of the `INTERVALS`,
    and the errors of quantization `soft_error` and `hard_error`.

    Distances are means over segments. The embedding is normalised segment by segment, as the quantizer does it first.

    Args:
        images: as for `CodebookUse`.
    """

    IMAGES = 1000
    INTERVALS = (1, 10, 100)  # steps
    EVERY = 10

    def __init__(self, images: Tensor) -> None:
        self.images, self.steps = images, 0
        self.rows: list[dict] = []
        self.past: deque[dict[str, Tensor]] = deque(maxlen=max(self.INTERVALS) + 1)

    def __call__(self, method: MeCoQ, epoch: int, step: int, views: Tensor) -> None:
        now = quantized(method.quantizer, method.embed(self.images))
        self.past.append(now)
        self.steps += 1
        if (self.steps - 1) % self.EVERY:
            return
        row = {"step": self.steps - 1, "epoch": epoch}
        for interval in self.INTERVALS:
            if interval < len(self.past):
                then = self.past[-1 - interval]
                row |= {f"{kind}_{interval}": distance(now[kind], then[kind]) for kind in now}  # Eq. 11
        self.rows.append(row | {f"{kind}_error": distance(now["embedding"], now[kind]) for kind in ("soft", "hard")})


# name, which is part of a trial's key -> what makes it of `images`, n -> the features of n training images at most,
# and of a trial's configuration
CALLBACKS: dict[str, Callable[[Callable[[int], Tensor], Config], CodebookUse | FeatureDrift]] = {
    "CodebookUse": lambda images, config: CodebookUse(images(CodebookUse.IMAGES), config.T),
    "FeatureDrift": lambda images, _: FeatureDrift(images(FeatureDrift.IMAGES)),
}
