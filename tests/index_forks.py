"""Runs `python -m search index` in one forked process after the other, with an encoder and a decoder that cost nothing;
sends it a signal at a given moment. Speaks lines of JSON as `forks.py` does: {"argv": [...], "kill": seconds or null,
"number": the signal's}."""

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hashlib

import numpy as np

import search.decode
import search.encoding
import search.making
from search import indexing
from search.decode import Decoded
from utils import run_script, sha256

M, D, F, SIZE = 4, 2, 8, 4


class FakeEncoder:
    """Codes and features are a hash of an image's pixels."""

    M, K, F, image_size, method = M, 256, F, SIZE, "fake"
    codewords = np.random.default_rng(0).random((M, 256, D), np.float32)

    def __init__(self, folder):
        self.model_sha256 = sha256(folder / "model.cpt")

    def encode(self, pixels):
        digests = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
        codes = np.frombuffer(b"".join(digest[:M] for digest in digests), np.uint8).reshape(-1, M)
        features = np.frombuffer(b"".join(digest[-F:] for digest in digests), np.int8).reshape(-1, F).astype(np.float32)
        return SimpleNamespace(
            codes=codes,
            features=features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9),
            vectors=np.concatenate([self.codewords[m, codes[:, m]] for m in range(M)], axis=1).reshape(-1, M * D),
        )


def fake_decode(content, image_size):
    """Any file that does not begin with "broken" is an image."""
    if content.startswith(b"broken"):
        return Decoded(None, (0, 0), "is broken")
    pixels = np.frombuffer(hashlib.sha512(content).digest()[: 3 * SIZE * SIZE], np.uint8)
    return Decoded(pixels.reshape(3, SIZE, SIZE), (len(content), 1), "")


class OwnProcess:
    """A pool that decodes here. `opened`: the paths that were."""

    opened: ClassVar[list[str]] = []

    def __init__(self, image_size, workers, seconds):
        self.image_size = image_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def paths(self, paths):
        for path in paths:
            self.opened.append(str(path))
            yield search.decode._decoded(str(path), fake_decode, self.image_size)


FAKE_ANN = SimpleNamespace(
    kind_for=lambda n: "flat",
    build=lambda path, codewords, codes, kind, vectors: path.write_bytes(codes.tobytes()) and {"kind": kind},
)


@contextmanager
def fakes():
    """Index without PyTorch and faiss."""
    import search

    before = search.making.load_encoder, search.decode.DecodingPool, search.making.photo_transform
    ann = getattr(search, "ann", None), sys.modules.get("search.ann")
    search.making.load_encoder = lambda folder, device: FakeEncoder(folder)
    search.decode.DecodingPool = OwnProcess
    search.making.photo_transform = lambda: "fake"
    search.ann = sys.modules["search.ann"] = FAKE_ANN
    OwnProcess.opened = []
    try:
        yield OwnProcess
    finally:
        search.making.load_encoder, search.decode.DecodingPool, search.making.photo_transform = before
        del search.ann, sys.modules["search.ann"]
        if ann[0]:
            search.ann = ann[0]
        if ann[1]:
            sys.modules["search.ann"] = ann[1]


def write_run(folder):
    """What stands for the folder of a training."""
    folder.mkdir(parents=True)
    (folder / "model.cpt").write_bytes(bytes(range(200)))
    (folder / "config.json").write_text("{}")
    return folder


def child(argv, folder):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    code = 99
    try:
        with fakes():
            code = run_script(lambda: indexing.main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request["argv"], folder)
        if request["kill"] is not None:
            time.sleep(request["kill"])
            os.kill(pid, request["number"])
        _, status = os.waitpid(pid, 0)
        seconds = time.monotonic() - start
        out, err = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("out", "err"))
        return {"rc": os.waitstatus_to_exitcode(status), "out": out, "err": err, "seconds": seconds}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
