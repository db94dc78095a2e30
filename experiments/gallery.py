"""The gallery of a report: queries of a run, each with the ten images that it finds first."""

import base64
import html
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import engine
import evaluation
import retrieval
from config import Config
from data import class_names
from photos import shown_name
from readers import ImageFiles, Images
from utils import InputError

FOUND = 10  # images per query


class Search:
    """The run's queries and codes, ranked again; `ap` `[Q]` are the average precisions, None without labels.

    Args:
        configuration: of a test of the run's model.
        codes: of the database, `[n, M]`.
        labels: of the database; None if there are none.

    Raises InputError if data or weights are not to be had, or the images are others than the run's.
    """

    def __init__(self, configuration: Config, codes: np.ndarray, labels: np.ndarray | None) -> None:
        self.splits, self.method = engine.build(configuration)
        known = self.splits.database.labels
        if len(codes) != len(known) or (labels is not None and not np.array_equal(labels, known)):
            flag = "data_root" if configuration.images is None else "images"
            raise InputError(
                f"the images of {configuration.dataset} are not those of the run: name their folder with --{flag}"
            )
        self.names = self.splits.classes or class_names(configuration.dataset, Path(configuration.list_root))
        images = self.splits.tested  # all: the run's cache is of all
        features = engine.build_features(configuration, self.method.backbone, images)
        self.queries = evaluation.encode_queries(self.method, features["query"])
        self.codes = torch.from_numpy(codes.astype(np.int32)).to(configuration.device)
        self.ap = None if labels is None else self.average_precisions(configuration)

    def average_precisions(self, configuration: Config) -> np.ndarray:
        """`[Q]`, of the run's MAP."""
        images = self.splits.tested
        both = [torch.from_numpy(images[name].labels).to(configuration.device) for name in ("query", "database")]
        measured = retrieval.Measure(configuration.topK, configuration.ties)
        width = self.method.M * self.method.K
        with torch.inference_mode():
            ap = retrieval.average_precisions(self.score, self.queries, both, measured, width=width)
        return ap.cpu().numpy()

    def score(self, queries: Tensor) -> Tensor:
        """Similarity of queries to all of the database, `[q, n]`, Eq. 17."""
        return retrieval.aqs_scores(self.method.tables(queries), self.codes)

    @torch.inference_mode()
    def first(self, query: int, k: int) -> np.ndarray:
        """The k nearest database images, equals in their order."""
        scores = self.score(self.queries[query : query + 1])[0]
        return torch.sort(scores, descending=True, stable=True)[1][:k].cpu().numpy()


def thumbnail(image: Image.Image) -> str:
    """A data URL: small images as they are, others at most 128 pixels high or wide."""
    image = image.convert("RGB")
    small = max(image.size) <= 64
    image.thumbnail((128, 128))
    content = io.BytesIO()
    image.save(content, format="PNG" if small else "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def label_text(label: np.ndarray, names: tuple[str, ...]) -> str:
    """A class id or a multi-hot row in words: names if there are any, else numbers."""
    if label.ndim:
        chosen = np.flatnonzero(label)
        named = len(names) == len(label)
        return ", ".join(names[i] for i in chosen) if named else f"labels {' '.join(str(i + 1) for i in chosen)}"
    return names[int(label)] if int(label) < len(names) else f"label {int(label)}"


def picture(images: Images | ImageFiles, index: int, kind: str, text: str) -> str:
    """A figure; `kind` is asked, hit, miss, or found if there are no labels."""
    photo = images.picture(index)
    small = " small" if max(photo.size) <= 64 else ""
    mark = {"asked": "query:", "hit": "\u2713", "miss": "\u2717", "found": ""}[kind]
    label = html.escape(text)
    return f'<figure class="{kind}{small}"><img src="{thumbnail(photo)}" alt="{label}"><b>{mark}</b> {label}</figure>'


def answer(search: Search, query: int) -> str:
    """A query and its nearest images, hits and misses marked."""
    splits, names = search.splits, search.names
    label, found = splits.query.labels[query], search.first(query, FOUND)
    both = (torch.from_numpy(np.asarray(labels)) for labels in (label[None], splits.database.labels[found]))
    relevant = retrieval.relevance(*both)[0].tolist()
    text = f'<div class="query"><h3>AP {search.ap[query]:.3f}, {sum(relevant)} of the first ten</h3>'
    text += picture(splits.query, query, "asked", label_text(label, names))
    for index, hit in zip(found, relevant, strict=True):
        words = label_text(splits.database.labels[index], names)
        text += picture(splits.database, index, "hit" if hit else "miss", words)
    return f"{text}</div>"


def neighbours(search: Search, query: int) -> str:
    """A query and its nearest images by name: without labels, none is a hit or a miss."""
    queries, database = search.splits.query, search.splits.database
    text = f'<div class="query"><h3>{html.escape(name_of(queries, query))}</h3>'
    text += picture(queries, query, "asked", "")
    return (
        text
        + "".join(picture(database, i, "found", name_of(database, i)) for i in search.first(query, FOUND))
        + "</div>"
    )


def name_of(images: Images | ImageFiles, index: int) -> str:
    """The name of an image's file; of images in memory, the number."""
    return shown_name(images.names[index]) if images.on_disk else f"image {index}"


def shown(search: Search, n: int) -> str:
    """n queries each with the best, the worst and middling average precision; without labels, 3 n of all."""
    if search.ap is None:
        chosen = np.unique(np.linspace(0, len(search.queries), 3 * n, endpoint=False).astype(int))
        text = f"<h2>Gallery</h2><p class='note'>Of {len(search.queries)} held-back images, and the nearest others.</p>"
        return text + "".join(neighbours(search, query) for query in chosen)
    order = np.argsort(-search.ap, kind="stable")
    middle = len(order) // 2
    groups = {"Best": order[:n], "Worst": order[::-1][:n], "In the middle": order[middle : middle + n]}
    text = f"<h2>Gallery</h2><p class='note'>Of {len(order)} queries, by average precision. \u2713 and a full frame: "
    text += "a label is shared; \u2717 and a dashed frame: none is.</p>"
    for name, queries in groups.items():
        text += f"<h2>{name}</h2>" + "".join(answer(search, query) for query in queries)
    return text
