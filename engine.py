"""A run: built from its configuration, trained, and tested."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import distributed
import evaluation
import loaders
from checkpoint import Callback, Loop, Signals, StateFile, Training, fingerprint
from config import Config, key, recorded
from data import Splits
from feature_cache import Computed, Features, test_features
from loaders import Preprocessing, TwoViews, ViewOptions
from methods import BACKBONES, METHODS
from methods.backbones import Backbone, PassThrough, build_backbone, read_state_dict
from methods.base import Method
from methods.batch_norm import synchronize_batch_norm
from model_file import save_model
from optimizer import build_optimizer, build_scheduler
from readers import ImageFiles, Images
from results import Events, Files, StepLog, Stopwatch, described, report, take_place
from utils import (
    LOG,
    InputError,
    NonFiniteError,
    RunError,
    Stopped,
    load_object,
    one_line,
    progress_bar,
    seed_everything,
    sha256,
    write_json,
)
from vectors import EmbeddingFiles, Vectors, dimensions

# ---------------------------------------------------------------- what a configuration describes


def build(config: Config) -> tuple[Splits, Method]:
    """Data and method of a run, the same whenever the seed is. Raises InputError if either cannot be had."""
    seed_everything(config.seed)
    # what is wrong with a file of weights is said before the data is checked; a download comes after it
    method = None if config.weights == "imagenet" else build_method(config)
    with distributed.one_for_all(config.download_cifar10):
        splits = build_splits(config)
    method = method or build_method(config)
    if config.int8_views and not config.test_only:
        method.backbone.quantize_views(loaders.some_images(splits.train, preprocessing(config)))
    return splits, method


def build_splits(config: Config) -> Splits:
    """The images of a run. Raises InputError if they are not there or not sound."""
    roots = Path(config.data_root), Path(config.list_root)
    what = config.dataset, config.protocol, config.seed
    photos = None if config.images is None else Path(config.images)
    source = data.Source(*what, *roots, config.download_cifar10, photos, embedding_files(config))
    splits = data.load_splits(source, config.limit, config.skip_bad_images, config.num_workers)
    sizes = len(splits.train), len(splits.query), len(splits.database)
    LOG.info("%d training images, %d queries, %d in the database", *sizes)
    if splits.validation is not None:
        LOG.info("%d other queries pick the checkpoint", len(splits.validation))
    return splits


def embedding_files(config: Config) -> EmbeddingFiles | None:
    """The files of embeddings that the flags name."""
    paths = [config.embeddings, config.embedding_views, config.embedding_labels]
    return EmbeddingFiles(*(path and Path(path) for path in paths)) if config.embeddings else None


def build_method(config: Config) -> Method:
    """The method that the flags describe, on its device; with `--test_only` it is the checkpoint's."""
    weights = "random" if config.test_only else config.weights
    if config.embeddings:
        backbone = PassThrough(dimensions(Path(config.embeddings)))
    else:
        backbone = build_backbone(config.backbone, weights, config.trainable_layer_num, config.precision == "bf16")
    method = load_object(METHODS[config.method].build)(backbone, config)
    if config.normalize_features:
        method.normalize_features()
    if config.test_only:
        method.load_checkpoint(Path(config.checkpoint))
    method = method.to(config.device)
    if config.compile and backbone.split:
        own = -(-config.batch_size // distributed.processes())
        backbone.compile_frozen(config.image_size, config.device, (2 * own, loaders.TEST_BATCH))
    return method


def build_loader(config: Config, splits: Splits) -> TwoViews:
    """Both views of the training images, in batches."""
    return loaders.train_loader(splits, view_options(config), config.device, config.num_workers)


def view_options(config: Config) -> ViewOptions:
    """How a run's training images become views."""
    sizes = config.image_size, config.batch_size
    normalized = BACKBONES[config.backbone].normalized
    return ViewOptions(config.views, *sizes, config.seed, config.augmentation, normalized, config.drop_last)


def build_features(config: Config, backbone: Backbone, images: dict[str, Images | ImageFiles]) -> dict[str, Features]:
    """The features of test images, by split; from the cache, if there is one."""
    folder = None if config.feature_cache == "off" else Path(config.feature_cache)
    return test_features(backbone, images, preprocessing(config), folder, key(config, "features"))


def preprocessing(config: Config) -> Preprocessing:
    """How a run's test images become batches."""
    normalized = BACKBONES[config.backbone].normalized
    return Preprocessing(config.image_size, config.device, config.num_workers, normalized)


def start(
    config: Config,
    method: Method,
    loader: Collection,
    path: Path | None = None,
    fingerprint: str = "",
    callbacks: Sequence[Callback] = (),
) -> Training:
    """A training that has not begun.

    Args:
        loader: only its number of steps per epoch is read.
        path: of `last.cpt`; None: no state is saved.
        fingerprint: see `checkpoint.fingerprint`.
    """
    optimizer = build_optimizer(method, config)
    scheduler = build_scheduler(optimizer, config, len(loader))
    file = StateFile(path, recorded(config), fingerprint) if path else None
    return Training(method, optimizer, scheduler, Loop.of(config), len(loader), file, callbacks)


# ---------------------------------------------------------------- training


def train_epoch(training: Training, batches: Collection[Tensor]) -> dict[str, float]:
    """The rest of an epoch, from `training.step` on; returns the means over all its steps. Raises RunError on a
    non-finite loss, and Stopped between two steps, after all has been saved.

    The host waits for the device once in `log_interval` steps only, to read the losses of all of them.

    Args:
        batches: views `[2N, 3, S, S]`; its length is that of the whole epoch.
    """
    method, signals = training.method, training.signals
    learned = [p for group in training.optimizer.param_groups for p in group["params"]]
    method.train()
    steps = StepLog(training.loop.log_interval, len(batches), training.step, training.note)
    with progress_bar(None, f"epoch {training.epoch}", total=len(batches), done=training.step) as bar:
        for views in batches:
            training.call_back(views)
            distributed.draw_apart(training.seed, training.epoch, training.step)
            terms = method.loss(views, training.epoch)
            training.optimizer.zero_grad()
            backward(terms["loss/total_loss"])
            distributed.average_gradients(learned)
            steps.add(training.scheduler.get_last_lr()[0], terms)
            training.optimizer.step()
            training.scheduler.step()
            method.after_step()
            training.step += 1
            bar.update()
            if steps.last:
                bar.set_postfix(loss=f"{steps.last['loss/total_loss']:.4f}")
            if signals.waiting() or training.step % training.loop.save_interval == 0:
                steps.read()
                training.save()
                signals.check()
    return {name: value / len(batches) for name, value in training.sums.items()}


def backward(total: Tensor) -> None:
    """Gradients of the loss. Raises RunError if `--detect_anomaly` finds a non-finite one."""
    try:
        total.backward()
    except RuntimeError as error:
        if "returned nan values" in str(error):
            raise NonFiniteError(one_line(error)) from error
        raise


def train(training: Training, loader: TwoViews, validate: Callable[[], float] | None, model_path: Path) -> None:
    """Train with early stopping, from where `training` stands; the best model by validation MAP is left in
    `model_path`, the state after each epoch in `last.cpt`.

    Args:
        validate: gives the MAP that picks the checkpoint, of the method as it stands; None: the last epoch's is kept.

    Raises RunError on a non-finite loss, naming epoch, step and the last good checkpoint, and Stopped on a signal.
    """
    signals = training.signals
    with naming_checkpoint(model_path, training), signals.deferred(), training.writer:
        while not training.finished:
            loader.set_epoch(training.epoch, training.step)
            with training.stopwatch.measure("train"), torch.autograd.set_detect_anomaly(training.loop.detect_anomaly):
                means = train_epoch(training, loader)
            LOG.info(
                "epoch %d: avg loss=%.6f, avg quantization error=%.6f",
                training.epoch, means["loss/total_loss"], means.get("quant_err", math.nan),
            )  # fmt: skip
            end_epoch(training, means, validate)
            if training.best_is_now:
                training.check_lock()
                save_best(training, model_path)
            if signals.waiting():
                training.save()
                signals.check()


def save_best(training: Training, path: Path) -> None:
    """Write the model as it stands; while a GPU trains on. Of several processes, the first does."""
    if not distributed.is_first():
        return
    written = partial(setattr, training, "saved_best", training.patience.best)
    if training.device.type == "cpu":
        save_model(training.method, path)
        written()
    else:
        training.writer.save(training.method, path, written)


def end_epoch(training: Training, means: dict[str, float], validate: Callable[[], float] | None) -> None:
    """Validate, if it is time to, and step on to the next epoch; the state is saved if that is cheap."""
    epoch, loop, signals = training.epoch, training.loop, training.signals
    last = epoch + 1 == loop.epochs
    entry = {"epoch": epoch} | means
    if validate and (last or (epoch + 1) % loop.eval_interval == 0):
        if several := distributed.processes() > 1:  # which go on to where they can stop together
            training.save(if_cheap=True)
        try:
            with training.stopwatch.measure("validate"), signals.deferred(several):
                entry["val_mAP"] = value = validate()
        except Stopped:
            training.save()
            raise
        LOG.info("val mAP=%.6f", value)
        training.method.after_validation()
        if training.events:
            training.events.add_scalar("val_mAP", value, epoch)
        training.patience.improved(value)
    training.history.append(entry)
    training.epoch, training.step, training.sums = epoch + 1, 0, {}
    if training.patience.exhausted and not last:
        LOG.info("early stop: no better val mAP in %d evaluations", loop.patience)
    training.save(if_cheap=True)


@contextmanager
def naming_checkpoint(path: Path, training: Training) -> Iterator[None]:
    """Add to the error that ends a training in which step it came and what is left of the run."""
    try:
        yield
    except (RunError, OSError, RuntimeError, MemoryError) as error:
        dead = "DataLoader worker" in str(error) or distributed.is_loss(error)
        if not isinstance(error, RunError | OSError) and not dead:
            raise
        reason = distributed.lost_process(error) if distributed.is_loss(error) else one_line(error)
        best = training.saved_best
        best = f"{path} (val mAP={best:.6f})" if best >= 0 else "none was saved yet"
        place = f"epoch {training.epoch}, step {training.step}"
        raise RunError(f"{place}: {reason}; last good checkpoint: {best}") from error


# ---------------------------------------------------------------- a run


def run(config: Config, files: Files, log: Path, state: dict | None = None, signals: Signals | None = None) -> dict:
    """Train, test the best model, and leave every file of a run. Returns what went into `metrics.json`.

    Args:
        log: where the log is written until the run has all it needs and takes its place.
        state: of `last.cpt`, to go on from there.
    """
    splits, method = build(config)
    told = described(config, splits)
    loader = build_loader(config, splits)
    training = join(config, splits, method, loader, files.last)
    training.signals, training.check_lock = signals or training.signals, files.check_lock
    if state:
        training.restore(state)
        LOG.info("going on in epoch %d, with step %d", training.epoch, training.step)
    with training.stopwatch.measure("features"):
        features = build_features(config, method.backbone, splits.all if config.normalize_features else splits.tested)
        if config.normalize_features and not state:
            method.centre_features(features["train"])
    distributed.copy_from_first(*method.state_dict().values())
    begin(config, files, log, state)
    if not state:
        training.save()
    elif training.best_is_now and distributed.is_first():  # it may have been stopped before it was written
        files.check_lock()
        save_model(method, files.model)
    measured = evaluation.Measure(config.topK, config.ties)
    validate = partial(evaluation.validate, method, features, splits, measured) if splits.validated else None
    first = distributed.is_first()
    with Events(files.tensorboard) if first and not config.disable_writer else nullcontext() as training.events:
        train(training, loader, validate, files.model)
    if first:
        load_best(training, files.model)
        told["model_sha256"] = sha256(files.model)  # before the test: a file may be replaced
    distributed.copy_from_first(*method.state_dict().values())
    with training.stopwatch.measure("test"):
        metrics, codes = evaluation.test(method, features, splits, measured)
        told |= unlabelled(config, method, splits, codes)
    told |= training.summary() | evaluation.beside(method, features, splits, codes, measured)
    return report(files, splits.database.labels, metrics, codes, measured.ties, told)


def join(config: Config, splits: Splits, method: Method, loader: TwoViews, path: Path) -> Training:
    """A training that has not begun, which all processes of the run share. Raises InputError if they cannot.

    Args:
        path: of `last.cpt`.
    """
    loader.share_out()
    content = compared(config, splits, method)
    synchronize_batch_norm(method)
    training = start(config, method, loader, path, content)
    training.validated = splits.validated
    return training


def compared(config: Config, splits: Splits, method: Method) -> str:
    """The `fingerprint` of what is trained on. Raises InputError if another process has another, or other flags."""
    steps = config.log_interval, config.save_interval, config.precision, config.test_only
    distributed.check_same(repr((sorted(key(config).items()), steps)), "flags")
    content = fingerprint(splits, method.backbone)
    distributed.check_same(content, "images, labels or weights")
    return content


def begin(config: Config, files: Files, log: Path, state: dict | None) -> None:
    """Let a run take its place, once it has all it needs; of several processes, the first does."""
    if distributed.is_first():
        take_place(files, log, state)
        write_json(files.checkpoints / "config.json", recorded(config))


def unlabelled(config: Config, method: Method, splits: Splits, codes: Tensor) -> dict:
    """What `metrics.json` says of a model that no MAP has picked: what can be measured without labels; of others
    nothing."""
    if splits.validated:
        return {}
    views = build_loader(config.replace(drop_last=False), replace(splits, train=splits.query))
    told = evaluation.unlabelled(method, views, codes)
    if isinstance(splits.query, Vectors) and splits.query.views is None:
        told["views_found"] = None  # pairs of neighbours are no views
    return {"unlabelled": told}


def load_best(training: Training, path: Path) -> None:
    """Load the best checkpoint of a training; write it if nothing was trained."""
    training.check_lock()
    if not training.history:
        save_model(training.method, path)
        return
    try:
        training.method.load_state_dict(read_state_dict(path, "best checkpoint"))
    except (InputError, RuntimeError) as error:
        raise RunError(f"{path} changed under the run: {error}") from error


def run_test(config: Config, files: Files, log: Path) -> dict:
    """Test a model that is trained already. The codes in `db_codes.npy` beside `--checkpoint`, if there are any, stand
    for the database; under `--limit` it is encoded. Returns what went into `metrics.json`."""
    checkpoint, stopwatch = Path(config.checkpoint), Stopwatch()
    splits, method = build(config)
    told, codes = described(config, splits), None
    if distributed.processes() > 1:
        compared(config, splits, method)
    stored = distributed.is_first() and checkpoint.with_name("db_codes.npy").exists() and config.limit is None
    if distributed.largest(int(stored))[0]:
        codes = evaluation.saved_codes(checkpoint, method, splits.database, preprocessing(config))
    with stopwatch.measure("features"):
        if codes is None:
            features = build_features(config, method.backbone, splits.tested)
        else:  # the queries once: not worth a cache
            features = {"query": Computed(method.backbone, splits.query, preprocessing(config))}
    begin(config, files, log, None)
    digest, measured = sha256(checkpoint), evaluation.Measure(config.topK, config.ties)
    with stopwatch.measure("test"):
        metrics, codes = evaluation.test(method, features, splits, measured, codes)
        told |= unlabelled(config, method, splits, codes)
    told |= {"epochs_run": 0, "best_epoch": None, "history": [], "seconds": stopwatch.seconds, "model_sha256": digest}
    told |= evaluation.beside(method, features, splits, codes, measured)
    return report(files, splits.database.labels, metrics, codes, measured.ties, told)
