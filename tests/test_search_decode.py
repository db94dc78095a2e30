"""Decoding in processes of their own: order, what hangs or crashes, what ends them."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import wait_for
from toy_decoder import Unpicklable, toy

from search import decode
from search.decode import DecodingPool
from utils import RunError

S = 4


def files(folder, contents):
    for i, content in enumerate(contents):
        (folder / f"{i}").write_text(content)
    return [folder / f"{i}" for i in range(len(contents))]


def colours(images):
    return [None if image.pixels is None else int(image.pixels.max()) for image in images]


def pids():
    return {worker.pid for worker in multiprocessing.active_children()}


def test_images_come_in_order_and_only_what_goes_wrong_is_lost(tmp_path):
    odd = {3: "hang", 5: "crash", 11: "raise", 12: f"once {tmp_path / 'flag'}", 20: "bad", 26: "exit", 27: "crash"}
    paths = files(tmp_path, [odd.get(i, f"colour {i}") for i in range(40)])
    paths[30].unlink()
    paths[31].unlink()
    os.mkfifo(paths[31])
    with DecodingPool(S, 2, 1.0, toy) as pool:
        images = list(pool.paths(paths))
        again = list(pool.paths(paths[:2]))
    lost = {*odd, 30, 31} - {12}
    assert colours(images) == [None if i in lost else 255 if i == 12 else i for i in range(40)]
    assert colours(again) == [0, 1]
    reasons = {i: image.reason for i, image in enumerate(images) if image.reason}
    assert reasons.keys() == lost
    assert reasons[3] == "its decoder took more than 1 s"
    assert reasons[5] == reasons[27] == "its decoder crashed (exit code -11)"
    assert reasons[26] == "its decoder crashed (exit code 0)"
    assert reasons[11] == "does not decode (odd content)"
    assert reasons[20] == "is bad \\udcff"
    assert reasons[30] == "is missing"
    assert reasons[31] == "is not a regular file"
    assert images[20].size == (3, 2)
    assert images[7].size == (7, 7)
    assert images[7].pixels.shape == (3, S, S)


def test_contents_from_many_threads():
    with DecodingPool(S, 1, 1.0, toy) as pool, ThreadPoolExecutor(8) as threads:
        contents = [b"crash" if i == 9 else f"colour {i}".encode() for i in range(60)]
        assert colours(threads.map(pool.content, contents)) == [None if i == 9 else i for i in range(60)]


def test_a_process_that_died_idle_costs_nothing():
    with DecodingPool(S, 1, 1.0, toy) as pool:
        assert pool.content(b"colour 1").reason == ""
        os.kill(pool.decoders[0].process.pid, signal.SIGKILL)
        assert colours([pool.content(b"colour 2")]) == [2]


def test_few_images_are_read_ahead(tmp_path):
    paths, read = files(tmp_path, ["colour 1"]) * 2000, []
    with DecodingPool(S, 2, 1.0, toy) as pool:
        images = pool.paths(path for path in paths if read.append(path) is None)
        for _ in range(100):
            next(images)
        assert len(read) <= 100 + decode.IN_FLIGHT + 2 * decode.PER_TASK
        images.close()


def test_leaving_ends_all_processes_at_once(tmp_path):
    before = pids()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), DecodingPool(S, 2, 60.0, toy) as pool:
        images = pool.paths(files(tmp_path, ["colour 1"] * 8 + ["hang", *["colour 1"] * 20]))
        assert next(images).reason == ""
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30
    wait_for(lambda: pids() <= before)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(decode.MOST_BYTES + 1)
    monkeypatch.setattr(decode, "MOST_BYTES", 100)
    assert decode._decoded(str(tmp_path / "large"), toy, S).reason == "has more than 100 bytes"


def test_a_process_that_does_not_start_is_said():
    with (
        DecodingPool(S, 1, 1.0, Unpicklable()) as pool,
        pytest.raises(RunError, match=r"does not start \(exit code 3\)"),
    ):
        pool.content(b"colour 1")
