"""A decoder for tests, in a module that processes import at once."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from search.decode import Decoded


def toy(content, image_size):
    """What the file says: an image of a colour, or how to go wrong."""
    word, _, number = content.decode().partition(" ")
    if word == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        while True:
            time.sleep(1)
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "once" and not Path(number).exists():
        Path(number).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "raise":
        raise ValueError("odd\ncontent")
    if word == "bad":
        return Decoded(None, (3, 2), "is bad \udcff")
    if word == "exit":
        os._exit(0)
    colour = int(number) if word == "colour" else 255
    return Decoded(np.full((3, image_size, image_size), colour, np.uint8), (colour, 7), "")


class Unpicklable:
    def __reduce__(self):
        return os._exit, (3,)
