"""SPQ: a product quantizer without normalisation, learned from scratch with its network (Jang, Cho; ICCV 2021)."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import loss
import retrieval
from distributed import gathered
from methods.base import Method
from utils import InputError


def init_weight(weight: Tensor, how: str) -> None:
    """Draw a matrix by Xavier's rule, "normal" with gain 0.1 or "uniform" with gain 1."""
    if how == "normal":
        nn.init.xavier_normal_(weight, gain=0.1)
    else:
        nn.init.xavier_uniform_(weight)


class SoftQuantizer(nn.Module):
    """M codebooks of K codewords of L dimensions. Neither they nor the embeddings are normalised.

    Args:
        scale: tau_q, sharpness of the soft codes, a factor.
        init: see `init_weight`; drawn as one matrix of K rows, the codebooks side by side.
    """

    def __init__(self, M: int, K: int, L: int, scale: float, init: str = "uniform") -> None:
        super().__init__()
        self.M, self.K, self.L, self.scale = M, K, L, scale
        whole = torch.empty(K, M * L)
        init_weight(whole, init)
        self.codebooks = nn.Parameter(whole.view(K, M, L).transpose(0, 1).contiguous())

    def distances(self, x: Tensor) -> Tensor:
        """Embeddings `[B, M L]` -> ||x_m - c_mk||, `[B, M, K]`."""
        return retrieval.codeword_distances(x, self.codebooks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, M L]` -> soft codes `[B, M, K]`, softmax_k(-tau_q ||x_m - c_mk||^2), and soft reconstructions
        z `[B, M L]`, z_m = sum_k p_mk c_mk."""
        soft_codes = (-self.scale * self.distances(x).square()).softmax(dim=-1)
        return soft_codes, torch.einsum("bmk,mkl->bml", soft_codes, self.codebooks).flatten(1)

    def hard_codes(self, x: Tensor) -> Tensor:
        """Embeddings `[B, M L]` -> codes `[B, M]`, the nearest codeword of each codebook; uint8 for K <= 256, else
        int32."""
        return self.distances(x).argmin(dim=-1).to(torch.uint8 if self.K <= 256 else torch.int32)


@dataclass(frozen=True)
class Objective:
    """`T`: tau; for `pairs` and `anchors` see `loss.cross_quantized_loss`. The two directions, embeddings of the first
    views against reconstructions of the second and the reverse, are added if `pairs` is "all", as in the released code;
    if "cross", the loss is their mean."""

    T: float = 0.5
    pairs: str = "cross"
    anchors: str = "embeddings"


class SPQ(Method):
    """Linear head to embeddings x of M L dimensions, and quantizer.

    Args:
        head_init: "normal": Xavier's rule with gain 0.1, no bias; "uniform": Xavier's rule, and torch's default bias.
        freeze_bn: from the first validation on, training leaves all batch normalisation at its running statistics, as
            the released code does; its scale and shift still learn.
    """

    def __init__(
        self,
        backbone: nn.Module,
        quantizer: SoftQuantizer,
        objective: Objective,
        head_init: str = "normal",
        freeze_bn: bool = False,
    ) -> None:
        super().__init__(backbone, quantizer.M, quantizer.K)
        self.quantizer, self.objective, self.freeze_bn = quantizer, objective, freeze_bn
        self.head = nn.Linear(backbone.dim, quantizer.M * quantizer.L, bias=head_init == "uniform")
        init_weight(self.head.weight, head_init)
        self.bn_frozen = False

    def train(self, mode: bool = True) -> "SPQ":
        super().train(mode)
        if self.bn_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def project(self, features: Tensor) -> Tensor:
        return self.head(features)

    def loss(self, views: Tensor, epoch: int) -> dict[str, Tensor]:
        # passes of their own, so that batch normalisation sees each view alone
        x_a, x_b = (gathered(self(view)) for view in views.chunk(2))  # [N, M L]
        (_, z_a), (_, z_b) = self.quantizer(x_a), self.quantizer(x_b)
        choices = vars(self.objective)
        ab = loss.cross_quantized_loss(x_a, z_b, **choices)
        ba = loss.cross_quantized_loss(x_b, z_a, **choices)
        error = loss.quantization_error(torch.cat([x_a, x_b]), torch.cat([z_a, z_b]))
        total = ab + ba if self.objective.pairs == "all" else (ab + ba) / 2
        return {"loss/ab": ab, "loss/ba": ba, "loss/total_loss": total, "quant_err": error}

    def after_validation(self) -> None:
        self.bn_frozen = self.freeze_bn

    def extra_state(self) -> dict:
        return {"bn_frozen": self.bn_frozen}

    def load_extra_state(self, state: dict | None) -> None:
        self.bn_frozen = state["bn_frozen"]

    def codes(self, z: Tensor) -> Tensor:
        return self.quantizer.hard_codes(z)

    def tables(self, queries: Tensor) -> Tensor:
        """Distances, not squared, and negative: larger is nearer."""
        return -self.quantizer.distances(queries)

    def quantization_error(self, z: Tensor) -> Tensor:
        return loss.quantization_error(z, self.quantizer(z)[1])

    def queries_of_codes(self, codes: Tensor) -> Tensor:
        return retrieval.reconstruction(codes, self.quantizer.codebooks).flatten(1)

    def check_state(self, state: dict[str, Tensor], path: Path) -> None:
        codebooks = state.get("quantizer.codebooks")
        if codebooks is None or codebooks.dim() != 3 or "head.weight" not in state:
            raise InputError(f"--checkpoint {path}: there is no head, or there are no codebooks [M, K, L], in it")
        M, K, L = codebooks.shape
        init, own = ("uniform" if biased else "normal" for biased in ("head.bias" in state, self.head.bias is not None))
        if (*codebooks.shape, init) != (*self.quantizer.codebooks.shape, own):
            raise InputError(
                f"--checkpoint {path}: of another configuration; give --M {M} --K {K} --L {L} --head_init {init}"
            )


def build(backbone: nn.Module, config: Namespace) -> SPQ:
    """The method that the flags describe."""
    quantizer = SoftQuantizer(config.M, config.K, config.L, config.soft_quantization_scale, config.head_init)
    objective = Objective(config.T, config.pairs, config.anchors)
    return SPQ(backbone, quantizer, objective, config.head_init, config.freeze_bn)
