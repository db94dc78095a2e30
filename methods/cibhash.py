"""CIBHash: codes of independent bits, learned by a contrastive loss and a bound on their information (Qiu, Su, Ou, Yu,
Chen; IJCAI 2021)."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import loss
import retrieval
from distributed import copy_from_first, gathered_views
from methods.base import Method
from utils import InputError


def straight_through(p: Tensor, threshold: Tensor | float) -> Tensor:
    """Signs of p - threshold `[N, B]`, -1 and 1 (-1 if they are equal); the gradient is taken as the identity."""
    signs = 2 * (p > threshold).to(p.dtype) - 1
    return signs + (p - p.detach())


def zeros_and_ones(signs: Tensor) -> Tensor:
    """Signs `[N, B]` as 0 and 1, Eq. 11: (sign + 1) / 2. A code of zeros has no direction, and thus no gradient: its
    cosine is 0, whose slope would be that of a division by nearly nothing."""
    bits = (signs + 1) / 2
    return bits.masked_fill((bits == 0).all(dim=1, keepdim=True), 0.0)


@dataclass(frozen=True)
class Objective:
    """The choices of the loss.

    Args:
        sampling: codes in training: "bernoulli": b = 1 with probability p, Eq. 11; "sign": p > 1/2, as released.
        alphabet: values of a bit: "01", or "pm": -1 and 1, as released.
        kl_weight: of the KL term, an upper bound on the mutual information of code and view.
        detach_kl: no gradient through the second distribution of a KL, as released.
    """

    T: float = 0.3
    sampling: str = "bernoulli"
    alphabet: str = "01"
    kl_weight: float = 0.001
    detach_kl: bool = False


class CIBHash(Method):
    """An encoder of one hidden layer to the logits of B bits; codes are packed into B / 8 bytes, ranked by Hamming
    distance."""

    def __init__(self, backbone: nn.Module, bits: int, hidden: int, objective: Objective) -> None:
        super().__init__(backbone, M=bits // 8, K=256)
        self.encoder = nn.Sequential(nn.Linear(backbone.dim, hidden), nn.ReLU(), nn.Linear(hidden, bits))
        self.objective = objective

    def project(self, features: Tensor) -> Tensor:
        return self.encoder(features)

    def loss(self, views: Tensor, epoch: int) -> dict[str, Tensor]:
        """NT-Xent of both views' codes, and the KL term; "quant_err" is the mean squared distance of 2p - 1 to its
        sign, the code at test."""
        objective = self.objective
        p = gathered_views(self(views)).sigmoid()  # [2N, B]
        threshold = 0.5
        if objective.sampling == "bernoulli":
            copy_from_first(threshold := torch.rand_like(p))
        codes = straight_through(p, threshold)
        if objective.alphabet == "01":
            codes = zeros_and_ones(codes)
        contrastive = loss.contrastive_loss(*codes.chunk(2), T=objective.T)
        kl = self.divergence(*p.chunk(2))
        soft = 2 * p.detach() - 1
        return {
            "loss/contrastive": contrastive,
            "loss/kl": kl,
            "loss/total_loss": contrastive + objective.kl_weight * kl,
            "quant_err": loss.quantization_error(soft, soft.sign()),
        }

    def divergence(self, p: Tensor, q: Tensor) -> Tensor:
        """The mean of KL(p, q) and KL(q, p) of the two views' probabilities `[N, B]`."""
        fixed_p, fixed_q = (p.detach(), q.detach()) if self.objective.detach_kl else (p, q)
        return (loss.bernoulli_kl(p, fixed_q) + loss.bernoulli_kl(q, fixed_p)) / 2

    def codes(self, z: Tensor) -> Tensor:
        return retrieval.pack_bits(z > 0)

    def query(self, z: Tensor) -> Tensor:
        return self.codes(z)

    def tables(self, queries: Tensor) -> Tensor:
        return retrieval.hamming_tables(queries)

    def queries_of_codes(self, codes: Tensor) -> Tensor:
        return codes

    def vectors(self, queries: Tensor) -> Tensor:
        """Bits as signs."""
        return retrieval.byte_signs(queries.device)[queries.long()].flatten(1)

    def codewords_for_search(self) -> Tensor:
        """Bytes as signs, d = 8."""
        return retrieval.byte_signs(self.encoder[0].weight.device).expand(self.M, -1, -1)

    def check_state(self, state: dict[str, Tensor], path: Path) -> None:
        hidden, bits = (state.get(f"encoder.{layer}.weight") for layer in (0, 2))
        if hidden is None or bits is None or hidden.dim() != 2 or bits.dim() != 2:
            raise InputError(f"--checkpoint {path}: there is no encoder of two layers in it")
        if (len(hidden), len(bits)) != (len(self.encoder[0].weight), len(self.encoder[2].weight)):
            raise InputError(
                f"--checkpoint {path}: of another configuration; give --code_length {len(bits)} "
                f"--hidden_dim {len(hidden)}"
            )


def build(backbone: nn.Module, config: Namespace) -> CIBHash:
    """The method that the flags describe."""
    objective = Objective(config.T, config.sampling, config.alphabet, config.kl_weight, config.detach_kl)
    return CIBHash(backbone, config.code_length, config.hidden_dim, objective)
