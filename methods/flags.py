"""Flags as rows: their form, the rules for their values, and the flags of each method. Imports no PyTorch."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from utils import InputError

Rule = Callable[[object], str | None]  # a value -> what is wrong with it

# What a flag can change, from which the keys of resumed runs, sweeps and caches are taken:
#   images    the images and labels of a run           features  what the frozen layers make of a test image
#   views     the augmented views                      result    anything else that comes out
#   weights   results, by a file or folder whose content is compared instead of its name
#   speed     how fast or safely a run goes; rounding    place     where it reads and writes
#   action    what is done with a run, not what it is
AFFECTS = ("images", "features", "views", "result", "weights", "speed", "place", "action")


@dataclass(frozen=True)
class Flag:
    """One row of the command line.

    Args:
        default: None: it depends on other flags, see `config.resolve`. A bool makes a switch.
        affects: one of `AFFECTS`.
        rule: what values make sense by themselves.
        recipe: its values in the recipes `paper` and `release`, if they differ; they are its defaults.
        usual: what stands for the default in keys if `default` is None.
    """

    name: str
    default: object
    affects: str
    help: str
    rule: Rule | None = None
    choices: Collection[str] | None = None
    type: Callable | None = None
    recipe: tuple[object, object] | None = None
    usual: object = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def absent_from_keys(self) -> object:
        """The value at which the flag is in no key."""
        if self.recipe:
            return self.recipe[0]
        return self.usual if self.default is None else self.default

    def fault(self, value: object) -> str | None:
        """What is wrong with a value; None if it makes sense."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if isinstance(value, float) and abs(value) > 1e30:
            return "is too large"
        if isinstance(value, int) and value >= 2**32:
            return "is beyond any machine"
        return self.rule(value) if self.rule and value is not None else None


@dataclass(frozen=True)
class Depends:
    """A method's default that depends on other flags, in words; `MethodRow.resolve` or `config.resolve` fills it in."""

    words: str


def at_least(low: float, reason: str = "") -> Rule:
    return lambda value: None if value >= low else f"must be at least {low}{reason}"


def not_negative(value: float) -> str | None:
    return None if value >= 0 else "must not be negative"


def positive(value: float) -> str | None:
    return None if value > 0 else "must be positive"


def code_shape(values: dict) -> tuple[int, int]:
    """M codebooks of K codewords."""
    return values["M"], values["K"]


def between(low: float, high: float, words: str) -> Rule:
    """low <= value < high."""
    return lambda value: None if low <= value < high else words


# ---------------------------------------------------------------- MeCoQ

MECOQ: dict[str, tuple[Flag, ...]] = {
    "MeCoQ: quantizer (Eq. 1-5)": (
        Flag("feat_dim", 64, "result", "D, dimensions of the embedding", at_least(1)),
        Flag("M", 4, "result", "M, number of codebooks: a code has M log2 K bits", at_least(1)),
        Flag("K", 256, "result", "K, codewords per codebook",
             between(2, 65537, "must be from 2 to 65536, two bytes per codebook at most")),
        Flag("codebooks", None, "result", "learn the codebooks, Eq. 14, or leave them as they were drawn, as the "
             "released code does", choices=("trained", "frozen"), recipe=("trained", "frozen")),
        Flag("codebook_init", None, "result", "how codewords are drawn: sphere: uniform directions; xavier: each "
             "number uniform, then normalised, as in the released code, so that they crowd towards a cube's diagonals",
             choices=("sphere", "xavier"), recipe=("sphere", "xavier")),
        Flag("alpha", 10.0, "result", "alpha, sharpness of the soft codes, Eq. 2", positive),
    ),
    "MeCoQ: loss and code memory (Eq. 6-14)": (
        Flag("T", 0.1, "result", "tau, temperature, Eq. 6",
             at_least(0.0001, ": exp(1 / tau) has to mean something")),
        Flag("mode", "simple", "result", "contrastive loss without (rho+ = 0) or with debiasing, Eq. 7",
             choices=("simple", "debias")),
        Flag("pos_prior", 0.0, "result", "rho+, share of false negatives, in [0, 1); counts with --mode debias",
             between(0, 1, "must be in [0, 1)")),
        Flag("hp_gamma", 0.5, "result", "gamma, weight of the codeword diversity Omega, Eq. 8 and 14", not_negative),
        Flag("hp_lambda", None, "result", "lambda, weight of the mean entropy of the soft codes, a term of the "
             "released code that the paper does not have", not_negative, type=float, recipe=(0.0, 1.0)),
        Flag("pairing", None, "result", "own: each query's positive with its own negatives, Eq. 6; all: with those of "
             "every query, a mean over a 2N x 2N table, as the released code does", choices=("own", "all"),
             recipe=("own", "all")),
        Flag("debias_memory", None, "result", "correct the negative term for the memory's negatives too, Eq. 13; the "
             "released code counts those of the batch only", recipe=(True, False)),
        Flag("negative_bound", None, "result", "lower bound of the negative term: dcl: n exp(-1 / tau); release: "
             "exp(-(2N - 2) / tau), practically 0", choices=("dcl", "release"), recipe=("dcl", "release")),
        Flag("normalize_memory", None, "result", "compare the memory's vectors by their cosine, like the batch's; the "
             "released code leaves them their length", recipe=(True, False)),
        Flag("memory", None, "result", "what the memory keeps: soft codes, hard codes, or the embeddings before "
             "quantization, Table 2 (default: soft; none without --queue_begin_epoch)",
             choices=("soft", "hard", "feature", "none"), usual="none"),
        Flag("queue_begin_epoch", -1, "result", "first epoch (from 0) that uses the code memory, Eq. 12-13; -1: never",
             at_least(-1, ": an epoch from 0, or -1 for no memory")),
        Flag("queue_size", 384, "result", "N_M, entries that the memory holds", at_least(1)),
        Flag("queue_advance", None, "result", "how far the memory moves on after a partial last batch: entries: by "
             "what it wrote; batch: by a whole batch, so that older entries stay, as in the released code",
             choices=("entries", "batch"), recipe=("entries", "batch")),
    ),
    "MeCoQ: search (Eq. 15-17)": (
        Flag("symmetric_distance", False, "result", "quantize the queries too"),
        Flag("normalize_query", None, "result", "divide the query's segments by their length, Eq. 16; the released "
             "code does not", recipe=(True, False)),
    ),
}  # fmt: skip


def resolve_mecoq(values: dict, _: bool) -> None:
    """Fill in what depends on other flags of MeCoQ. Raises InputError if they do not go together."""
    if values["feat_dim"] % values["M"]:
        raise InputError(
            f"--feat_dim {values['feat_dim']}: must be a multiple of --M {values['M']}: one segment per codebook"
        )
    if values["memory"] not in (None, "none") and values["queue_begin_epoch"] == -1:
        raise InputError(f"--memory {values['memory']}: say from which epoch on, with --queue_begin_epoch")
    values["memory"] = values["memory"] or "soft"
    if values["memory"] == "none" or values["queue_begin_epoch"] == -1:
        values["memory"], values["queue_begin_epoch"] = "none", -1
    if values["mode"] == "simple":
        values["pos_prior"] = 0.0


# ---------------------------------------------------------------- SPQ


def power_of_two(value: float) -> str | None:
    fits = 2 <= value <= 65536 and value == 2 ** round(math.log2(value))
    return None if fits else "must be a power of two from 2 to 65536: a codebook gives log2 K whole bits"


SPQ: dict[str, tuple[Flag, ...]] = {
    "SPQ: quantizer": (
        Flag("M", 8, "result", "M, number of codebooks: a code has M log2 K bits", at_least(1)),
        Flag("K", 16, "result", "K, codewords per codebook, a power of two", power_of_two),
        Flag("L", 16, "result", "L, dimensions of a codeword; the embedding has M L", at_least(1)),
        Flag("soft_quantization_scale", 5.0, "result", "tau_q, sharpness of the soft codes, a factor; the paper "
             "prints a divisor and means 0.2, the same", positive),
        Flag("head_init", None, "result", "how head and codebooks begin: normal: Xavier's with gain 0.1 and no bias, "
             "as the released code had it when the paper appeared; uniform: Xavier's with a bias, as it has today",
             choices=("normal", "uniform"), recipe=("normal", "uniform")),
        Flag("head_only", False, "result", "learn the head and the codebooks alone, on the features of a pretrained "
             "--backbone"),
    ),
    "SPQ: loss and training": (
        Flag("T", 0.5, "result", "tau, temperature of the contrastive loss", at_least(0.001)),
        Flag("pairs", None, "result", "cross: an image's negatives are the others in the other view, the paper's "
             "figure; all: both views, embeddings and soft reconstructions alike, as the released code has it",
             choices=("cross", "all"), recipe=("cross", "all")),
        Flag("anchors", None, "result", "embeddings: they alone are anchors, as the arrows of the paper's figure "
             "read; both: soft reconstructions too, as the released code has it", choices=("embeddings", "both"),
             recipe=("embeddings", "both")),
        Flag("freeze_bn", None, "result", "leave batch normalisation at its running statistics from the first "
             "validation on, as the released code does by accident (no source on the paper has it)",
             recipe=(False, True)),
    ),
}  # fmt: skip

# SPQ's paper could not be read: what its column says comes from its figures and from its authors
SPQ_DEFAULTS: dict[str, object] = {
    "protocol": "official", "image_size": Depends("32, or 224 for a pretrained backbone"),
    "backbone": "resnet18_small", "augmentation": ("SPQ", "SPQ-release"),
    "epoch_num": 5000, "batch_size": 256, "drop_last": True, "optimizer": "Adam", "lr": 3e-4, "hp_beta": 1e-5,
    "schedule": ("epoch", "returning"), "warmup_epoch_num": 10, "start_lr": Depends("as --lr"), "final_lr": 0.0,
    "keep_lr_scaling": True, "detect_anomaly": False, "topK": 1000, "eval_interval": 100, "monitor_counter": 5000,
}  # fmt: skip


def resolve_spq(values: dict, pretrained: bool) -> None:
    """Fill in what depends on other flags of SPQ. Raises InputError if they do not go together."""
    name = values["backbone"]
    if pretrained and not values["head_only"]:
        raise InputError(
            f"--backbone {name}: SPQ trains a network of its own from scratch, --backbone resnet18_small; to learn its "
            "head and codebooks alone on features that are frozen, add --head_only"
        )
    if values["head_only"] and (not pretrained or values["trainable_layer_num"]):
        raise InputError("--head_only: needs a pretrained --backbone, and --trainable_layer_num 0")
    if values["start_lr"] is None:
        values["start_lr"] = values["lr"]


# ---------------------------------------------------------------- CIBHash


def whole_bytes(value: float) -> str | None:
    return None if value >= 8 and value % 8 == 0 else "must be a multiple of 8: codes are whole bytes"


CIBHASH: dict[str, tuple[Flag, ...]] = {
    "CIBHash: encoder": (
        Flag("code_length", 16, "result", "B, bits of a code, a multiple of 8", whole_bytes),
        Flag("hidden_dim", 1024, "result", "width of the encoder's hidden layer", at_least(1)),
    ),
    "CIBHash: loss": (
        Flag("T", 0.3, "result", "temperature of the contrastive loss", at_least(0.001)),
        Flag("sampling", None, "result", "codes in training: bernoulli: drawn, b = 1 with probability p, Eq. 11; sign: "
             "p > 1/2, as the released code has it; either with a straight-through gradient",
             choices=("bernoulli", "sign"), recipe=("bernoulli", "sign")),
        Flag("alphabet", None, "result", "values of a bit in the loss: 01: 0 and 1; pm: -1 and 1, as in the released "
             "code: another cosine", choices=("01", "pm"), recipe=("01", "pm")),
        Flag("kl_weight", 0.001, "result", "beta, weight of the KL term, an upper bound on the mutual information of "
             "code and view", not_negative),
        Flag("detach_kl", None, "result", "stop the gradient through the second distribution of each KL, as the "
             "released code does (what the paper does could not be read)", recipe=(False, True)),
    ),
}  # fmt: skip

# CIBHash's paper could not be read: its column comes from what others quote and from MeCoQ's Table 1
CIBHASH_DEFAULTS: dict[str, object] = {
    "protocol": ("II", "CIBHash"), "epoch_num": Depends("60, at 16 bits 80"), "batch_size": 64, "optimizer": "Adam",
    "lr": 1e-3, "hp_beta": 0.0, "disable_scheduler": True, "keep_lr_scaling": True, "detect_anomaly": False,
    "topK": 1000, "eval_interval": 20, "monitor_counter": 6,
}  # fmt: skip


def resolve_cibhash(values: dict, _: bool) -> None:
    """Fill in the number of epochs, which depends on the code length."""
    if values["epoch_num"] is None:
        values["epoch_num"] = 80 if values["code_length"] == 16 else 60
