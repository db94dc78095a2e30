"""Frozen features of test images, computed once and kept on disk.

Test images are never augmented and frozen blocks never change, so what leaves the backbone's prefix is the same in
every epoch and every run on the same images. It is rounded to half precision whether it is kept or not, and computed in
batches of one size: a run without the cache gives the same codes, to the last bit.
"""

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

import loaders
import transforms
from decoding import opencv
from distributed import CPU_CHUNK, fits, gathered, is_first, largest, processes, processor_name, rank, sent, share
from loaders import TEST_BATCH, Preprocessing
from methods.backbones import Backbone
from readers import ImageFiles, Images
from utils import LOG, InputError, atomic_write, check_writable, locked, progress_bar, sha256, write_json

FORMAT = 1  # to be raised with every change of what the values are


def filled(batch: Tensor, rows: int) -> Tensor:
    """Images `[B, 3, S, S]`, or vectors `[B, D]`, and the last of them again until they are a multiple of `rows`: how a
    layer rounds may depend on the size of the batch."""
    return torch.cat([batch, batch[-1:].expand(-len(batch) % rows, *batch.shape[1:])])


def prefix_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Images `[B, 3, S, S]` -> what leaves the backbone's prefix `[B, ...]`, float16; the images of a backbone without
    frozen blocks."""
    most = torch.finfo(torch.float16).max
    features = backbone.prefix(images)
    return features.clamp(-most, most).half() if backbone.cut else features


class Computed:
    """Features of images in batches `[B, ...]` float16, computed each time they are asked for. Of a backbone without
    frozen blocks they are the images, float32."""

    def __init__(self, backbone: Backbone, images: Images | ImageFiles, preprocessing: Preprocessing) -> None:
        self.backbone, self.images, self.preprocessing = backbone, images, preprocessing

    @cached_property
    def own(self) -> "Computed":
        return self.part(share(len(self)))

    def part(self, batches: slice) -> "Computed":
        """Some of the batches."""
        return Computed(self.backbone, self.images.subset(rows_of(batches, len(self.images))), self.preprocessing)

    def __len__(self) -> int:
        return -(-len(self.images) // TEST_BATCH)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Tensor]:
        """The backbone must be in evaluation mode. Raises RunError if an image can no longer be read."""
        rows = CPU_CHUNK if self.preprocessing.device == "cpu" else TEST_BATCH
        for batch in loaders.test_batches(self.images, self.preprocessing):
            yield prefix_features(self.backbone, filled(batch, rows))[: len(batch)]


class Cached:
    """The same, read from some rows of an array on disk; a GPU keeps them if they fit."""

    def __init__(self, array: np.ndarray, rows: np.ndarray, device: str) -> None:
        self.array, self.rows, self.device = array, rows, device
        self.kept: list[Tensor] = []

    @cached_property
    def own(self) -> "Cached":
        return Cached(self.array, self.rows[rows_of(share(len(self)), len(self.rows))], self.device)

    def __len__(self) -> int:
        return -(-len(self.rows) // TEST_BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.kept and fits(len(self.rows) * self.array[:1].nbytes, self.device):
            self.kept = list(self._read())
        return iter(self.kept) if self.kept else self._read()

    def _read(self) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), TEST_BATCH):
            yield sent(torch.from_numpy(self.array[self.rows[start : start + TEST_BATCH]]), self.device)


Features = Computed | Cached


def rows_of(batches: slice, n: int) -> np.ndarray:
    """The rows, of n, in some of the batches."""
    rows = np.arange(n)
    return rows[np.isin(rows // TEST_BATCH, np.arange(-(-n // TEST_BATCH))[batches])]


def own_part(features: Features) -> Features:
    """This process's share of the batches."""
    return features if processes() == 1 else features.own


def test_features(
    backbone: Backbone,
    images: dict[str, Images | ImageFiles],
    preprocessing: Preprocessing,
    folder: Path | None,
    flags: dict[str, object],
) -> dict[str, Features]:
    """The features of some splits' images, from the cache in `folder`, which is filled first if need be; computed each
    time if there is no folder or the backbone has no frozen block.

    Args:
        images: by split, say query and database. Training images are in the database too and make no other cache.
        flags: those that affect features, see `config.key`.

    Raises InputError if the cache cannot be written or there is no room for it.
    """
    if folder is None or backbone.cut == 0:
        return {name: Computed(backbone, part, preprocessing) for name, part in images.items()}
    names = {name: part.identities() for name, part in images.items()}
    distinct, first = np.unique(np.concatenate(list(names.values())), return_index=True)
    key = cache_key(backbone, next(iter(images.values())), distinct, preprocessing, flags)
    folder = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    array = read_cache(folder, key) if is_first() else None
    if not largest(int(array is not None))[0]:
        joined = reduce(lambda part, more: part.joined(more), images.values())
        array = _fill_alone(folder, key, Computed(backbone, joined.subset(first), preprocessing))
    array = _open(folder) if array is None else array
    LOG.info("features of %d test images are in %s", len(array), folder)
    return {name: Cached(array, np.searchsorted(distinct, part), preprocessing.device) for name, part in names.items()}


test_features.__test__ = False  # not a pytest function


# ---------------------------------------------------------------- the key


def cache_key(
    backbone: Backbone, images: Images | ImageFiles, names: np.ndarray, preprocessing: Preprocessing, flags: dict
) -> dict[str, object]:
    """All that the features depend on.

    Args:
        images: some of them: what they are like, and their folder.
        names: identities of all of them, sorted, so that a list of images has an order that no split knows of.
    """
    versions = [torch.__version__, torchvision.__version__, PIL.__version__]
    if images.on_disk and images.upright:
        transform = f"{transforms.PHOTO_TRANSFORM}" + "; normalised" * preprocessing.normalized
        versions.append(opencv().__version__)
    elif images.on_disk:
        transform = repr(transforms.photo_transform(preprocessing.image_size, preprocessing.normalized))
    else:
        transform = f"{images.pixels.shape[1:]} enlarged" + " and normalised" * preprocessing.normalized
    digest = hashlib.sha256(json.dumps(names.tolist()).encode())
    digest.update(images.state(names).encode())
    weights = hashlib.sha256()
    for block in backbone.blocks[: backbone.cut]:
        for name, tensor in block.state_dict().items():
            weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
    return {
        "format": FORMAT,
        "images": len(names),
        "images_sha256": digest.hexdigest(),
        "transform": transform,
        "image_size": preprocessing.image_size,
        "blocks": backbone.cut,
        "weights_sha256": weights.hexdigest(),
        "bf16": backbone.bf16,
        "compiled": backbone.compiled is not None,
        "device": processor_name(preprocessing.device),
        "versions": versions,
        "flags": flags,
    } | chunks(backbone, preprocessing.image_size, preprocessing.device)


def chunks(backbone: Backbone, image_size: int, device: str) -> dict[str, int]:
    """How many images a CPU takes at a time, if not as many as ever: rounding may depend on it."""
    if device != "cpu" or backbone.compiled is not None:
        return {}
    rows = backbone.rows(torch.empty(0, 3, image_size, image_size))
    return {} if rows == CPU_CHUNK else {"rows": rows}


# ---------------------------------------------------------------- the files


def read_cache(folder: Path, key: dict[str, object]) -> np.ndarray | None:
    """The features `[n, ...]` in `folder`, mapped into memory, or None if they are not there, not whole, or of another
    key."""
    path = folder / "features.npy"
    try:
        written = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        if written == {"key": key, "sha256": sha256(path)}:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        LOG.warning("WARNING: %s is damaged: its features are computed again", folder)
    except FileNotFoundError:
        pass  # never finished
    except (OSError, ValueError, RecursionError) as error:
        LOG.warning("WARNING: %s is damaged (%s): its features are computed again", folder, error)
    return None


def _open(folder: Path) -> np.ndarray:
    """The features that the first of the run's processes has found or made."""
    try:
        return np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is not there for all of the run's processes ({error}): name a folder that all machines share "
            "with --feature_cache, or compute features anew for every test with --feature_cache off"
        ) from error


def _fill_alone(folder: Path, key: dict[str, object], computed: Computed) -> np.ndarray | None:
    """The features in `folder`, computed by this run or by another that holds the lock; None, but for the first of the
    run's processes."""
    busy = f"waiting for another process, which computes the features in {folder}"
    if is_first():
        check_writable(folder)
    with locked(folder / "lock", busy, wait=True) if is_first() else nullcontext():
        array = read_cache(folder, key) if is_first() else None  # another run may have been faster
        if not largest(int(array is not None))[0]:
            fill_cache(folder, key, computed)
            array = read_cache(folder, key) if is_first() else None
    if not largest(int(array is not None))[0]:  # the others wait here until it is written
        raise InputError(f"{folder} changed while it was written: name another folder with --feature_cache")
    return array


def fill_cache(folder: Path, key: dict[str, object], computed: Computed) -> None:
    """Compute features, each of the run's processes a part of them. The first process writes them: first the array,
    then the key that makes it count."""
    computed.backbone.eval()
    if not is_first():
        for _ in in_turn(computed):
            pass
        return
    n = len(computed.images)
    one = Computed(computed.backbone, computed.images.subset(np.arange(1)), computed.preprocessing)
    shape = next(iter(one)).shape[1:]
    check_room(folder, n, n * int(np.prod(shape)) * 2)
    (folder / "key.json").unlink(missing_ok=True)
    digest = hashlib.sha256()

    with atomic_write(folder / "features.npy") as file:

        def write(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        header = {"descr": "<f2", "fortran_order": False, "shape": (n, *shape)}
        np.lib.format.write_array_header_1_0(Namespace(write=write), header)
        with progress_bar(None, "features of test images", total=n) as bar:
            for batch in in_turn(computed):
                write(batch.cpu().contiguous().numpy().tobytes())
                bar.update(len(batch))
    write_json(folder / "key.json", {"key": key, "sha256": digest.hexdigest()})


@torch.inference_mode()
def in_turn(computed: Computed) -> Iterator[Tensor]:
    """The features of all images in their order, batch by batch; or, of several processes, as many batches at once, of
    which each computes one."""
    count = processes()
    if count == 1 or len(computed) < count:
        yield from computed
        return
    own = iter(computed.part(slice(rank(), None, count)))
    batch = next(own)
    for start in range(0, len(computed), count):
        yield gathered(batch if start + rank() < len(computed) else batch[:0])
        batch = next(own, batch)


def check_room(folder: Path, n: int, size: int) -> None:
    """Log how much room the features of n images take. Raises InputError if there is not as much.

    Args:
        size: in bytes.
    """
    free = shutil.disk_usage(folder).free
    LOG.info(
        "computing the features of %d test images once: %.2f GB in %s, of %.2f free", n, size / 1e9, folder, free / 1e9
    )
    if size + 2**20 > free:
        raise InputError(
            f"the features of {n} test images need {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f}: name another "
            "folder with --feature_cache DIR, or compute them anew for every test with --feature_cache off"
        )
