"""What is known already? Test images' features in front of the first trained layer, computed once and kept on disk.

Test images are never augmented and frozen blocks never change, so what leaves the backbone's prefix is the same in
every epoch and every run on the same images. It is rounded to half precision whether it is kept or not, and computed in
batches of one size: a run without the cache gives the same codes, to the last bit.
"""

import hashlib
import json
import platform
import shutil
from argparse import Namespace
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

import data
from methods.mecoq import Backbone
from readers import ImageFiles
from utils import CPU_CHUNK, LOG, InputError, atomic_write, check_writable, locked, progress_bar, sha256, write_json

FORMAT = 1  # to be raised with every change of what the values are


class Computed:
    """Features of images in batches `[B, ...]` float16, computed each time they are asked for. Of a backbone without
    frozen blocks they are the images, float32."""

    def __init__(self, backbone: Backbone, images: data.Images | ImageFiles, args: Namespace) -> None:
        self.backbone, self.images, self.args = backbone, images, args

    def __len__(self) -> int:
        return -(-len(self.images) // data.TEST_BATCH)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Tensor]:
        """The backbone must be in evaluation mode. Raises RunError where an image can no longer be read."""
        rows = CPU_CHUNK if self.args.device == "cpu" else data.TEST_BATCH
        for batch in data.test_batches(self.images, self.args):
            # filled up with its last image: how a layer rounds may depend on the size of the batch
            fill = batch[-1:].expand(-len(batch) % rows, -1, -1, -1)
            features = self.backbone.prefix(torch.cat([batch, fill]))[: len(batch)]
            most = torch.finfo(torch.float16).max
            yield features.clamp(-most, most).half() if self.backbone.cut else features


class Cached:
    """The same, read from some rows of an array on disk."""

    def __init__(self, array: np.ndarray, rows: np.ndarray, device: str) -> None:
        self.array, self.rows, self.device = array, rows, device

    def __len__(self) -> int:
        return -(-len(self.rows) // data.TEST_BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.rows), data.TEST_BATCH):
            batch = self.array[self.rows[start : start + data.TEST_BATCH]]
            yield torch.from_numpy(batch).to(self.device, non_blocking=True)


def test_features(
    backbone: Backbone, splits: data.Splits, args: Namespace, parts: tuple[str, ...] = ("query", "database")
) -> dict[str, Computed | Cached]:
    """The features of queries and database, or of what `parts` names, from the cache in `--feature_cache`, which is
    filled first if need be; computed each time where that is "off" or the backbone has no frozen block. Training
    images are among those of the database: they make no other cache.

    Raises InputError where the cache can not be written or there is no room for it.
    """
    images = {name: getattr(splits, name) for name in parts}
    if args.feature_cache == "off" or backbone.cut == 0:
        return {name: Computed(backbone, images[name], args) for name in parts}
    names = {name: identities(images[name]) for name in parts}
    known, first = np.unique(np.concatenate(list(names.values())), return_index=True)
    key = cache_key(backbone, splits.database, known, args)
    folder = Path(args.feature_cache) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    array = read_cache(folder, key)
    if array is None:
        check_writable(folder)
        busy = f"waiting for another process, which computes the features in {folder}"
        with locked(folder / "lock", busy, wait=True):
            array = read_cache(folder, key)  # another process may have been faster
            if array is None:
                joined = reduce(lambda some, more: some.joined(more), images.values())
                fill_cache(folder, key, backbone, joined.subset(first), args)
                array = read_cache(folder, key)
    if array is None:
        raise InputError(f"{folder} changed while it was written: name another folder with --feature_cache")
    LOG.info("features of %d test images are in %s", len(array), folder)
    return {name: Cached(array, np.searchsorted(known, names[name]), args.device) for name in parts}


test_features.__test__ = False  # not a pytest function


# ---------------------------------------------------------------- whose features they are


def identities(images: data.Images | ImageFiles) -> np.ndarray:
    """A name for each image `[n]`: its file, or a digest of its pixels; so that a list of images has an order that no
    split knows of."""
    if isinstance(images, ImageFiles):
        return images.names
    return np.array([hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images.pixels])


def cache_key(
    backbone: Backbone, images: data.Images | ImageFiles, names: np.ndarray, args: Namespace
) -> dict[str, object]:
    """All that the features depend on.

    Args:
        images: some of those to be known: what they are like, and where.
        names: `identities` of all of them, sorted.
    """
    digest = hashlib.sha256(json.dumps(names.tolist()).encode())
    if isinstance(images, ImageFiles):
        stats = ((images.root / name).stat() for name in names)
        digest.update(json.dumps([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
        transform = repr(data.photo_transform(args.image_size))
    else:
        transform = f"{images.pixels.shape[1:]} enlarged and normalised"
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
        "image_size": args.image_size,
        "backbone": args.backbone,
        "blocks": backbone.cut,
        "weights_sha256": weights.hexdigest(),
        "precision": args.precision,
        "compile": args.compile,
        "device": device_name(args.device),
        "versions": [torch.__version__, torchvision.__version__, PIL.__version__],
    }


def device_name(device: str) -> str:
    """What kind of processor rounds: features differ between kinds in their last bits."""
    if device != "cpu":
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        return f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}, TF32 {tf32}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


# ---------------------------------------------------------------- the files


def read_cache(folder: Path, key: dict[str, object]) -> np.ndarray | None:
    """The features `[n, ...]` in `folder`, mapped into memory, or None where they are not there, not whole, or not what
    `key` says."""
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


def fill_cache(
    folder: Path, key: dict[str, object], backbone: Backbone, images: data.Images | ImageFiles, args: Namespace
) -> None:
    """Compute and write the features of `images`, first the array, then the key that makes it count."""
    backbone.eval()
    shape = next(iter(Computed(backbone, images.subset(np.arange(1)), args))).shape[1:]
    size = len(images) * int(np.prod(shape)) * 2
    free = shutil.disk_usage(folder).free
    LOG.info(
        "computing the features of %d test images once: %.2f GB in %s, of %.2f free",
        len(images),
        size / 1e9,
        folder,
        free / 1e9,
    )
    if size + 2**20 > free:
        raise InputError(
            f"the features of {len(images)} test images need {size / 1e9:.2f} GB, {folder} has {free / 1e9:.2f}: name "
            "another folder with --feature_cache DIR, or compute them anew for every test with --feature_cache off"
        )
    (folder / "key.json").unlink(missing_ok=True)
    digest = hashlib.sha256()

    with atomic_write(folder / "features.npy") as file:

        def write(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        header = {"descr": "<f2", "fortran_order": False, "shape": (len(images), *shape)}
        np.lib.format.write_array_header_1_0(Namespace(write=write), header)
        with progress_bar(None, "features of test images", total=len(images)) as bar:
            for batch in Computed(backbone, images, args):
                write(batch.cpu().contiguous().numpy().tobytes())
                bar.update(len(batch))
    write_json(folder / "key.json", {"key": key, "sha256": digest.hexdigest()})
