"""A plain version of what the authors' release does, as far as speed is concerned; written from its description, not
from its code.

Views by Pillow in workers, each through the network on its own; float32; a loss read, and waited for, at every step,
under anomaly detection; every image encoded again for every test; one full argsort per query for every metric. The
other side of the benchmark, and an oracle for tests. What is computed is the paper's method, as everywhere here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

import loss
import retrieval
import transforms
from data import Splits
from loaders import Preprocessing, ViewOptions
from methods.backbones import Backbone
from methods.mecoq import MeCoQ
from readers import ImageFiles, Images
from utils import worker_count


def strip(backbone: Backbone) -> torch.nn.Module:
    """The backbone as one would write it down: float32, blocks one after the other, layers as they come."""
    net = torch.nn.Sequential(*backbone.blocks)
    return net.to(memory_format=torch.contiguous_format)


def train_loader(splits: Splits, options: ViewOptions, num_workers: int) -> DataLoader:
    """Both views `[N, 2, 3, S, S]` of the training images, made by Pillow in workers."""
    transform = transforms.view_transform(options.image_size, splits.mirrored)
    dataset = _Pictures(splits.train, lambda picture: torch.stack([transform(picture), transform(picture)]))
    return DataLoader(dataset, options.batch_size, shuffle=True, num_workers=worker_count(num_workers))


class _Pictures(Dataset):
    """index -> the transformed image."""

    def __init__(self, images: Images | ImageFiles, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.picture(index))


def step(
    method: MeCoQ, net: torch.nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, use_memory: bool
) -> float:
    """One optimisation step on views `[N, 2, 3, S, S]`, without the entropy term. Returns the loss."""
    objective = method.objective
    with torch.autograd.set_detect_anomaly(True):
        view1, view2 = batch.to(method.projection.weight.device).unbind(dim=1)
        z = torch.cat([method.project(method.normalized(net(view))) for view in (view1, view2)])
        soft_codes, reconstruction = method.quantizer(z)
        codewords = method.quantizer.codewords()
        contrastive = loss.contrastive_loss(
            *reconstruction.flatten(1).chunk(2),
            method.recall(codewords).flatten(1) if use_memory else None,
            T=objective.T,
            pos_prior=objective.pos_prior,
        )
        diversity = loss.codeword_diversity(codewords)
        total = contrastive + objective.diversity_weight * diversity
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if method.memory is not None:
            method.remember(z, soft_codes)
    return [term.item() for term in (contrastive, diversity, total)][-1]


@torch.no_grad()
def encode(
    method: MeCoQ, net: torch.nn.Module, images: Images | ImageFiles, how: Preprocessing, batch_size: int
) -> Tensor:
    """Embeddings `[n, D]` of test images."""
    net.eval()
    S = how.image_size
    square = [T.Resize((S, S)), T.ToTensor(), T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)]
    transform = transforms.photo_transform(S) if images.on_disk else T.Compose(square)
    loader = DataLoader(_Pictures(images, transform), batch_size, num_workers=worker_count(how.num_workers))
    return torch.cat([method.project(method.normalized(net(batch.to(how.device)))) for batch in loader])


# ---------------------------------------------------------------- metrics, one query after the other


def ranked_hits(query: Tensor, label: Tensor, codewords: Tensor, db_codes: Tensor, db_labels: Tensor) -> Tensor:
    """Relevance of all database images to one query `[D]`, best first: `[n]` float32, by a full argsort.
    Equal scores come in any order."""
    table = retrieval.lookup_tables(query[None], codewords)[0]  # [M, K]
    scores = sum(table[m][db_codes[:, m].long()] for m in range(len(table)))
    hits = db_labels == label if db_labels.dim() == 1 else (db_labels & label).any(dim=1)
    return hits[scores.argsort(descending=True)].float()


def mean_average_precision(queries: Tensor, labels: Tensor, topK: int, **database: Tensor) -> float:
    values = []
    for query, label in zip(queries, labels, strict=True):
        hits = ranked_hits(query, label, **database)[:topK]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
        values.append(((precision * hits).sum() / hits.sum().clamp(min=1)).item())
    return sum(values) / len(values)


def pr_curve(queries: Tensor, labels: Tensor, **database: Tensor) -> Tensor:
    """Recall and precision `[2, n]`."""
    curve = 0
    for query, label in zip(queries, labels, strict=True):
        hits = ranked_hits(query, label, **database).cumsum(0)
        curve = curve + torch.stack(
            [hits / hits[-1].clamp(min=1), hits / torch.arange(1, len(hits) + 1, device=hits.device)]
        )
    return curve / len(queries)


def precision_at_k(queries: Tensor, labels: Tensor, topK: int, **database: Tensor) -> Tensor:
    """`[K]`."""
    curve = 0
    for query, label in zip(queries, labels, strict=True):
        hits = ranked_hits(query, label, **database)[:topK].cumsum(0)
        curve = curve + hits / torch.arange(1, len(hits) + 1, device=hits.device)
    return curve / len(queries)


def evaluate(queries: Tensor, labels: Tensor, topK: int, **database: Tensor) -> tuple[float, Tensor, Tensor]:
    """MAP@K, PR curve and precision at 1 ... K: each ranks for itself.

    Args:
        queries, labels: `[Q, D]` embeddings and their labels.
        database: `codewords` `[M, K, d]`, `db_codes` `[n, M]`, `db_labels`.
    """
    measures = (partial(mean_average_precision, topK=topK), pr_curve, partial(precision_at_k, topK=topK))
    return tuple(measure(queries, labels, **database) for measure in measures)
