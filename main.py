"""What did the user ask for? Flags -> one run: data, network, training, test.

python main.py --dataset CIFAR10 --protocol II --M 4 --feat_dim 48 ... --notes CifarII32bits
"""

import argparse
import json
import math
import re
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import data
import engine
from checkpoint import Signals, begin, find_state
from methods.mecoq import BACKBONES, Backbone, MeCoQ, build_backbone, load_checkpoint
from results import Files, code_bits, is_finished
from utils import (
    LOG,
    InputError,
    Parser,
    RunError,
    check_writable,
    locked,
    logging_to,
    new_log,
    one_line,
    run_script,
    seed_everything,
)

# how PyTorch words it on a GPU, on a CPU, and where the shared memory of its workers is full
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bus error", "Bus error", "killed by signal: Killed")

NOTES = re.compile(r"\w[\w.+=-]*")

# Where the released code departs from the paper. A recipe is a column of this table, a set of defaults; a flag that the
# user gives wins.
DIFFERENCES: dict[str, tuple[object, object]] = {
    # flag               paper      release
    "codebooks":        ("trained", "frozen"),
    "pairing":          ("own",     "all"),
    "debias_memory":    (True,      False),
    "negative_bound":   ("dcl",     "release"),
    "normalize_memory": (True,      False),
    "keep_lr_scaling":  (True,      False),
    "normalize_query":  (True,      False),
    "hp_lambda":        (0.0,       1.0),
    "detect_anomaly":   (False,     True),
}  # fmt: skip
RECIPES: dict[str, dict[str, object]] = {
    "paper": {flag: paper for flag, (paper, _) in DIFFERENCES.items()},
    "release": {flag: release for flag, (_, release) in DIFFERENCES.items()},
}


def build_parser() -> Parser:
    """All flags, grouped by topic. Those whose default depends on others say so and start as None."""
    parser = Parser(
        description="MeCoQ: contrastive quantization with code memory for unsupervised image retrieval.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_run_flags(parser.add_argument_group("run"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_network_flags(parser.add_argument_group("backbone and quantizer (Eq. 1-5)"))
    _add_loss_flags(parser.add_argument_group("loss and code memory (Eq. 6-14)"))
    _add_optimizer_flags(parser.add_argument_group("optimisation"))
    _add_test_flags(parser.add_argument_group("test (Eq. 15-18)"))
    return parser


# fmt: off
def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--notes", help="name of the run and of its files (default: made of data set, protocol and bits)")
    add("--recipe", choices=sorted(RECIPES), default="paper",
        help="set of defaults for the flags marked [recipe]: what the paper's equations say, or what the released code "
        "computes; a flag that is given wins (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--seed", type=int, default=2021, help="seed of splits, weights, order and views (default: %(default)s)")
    add("--output", default=".", metavar="DIR", help="logs/ and checkpoints/ go below it (default: current folder)")
    add("--log_interval", type=int, default=20,
        help="steps after which their losses are read from the device, all at once (default: %(default)s)")
    add("--feature_cache", default=".cache", metavar="DIR",
        help="keeps what the frozen layers make of test images, for all runs that share it; off: compute it again for "
        "every test (default: %(default)s)")
    add("--compile", action="store_true",
        help="let PyTorch compile the frozen layers: faster after half a minute or so, other rounding")
    add("--disable_writer", action="store_true", help="write no TensorBoard files")
    add("--test_only", action="store_true", help="train nothing: test the model of --checkpoint")
    add("--checkpoint", metavar="PATH",
        help="model.cpt of a run, or of the authors' release; db_codes.npy beside it is taken for the database's codes")
    add("--resume", action="store_true",
        help="go on with the run of this name where it was stopped; begin where there is none, do nothing where it has "
        "finished")
    add("--overwrite", action="store_true", help="begin anew and replace the run of this name")
    add("--save_interval", type=int, default=500,
        help="steps after which last.cpt is saved, besides at the end of each epoch (default: %(default)s)")
    add("--dry_run", action="store_true",
        help="check the flags, print the resolved configuration as JSON, touch neither data nor device")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", choices=["CIFAR10", "Flickr25K", "NUSWIDE", "Digits"], default="CIFAR10",
        help="Digits is small and comes with scikit-learn (default: %(default)s)")
    add("--protocol", "--protocal", choices=["I", "II"], default="I",
        help="CIFAR-10: train on 50,000 (I) or 5,000 (II) images; the others ignore it (default: %(default)s)")
    add("--data_root", default="datasets", metavar="DIR",
        help="folder with CIFAR-10/cifar-10-batches-py, Flickr25K/mirflickr, NUS-WIDE/Flickr (default: %(default)s)")
    add("--list_root", default="data", metavar="DIR",
        help="folder with the split lists Flickr25k/*.txt and Nuswide/*.txt (default: %(default)s)")
    add("--skip_bad_images", action="store_true",
        help="leave out image files that are missing or do not decode, instead of stopping before the run")
    add("--download_cifar10", action="store_true", help="download CIFAR-10 first if it is not there")
    add("--image_size", type=int, default=224, help="S, side of the network's input in pixels (default: %(default)s)")
    add("--views", choices=["batched", "pil"], default="batched",
        help="augment images one by one with Pillow, or in batches on the device: the same but for rounding "
        "(default: %(default)s)")
    add("--num_workers", type=int, default=10,
        help="processes that prepare images, at most one a core is started (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="use N images a split only, to try things out (default: all)")


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--backbone", choices=sorted(BACKBONES), default="vgg16",
        help="feature extractor; convnet is small and trained from scratch (default: %(default)s)")
    add("--weights", metavar="{imagenet,random,PATH}",
        help="of the backbone; PATH: a state dict with torchvision's keys (default: imagenet; convnet: random)")
    add("--vgg_model_path", metavar="PATH", help="the same as --weights PATH")
    add("--trainable_layer_num", type=int, default=0,
        help="trained blocks of the backbone, from its end; vgg16: 0, 1 (fc7) or 2 (fc6, fc7); convnet: always all "
        "(default: %(default)s)")
    add("--precision", choices=["bf16", "fp32"], default="bf16",
        help="of the frozen part of the backbone; all that is learned is float32 (default: %(default)s)")
    add("--feat_dim", type=int, default=64, help="D, dimensions of the embedding (default: %(default)s)")
    add("--M", type=int, default=4, help="M, number of codebooks: a code has M log2 K bits (default: %(default)s)")
    add("--K", type=int, default=256, help="K, codewords a codebook (default: %(default)s)")
    add("--codebooks", choices=["trained", "frozen"],
        help="learn the codebooks, Eq. 14, or leave them as they were drawn, as the released code does [recipe]")
    add("--alpha", type=float, default=10.0,
        help="alpha, sharpness of the soft codes, Eq. 2 (default: %(default)s)")


def _add_loss_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--T", type=float, default=0.1, help="tau, temperature, Eq. 6 (default: %(default)s)")
    add("--mode", choices=["simple", "debias"], default="simple",
        help="contrastive loss without (rho+ = 0) or with debiasing, Eq. 7 (default: %(default)s)")
    add("--pos_prior", type=float, default=0.0,
        help="rho+, share of false negatives, in [0, 1); counts with --mode debias (default: %(default)s)")
    add("--hp_beta", type=float, default=5e-6, help="beta, weight decay, Eq. 14 (default: %(default)s)")
    add("--hp_gamma", type=float, default=0.5,
        help="gamma, weight of the codeword diversity Omega, Eq. 8 and 14 (default: %(default)s)")
    add("--hp_lambda", type=float,
        help="lambda, weight of the mean entropy of the soft codes, a term of the released code that the paper does "
        "not have (paper: 0, release: 1) [recipe]")
    add("--pairing", choices=["own", "all"],
        help="own: each query's positive with its own negatives, Eq. 6; all: with those of every query, a mean over a "
        "2N x 2N table, as the released code does [recipe]")
    add("--debias_memory", action=BooleanOptionalAction,
        help="correct the negative term for the memory's negatives too, Eq. 13; the released code counts those of the "
        "batch only [recipe]")
    add("--negative_bound", choices=["dcl", "release"],
        help="lower bound of the negative term: dcl: n exp(-1 / tau); release: exp(-(2N - 2) / tau), practically 0 "
        "[recipe]")
    add("--normalize_memory", action=BooleanOptionalAction,
        help="compare the memory's vectors by their cosine, like the batch's; the released code leaves them their "
        "length [recipe]")
    add("--memory", choices=["soft", "hard", "feature", "none"],
        help="what the memory keeps: soft codes, hard codes, or the embeddings before quantization, Table 2 "
        "(default: soft; none without --queue_begin_epoch)")
    add("--queue_begin_epoch", type=int, default=-1,
        help="first epoch (from 0) that uses the code memory, Eq. 12-13; -1: never (default: %(default)s)")
    add("--queue_size", type=int, default=384,
        help="N_M, entries that the memory holds (default: %(default)s)")


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epoch_num", type=int, default=50, help="epochs; 0 tests the untrained model (default: %(default)s)")
    add("--batch_size", type=int, default=128, help="N, images a step (default: %(default)s)")
    add("--optimizer", choices=["SGD", "Adam"], default="SGD", help="(default: %(default)s)")
    add("--lr", type=float, default=0.01, help="highest learning rate (default: %(default)s)")
    add("--lr_scaling", type=float,
        help="learning rate of trained backbone blocks, as a share of --lr (default: 0.001; convnet: 1)")
    add("--keep_lr_scaling", action=BooleanOptionalAction,
        help="honour --lr_scaling throughout; in the released code the scheduler overwrites it: all learn at --lr "
        "[recipe]")
    add("--momentum", type=float, default=0.9, help="of SGD (default: %(default)s)")
    add("--disable_scheduler", action="store_true", help="keep --lr throughout: no warm-up, no cosine")
    add("--warmup_epoch_num", type=int, default=1,
        help="epochs of linear rise from --start_lr to --lr (default: %(default)s)")
    add("--start_lr", type=float, default=1e-5, help="learning rate of the first step (default: %(default)s)")
    add("--final_lr", type=float, default=1e-5, help="where the cosine ends (default: %(default)s)")
    add("--detect_anomaly", action=BooleanOptionalAction,
        help="let PyTorch look for numbers that are none in every backward pass, which slows it and changes no result "
        "[recipe]")


def _add_test_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--topK", type=int, help="K of MAP@K and P@K (default: the whole database)")
    add("--symmetric_distance", action="store_true", help="quantize the queries too")
    add("--normalize_query", action=BooleanOptionalAction,
        help="divide the query's segments by their length, Eq. 16; the released code does not [recipe]")
    add("--eval_interval", type=int, default=1, help="epochs between validations (default: %(default)s)")
    add("--monitor_counter", type=int, default=10,
        help="validations without a better MAP before training stops (default: %(default)s)")


# fmt: on
# ---------------------------------------------------------------- resolving and checking


def resolve(args: Namespace) -> Namespace:
    """Fill in the defaults that depend on other flags: the recipe's, the backbone's, the name's."""
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    from_scratch = args.backbone == "convnet"
    if args.test_only != (args.checkpoint is not None):
        raise InputError("--test_only and --checkpoint PATH go together: give both or none")
    if args.test_only and (args.weights or args.vgg_model_path):
        raise InputError("--weights: with --test_only they come from --checkpoint")
    args.weights = args.weights or args.checkpoint
    if args.weights and args.vgg_model_path and args.weights != args.vgg_model_path:
        raise InputError("--weights and --vgg_model_path name different weights: give one of them")
    args.weights = args.weights or args.vgg_model_path or ("random" if from_scratch else "imagenet")
    del args.vgg_model_path
    if args.lr_scaling is None:
        args.lr_scaling = 1.0 if from_scratch else 1e-3
    check(args)
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite: go on with the old run, or replace it?")
    if args.device == "cuda":
        args.device = "cuda:0"
    if args.memory not in (None, "none") and args.queue_begin_epoch == -1:
        raise InputError(f"--memory {args.memory}: say from which epoch on, with --queue_begin_epoch")
    args.memory = args.memory or "soft"
    if args.memory == "none" or args.queue_begin_epoch == -1:
        args.memory, args.queue_begin_epoch = "none", -1
    if args.mode == "simple":
        args.pos_prior = 0.0
    if args.notes is None and args.test_only:
        args.notes = f"{Path(args.checkpoint).resolve().parent.name}-test"
        if not NOTES.fullmatch(args.notes):
            args.notes = "test"
    if args.notes is None:
        protocol = args.protocol if args.dataset == "CIFAR10" else ""
        args.notes = f"{args.dataset}{protocol}{code_bits(args)}bits"
    return args


def departures(args: Namespace) -> dict[str, object]:
    """The flags of the recipe that the user set otherwise, with the values they have."""
    return {flag: getattr(args, flag) for flag, value in RECIPES[args.recipe].items() if getattr(args, flag) != value}


def recipe_line(args: Namespace) -> str:
    """The recipe in words: its resolved flags, and where they are not its own."""
    flags = ", ".join(f"{flag}={getattr(args, flag)}" for flag in RECIPES[args.recipe])
    own = ", ".join(f"{flag}={RECIPES[args.recipe][flag]}" for flag in departures(args))
    return f"recipe {args.recipe}: {flags} ({f'the recipe itself has {own}' if own else 'as the recipe has them'})"


def check(args: Namespace) -> None:
    """Raise InputError on the first flag whose value makes no sense, alone or beside the others."""

    def require(fine: bool, flag: str, rule: str) -> None:
        if not fine:
            raise InputError(f"--{flag} {getattr(args, flag)}: {rule}")

    for flag, value in vars(args).items():
        require(not isinstance(value, float) or math.isfinite(value), flag, "must be a finite number")
        require(not isinstance(value, int) or value < 2**32, flag, "is beyond any machine")
    for flag in (
        "image_size",
        "feat_dim",
        "M",
        "queue_size",
        "eval_interval",
        "monitor_counter",
        "log_interval",
        "save_interval",
    ):
        require(getattr(args, flag) >= 1, flag, "must be at least 1")
    for flag in ("limit", "topK"):
        require(getattr(args, flag) is None or getattr(args, flag) >= 1, flag, "must be at least 1")
    for flag in ("num_workers", "epoch_num", "trainable_layer_num", "warmup_epoch_num"):
        require(getattr(args, flag) >= 0, flag, "must not be negative")
    for flag in ("hp_beta", "hp_gamma", "hp_lambda", "start_lr", "final_lr", "lr_scaling"):
        require(getattr(args, flag) >= 0, flag, "must not be negative")
    for flag in ("alpha", "lr"):
        require(getattr(args, flag) > 0, flag, "must be positive")
    require(args.T >= 1e-4, "T", "must be at least 0.0001: exp(1 / tau) has to mean something")
    require(0 <= args.seed < 2**32, "seed", "must be from 0 to 2^32 - 1")
    require(0 <= args.momentum < 1, "momentum", "must be in [0, 1)")
    require(0 <= args.pos_prior < 1, "pos_prior", "must be in [0, 1)")
    require(2 <= args.K <= 65536, "K", "must be from 2 to 65536, two bytes a codebook at most")
    require(args.feat_dim % args.M == 0, "feat_dim", f"must be a multiple of --M {args.M}: one segment a codebook")
    require(args.batch_size >= 2, "batch_size", "must be at least 2: a batch of one has no negatives")
    require(args.queue_begin_epoch >= -1, "queue_begin_epoch", "must be an epoch from 0, or -1 for no memory")
    most = BACKBONES[args.backbone][1]
    require(args.trainable_layer_num <= most, "trainable_layer_num", f"{args.backbone} has {most} blocks to train")
    require(args.image_size >= 32 or args.backbone == "convnet", "image_size", f"{args.backbone} needs at least 32")
    require(args.image_size >= 8, "image_size", "convnet needs at least 8")
    require(args.backbone != "convnet" or args.weights != "imagenet", "weights", "convnet has none: use random")
    require(
        re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", args.device) is not None,
        "device",
        "must be cpu, cuda or cuda:N",
    )
    require(
        args.notes is None or NOTES.fullmatch(args.notes) is not None,
        "notes",
        "names files: use letters, digits and . _ + = - only",
    )


def take_device(args: Namespace) -> bool:
    """Make `--device` the current one. Returns whether it lacks bfloat16, for which float32 stands in then. Raises
    InputError where it is not there."""
    check_device(args.device)
    if args.device != "cpu":
        torch.cuda.set_device(args.device)
    no_bf16 = args.precision == "bf16" and args.device != "cpu" and not torch.cuda.is_bf16_supported(False)
    args.precision = "fp32" if no_bf16 else args.precision
    return no_bf16


def check_device(device: str) -> None:
    """Raise InputError where the device that was asked for is not there."""
    if device == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        found = f"this machine has {count} usable" if count else "no usable CUDA device was found"
        raise InputError(f"--device {device}: {found}; use --device cpu or another number")


# ---------------------------------------------------------------- the run


def build(args: Namespace) -> tuple[data.Splits, MeCoQ]:
    """Data and model of a run, the same whenever the seed is. Raises InputError where either can not be had."""
    seed_everything(args.seed)
    # what is wrong with a file of weights is said before a long look at the data; a download comes after it
    model = None if args.weights == "imagenet" else build_model(args)
    splits = data.load_splits(
        args.dataset,
        args.protocol,
        args.seed,
        Path(args.data_root),
        Path(args.list_root),
        download_cifar10=args.download_cifar10,
        limit=args.limit,
        skip_bad_images=args.skip_bad_images,
        num_workers=args.num_workers,
    )
    sizes = len(splits.train), len(splits.query), len(splits.database)
    LOG.info("%d training images, %d queries, %d in the database", *sizes)
    return splits, model or build_model(args)


def build_model(args: Namespace) -> MeCoQ:
    """The model that the flags describe, on its device; with `--test_only` it is the checkpoint's."""
    weights = "random" if args.test_only else args.weights
    backbone = build_backbone(args.backbone, weights, args.trainable_layer_num, args.precision == "bf16")
    model = assemble(backbone, args)
    if args.test_only:
        load_checkpoint(model, Path(args.checkpoint))
    model = model.to(args.device)
    if args.compile and backbone.split:
        backbone.compile_frozen(args.image_size, args.device)
    return model


def assemble(backbone: Backbone, args: Namespace) -> MeCoQ:
    queue_size = None if args.memory == "none" else args.queue_size
    trained_codebooks = args.codebooks == "trained"
    return MeCoQ(backbone, args.feat_dim, args.M, args.K, args.alpha, queue_size, args.memory, trained_codebooks)


def run(args: Namespace) -> None:
    """Build what the flags describe, train and test it. Raises InputError, RunError or Stopped."""
    no_bf16 = take_device(args)
    going_on, overwrite = args.resume, args.overwrite
    del args.resume, args.overwrite  # they are not what the run is
    files = Files(Path(args.output), args.notes)
    same = args.test_only and files.checkpoints.resolve() == Path(args.checkpoint).resolve().parent
    if args.test_only and (same or files.model.exists()):
        raise InputError(f"--notes {args.notes}: {files.checkpoints} holds a trained model; choose another name")
    for folder in (files.checkpoints, files.log.parent if args.disable_writer else files.tensorboard):
        check_writable(folder)
    busy = f"--notes {args.notes}: another process is at this run"
    with Signals() as signals, locked(files.checkpoints / ".lock", busy, wait=False):
        if going_on and is_finished(files, args):
            print(f"{files.checkpoints} is finished: nothing to do")
            return
        state = None if overwrite else find_state(files, args, going_on)
        with new_log(files.log, beside=bool(files.present())) as log, logging_to(log):
            LOG.info(recipe_line(args))
            LOG.info("configuration: %s", json.dumps(vars(args)))
            if no_bf16:
                LOG.warning("WARNING: this GPU has no bfloat16: running with --precision fp32")
            splits, model = build(args)
            take_place = partial(begin, files, log, state)
            if args.test_only:
                engine.run_test(model, splits, args, files, take_place)
            else:
                engine.run(model, splits, args, files, state, signals, take_place)
            LOG.info("results are in %s", files.checkpoints)


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Raises RunError where memory runs out, or a worker dies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error) and OUT_OF_MEMORY[-1] not in str(error):
            raise RunError(one_line(error)) from error
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = one_line(error)[:200]
        raise RunError(
            f"out of memory ({reason}): try a smaller --batch_size, --num_workers, --queue_size or --K"
        ) from error


def start(argv: list[str] | None) -> None:
    """Do what the flags say; a lack of memory ends in one line too."""
    args = resolve(build_parser().parse_args(argv))
    if args.dry_run:
        print(json.dumps(vars(args), indent=2))
    else:
        with naming_lack_of_memory():
            run(args)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that failed; 130 when interrupted."""
    return run_script(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
