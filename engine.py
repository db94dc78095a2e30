"""How does a run go? Training, encoding a database, testing."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import data
import loss
import retrieval
from features import Cached, Computed, test_features
from lists import ImageFiles
from network import CodebookAttention, MeCoQ, read_state_dict
from results import (
    Files,
    code_bits,
    device_name,
    peak_memory,
    read_array,
    read_metrics,
    save_model,
    save_results,
    versions,
)
from utils import LOG, InputError, Patience, RunError, learning_rate, one_line, progress_bar, sha256, write_json


class Stopwatch:
    """Seconds spent in each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# ---------------------------------------------------------------- training


def build_optimizer(model: MeCoQ, args: Namespace) -> torch.optim.Optimizer:
    """Projection and codebooks learn at `lr`, trained blocks at `lr * lr_scaling`; beta decays all (Eq. 14).

    Without `--keep_lr_scaling` the scheduler, if there is one, overwrites the scaled rate: all learn at `lr`.
    """
    scaling = args.lr_scaling if args.keep_lr_scaling or args.disable_scheduler else 1.0
    head = [*model.projection.parameters(), *model.quantizer.parameters()]
    groups = [
        {"params": [p for p in parameters if p.requires_grad], "lr": rate}
        for parameters, rate in ((head, args.lr), (model.backbone.parameters(), args.lr * scaling))
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "SGD":
        return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.hp_beta)
    return torch.optim.Adam(groups, weight_decay=args.hp_beta)


def build_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps_per_epoch: int):  # noqa: ANN201
    """Warm-up and cosine, stepped every batch; each group keeps its proportion to `--lr`."""

    def factor(step: int) -> float:
        if args.disable_scheduler:
            return 1.0
        return (
            learning_rate(
                step, steps_per_epoch, args.epoch_num, args.warmup_epoch_num, args.start_lr, args.lr, args.final_lr
            )
            / args.lr
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def objective(
    model: MeCoQ, views: Tensor, use_memory: bool, args: Namespace
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Eq. 14 without its weight decay, which the optimiser applies.

    Returns the terms and their weighted sum by TensorBoard tag, and of both views the embeddings `[2N, D]` and the
    soft codes `[2N, M, K]`.

    Args:
        views: `[2N, 3, S, S]`, the first views of N images, then the second ones.
        use_memory: whether the code memory's entries act as negatives, Eq. 12-13.
    """
    z = model(views)  # [2N, D]
    quantizer = model.quantizer
    soft_codes, reconstruction = quantizer(z)  # [2N, M, K], [2N, M, d]
    codewords = quantizer.codewords()
    contrastive = loss.contrastive_loss(
        *reconstruction.flatten(1).chunk(2),
        model.recall(codewords).flatten(1) if use_memory else None,
        T=args.T,
        pos_prior=args.pos_prior,
        pairing=args.pairing,
        debias_memory=args.debias_memory,
        negative_bound=args.negative_bound,
        normalize_memory=args.normalize_memory,
    )
    entropy = loss.code_entropy(soft_codes)
    diversity = loss.codeword_diversity(codewords)
    terms = {
        "loss/simclr_loss": contrastive,
        "loss/entropy_reg_loss": entropy,
        "loss/codeword_reg_loss": diversity,
        "loss/total_loss": contrastive + args.hp_lambda * entropy + args.hp_gamma * diversity,  # Eq. 14
        "quant_err": loss.quantization_error(quantizer.segments(z), reconstruction),
    }
    return terms, z, soft_codes


def train_epoch(
    model: MeCoQ,
    loader: data.TwoViews,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    epoch: int,
    args: Namespace,
    writer: SummaryWriter | None,
) -> dict[str, float]:
    """One pass over the training images; returns the means over its steps. Raises RunError on a non-finite loss.

    The host never waits for the device but once in `--log_interval` steps, to read the losses of all of them.
    """
    model.train()
    loader.batch_sampler.epoch = epoch
    use_memory = model.memory is not None and epoch >= args.queue_begin_epoch
    steps = StepLog(epoch, len(loader), args.log_interval, writer)
    bar = progress_bar(loader, f"epoch {epoch}")
    for step, views in enumerate(bar):
        terms, z, soft_codes = objective(model, views, use_memory, args)
        optimizer.zero_grad()
        try:
            terms["loss/total_loss"].backward()
        except RuntimeError as error:
            if "returned nan values" in str(error):  # --detect_anomaly
                raise RunError(f"{error} in epoch {epoch}, step {step}") from error
            raise
        steps.add(scheduler.get_last_lr()[0], terms)
        if steps.last:
            bar.set_postfix(loss=f"{steps.last['loss/total_loss']:.4f}")
        optimizer.step()
        scheduler.step()
        if model.memory is not None:
            model.remember(z, soft_codes)
    return steps.means()


class StepLog:
    """The losses of an epoch's steps: left on the device, read every `interval` steps all at once, and passed on to
    TensorBoard, each with the step it was of.

    `last` holds the newest values that were read, by tag.
    """

    def __init__(self, epoch: int, steps: int, interval: int, writer: SummaryWriter | None) -> None:
        self.epoch, self.steps, self.interval, self.writer = epoch, steps, interval, writer
        self.waiting: list[tuple[float, Tensor]] = []
        self.read = 0
        self.sums: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def add(self, lr: float, terms: dict[str, Tensor]) -> None:
        """Take a step's terms (scalars by tag). Raises RunError where one that is read now is not finite."""
        self.names = ["lr", *terms]
        self.waiting.append((lr, torch.stack([term.detach() for term in terms.values()])))
        if len(self.waiting) == self.interval or self.read + len(self.waiting) == self.steps:
            rates, values = zip(*self.waiting, strict=True)
            self.waiting = []
            for lr, row in zip(rates, torch.stack(values).tolist(), strict=True):
                self._note(dict(zip(self.names, [lr, *row], strict=True)))

    def _note(self, scalars: dict[str, float]) -> None:
        total = scalars["loss/total_loss"]
        if not math.isfinite(total):
            place = f"epoch {self.epoch}, step {self.read}"
            raise RunError(f"the loss became {total} in {place}: try a smaller --lr or a larger --T")
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            if self.writer:
                self.writer.add_scalar(name, value, self.epoch * self.steps + self.read)
        self.read += 1
        self.last = scalars

    def means(self) -> dict[str, float]:
        """Of the values of all steps, by tag."""
        return {name: value / self.steps for name, value in self.sums.items()}


def train(
    model: MeCoQ,
    loader: data.TwoViews,
    validation: Callable[[], float],
    args: Namespace,
    files: Files,
    watch: Stopwatch,
    writer: SummaryWriter | None,
) -> list[dict]:
    """Train with early stopping; the best model by validation MAP is left in `model.cpt`. Returns the history.

    Args:
        loader: see `data.train_loader`.
        validation: gives the MAP that picks the checkpoint, of the model as it stands.

    Raises RunError on a non-finite loss, naming epoch, step and the last good checkpoint.
    """
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, args, len(loader))
    patience = Patience(args.monitor_counter)
    history: list[dict] = []
    for epoch in range(args.epoch_num):
        with (
            watch.measure("train"),
            naming_checkpoint(files.model, patience),
            torch.autograd.set_detect_anomaly(args.detect_anomaly),
        ):
            means = train_epoch(model, loader, optimizer, scheduler, epoch, args, writer)
        history.append({"epoch": epoch} | means)
        LOG.info(
            "epoch %d: avg loss=%.6f, avg quantization error=%.6f",
            epoch, means["loss/total_loss"], means["quant_err"],
        )  # fmt: skip
        last = epoch + 1 == args.epoch_num
        if not last and (epoch + 1) % args.eval_interval:
            continue
        with watch.measure("validate"), naming_checkpoint(files.model, patience):
            value = validation()
        history[-1]["val_mAP"] = value
        LOG.info("val mAP=%.6f", value)
        if writer:
            writer.add_scalar("val_mAP", value, epoch)
        if patience.improved(value):
            save_model(model, files.model)
        elif patience.exhausted and not last:
            LOG.info("early stop: no better val mAP in %d evaluations", args.monitor_counter)
            break
    return history


@contextmanager
def naming_checkpoint(path: Path, patience: Patience) -> Iterator[None]:
    """Add to a RunError what can be saved from the run."""
    try:
        yield
    except RunError as error:
        best = f"{path} (val mAP={patience.best:.6f})" if patience.best >= 0 else "none was saved yet"
        raise RunError(f"{one_line(error)}; last good checkpoint: {best}") from None


# ---------------------------------------------------------------- testing


@torch.inference_mode()
def encode(model: MeCoQ, images: Computed | Cached, hard: bool) -> Tensor:
    """Hard codes `[n, M]` of images, or their embeddings `[n, D]`, on the run's device, in the images' order.

    Raises RunError where an embedding is not finite: its code would mean nothing.
    """
    model.eval()
    rows, sound = [], []
    for batch in progress_bar(images, "encode database" if hard else "encode queries"):
        z = model.embed(batch.float())
        sound.append(z.isfinite().all())
        rows.append(model.quantizer.hard_codes(z) if hard else z)
    if not torch.stack(sound).all():
        raise RunError("the embeddings are not finite numbers: try a smaller --lr or a larger --T")
    return torch.cat(rows)


def test(
    model: MeCoQ,
    features: dict[str, Computed | Cached],
    splits: data.Splits,
    args: Namespace,
    db_codes: Tensor | None = None,
) -> tuple[retrieval.Metrics, Tensor]:
    """Encode queries and database (or take `db_codes` for it), rank, measure. Returns the metrics and the database's
    codes `[n, M]`.

    Args:
        features: see `features.test_features`.
    """
    if db_codes is None:
        db_codes = encode(model, features["database"], hard=True)
    queries = encode(model, features["query"], hard=args.symmetric_distance)
    return measure(retrieval.evaluate, model.quantizer, queries, db_codes, splits, args), db_codes


def validate(model: MeCoQ, features: dict[str, Computed | Cached], splits: data.Splits, args: Namespace) -> float:
    """MAP@K, as `test` finds it."""
    queries = encode(model, features["query"], hard=args.symmetric_distance)
    db_codes = encode(model, features["database"], hard=True)
    return measure(retrieval.mean_average_precision, model.quantizer, queries, db_codes, splits, args)


@torch.inference_mode()
def measure(
    metric: Callable,
    quantizer: CodebookAttention,
    queries: Tensor,
    db_codes: Tensor,
    splits: data.Splits,
    args: Namespace,
) -> retrieval.Metrics | float:
    """`retrieval.evaluate` or `retrieval.mean_average_precision` of embeddings (or codes) of the queries and codes of
    the database, with the similarity that the flags ask for, on the run's device."""
    codewords = quantizer.codewords()
    if not codewords.isfinite().all():
        raise RunError("the codewords are not finite numbers: try a smaller --lr or a larger --T")
    if args.symmetric_distance:
        tables = retrieval.symmetric_tables
    else:
        tables = partial(retrieval.lookup_tables, normalize_query=args.normalize_query)
    with progress_bar(None, "rank queries", total=len(queries)) as bar:
        return metric(
            lambda part: tables(part, codewords),
            queries,
            db_codes.to(args.device),
            torch.from_numpy(splits.query.labels).to(args.device),
            torch.from_numpy(splits.database.labels).to(args.device),
            args.topK,
            on_chunk=bar.update,
        )


test.__test__ = False  # not a pytest function


# ---------------------------------------------------------------- a run


def run(model: MeCoQ, splits: data.Splits, args: Namespace, files: Files) -> dict:
    """Train, test the best model, and leave every file of a run. Returns what went into `metrics.json`."""
    watch = Stopwatch()
    write_json(files.checkpoints / "config.json", vars(args))
    with watch.measure("features"):
        known = test_features(model.backbone, splits, args)
    writer = None if args.disable_writer else SummaryWriter(str(files.tensorboard))
    loader = data.train_loader(splits, args)
    try:
        history = train(model, loader, lambda: validate(model, known, splits, args), args, files, watch, writer)
    finally:
        if writer:
            writer.close()
    if history:
        try:
            model.load_state_dict(read_state_dict(files.model, "best checkpoint"))
        except (InputError, RuntimeError) as error:
            raise RunError(f"{files.model} changed under the run: {error}") from error
    else:
        save_model(model, files.model)
    return report(model, known, splits, args, files, watch, history)


def run_test(model: MeCoQ, splits: data.Splits, args: Namespace, files: Files) -> dict:
    """Test a model that is trained already. The codes in `db_codes.npy` beside `--checkpoint`, if there are any, stand
    for the database; under `--limit` it is encoded."""
    write_json(files.checkpoints / "config.json", vars(args))
    path = Path(args.checkpoint).with_name("db_codes.npy")
    codes = saved_codes(path, model, splits.database, args) if path.exists() and args.limit is None else None
    watch = Stopwatch()
    with watch.measure("features"):
        if codes is None:
            known = test_features(model.backbone, splits, args)
        else:  # the queries once: not worth a cache
            known = {"query": Computed(model.backbone, splits.query, args)}
    return report(model, known, splits, args, files, watch, [], codes)


def saved_codes(path: Path, model: MeCoQ, database: data.Images | ImageFiles, args: Namespace) -> Tensor:
    """Codes `[n, M]` of the database from a file, once some of its images, encoded anew, have shown that they fit.

    Raises InputError where they do not.
    """
    advice = "move the file away to have the database encoded"
    codes = read_array(path)
    if codes.shape != (len(database), args.M) or codes.dtype.kind not in "iu":
        raise InputError(f"{path} holds {codes.dtype} {list(codes.shape)}, not a code of {args.M} numbers for each of "
                         f"{len(database)} images: {advice}")  # fmt: skip
    if codes.min() < 0 or codes.max() >= args.K:
        raise InputError(f"{path}: a code is {codes.min()} or {codes.max()}, codewords are 0 to {args.K - 1}: {advice}")
    targets = path.with_name("db_targets.npy")
    labels = read_array(targets) if targets.exists() else database.labels
    if labels.ndim == 2 and labels.size and database.labels.ndim == 1:  # one-hot rows for class ids
        labels = labels.argmax(axis=1)
    if not np.array_equal(labels, database.labels):
        raise InputError(f"{targets}: other labels than those of this data set, split and --seed: {advice}")
    metrics = path.with_name("metrics.json")
    model_of_codes = read_metrics(metrics).get("model_sha256") if metrics.exists() else None
    if model_of_codes not in (None, sha256(Path(args.checkpoint))):
        raise InputError(f"{path} was made with another model than --checkpoint: {advice}")
    probe = np.linspace(0, len(database), min(64, len(database)), endpoint=False).astype(int)
    model.eval()
    anew = encode(model, Computed(model.backbone, database.subset(probe), args), hard=True).cpu().numpy()
    agree, chance = (float((anew == np.roll(codes[probe], shift, axis=0)).mean()) for shift in (0, 1))
    if agree < chance + 0.8 * (1 - chance):  # rounding differs between devices, a model's codes do not
        raise InputError(f"{path}: only {agree:.0%} of the codes of {len(probe)} images are the checkpoint's: {advice}")
    LOG.info("database codes from %s (of %d images encoded anew, %.1f%% agree)", path, len(probe), 100 * agree)
    return torch.from_numpy(codes.astype(np.uint8 if args.K <= 256 else np.int32))


def report(
    model: MeCoQ,
    features: dict[str, Computed | Cached],
    splits: data.Splits,
    args: Namespace,
    files: Files,
    watch: Stopwatch,
    history: list[dict],
    db_codes: Tensor | None = None,
) -> dict:
    """Test the model, log and write every result. Returns what went into `metrics.json`."""
    digest = sha256(Path(args.checkpoint) if args.test_only else files.model)  # before the test: a file may be replaced
    with watch.measure("test"):
        metrics, db_codes = test(model, features, splits, args, db_codes)
    LOG.info("test mAP=%.6f", metrics.map)
    precisions = metrics.p_at_k[1].tolist()
    ranks = [rank for rank in (1, 10, 100, 1000, 5000) if rank <= len(precisions)]
    LOG.info("test %s", ", ".join(f"P@{rank}={precisions[rank - 1]:.6f}" for rank in ranks))
    save_results(metrics, db_codes.cpu(), splits.database.labels, args, files)
    results = {
        "map": metrics.map,
        "topK": args.topK,
        "recipe": args.recipe,
        "notes": args.notes,
        "dataset": args.dataset,
        "bits": code_bits(args),
        "seed": args.seed,
        "limit": args.limit,
        "canonical_data": splits.canonical,
        "epochs_run": len(history),
        "best_epoch": max((h for h in history if "val_mAP" in h), key=lambda h: h["val_mAP"], default={}).get("epoch"),
        "history": history,
        "seconds": watch.seconds,
        "peak_memory_mb": peak_memory(args.device),
        "device": device_name(args.device),
        "versions": versions(),
        "model_sha256": digest,
        "config": vars(args),
    }
    write_json(files.checkpoints / "metrics.json", results)
    return results
