"""Every flag once: its default, its rule, its help and what it affects; the two recipes; the keys taken from them.

Imports no PyTorch: `--help`, `--dry_run` and a wrong flag answer at once.
"""

import argparse
import math
import re
import unicodedata
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from data import DATASETS
from methods import BACKBONES, METHODS
from methods.flags import Depends, Flag, at_least, between, not_negative, positive
from utils import InputError, Parser
from vectors import resolve_flags

NOTES = re.compile(r"\w[\w.+=-]*")
RESULTS = ("images", "features", "views", "result")  # what a result depends on, besides the content of weights


def _device(value: str) -> str | None:
    return None if re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", value) else "must be cpu, cuda or cuda:N"


def _notes(value: str) -> str | None:
    return None if NOTES.fullmatch(value) else "names files: use letters, digits and . _ + = - only"


def _path(value: str) -> str | None:
    odd = any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value)
    return "is not a path in UTF-8 without control characters" if odd else None


FLAGS: dict[str, tuple[Flag, ...]] = {
    "run": (
        Flag("method", "MeCoQ", "result", "what is learned", choices=METHODS),
        Flag("notes", None, "place", "name of the run and of its files (default: from data set, protocol and bits)",
             _notes, type=str),
        Flag("recipe", "paper", "result", "defaults for the flags marked [recipe]: what the paper's equations say, or "
             "what the released code computes; a flag that is given wins", choices=("paper", "release")),
        Flag("device", "cpu", "speed", "cpu, cuda or cuda:N", _device),
        Flag("seed", 2021, "images", "seed of splits, weights, order and views",
             between(0, 2**32, "must be from 0 to 2^32 - 1")),
        Flag("output", ".", "place", "folder of logs/ and checkpoints/", _path, metavar="DIR"),
        Flag("log_interval", 20, "speed", "steps after which their losses are read from the device, all at once",
             at_least(1)),
        Flag("feature_cache", ".cache", "place", "folder that keeps the frozen layers' features of test images for all "
             "runs that share it; off: compute them again for every test", _path, metavar="DIR"),
        Flag("compile", False, "features", "let PyTorch compile the frozen layers: faster after half a minute or so, "
             "other rounding"),
        Flag("disable_writer", False, "place", "write no TensorBoard files"),
        Flag("test_only", False, "result", "train nothing: test the model of --checkpoint"),
        Flag("checkpoint", None, "result", "model.cpt of a run, or of the authors' release; db_codes.npy beside it is "
             "taken for the database's codes", type=str, metavar="PATH"),
        Flag("resume", False, "action", "go on with the run of this name from where it was stopped; begin if there is "
             "none, do nothing if it has finished"),
        Flag("overwrite", False, "action", "begin anew and replace the run of this name"),
        Flag("save_interval", 500, "speed", "steps after which last.cpt is saved, besides at the end of each epoch",
             at_least(1)),
        Flag("dry_run", False, "action", "check the flags, print the resolved configuration as JSON, touch neither "
             "data nor device"),
    ),
    "data": (
        Flag("dataset", "CIFAR10", "images", "; ".join(f"{name}: {row.help}" for name, row in DATASETS.items()),
             choices=DATASETS),
        Flag("protocol", "I", "images", "CIFAR-10: train on 50,000 (I) or 5,000 (II) of all images; official: its own "
             "split, 50,000 and 10,000; CIBHash: 5,000 of these 50,000 train, half of the 10,000 pick the checkpoint; "
             "the other data sets ignore it", choices=("I", "II", "official", "CIBHash"), aliases=("protocal",)),
        Flag("data_root", "datasets", "place", "folder of the images: CIFAR-10/cifar-10-batches-py, "
             "Flickr25K/mirflickr, NUS-WIDE/Flickr", _path, metavar="DIR"),
        Flag("list_root", "data", "place", "folder of the split lists Flickr25k/*.txt and Nuswide/*.txt", _path,
             metavar="DIR"),
        Flag("embeddings", None, "weights", "of --dataset Embeddings: a .npy file of vectors [n, D], floats; flags of "
             "images do not count then", type=str, metavar="X.npy"),
        Flag("embedding_views", None, "weights", "views of each, floats [n, V, D], from which it learns; without, from "
             "an embedding's nearest neighbours", type=str, metavar="V.npy"),
        Flag("embedding_labels", None, "weights", "labels, for the test alone: ints [n], or zeros and ones [n, L]",
             type=str, metavar="Y.npy"),
        Flag("images", None, "weights", "folder of the images of --dataset Folder, with all its subfolders", _path,
             type=str, metavar="DIR"),
        Flag("skip_bad_images", False, "images", "leave out image files that are missing or do not decode, instead of "
             "stopping before the run"),
        Flag("download_cifar10", False, "place", "download CIFAR-10 first if it is not there"),
        Flag("image_size", 224, "features", "S, side of the network's input in pixels", at_least(1)),
        Flag("views", "batched", "views", "augment images one by one with Pillow, or in batches on the device: the "
             "same but for rounding", choices=("batched", "pil")),
        Flag("augmentation", "MeCoQ", "views", "what a view is: MeCoQ's list of operations, which CIBHash shares; or "
             "SPQ's, by today's formulas, or by those of the old library version that the released code names",
             choices=("MeCoQ", "SPQ", "SPQ-release")),
        Flag("num_workers", 10, "speed", "processes that prepare images, at most one per core is started",
             not_negative),
        Flag("limit", None, "images", "use N images per split only, to try things out; N embeddings to train on "
             "(default: all)", at_least(1),
             type=int, metavar="N"),
    ),
    "backbone": (
        Flag("backbone", "vgg16", "features", "feature extractor; trained from scratch: convnet, resnet18_small "
             "(SPQ's, for 32 px), resnet18_tiny (a quarter of its widths)", choices=BACKBONES),
        Flag("weights", None, "weights", "of the backbone; PATH: a state dict with torchvision's keys (default: "
             "imagenet; from scratch: random)", type=str, metavar="{imagenet,random,PATH}"),
        Flag("vgg_model_path", None, "weights", "the same as --weights PATH", type=str, metavar="PATH"),
        Flag("trainable_layer_num", 0, "result", "trained blocks of the backbone, from its end; vgg16: 0, 1 (fc7) or "
             "2 (fc6, fc7); from scratch: always all", not_negative),
        Flag("normalize_features", False, "result", "centre the frozen backbone's features by their mean over the "
             "training images and bring all to one length, before anything is learned of them; in neither recipe"),
        Flag("precision", "bf16", "features", "of the frozen part of the backbone; all that is learned is float32",
             choices=("bf16", "fp32")),
        Flag("int8_views", False, "views", "run the frozen convolutions of views in 8-bit integers; tests are as ever: "
             "of vgg16 and squeezenet1_0, on a CPU"),
    ),
    "optimisation": (
        Flag("epoch_num", 50, "result", "epochs; 0 tests the untrained model", not_negative),
        Flag("batch_size", 128, "result", "N, images per step",
             at_least(2, ": a batch of one has no negatives")),
        Flag("drop_last", False, "result", "leave out the last batch of an epoch if it is smaller"),
        Flag("optimizer", "SGD", "result", "optimiser", choices=("SGD", "Adam")),
        Flag("lr", 0.01, "result", "highest learning rate", positive),
        Flag("lr_scaling", None, "result", "learning rate of trained backbone blocks, as a share of --lr (default: "
             "0.001; from scratch: 1)", not_negative, type=float, usual=1e-3),
        Flag("keep_lr_scaling", None, "result", "honour --lr_scaling throughout; in the released code the scheduler "
             "overwrites it: all learn at --lr", recipe=(True, False)),
        Flag("momentum", 0.9, "result", "of SGD", between(0, 1, "must be in [0, 1)")),
        Flag("hp_beta", 5e-6, "result", "weight decay; MeCoQ's beta, Eq. 14", not_negative),
        Flag("schedule", "batch", "result", "how the learning rate falls after the warm-up: batch: half a cosine, "
             "stepped every batch; epoch: every epoch; returning: every epoch, and half a cosine takes as many epochs "
             "as an epoch has steps, so that the rate rises again, as in SPQ's released code",
             choices=("batch", "epoch", "returning")),
        Flag("disable_scheduler", False, "result", "keep --lr throughout: no warm-up, no cosine"),
        Flag("warmup_epoch_num", 1, "result", "epochs of linear rise from --start_lr to --lr", not_negative),
        Flag("start_lr", 1e-5, "result", "learning rate of the first step", not_negative),
        Flag("final_lr", 1e-5, "result", "learning rate at the end of the cosine", not_negative),
        Flag("detect_anomaly", None, "speed", "let PyTorch look for non-finite numbers in every backward pass, which "
             "slows it and changes no result; on a GPU off in both recipes", recipe=(False, True)),
    ),
    "test (Eq. 18)": (
        Flag("topK", None, "result", "K of MAP@K and P@K; without it: the whole database", at_least(1), type=int),
        Flag("ties", None, "result", "MAP of images with equal scores: expected: the mean over all their orders, "
             "exact; database: in database order, which misjudges short codes if the database is sorted by class",
             choices=("expected", "database"), recipe=("expected", "database")),
        Flag("eval_interval", 1, "result", "epochs between validations", at_least(1)),
        Flag("monitor_counter", 10, "result", "validations without a better MAP before training stops", at_least(1)),
    ),
}  # fmt: skip


class Config(Namespace):
    """The resolved flags of a run, read-only: `config.lr`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a configuration does not change: use replace({name}=...)")

    def replace(self, **changes: object) -> "Config":
        """A copy with other values, which are not checked."""
        return Config(vars(self) | changes)


def tables(method: str) -> dict[str, list[Flag]]:
    """All flags of runs of a method, by heading, with the method's own defaults."""
    defaults = METHODS[method].defaults
    shared = {heading: [_with_default(flag, defaults) for flag in table] for heading, table in FLAGS.items()}
    return shared | {heading: list(table) for heading, table in METHODS[method].flags.items()}


def _with_default(flag: Flag, defaults: Mapping[str, object]) -> Flag:
    """A flag with the default that a method has for it, if it has one."""
    if flag.name == "method" or flag.name not in defaults:
        return flag
    value, kind = defaults[flag.name], flag.type or type(flag.recipe[0] if flag.recipe else flag.default)
    if isinstance(value, Depends):
        return replace(flag, default=None, type=kind, help=f"{flag.help} (default: {value.words})")
    if isinstance(value, tuple):
        return replace(flag, default=None, recipe=value, type=kind)
    return replace(flag, default=value, recipe=None, type=None if kind is bool else kind)


def rows(method: str) -> dict[str, Flag]:
    """All flags of runs of a method, by name."""
    return {flag.name: flag for table in tables(method).values() for flag in table}


# ---------------------------------------------------------------- recipes


def recipe_defaults(recipe: str, method: str = "MeCoQ") -> dict[str, object]:
    """The defaults that a recipe sets: flag -> value."""
    column = ("paper", "release").index(recipe)
    return {name: flag.recipe[column] for name, flag in rows(method).items() if flag.recipe}


def departures(config: Config) -> dict[str, object]:
    """The flags of the recipe that the user set otherwise, with the values they have."""
    recipe = recipe_defaults(config.recipe, config.method)
    return {name: getattr(config, name) for name, value in recipe.items() if getattr(config, name) != value}


# the order in which logs have always named them; others come behind
LOGGED = ("codebooks", "pairing", "debias_memory", "negative_bound", "normalize_memory", "keep_lr_scaling",
          "normalize_query", "hp_lambda", "detect_anomaly")  # fmt: skip


def recipe_line(config: Config) -> str:
    """The recipe in words: its resolved flags, and which of them are not its own."""
    recipe = recipe_defaults(config.recipe, config.method)
    names = [name for name in LOGGED if name in recipe] + [name for name in recipe if name not in LOGGED]
    flags = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    own = ", ".join(f"{name}={recipe[name]}" for name in names if getattr(config, name) != recipe[name])
    return f"recipe {config.recipe}: {flags} ({f'the recipe itself has {own}' if own else 'as the recipe has them'})"


# ---------------------------------------------------------------- reading the command line


def build_parser(method: str = "MeCoQ") -> Parser:
    """The parser of all flags of a method; those whose default depends on others start as None."""
    parser = Parser(
        description="Contrastive quantization and hashing for unsupervised image retrieval: MeCoQ, SPQ and CIBHash. "
        f"These are the flags of {method}; --method NAME --help shows those of another.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for heading, table in tables(method).items():
        group = parser.add_argument_group(heading)
        for flag in table:
            _add(group, flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{name}" for name in (flag.name, *flag.aliases)]
    marked = " [recipe]" if flag.recipe else ""
    on_by_default = any(row.defaults.get(flag.name) is True for row in METHODS.values())
    if flag.default is False and not on_by_default:
        group.add_argument(*names, action="store_true", help=flag.help)
    elif isinstance(flag.default, bool) or (flag.recipe and isinstance(flag.recipe[0], bool)):
        group.add_argument(*names, action=BooleanOptionalAction, default=flag.default, help=flag.help + marked)
    else:
        told = f" (default: {flag.default})" if flag.default is not None else ""
        kind = flag.type or (str if flag.default is None else type(flag.default))
        options = {"type": kind, "choices": flag.choices, "metavar": flag.metavar, "default": flag.default}
        group.add_argument(*names, help=(flag.help + told + marked).replace("%", "%%"), **options)


def parse_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags as given, not resolved: those that depend on others are None. Raises InputError."""
    first = Parser(add_help=False, allow_abbrev=False)
    _add(first.add_argument_group("method"), rows("MeCoQ")["method"])
    method = first.parse_known_args(argv)[0].method
    values, unknown = build_parser(method).parse_known_args(argv)
    for flag in unknown:
        bare = flag.partition("=")[0].removeprefix("--").removeprefix("no-")
        owners = [name for name in METHODS if name != method and bare in rows(name)]
        if flag.startswith("--") and owners:
            raise InputError(f"{flag.partition('=')[0]}: a flag of {' and '.join(owners)}, not of {method} (--method)")
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}")
    return vars(values)


def parse(argv: list[str] | None) -> Config:
    """The configuration that a command line describes, resolved and checked. Raises InputError."""
    return resolve(parse_flags(argv))


# ---------------------------------------------------------------- resolving and checking


def resolve(values: Mapping[str, Any]) -> Config:
    """Fill in the defaults that depend on other flags (the recipe's, the backbone's, the name's) and check all.

    Raises InputError on the first flag whose value makes no sense, alone or beside the others.
    """
    values = dict(values)
    resolve_flags(values, rows(values["method"])["backbone"].default)
    method, backbone = METHODS[values["method"]], BACKBONES[values["backbone"]]
    if values["image_size"] is None:
        values["image_size"] = 224 if backbone.pretrained else 32
    if values["detect_anomaly"] is None and values["device"] != "cpu":
        values["detect_anomaly"] = False  # it would read from the GPU after every backward function
    for name, value in recipe_defaults(values["recipe"], values["method"]).items():
        values[name] = value if values[name] is None else values[name]
    _resolve_weights(values)
    if values["lr_scaling"] is None:
        values["lr_scaling"] = 1e-3 if backbone.pretrained else 1.0
    check(values)
    if values["resume"] and values["overwrite"]:
        raise InputError("--resume and --overwrite: go on with the old run, or replace it?")
    if values["device"] == "cuda":
        values["device"] = "cuda:0"
    method.resolve(values, backbone.pretrained)
    if values["notes"] is None:
        values["notes"] = _default_notes(values)
    return Config(values)


def _resolve_weights(values: dict[str, Any]) -> None:
    path = values.pop("vgg_model_path", None)
    if values["test_only"] != (values["checkpoint"] is not None):
        raise InputError("--test_only and --checkpoint PATH go together: give both or none")
    if values["test_only"] and (values["weights"] or path):
        raise InputError("--weights: with --test_only they come from --checkpoint")
    if values["weights"] and path and values["weights"] != path:
        raise InputError("--weights and --vgg_model_path name different weights: give one of them")
    usual = "imagenet" if BACKBONES[values["backbone"]].pretrained else "random"
    usual = "none" if values["backbone"] == "none" else usual
    values["weights"] = values["weights"] or values["checkpoint"] or path or usual


def _default_notes(values: dict[str, Any]) -> str:
    if values["test_only"]:
        notes = f"{Path(values['checkpoint']).resolve().parent.name}-test"
        return notes if NOTES.fullmatch(notes) else "test"
    protocol = values["protocol"] if DATASETS[values["dataset"]].protocols else ""
    named = "" if values["method"] == "MeCoQ" else f"{values['method']}-"
    return f"{named}{values['dataset']}{protocol}{code_bits(values)}bits"


def check(values: Mapping[str, Any]) -> None:
    """Raise InputError on the first value that makes no sense, by itself or for the backbone."""
    for name, flag in rows(values["method"]).items():
        fault = flag.fault(values[name]) if name in values else None
        if fault:
            raise InputError(f"--{name} {values[name]}: {fault}")
    if DATASETS[values["dataset"]].own != (values["images"] is not None):
        raise InputError("--dataset Folder and --images DIR go together: give both or none")
    name = values["backbone"]
    backbone = BACKBONES[name]
    if values["trainable_layer_num"] > backbone.trainable:
        raise InputError(
            f"--trainable_layer_num {values['trainable_layer_num']}: {name} has {backbone.trainable} blocks to train"
        )
    if (name == "none") != (values["dataset"] == "Embeddings"):
        raise InputError(f"--backbone {name}: none is for --dataset Embeddings, all others have images")
    if values["image_size"] < backbone.smallest:
        raise InputError(f"--image_size {values['image_size']}: {name} needs at least {backbone.smallest}")
    if values["normalize_features"] and (values["trainable_layer_num"] or not backbone.pretrained):
        raise InputError("--normalize_features: the mean of features that learn does not stay: freeze the --backbone")
    if values["int8_views"] and (values["device"] != "cpu" or name not in ("vgg16", "squeezenet1_0")):
        raise InputError("--int8_views: of --backbone vgg16 and squeezenet1_0 on a CPU only")
    if values["views"] == "pil" and values["augmentation"] != "MeCoQ":
        raise InputError(f"--views pil: --augmentation {values['augmentation']} is made in batches only")
    if values["weights"] == "imagenet" and not backbone.pretrained:
        raise InputError(f"--weights imagenet: {name} has none: use random")


# ---------------------------------------------------------------- keys


def key(config: Config, *kinds: str) -> dict[str, object]:
    """The flags that affect these kinds (all `RESULTS` if none is named) and are not at their default.

    A flag at its default is in no key, so that a new flag makes no kept file stale. What counts is the default for all
    methods, not a method's own: methods on the same images share caches.
    """
    return {
        name: getattr(config, name)
        for name, flag in _affecting(config, kinds).items()
        if getattr(config, name) != flag.absent_from_keys
    }


def differing(config: Config, stored: Mapping[str, object], *kinds: str) -> list[str]:
    """The flags of these kinds (all `RESULTS` if none is named) that a stored configuration has otherwise; what it
    lacks was at its default."""
    return [
        name
        for name, flag in _affecting(config, kinds).items()
        if stored.get(name, flag.absent_from_keys) != getattr(config, name)
    ]


def _affecting(config: Config, kinds: tuple[str, ...]) -> dict[str, Flag]:
    """The rows of the configuration's flags that affect these kinds."""
    table = [flag for table in (FLAGS | METHODS[config.method].flags).values() for flag in table]
    return {flag.name: flag for flag in table if flag.name in config and flag.affects in (kinds or RESULTS)}


def recorded(config: Config) -> dict[str, object]:
    """The configuration as a run's files hold it: without what was done with the run."""
    table = rows(config.method)
    return {name: value for name, value in vars(config).items() if table[name].affects != "action"}


def code_shape(values: Mapping[str, Any]) -> tuple[int, int]:
    """(M, K) of a configuration's values: an image's code is M numbers from 0 to K - 1."""
    return METHODS[values["method"]].shape(dict(values))


def code_bits(values: Mapping[str, Any]) -> int:
    """Bits of an image's code: M log2 K."""
    M, K = code_shape(values)
    return round(M * math.log2(K))
