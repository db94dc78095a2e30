"""A trained model as search uses it: images in; codes, features and query vectors out."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import config
import engine
import transforms
from config import Config
from distributed import CPU_CHUNK, use_device
from feature_cache import filled, prefix_features
from loaders import TEST_BATCH
from methods import BACKBONES, METHODS
from methods.base import Method
from utils import InputError, NonFiniteError, RunError, sha256

MOST_CODEWORDS = 4096  # per codebook, if the tables themselves are searched: each is a vector of as many numbers


@dataclass
class Encoded:
    """What a model makes of B images: `codes` `[B, M]`, uint8 for K <= 256, else uint16; `features` `[B, F]` float32,
    the backbone's, of unit length; `vectors` `[B, M d]` float32, what a query is searched with."""

    codes: np.ndarray
    features: np.ndarray
    vectors: np.ndarray


class Encoder:
    """The model in a run's folder. The score of an image of code c for a query of vector q is the sum over m of
    q_m . codewords[m, c_m], larger is nearer.

    `codewords`: `[M, K, d]` float32.

    Args:
        folder: holds the run's `model.cpt` and `config.json`.
        device: cpu, cuda or cuda:N.
        queries: to encode queries alone: in float32, as the exported graph does, whatever the run's precision, and not
            filled up to the size of a batch, which one image would have to wait for.

    Raises InputError if the folder does not hold a model of images, whole and of this version.
    """

    def __init__(self, folder: Path, device: str = "cpu", queries: bool = False) -> None:
        device = "cuda:0" if device == "cuda" else device  # torch.cuda.set_device wants a number
        model = folder / "model.cpt"
        configuration = read_config(folder)
        if not model.is_file():
            raise InputError(f"{model} does not exist: name the folder of a finished training, checkpoints/NAME")
        precision = use_device(device, "fp32" if queries else configuration.precision)
        self.model_sha256 = sha256(model)
        changes = {"device": device, "precision": precision, "test_only": True, "checkpoint": str(model)}
        try:
            self._method = engine.build_method(configuration.replace(compile=False, **changes)).eval()
        except InputError as error:
            raise InputError(str(error).replace("--checkpoint ", "", 1)) from error
        self.method, self.M, self.K = configuration.method, self._method.M, self._method.K
        self.F, self.image_size, self.device = self._method.backbone.dim, configuration.image_size, device
        self._normalized = BACKBONES[configuration.backbone].normalized
        self._queries = queries
        self._rows = CPU_CHUNK if device == "cpu" else TEST_BATCH  # images at a time
        self.codewords = self._codewords()

    @property
    def D(self) -> int:  # noqa: N802
        """Numbers of a query's vector, M d."""
        return self.M * self.codewords.shape[2]

    def _codewords(self) -> np.ndarray:
        if type(self._method).codewords_for_search is Method.codewords_for_search and self.K > MOST_CODEWORDS:
            raise InputError(f"--K {self.K}: codes of {self.method} are searched with up to {MOST_CODEWORDS} codewords")
        with torch.inference_mode():
            return np.ascontiguousarray(self._method.codewords_for_search().float().cpu().numpy())

    def encode(self, pixels: np.ndarray) -> Encoded:
        """Images `[B, 3, S, S]` uint8 -> what the model makes of them. On a CPU an image's bits do not depend on what
        it is encoded with, unless they are queries; on a GPU without enough memory fewer are encoded at a time.

        Raises RunError if memory is short of one image, or an embedding is not finite.
        """
        start, parts = 0, []
        while start < len(pixels) or not parts:
            batch = pixels[start : start + self._rows]
            try:
                parts.append(self._encode(batch))
            except torch.OutOfMemoryError as error:
                if self._rows == 1:
                    raise RunError(f"out of memory on {self.device}: use --device cpu") from error
                self._rows //= 2
                torch.cuda.empty_cache()
                continue
            start += len(batch)
        codes, features, vectors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Encoded(codes.astype(np.uint8 if self.K <= 256 else np.uint16), features, vectors)

    @torch.inference_mode()
    def vectors_of(self, codes: np.ndarray) -> np.ndarray:
        """Codes `[n, M]` -> the vectors `[n, M d]` that search for images like those of which they are the codes."""
        queries = self._method.queries_of_codes(torch.from_numpy(codes.astype(np.int32)).to(self.device))
        return self._method.vectors(queries).cpu().numpy()

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Codes, features and vectors of at most as many images as are encoded at a time."""
        S, method, n = self.image_size, self._method, len(pixels)
        if pixels.shape[1:] != (3, S, S) or pixels.dtype != np.uint8:
            raise ValueError(f"images are {pixels.dtype} {pixels.shape}, not uint8 [B, 3, {S}, {S}]")
        if n == 0:
            pixels = np.zeros((1, 3, S, S), dtype=np.uint8)
        images = transforms.from_bytes(torch.tensor(pixels, device=self.device).float(), self._normalized)
        if self._queries:
            features = method.backbone(images)
        else:
            images = filled(images, self._rows)
            features = method.backbone.suffix(prefix_features(method.backbone, images).float())
        z = method.of_features(features)
        if not bool((z.abs() < 1e15).all()):
            raise NonFiniteError("the embeddings are not finite numbers: the model is of no use")
        outputs: tuple[Tensor, ...] = (method.codes(z), F.normalize(features, dim=1), method.vectors(method.query(z)))
        return tuple(output[:n].cpu().numpy() for output in outputs)


def read_config(folder: Path) -> Config:
    """The configuration of the run in a folder. Raises InputError if there is none, or it is damaged, of another
    version, or of a run without images."""
    path = folder / "config.json"
    try:
        values = _known(json.loads(path.read_text(encoding="utf-8")))
        config.check(values)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name the folder of a run, checkpoints/NAME") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged, or not the configuration of a run") from error
    return Config(values)


def _known(stored: dict) -> dict:
    """The values of all flags; those that an older version did not have are at their default. Raises InputError if
    this version lacks one, or a choice."""
    if stored["dataset"] == "Embeddings":
        raise InputError("the run is on --dataset Embeddings: it has no images, and cannot encode any")
    method = stored["method"]
    if method not in METHODS:
        raise InputError(f"--method {method}: this version has {', '.join(METHODS)}")
    rows = {name: flag for name, flag in config.rows(method).items() if flag.affects != "action"}
    unknown = sorted(stored.keys() - rows)
    if unknown:
        raise InputError(f"--{unknown[0]}: this version does not have it")
    values = {name: flag.absent_from_keys for name, flag in rows.items()} | stored
    for name, flag in rows.items():
        if flag.choices and values[name] not in (None, *flag.choices):
            raise InputError(f"--{name} {values[name]}: this version has {', '.join(flag.choices)}")
    return values
