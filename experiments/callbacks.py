"""What happens inside while a model learns? Looks at it before its steps, without changing anything."""

from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import loss
from methods.mecoq import CodebookAttention, MeCoQ

Look = Callable[[MeCoQ, int, int, Tensor], None]  # model, epoch, step of the epoch, the views of that step


class Watched:
    """A loader of views whose batches are looked at, with the model as it stands then, before they are trained on."""

    def __init__(self, loader, model: MeCoQ, look: Look) -> None:  # noqa: ANN001, as `data.train_loader` gives it
        self.loader, self.model, self.look, self.batch_sampler = loader, model, look, loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        for step, views in enumerate(self.loader):
            training = self.model.training
            with torch.no_grad():
                self.look(self.model.eval(), self.batch_sampler.epoch, step, views)
            self.model.train(training)
            yield views


def hard_reconstruction(quantizer: CodebookAttention, z: Tensor) -> Tensor:
    """Embeddings `[B, D]` -> their nearest codewords `[B, M, d]`, Eq. 15."""
    codewords, codes = quantizer.codewords(), quantizer.hard_codes(z).long()
    return torch.stack([codewords[m][codes[:, m]] for m in range(quantizer.M)], dim=1)


def used_codewords(codes: Tensor, K: int) -> tuple[float, float]:
    """How evenly the codewords of hard codes `[n, M]` are used: the share of them that code any image, and the
    perplexity of their use, exp(entropy), as a share of K; means over codebooks, both 1 where all are used alike."""
    shares = torch.stack([torch.bincount(column.long(), minlength=K) for column in codes.T]).double() / len(codes)
    entropy = -(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum(dim=1)
    return float((shares > 0).double().mean()), float((entropy.exp() / K).mean())


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


class CodebookWatch:
    """How the codebooks fare, Figure 2: `rows`, one an epoch.

    `vanilla_loss`: the contrastive loss of Eq. 6 without debiasing, memory and regulariser, so that variants can be
    compared; the mean over the epoch's steps. Of some images at the epoch's start: `used` and `perplexity`, see
    `used_codewords`, and `soft_error` and `hard_error`, the mean squared distance of unit segments to what the
    quantizer makes of them.

    Args:
        images: what leaves the backbone's prefix for these images, `[n, ...]`.
    """

    IMAGES = 5000  # at most, to look at

    def __init__(self, images: Tensor, args: Namespace) -> None:
        self.images, self.args, self.rows = images, args, []

    def __call__(self, model: MeCoQ, epoch: int, step: int, views: Tensor) -> None:
        if step == 0:
            z = model.embed(self.images)
            made = quantized(model.quantizer, z)
            used, perplexity = used_codewords(model.quantizer.hard_codes(z), model.quantizer.K)
            errors = {f"{kind}_error": distance(made["embedding"], made[kind]) for kind in ("soft", "hard")}
            self.rows.append({"epoch": epoch, "used": used, "perplexity": perplexity} | errors | {"vanilla_loss": 0.0})
            self.losses: list[float] = []
        reconstruction = model.quantizer(model(views))[1].flatten(1)
        self.losses.append(float(loss.contrastive_loss(*reconstruction.chunk(2), T=self.args.T)))
        self.rows[-1]["vanilla_loss"] = sum(self.losses) / len(self.losses)


class DriftWatch:
    """How far representations of the same images move within some steps, Eq. 11 and Figure 3: `rows`, one in `EVERY`
    steps, with a column `<kind>_<interval>` for embeddings, soft and hard reconstructions and each of the `INTERVALS`,
    and the errors of quantization `soft_error` and `hard_error`.

    Distances are means over segments. The embedding is normalised segment by segment, as the quantizer does it first.

    Args:
        images: as for `CodebookWatch`.
    """

    IMAGES = 1000
    INTERVALS = (1, 10, 100)  # steps
    EVERY = 10

    def __init__(self, images: Tensor, args: Namespace) -> None:
        self.images, self.steps, self.rows = images, 0, []
        self.past: deque[dict[str, Tensor]] = deque(maxlen=max(self.INTERVALS) + 1)

    def __call__(self, model: MeCoQ, epoch: int, step: int, views: Tensor) -> None:
        now = quantized(model.quantizer, model.embed(self.images))
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
