"""Images of several threads, encoded together: that takes less time than one after the other."""

import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from search.encoder import Encoder

MOST_TOGETHER = 32


class Batching:
    """An encoder that threads share."""

    def __init__(self, encoder: "Encoder") -> None:
        self.encoder, self.lock = encoder, threading.Lock()
        self.waiting: deque[tuple[np.ndarray, Future]] = deque()

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image `[3, S, S]` uint8 -> its query vector `[M d]` and its feature `[F]`, float32.

        Raises what the encoder raises.
        """
        mine: Future = Future()
        self.waiting.append((pixels, mine))
        with self.lock:  # who gets it encodes for all who wait
            while not mine.done():
                self._encode_waiting()
        return mine.result()

    def _encode_waiting(self) -> None:
        batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), MOST_TOGETHER))]
        try:
            encoded = self.encoder.encode(np.stack([pixels for pixels, _ in batch]))
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), vector, feature in zip(batch, encoded.vectors, encoded.features, strict=True):
            future.set_result((vector, feature))
