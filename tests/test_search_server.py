"""The server of an index over real sockets: slow, greedy and rude clients, and many of them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import HTTPServer
from types import SimpleNamespace

import pytest
from helpers import HOSTILE, ROOT, wait_for
from search_fakes import D, fake_api, photo
from search_small import NAMES, write_index

from search import connections
from search.connections import Server, Stream, listening
from search.serve import until_stopped
from utils import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("photos")


@pytest.fixture
def server(folder, monkeypatch):
    """A server that is less patient than usual, and has few places."""
    for name, value in (("HEADER_SECONDS", 0.4), ("BODY_SECONDS", 0.4), ("LINGER_SECONDS", 0.2), ("SLOWEST", 2**24),
                        ("MOST_CONNECTIONS", 12)):  # fmt: skip
        monkeypatch.setattr(connections, name, value)
    with listening("127.0.0.1", 0) as listener:
        api = fake_api(folder, most_at_once=24)
        server = Server(listener, api, api.limits.most_bytes)
    object.__setattr__(api.limits, "hosts", frozenset({f"127.0.0.1:{server.port}"}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    wait_for(lambda: asked(server, "GET", "/health")[0] == 200)  # whatever the test did
    server.shutdown()
    thread.join()


def asked(server, method, path, body=None, headers=None):
    """Status and content of a request."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def connected(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def received(client):
    """All that the server sends until it closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def lines(server, *more, method="POST /search"):
    """The beginning of a request."""
    return "\r\n".join([f"{method} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", *more, "", ""]).encode()


def test_a_search_over_the_wire(server, folder):
    content = photo(folder.parent / "red.png")
    for headers in ({"Content-Type": "image/png"}, {"Content-Type": "image/png", "Expect": "100-continue"}):
        status, body = asked(server, "POST", "/search?k=3", content, headers)
        assert status == 200 and len(json.loads(body)["hits"]) == 3
    assert asked(server, "GET", "/thumb/2")[1][:2] == b"\xff\xd8"


def test_a_body_in_chunks(server, folder):
    content = photo(folder.parent / "red.png")
    for parts, expected in (
        ([content[:9], content[9:]], 200),
        ([b"\0" * 200_000], 400),
        ([b"\0" * 200_000, b"\0"], 413),
    ):
        assert asked(server, "POST", "/search", iter(parts), {"Content-Type": "image/png"})[0] == expected


def test_a_gigabyte_is_refused_before_it_is_sent(server):
    with connected(server) as client:
        client.sendall(lines(server, "Content-Type: image/jpeg", f"Content-Length: {10**9}"))
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"200,000 bytes" in answer


@pytest.mark.parametrize("size", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
def test_of_a_gigabyte_little_is_read(server, size):
    sent, block = 0, b"40000\r\n" + b"\0" * 2**18 + b"\r\n" if "chunked" in size else b"\0" * 2**18
    with connected(server) as client:
        client.sendall(lines(server, "Content-Type: image/jpeg", size))
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                client.sendall(block)
                sent += len(block)
    assert sent < 3e7  # what systems hold of it on the way included


def test_a_chunk_without_an_end(server):
    for body in (b"1" * 2**20, b"-5\r\n", b"x\r\n", b"5\r\nab"):
        with connected(server) as client:
            client.sendall(lines(server, "Content-Type: image/jpeg", "Transfer-Encoding: chunked"))
            with contextlib.suppress(ConnectionError):
                client.sendall(body)
            assert received(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"")


def drip(client, content, seconds=0.1):
    """Send a byte at a time until the server has had enough. Returns the seconds that took."""
    start = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in content:
            client.sendall(bytes([byte]))
            time.sleep(seconds)
            if time.monotonic() - start > 15:
                break
    return time.monotonic() - start


def test_slow_headers_and_slow_bodies_are_ended(server):
    with connected(server) as client:
        assert drip(client, lines(server, method="GET /health") + b"\0" * 200) < 3
    with connected(server) as client:
        client.sendall(lines(server, "Content-Type: image/jpeg", "Content-Length: 1000"))
        assert drip(client, b"\0" * 200) < 3
        assert received(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"")
    wait_for(lambda: server.app.free._value == 24)


def test_silent_clients_are_ended(server):
    for beginning in (b"", b"GET", lines(server, "Content-Type: image/jpeg", "Content-Length: 1000")):
        with connected(server) as client:
            client.sendall(beginning)
            start = time.monotonic()
            received(client)
            assert time.monotonic() - start < 3


def test_more_connections_than_allowed_get_503(server):
    held = [connected(server) for _ in range(12)]
    wait_for(lambda: server.free._value == 0)
    with connected(server) as client:
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.partition(b"Content-Length: ")[2].split()[0]) == len(body) and "error" in json.loads(body)
    for client in held:
        client.close()
    wait_for(lambda: server.free._value == 12)


def test_many_connections_that_break_off(server):
    for i in range(200):
        with contextlib.suppress(ConnectionError), connected(server) as client:
            client.sendall(lines(server, "Content-Type: image/png", "Content-Length: 9")[: 7 * i % 160])
    wait_for(lambda: server.free._value == 12 and server.app.free._value == 24)


@pytest.mark.parametrize("request_lines", [
    b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"GET " + b"/x" * 40_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, b"GET /\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n", b"GET \" HTTP/\"\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"GET /thumb/%2e%2e%2f HTTP/1.0\r\n\r\n", b"\0" * 100_000,
])  # fmt: skip
def test_unsound_requests(server, request_lines):
    with connected(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(request_lines)
        answer = received(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert not head or not head.startswith(b"HTTP/") or head[9:10] == b"4", head
    assert not body or "error" in json.loads(body) or head.startswith(b"{")


def test_what_is_sent_behind_a_request_is_no_request(server):
    with connected(server) as client:
        client.sendall(lines(server, method="GET /health") * 2)
        assert received(client).count(b"HTTP/1.1 200") == 1


def test_twenty_at_a_time(server, folder):
    server.free = threading.BoundedSemaphore(128)
    content, vector = photo(folder.parent / "red.png"), json.dumps({"vector": [1] * D})

    def ask(i):
        if i % 3 == 0:
            return asked(server, "POST", "/search", content, {"Content-Type": "image/png"})[0]
        if i % 3 == 1:
            return asked(server, "POST", "/search", vector, {"Content-Type": "application/json"})[0]
        return asked(server, "GET", f"/like/{2 * (i % 29)}")[0]

    with ThreadPoolExecutor(20) as clients:
        assert set(clients.map(ask, range(300))) == {200}
    wait_for(lambda: server.free._value == 128)


def test_a_port_that_is_taken(server):
    with pytest.raises(InputError, match=f"port {server.port} .*name another --port"):
        listening("127.0.0.1", server.port)
    for host in ("no such host", "1.2.3.4", "x" * 300):
        with pytest.raises(InputError, match="cannot listen"):
            listening(host, 0)


def test_a_stream_ends_after_the_bytes_and_fails_after_the_seconds_allowed():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours)
        stream.allow(5, 60)
        theirs.sendall(b"1234567")
        assert stream.read(3) + stream.read(9) + stream.read(9) == b"12345"
        stream.allow(9, 60)
        assert stream.read(9) == b"67"
        stream.allow(9, 0.05)
        with pytest.raises(TimeoutError):
            stream.read(9)
        with pytest.raises(TimeoutError):
            stream.read(9)


def test_a_signal_ends_the_server(folder):
    before = signal.getsignal(signal.SIGTERM)
    with listening("127.0.0.1", 0) as listener:
        server = Server(listener, fake_api(folder), 10)
        for number in (signal.SIGTERM, signal.SIGINT):
            with until_stopped(server):
                threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
                HTTPServer.serve_forever(server, 0.02)
    server.server_close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not HOSTILE, reason="starts the command four times: MECOQ_HOSTILE=1")
def test_the_command_on_an_index(finished, tmp_path):
    index = write_index(tmp_path, finished / "checkpoints" / "small")
    command = [sys.executable, "-m", "search", "serve", str(index), "--num_workers", "1"]
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        line = process.stdout.readline().decode()
        port = int(re.fullmatch(rf"60 images of {re.escape(str(index))} at http://127\.0\.0\.1:(\d+)/ .*\n", line)[1])
        running = SimpleNamespace(port=port)
        content = (tmp_path / "photos" / NAMES[7]).read_bytes()
        status, body = asked(running, "POST", "/search?k=3", content, {"Content-Type": "image/jpeg"})
        hits = json.loads(body)["hits"]
        assert status == 200 and hits[0]["name"] == NAMES[7] and hits[0]["cosine"] > 0.999
        status, body = asked(running, "GET", f"/thumb/{hits[0]['id']}")
        assert status == 200 and body[:2] == b"\xff\xd8"
        assert hits[0]["id"] not in {
            hit["id"] for hit in json.loads(asked(running, "GET", f"/like/{hits[0]['id']}")[1])["hits"]
        }
        taken = subprocess.run([*command, "--port", str(port)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert taken.returncode == 2 and re.fullmatch(
            r"error: cannot listen at .*name another --port.*\n", taken.stderr
        )
        process.terminate()
        rest, errors = process.communicate(timeout=60)
        assert (process.returncode, rest, errors) == (0, b"stopped\n", b"")
    (index / "codes" / "00000.npy").write_bytes(b"x")
    damaged = subprocess.run([*command, "--port", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert damaged.returncode == 2 and re.fullmatch(r"error: .*00000\.npy is damaged.*\n", damaged.stderr)
    beyond = subprocess.run(
        [*command, "--port", "0", "--host", "0.0.0.0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert beyond.stderr.startswith("WARNING: whoever reaches 0.0.0.0 can search") and beyond.stderr.count("\n") == 2
