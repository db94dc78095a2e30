"""How does a run go? Training, encoding a database, testing."""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import loss
import retrieval
from checkpoint import Signals, Training, fingerprint
from feature_cache import Cached, Computed, test_features
from methods.mecoq import CodebookAttention, MeCoQ, read_state_dict
from readers import ImageFiles
from results import (
    Events,
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
from utils import LOG, InputError, RunError, Stopped, learning_rate, one_line, progress_bar, sha256, write_json


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
    training: Training, loader: data.TwoViews, args: Namespace, signals: Signals | None = None
) -> dict[str, float]:
    """The rest of an epoch, from `training.step` on; returns the means over all its steps. Raises RunError on a
    non-finite loss, and Stopped between two steps, after all has been saved.

    The host never waits for the device but once in `--log_interval` steps, to read the losses of all of them.
    """
    model, epoch, signals = training.model, training.epoch, signals or Signals()
    model.train()
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, training.step
    use_memory = model.memory is not None and epoch >= args.queue_begin_epoch
    steps = StepLog(training, len(loader), args.log_interval)
    with progress_bar(None, f"epoch {epoch}", total=len(loader), done=training.step) as bar:
        for views in loader:
            terms, z, soft_codes = objective(model, views, use_memory, args)
            training.optimizer.zero_grad()
            try:
                terms["loss/total_loss"].backward()
            except RuntimeError as error:
                if "returned nan values" in str(error):  # --detect_anomaly
                    raise RunError(one_line(error)) from error
                raise
            steps.add(training.scheduler.get_last_lr()[0], terms)
            training.optimizer.step()
            training.scheduler.step()
            if model.memory is not None:
                model.remember(z, soft_codes)
            training.step += 1
            bar.update()
            if steps.last:
                bar.set_postfix(loss=f"{steps.last['loss/total_loss']:.4f}")
            if training.step % args.save_interval == 0 or signals.waiting:
                steps.read()
                training.save()
                signals.check()
    return {name: value / len(loader) for name, value in training.sums.items()}


class StepLog:
    """The losses of an epoch's steps: left on the device, read every `interval` steps all at once, added to
    `training.sums`, and passed on to `training.events`, each with the step it was of.

    `last` holds the newest values that were read, by tag.
    """

    def __init__(self, training: Training, steps: int, interval: int) -> None:
        self.training, self.steps, self.interval = training, steps, interval
        self.waiting: list[tuple[float, Tensor]] = []
        self.done = training.step
        self.last: dict[str, float] = {}

    def add(self, lr: float, terms: dict[str, Tensor]) -> None:
        """Take a step's terms (scalars by tag). Raises RunError where one that is read now is not finite."""
        self.names = ["lr", *terms]
        self.waiting.append((lr, torch.stack([term.detach() for term in terms.values()])))
        if len(self.waiting) == self.interval or self.done + len(self.waiting) == self.steps:
            self.read()

    def read(self) -> None:
        """Read what waits. Raises RunError where a loss is not finite."""
        if self.waiting:
            rates, values = zip(*self.waiting, strict=True)
            self.waiting = []
            for lr, row in zip(rates, torch.stack(values).tolist(), strict=True):
                self._note(dict(zip(self.names, [lr, *row], strict=True)))

    def _note(self, scalars: dict[str, float]) -> None:
        total, sums, events = scalars["loss/total_loss"], self.training.sums, self.training.events
        if not math.isfinite(total):
            self.training.step = self.done  # an earlier one than that which is being done
            raise RunError(f"the loss became {total}: try a smaller --lr or a larger --T")
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value
            if events:
                events.add_scalar(name, value, self.training.epoch * self.steps + self.done)
        self.done += 1
        self.last = scalars


def train(
    training: Training,
    loader: data.TwoViews,
    validation: Callable[[], float],
    args: Namespace,
    files: Files,
    watch: Stopwatch,
    signals: Signals | None = None,
) -> None:
    """Train with early stopping, from where `training` stands; the best model by validation MAP is left in `model.cpt`,
    the state after each epoch in `last.cpt`.

    Args:
        loader: see `data.train_loader`.
        validation: gives the MAP that picks the checkpoint, of the model as it stands.

    Raises RunError on a non-finite loss, naming epoch, step and the last good checkpoint, and Stopped on a signal.
    """
    model, patience, history = training.model, training.patience, training.history
    signals = signals or Signals()
    with naming_checkpoint(files.model, training), signals.deferred():
        while not training.finished:
            epoch = training.epoch
            with watch.measure("train"), torch.autograd.set_detect_anomaly(args.detect_anomaly):
                means = train_epoch(training, loader, args, signals)
            LOG.info(
                "epoch %d: avg loss=%.6f, avg quantization error=%.6f",
                epoch, means["loss/total_loss"], means["quant_err"],
            )  # fmt: skip
            last = epoch + 1 == args.epoch_num
            entry = {"epoch": epoch} | means
            if last or (epoch + 1) % args.eval_interval == 0:
                try:
                    with watch.measure("validate"), signals.deferred(False):
                        entry["val_mAP"] = value = validation()
                except Stopped:
                    training.save()
                    raise
                LOG.info("val mAP=%.6f", value)
                if training.events:
                    training.events.add_scalar("val_mAP", value, epoch)
                patience.improved(value)
            history.append(entry)
            training.epoch, training.step, training.sums = epoch + 1, 0, {}
            if patience.exhausted and not last:
                LOG.info("early stop: no better val mAP in %d evaluations", args.monitor_counter)
            training.save(if_cheap=True)
            if training.best_is_now:
                save_model(model, files.model)
                training.saved_best = patience.best
            if signals.waiting:
                training.save()
                signals.check()


@contextmanager
def naming_checkpoint(path: Path, training: Training) -> Iterator[None]:
    """Say with the error that ends a training in which step it came and what there is of the run."""
    try:
        yield
    except (RunError, OSError, RuntimeError) as error:
        dead_worker = "DataLoader worker" in str(error)
        if not isinstance(error, RunError | OSError) and not dead_worker:
            raise
        best = training.saved_best
        best = f"{path} (val mAP={best:.6f})" if best >= 0 else "none was saved yet"
        place = f"epoch {training.epoch}, step {training.step}"
        raise RunError(f"{place}: {one_line(error)}; last good checkpoint: {best}") from error


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
        sound.append((z.abs() < 1e15).all())  # not so large, either, that similarities overflow
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


def tables(quantizer: CodebookAttention, args: Namespace) -> Callable[[Tensor], Tensor]:
    """What makes tables `[q, M, K]` of some queries, for the similarity that the flags ask for."""
    codewords = quantizer.codewords()
    if not codewords.isfinite().all():
        raise RunError("the codewords are not finite numbers: try a smaller --lr or a larger --T")
    if args.symmetric_distance:
        return lambda queries: retrieval.symmetric_tables(queries, codewords)
    return lambda queries: retrieval.lookup_tables(queries, codewords, args.normalize_query)


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
    with progress_bar(None, "rank queries", total=len(queries)) as bar:
        return metric(
            tables(quantizer, args),
            queries,
            db_codes.to(args.device),
            torch.from_numpy(splits.query.labels).to(args.device),
            torch.from_numpy(splits.database.labels).to(args.device),
            args.topK,
            on_chunk=bar.update,
        )


test.__test__ = False  # not a pytest function


# ---------------------------------------------------------------- a run


def run(
    model: MeCoQ,
    splits: data.Splits,
    args: Namespace,
    files: Files,
    state: dict | None = None,
    signals: Signals | None = None,
    begin: Callable[[], object] = lambda: None,
) -> dict:
    """Train, test the best model, and leave every file of a run. Returns what went into `metrics.json`.

    Args:
        state: of `last.cpt`, to go on from there.
        begin: called when the run has all it needs, before it writes its first file.
    """
    watch = Stopwatch()
    loader = data.train_loader(splits, args)
    training = start(model, loader, args, files.last, fingerprint(splits, model.backbone))
    if state:
        training.restore(state)
        LOG.info("going on in epoch %d, with step %d", training.epoch, training.step)
    watch.seconds = training.seconds
    with watch.measure("features"):
        known = test_features(model.backbone, splits, args)
    begin()
    write_json(files.checkpoints / "config.json", vars(args))
    if not state:
        training.save()
    elif training.best_is_now:  # it may have been stopped before it was written
        save_model(model, files.model)
    with nullcontext() if args.disable_writer else Events(files.tensorboard) as training.events:
        train(training, loader, lambda: validate(model, known, splits, args), args, files, watch, signals)
    if training.history:
        try:
            model.load_state_dict(read_state_dict(files.model, "best checkpoint"))
        except (InputError, RuntimeError) as error:
            raise RunError(f"{files.model} changed under the run: {error}") from error
    else:
        save_model(model, files.model)
    return report(model, known, splits, args, files, watch, training.history)


def start(
    model: MeCoQ, loader: data.TwoViews, args: Namespace, path: Path | None = None, fingerprint: str = ""
) -> Training:
    """A training that has not begun; see `Training`."""
    optimizer = build_optimizer(model, args)
    return Training(model, optimizer, build_scheduler(optimizer, args, len(loader)), args, path, fingerprint)


def run_test(
    model: MeCoQ, splits: data.Splits, args: Namespace, files: Files, begin: Callable[[], object] = lambda: None
) -> dict:
    """Test a model that is trained already. The codes in `db_codes.npy` beside `--checkpoint`, if there are any, stand
    for the database; under `--limit` it is encoded. `begin`: see `run`."""
    path = Path(args.checkpoint).with_name("db_codes.npy")
    codes = saved_codes(path, model, splits.database, args) if path.exists() and args.limit is None else None
    watch = Stopwatch()
    with watch.measure("features"):
        if codes is None:
            known = test_features(model.backbone, splits, args)
        else:  # the queries once: not worth a cache
            known = {"query": Computed(model.backbone, splits.query, args)}
    begin()
    write_json(files.checkpoints / "config.json", vars(args))
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
