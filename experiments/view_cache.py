"""Features of views, computed once and shared by trials.

A run draws its views from its seed alone. If the backbone is frozen and has no dropout, the features of those views are
therefore the same whatever the loss, the quantizer or the memory: kept on disk, they make a training of minutes one of
seconds.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor, nn

import config
from config import Config
from decoding import opencv
from distributed import processor_name, sent
from loaders import TwoViews
from methods.backbones import Backbone
from readers import read_array
from utils import LOG, InputError, atomic_write, check_writable, locked, progress_bar, sha256, write_json

FORMAT = 2  # to be raised with every change of what the values are or how they are kept


def can_cache(backbone: Backbone) -> bool:
    """Whether the backbone gives the same features whatever is learned behind it: nothing in it learns or drops out."""
    dropout = any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules())
    return backbone.split == len(backbone.blocks) and not dropout


def views_key(configuration: Config) -> dict[str, object]:
    """The flags that features of views depend on. SPQ's colour operations have an order per batch: another batch size
    makes other views."""
    key = config.key(configuration, "images", "features", "views")
    if configuration.augmentation != "MeCoQ":
        key["batch_size"] = configuration.batch_size
    return key


def cache_key(configuration: Config, fingerprint: str) -> dict[str, object]:
    """All that features of views depend on; the fingerprint is that of images and weights."""
    makers = torch.__version__, torchvision.__version__, kornia_version(), PIL.__version__, opencv().__version__
    return {
        "format": FORMAT,
        **views_key(configuration),
        "sha256": fingerprint,
        "processor": processor_name(configuration.device),
        "versions": list(makers),
    }


def kornia_version() -> str | None:
    """None if it is not installed: only SPQ's views need it."""
    try:
        return metadata.version("kornia")
    except metadata.PackageNotFoundError:
        return None


class ViewCache:
    """The features of several epochs' views in a folder: `epoch000.npy` ... `[2, n, F]` float32, both views of the
    training images in the order in which that epoch takes them, and beside each a JSON file with its SHA-256 and shape.

    Args:
        root: its folder is below, named by the key.
        key: see `cache_key`.
    """

    def __init__(self, root: Path, key: dict[str, object]) -> None:
        self.key = key
        self.folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.sound: set[int] = set()  # epochs whose files were checked or written here

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch:03d}.npy"

    def fill(self, epochs: int, loader: TwoViews, backbone: Backbone, n: int) -> None:
        """Check the files of the first epochs, and compute what is missing or damaged.

        Args:
            loader: of the views of n training images, all of them.

        Raises InputError if the backbone is not frozen, or the disk is too full.
        """
        if not can_cache(backbone):
            raise InputError("a view cache needs a backbone without trained blocks and dropout")
        if self.sound.issuperset(range(epochs)):
            return
        check_writable(self.folder)
        busy = f"waiting for another process, which computes the features in {self.folder}"
        with locked(self.folder / "lock", busy, wait=True):
            write_json(self.folder / "key.json", self.key)
            shape = [2, n, backbone.dim]
            missing = [epoch for epoch in range(epochs) if epoch not in self.sound and not self._whole(epoch, shape)]
            self._check_space(len(missing), 4 * int(np.prod(shape)))
            backbone.train()  # no dropout, see `can_cache`: it only tells views from test images
            for epoch in missing:
                loader.set_epoch(epoch)
                bar = progress_bar(loader, f"features of epoch {epoch}'s views")
                pairs = [torch.stack(backbone(views).chunk(2)).cpu() for views in bar]
                self._write(epoch, torch.cat(pairs, dim=1).numpy())
            backbone.eval()
            self.sound.update(range(epochs))

    def _whole(self, epoch: int, shape: list[int]) -> bool:
        """Whether the file of an epoch is the one that was written."""
        path = self.path(epoch)
        try:
            written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if written == {"sha256": sha256(path), "shape": shape}:
                return True
            reason = "its content changed"
        except FileNotFoundError:
            return False  # never finished
        except (OSError, ValueError, RecursionError) as error:
            reason = error
        LOG.warning("WARNING: %s is damaged (%s): its features are computed again", path, reason)
        return False

    def _write(self, epoch: int, features: np.ndarray) -> None:
        """Write the features of an epoch, first the array, then the checksum that makes it count."""
        path = self.path(epoch)
        path.with_suffix(".json").unlink(missing_ok=True)
        with atomic_write(path) as file:
            hashed = _Hashed(file)
            np.lib.format.write_array(hashed, features, allow_pickle=False)
        write_json(path.with_suffix(".json"), {"sha256": hashed.digest.hexdigest(), "shape": list(features.shape)})

    def _check_space(self, epochs: int, size: int) -> None:
        """Raise InputError if the disk has no space for `size` bytes per epoch."""
        free = shutil.disk_usage(self.folder).free
        if epochs * size + 2**20 > free:
            raise InputError(
                f"the features of {epochs} epochs' views need {epochs * size / 1e9:.2f} GB, {self.folder} has "
                f"{free / 1e9:.2f}: name another folder with --view_cache"
            )


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file) -> None:  # noqa: ANN001, any binary file
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)


class CachedViews:
    """Features of views `[2N, F]` batch by batch, as `loaders.TwoViews` gives the views themselves.

    Args:
        n: training images.
        drop_last: whether a last batch that is smaller is left out.
    """

    def __init__(self, cache: ViewCache, n: int, batch_size: int, device: str, drop_last: bool = False) -> None:
        self.cache, self.batch_size, self.device = cache, batch_size, device
        self.n = n - n % batch_size if drop_last else n
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """The rest of the epoch."""
        features = read_array(self.cache.path(self.epoch), mmap_mode="r")  # [2, n, F]
        for start in range(self.first_step * self.batch_size, self.n, self.batch_size):
            batch = np.array(features[:, start : start + self.batch_size])
            yield sent(torch.from_numpy(batch), self.device).flatten(0, 1)
