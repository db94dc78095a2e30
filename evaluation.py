"""Encoding with a method, validation and test."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import retrieval
from data import Splits
from distributed import is_first, joined, largest, share, total
from feature_cache import Computed, Features, own_part
from loaders import Preprocessing, TwoViews
from methods.base import Method
from methods.mecoq import used_codewords
from readers import ImageFiles, Images
from results import read_codes
from retrieval import Measure, Metrics
from utils import LOG, InputError, NonFiniteError, progress_bar
from vectors import Vectors

COMPARED = 100_000  # embeddings of the database, at most, on which other quantizers are tried

RANKED_AT_ONCE = 128  # queries


@torch.inference_mode()
def encode(method: Method, batches: Features, output: Callable[[Tensor], Tensor], description: str) -> Tensor:
    """`output` (`method.codes` or `method.query`) of the embeddings of images `[n, ...]`, on the run's device, in the
    images' order.

    Raises RunError if an embedding is not finite: its code would mean nothing.
    """
    method.eval()
    rows, sound = [], []
    for batch in progress_bar(own_part(batches), description):
        z = method.embed(batch.float())
        sound.append((z.abs() < 1e15).all())  # not so large, either, that similarities overflow
        rows.append(output(z))
    if largest(int(not torch.stack(sound).all()))[0]:
        raise NonFiniteError("the embeddings are not finite numbers: try a smaller --lr or a larger --T")
    return joined(torch.cat(rows), len(batches))


def encode_database(method: Method, batches: Features) -> Tensor:
    """Codes `[n, M]`."""
    return encode(method, batches, method.codes, "encode database")


def encode_queries(method: Method, batches: Features) -> Tensor:
    """What `method.tables` takes, `[Q, ...]`."""
    return encode(method, batches, method.query, "encode queries")


@torch.inference_mode()
def measure(
    metric: Callable[..., Tensor], method: Method, queries: Tensor, codes: Tensor, labels: Sequence[np.ndarray]
) -> Tensor:
    """`retrieval.ranking_sums` or `retrieval.table_average_precisions`, whose other arguments are bound, of this
    process's share of encoded queries, and the database.

    Args:
        labels: of queries and database.
    """
    if not all(p.isfinite().all() for name, p in method.named_parameters() if not name.startswith("backbone.")):
        raise NonFiniteError("a learned parameter is not finite: try a smaller --lr or a larger --T")
    asked, stored = (torch.from_numpy(array).to(queries.device) for array in labels)
    own = share(len(queries))
    with progress_bar(None, "rank queries", total=own.stop - own.start) as bar:
        return metric(method.tables, queries[own], codes.to(queries.device), [asked[own], stored], on_chunk=bar.update)


def validate(method: Method, features: dict[str, Features], splits: Splits, measured: Measure) -> float:
    """MAP@K, the one of `measured.ties`: of the validation queries if the protocol has any, else as `test` finds it."""
    split = "query" if splits.validation is None else "validation"
    queries = encode_queries(method, features[split])
    codes = encode_database(method, features["database"])
    metric = partial(retrieval.table_average_precisions, measured=measured)
    found = measure(metric, method, queries, codes, [splits.tested[split].labels, splits.database.labels])
    return float(joined(found, len(queries)).mean())


def test(
    method: Method, features: dict[str, Features], splits: Splits, measured: Measure, codes: Tensor | None = None
) -> tuple[Metrics | None, Tensor]:
    """Encode queries and database (or take `codes` for it), rank, measure. Returns the metrics, with MAP@K by ties, and
    the database's codes `[n, M]`; without labels there are no metrics."""
    if codes is None:
        codes = encode_database(method, features["database"])
    if not splits.labelled:
        return None, codes
    queries = encode_queries(method, features["query"])
    metric = partial(retrieval.ranking_sums, topK=measured.topK)
    sums = measure(metric, method, queries, codes, [splits.query.labels, splits.database.labels])
    return retrieval.metrics_of(total(sums, len(queries)), len(queries), measured.topK), codes


test.__test__ = False  # not a pytest function


@torch.inference_mode()
def unlabelled(method: Method, views: TwoViews, codes: Tensor) -> dict[str, float | None]:
    """What can be measured without labels:

    `codewords_used` and `perplexity`: evenness of the use of codewords by the database's codes, shares, see
    `used_codewords`. `quantization_error`: the method's, of all views; None if it has none. `views_found`: the share of
    held-back images of which one view, as a query, finds the code of the other view before those of all other images'
    views; of k codes that score as the right one does, each is the first with probability 1 / k.

    Args:
        views: two random views of the held-back images, in batches.
        codes: of the database, `[n, M]`.
    """
    method.eval()
    views.set_epoch(0)
    z = [method(batch) for batch in progress_bar(views, "encode views")]
    first, second = (torch.cat(parts) for parts in zip(*(batch.chunk(2) for batch in z), strict=True))
    error = method.quantization_error(torch.cat([first, second]))
    queries, others = method.query(first), method.codes(second)
    found = 0.0
    for start in range(0, len(queries), RANKED_AT_ONCE):
        scores = retrieval.aqs_scores(method.tables(queries[start : start + RANKED_AT_ONCE]), others)
        own = scores.diagonal(start)[:, None]
        equal = (scores == own).sum(dim=1)
        found += float(((scores > own).sum(dim=1).eq(0) / equal).sum())
    used, perplexity = used_codewords(codes.cpu(), method.K)
    return {
        "codewords_used": used,
        "perplexity": perplexity,
        "quantization_error": None if error is None else float(error),
        "views_found": found / len(queries),
    }


def saved_codes(path: Path, method: Method, images: Images | ImageFiles, how: Preprocessing) -> Tensor:
    """The codes `[n, M]` of the database that lie beside a checkpoint, once 64 of its images, encoded anew, have shown
    that they fit. Raises InputError if they do not."""
    codes, file = read_codes(path, method.M, method.K, images.labels), path.with_name("db_codes.npy")
    probe = np.linspace(0, len(images), min(64, len(images)), endpoint=False).astype(int)
    anew = encode_database(method, Computed(method.backbone, images.subset(probe), how)).cpu().numpy()
    agree, chance = (float((anew == np.roll(codes[probe], shift, axis=0)).mean()) for shift in (0, 1))
    if agree < chance + 0.8 * (1 - chance):  # rounding differs between devices, a model's codes do not
        raise InputError(
            f"{file}: only {agree:.0%} of the codes of {len(probe)} images are the checkpoint's: move the file away "
            "to have the database encoded"
        )
    LOG.info("database codes from %s (of %d images encoded anew, %.1f%% agree)", file, len(probe), 100 * agree)
    return torch.from_numpy(codes.astype(np.uint8 if method.K <= 256 else np.int32))


@torch.inference_mode()
def beside(
    method: Method, features: dict[str, Features], splits: Splits, codes: Tensor, measured: Measure
) -> dict[str, dict]:
    """faiss's quantizers of as many bytes beside the codes `[n, M]` of a run on embeddings: logged, and as
    `metrics.json` has them; empty if the run has images, faiss is not installed, or there is too little to learn from.
    """
    if not isinstance(splits.database, Vectors):
        return {}
    if largest(int(importlib.util.find_spec("faiss") is None))[0]:
        LOG.info("beside it: nothing, PQ and OPQ need faiss (pip install -r requirements-extra.txt)")
        return {}
    import quantizers

    if len(splits.train) < quantizers.FEWEST_TRAINED:
        LOG.info("beside it: nothing, PQ and OPQ need %d embeddings to learn from", quantizers.FEWEST_TRAINED)
        return {}
    n = len(splits.database)
    chosen = np.linspace(0, n, min(n, COMPARED), endpoint=False).astype(int)
    parts = splits.all | {"database": splits.database.subset(chosen)}
    queries = encode_queries(method, features["query"])
    if not is_first():
        return {}
    ours = quantizers.by_codes(method.tables, queries, codes.to(queries.device)[torch.from_numpy(chosen)])
    labels = [torch.from_numpy(parts[name].labels) for name in ("query", "database")] if splits.labelled else None
    bits = 8 * math.ceil(method.M * math.log2(method.K) / 8)
    rows = quantizers.compare({"this run": ours}, parts, bits, labels, measured)
    LOG.info("beside it: %d-bit codes of faiss, on %d embeddings of the database", bits, len(chosen))
    for name, row in rows.items():
        value = "" if row["map"] is None else f"mAP={row['map']:.6f}, "
        LOG.info("beside it: %s: %srecall of the nearest embedding @10=%.6f", name, value, row["recall"])
    LOG.info("beside it: %s", quantizers.advice(rows, "this run"))
    return {"beside": {"database": len(chosen), "bits": bits, "rows": rows}}
