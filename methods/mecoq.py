"""MeCoQ: codebook attention (the quantizer), the code memory, and the objective of Eq. 14."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loss
import retrieval
from distributed import gathered_views
from methods.backbones import plain_numbers
from methods.base import Method
from utils import InputError

# ---------------------------------------------------------------- quantizer and memory


class CodebookAttention(nn.Module):
    """The quantizer: M codebooks of K codewords of d = D / M dimensions, Eq. 1-5 and 15.

    Codewords are stored with a small norm and normalised where they are used: their direction alone matters, and
    a short vector turns further for the same gradient, which lets them keep up with the projection.
    """

    INITIAL_NORM = 0.1

    def __init__(self, codebooks: "Codebooks") -> None:
        super().__init__()
        self.M, self.K, self.d, self.alpha = codebooks.M, codebooks.K, codebooks.D // codebooks.M, codebooks.alpha
        shape = self.M, self.K, self.d
        # normalised numbers of a normal distribution have no preferred direction; those of a uniform one, do
        drawn = torch.randn(shape) if codebooks.init == "sphere" else torch.empty(shape).uniform_(-1, 1)
        self.codebooks = nn.Parameter(self.INITIAL_NORM * F.normalize(drawn, dim=-1), requires_grad=codebooks.trained)

    def codewords(self) -> Tensor:
        """Unit codewords `[M, K, d]`."""
        return F.normalize(self.codebooks, dim=-1)

    def segments(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> unit segments `[B, M, d]`."""
        return F.normalize(z.view(-1, self.M, self.d), dim=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, D]` -> soft codes p `[B, M, K]` (Eq. 2-5) and soft reconstruction `[B, M, d]` (Eq. 1)."""
        codewords = self.codewords()
        similarity = torch.einsum("bmd,mkd->bmk", self.segments(z), codewords)
        soft_codes = (self.alpha * similarity).softmax(dim=-1)
        return soft_codes, self.reconstruct(soft_codes, codewords)

    @staticmethod
    def reconstruct(soft_codes: Tensor, codewords: Tensor) -> Tensor:
        """Soft codes `[B, M, K]` and codewords `[M, K, d]` -> `[B, M, d]`, Eq. 1."""
        return torch.einsum("bmk,mkd->bmd", soft_codes, codewords)

    def hard_codes(self, z: Tensor) -> Tensor:
        """Embeddings `[B, D]` -> codes `[B, M]`, the nearest codeword of each codebook, Eq. 15.

        uint8 (one byte per codebook) for K <= 256, else int32.
        """
        nearest = torch.einsum("bmd,mkd->bmk", self.segments(z), self.codewords()).argmax(dim=-1)
        return nearest.to(torch.uint8 if self.K <= 256 else torch.int32)


class CodeMemory(nn.Module):
    """A queue of the last `size` entries, `[size, *shape]`; the oldest leave first. Slots never written stay out.

    Args:
        advance: slots by which it moves on with every batch of entries, if that is larger than the batch: after a
            partial one the released code moves on by a whole one, so that older entries stay. 0: by what was written.
    """

    def __init__(self, size: int, *shape: int, advance: int = 0) -> None:
        super().__init__()
        self.size, self.advance = size, advance
        self.next = 0  # the slot that is written next
        self.register_buffer("codes", torch.zeros(size, *shape), persistent=False)
        self.written = torch.zeros(size, dtype=torch.bool)  # on the CPU: the host must not wait for the device

    @torch.no_grad()
    def enqueue(self, entries: Tensor) -> None:
        """Append entries `[B, *shape]`, in their order; any B."""
        entries = entries[-self.size :].detach()
        step = max(len(entries), self.advance)
        for tensor, values in ((self.codes, entries), (self.written, True)):
            tensor[(self.next + torch.arange(len(entries), device=tensor.device)) % self.size] = values
        self.next = (self.next + step) % self.size

    def entries(self) -> Tensor:
        """The entries held, `[B, *shape]`, in no particular order."""
        held = int(self.written.sum())
        if self.written[:held].all():
            return self.codes[:held]
        return self.codes[self.written.nonzero()[:, 0].to(self.codes.device, non_blocking=True)]


def hard_reconstruction(quantizer: CodebookAttention, z: Tensor) -> Tensor:
    """Embeddings `[B, D]` -> their nearest codewords `[B, M, d]`, Eq. 15."""
    return retrieval.reconstruction(quantizer.hard_codes(z), quantizer.codewords())


def used_codewords(codes: Tensor, K: int) -> tuple[float, float]:
    """Evenness of the use of codewords by hard codes `[n, M]`: the share of them that code any image, and the
    perplexity of their use, exp(entropy), as a share of K; means over codebooks, both 1 if all are used alike."""
    shares = torch.stack([torch.bincount(column.long(), minlength=K) for column in codes.T]).double() / len(codes)
    entropy = -(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum(dim=1)
    return float((shares > 0).double().mean()), float((entropy.exp() / K).mean())


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class Codebooks:
    """M codebooks of K codewords for embeddings of D dimensions; `alpha`: sharpness of the soft codes, Eq. 2;
    `trained`: whether they learn. `init`: "sphere": uniform directions; "xavier": each number uniform, as in the
    released code."""

    M: int
    K: int
    D: int
    alpha: float = 10.0
    trained: bool = True
    init: str = "sphere"


@dataclass(frozen=True)
class Memory:
    """A code memory of `size` entries, used as negatives from epoch `begin` on, Eq. 12-13.

    `kind`: what it keeps (paper, Table 2): "soft" codes, "hard" codes (as one-hot rows), or the "feature", the
    embedding before quantization. `advance`: see `CodeMemory`.
    """

    kind: str
    size: int
    begin: int = 0
    advance: int = 0


@dataclass(frozen=True)
class Objective:
    """The choices of Eq. 6-8 and 13-14; for the last four fields see `loss.contrastive_loss`."""

    T: float
    pos_prior: float = 0.0
    diversity_weight: float = 0.5  # gamma
    entropy_weight: float = 0.0  # lambda, of the released code
    pairing: str = "own"
    debias_memory: bool = True
    negative_bound: str = "dcl"
    normalize_memory: bool = True


@dataclass(frozen=True)
class Search:
    """Whether queries are quantized too, and whether their segments are divided by their length, Eq. 16."""

    symmetric: bool = False
    normalize_query: bool = True


class MeCoQ(Method):
    """Linear projection to D dimensions, quantizer, and (in training) the code memory."""

    released_keys: ClassVar = {"vgg.": "backbone.net.", "pq_layer._C": "quantizer.codebooks"}
    ignored_keys: ClassVar = frozenset({"backbone.net.classifier.6.weight", "backbone.net.classifier.6.bias"})

    def __init__(
        self,
        backbone: nn.Module,
        codebooks: Codebooks,
        objective: Objective,
        memory: Memory | None = None,
        search: Search | None = None,
    ) -> None:
        super().__init__(backbone, codebooks.M, codebooks.K)
        M, K, D = codebooks.M, codebooks.K, codebooks.D
        self.objective, self.search, self.memory_options = objective, search or Search(), memory
        self.projection = nn.Linear(backbone.dim, D)
        self.quantizer = CodebookAttention(codebooks)
        self.memory = None
        if memory:
            self.memory = CodeMemory(memory.size, M, D // M if memory.kind == "feature" else K, advance=memory.advance)
        self.latest: tuple[Tensor, Tensor] | None = None  # embeddings and soft codes of the step

    def project(self, features: Tensor) -> Tensor:
        return self.projection(features)

    def loss(self, views: Tensor, epoch: int) -> dict[str, Tensor]:
        """Eq. 14 without its weight decay, which the optimiser applies."""
        z = gathered_views(self(views))  # [2N, D]
        quantizer, objective = self.quantizer, self.objective
        soft_codes, reconstruction = quantizer(z)  # [2N, M, K], [2N, M, d]
        codewords = quantizer.codewords()
        use_memory = self.memory is not None and epoch >= self.memory_options.begin
        contrastive = loss.contrastive_loss(
            *reconstruction.flatten(1).chunk(2),
            self.recall(codewords).flatten(1) if use_memory else None,
            T=objective.T,
            pos_prior=objective.pos_prior,
            pairing=objective.pairing,
            debias_memory=objective.debias_memory,
            negative_bound=objective.negative_bound,
            normalize_memory=objective.normalize_memory,
        )
        entropy = loss.code_entropy(soft_codes)
        diversity = loss.codeword_diversity(codewords)
        self.latest = z.detach(), soft_codes.detach()
        return {
            "loss/simclr_loss": contrastive,
            "loss/entropy_reg_loss": entropy,
            "loss/codeword_reg_loss": diversity,
            "loss/total_loss": contrastive
            + objective.entropy_weight * entropy
            + objective.diversity_weight * diversity,  # Eq. 14
            "quant_err": loss.quantization_error(quantizer.segments(z), reconstruction),
        }

    def after_step(self) -> None:
        """Enqueue the step's soft codes, Eq. 12."""
        if self.memory is not None:
            self.remember(*self.latest)

    def remember(self, z: Tensor, soft_codes: Tensor) -> None:
        """Enqueue embeddings `[B, D]` with their soft codes `[B, M, K]`, in the form that the memory keeps."""
        if self.memory_options.kind == "feature":
            self.memory.enqueue(self.quantizer.segments(z))
        elif self.memory_options.kind == "hard":
            self.memory.enqueue(F.one_hot(soft_codes.argmax(dim=-1), self.quantizer.K).to(soft_codes.dtype))
        else:
            self.memory.enqueue(soft_codes)

    def recall(self, codewords: Tensor) -> Tensor:
        """The memory's vectors `[B, M, d]`: codes are reconstructed with today's codewords, Eq. 12."""
        entries = self.memory.entries()
        return entries if self.memory_options.kind == "feature" else self.quantizer.reconstruct(entries, codewords)

    def extra_state(self) -> dict | None:
        memory = self.memory
        return memory and {"codes": memory.codes, "next": memory.next, "written": memory.written}

    def load_extra_state(self, state: dict | None) -> None:
        if self.memory is not None:
            self.memory.codes.copy_(state["codes"])
            self.memory.next, self.memory.written = state["next"], state["written"].cpu()

    def codes(self, z: Tensor) -> Tensor:
        return self.quantizer.hard_codes(z)

    def query(self, z: Tensor) -> Tensor:
        return self.codes(z) if self.search.symmetric else z

    def tables(self, queries: Tensor) -> Tensor:
        codewords = self.quantizer.codewords()
        if self.search.symmetric:
            return retrieval.symmetric_tables(queries, codewords)
        return retrieval.lookup_tables(queries, codewords, self.search.normalize_query)

    def quantization_error(self, z: Tensor) -> Tensor:
        return loss.quantization_error(self.quantizer.segments(z), self.quantizer(z)[1])

    def queries_of_codes(self, codes: Tensor) -> Tensor:
        if self.search.symmetric:
            return codes
        return retrieval.reconstruction(codes, self.quantizer.codewords()).flatten(1)

    def vectors(self, queries: Tensor) -> Tensor:
        """Segments; of unit length, if Eq. 16 has them so; the codewords that stand for them, if queries are quantized
        too."""
        if self.search.symmetric:
            return retrieval.reconstruction(queries, self.quantizer.codewords()).flatten(1)
        return self.quantizer.segments(queries).flatten(1) if self.search.normalize_query else queries

    def codewords_for_search(self) -> Tensor:
        return self.quantizer.codewords()

    def check_state(self, state: dict[str, Tensor], path: Path) -> None:
        codebooks = state.get("quantizer.codebooks")
        if codebooks is None or codebooks.dim() != 3:
            raise InputError(f"--checkpoint {path}: there are no codebooks [M, K, D / M] in it")
        M, K, d = codebooks.shape
        if (M, K, d) != (self.M, self.K, self.quantizer.d):
            raise InputError(f"--checkpoint {path}: made with other codebooks; give --M {M} --K {K} --feat_dim {M * d}")
        if plain_numbers(codebooks, torch.float32) and not codebooks.float().norm(dim=-1).all():
            raise InputError(f"--checkpoint {path}: a codeword is zero: it has no direction")


def build(backbone: nn.Module, config: Namespace) -> MeCoQ:
    """The method that the flags describe."""
    memory = None
    if config.memory != "none":
        advance = 2 * config.batch_size if config.queue_advance == "batch" else 0
        memory = Memory(config.memory, config.queue_size, config.queue_begin_epoch, advance)
    objective = Objective(
        T=config.T,
        pos_prior=config.pos_prior,
        diversity_weight=config.hp_gamma,
        entropy_weight=config.hp_lambda,
        pairing=config.pairing,
        debias_memory=config.debias_memory,
        negative_bound=config.negative_bound,
        normalize_memory=config.normalize_memory,
    )
    trained = config.codebooks == "trained"
    codebooks = Codebooks(config.M, config.K, config.feat_dim, config.alpha, trained, config.codebook_init)
    return MeCoQ(backbone, codebooks, objective, memory, Search(config.symmetric_distance, config.normalize_query))
