"""A threaded HTTP server whose clients cannot use it up: connections, time and bytes of each are bounded.

Werkzeug's server does the rest. Each connection serves one request, in a thread of its own.
"""

import io
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from utils import LOG, InputError, one_line

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

MOST_CONNECTIONS = 128
MOST_HEADER_BYTES = 2**16
FRAMING_BYTES = 2**20  # of a body beside its content: the chunks' headers, the parts' of a form
HEADER_SECONDS = 10.0
BODY_SECONDS = 10.0  # and one second more for every SLOWEST bytes that arrived
SLOWEST = 2**16  # bytes per second
SEND_SECONDS = 30.0
LINGER_SECONDS = 2.0  # a client that still sends when it is answered would otherwise lose the answer
BUSY_BODY = b'{"error": "too many connections: try again"}\n'
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
    b"Connection: close\r\n\r\n%s"
) % (len(BUSY_BODY), BUSY_BODY)


class Stream(io.RawIOBase):
    """A client's connection; reading ends after the bytes, and fails after the seconds, that `allow` gives."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.bytes_left, self.deadline = 0, 0.0

    def allow(self, size: int, seconds: float) -> None:
        self.bytes_left, self.deadline = size, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Raises TimeoutError; more bytes than are allowed look like the end of the stream."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the request took too long")
        if not self.bytes_left:
            return 0
        self.connection.settimeout(seconds)
        size = self.connection.recv_into(buffer, min(len(buffer), self.bytes_left))
        self.bytes_left -= size
        self.deadline += size / SLOWEST
        return size

    def write(self, content: bytes) -> int:
        """Send all of `content`; what the client sends after that is not waited for."""
        self.connection.settimeout(SEND_SECONDS)
        self.connection.sendall(content)
        self.allow(FRAMING_BYTES, LINGER_SECONDS)
        return len(content)


class Handler(WSGIRequestHandler):
    """One request. Its errors before the application are JSON too; no log line per request."""

    error_message_format = '{"error": "this is no sound HTTP request (%(code)d)"}\n'
    error_content_type = "application/json"
    server: "Server"

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.wfile = Stream(self.connection)
        self.wfile.allow(MOST_HEADER_BYTES, HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.wfile)

    def run_wsgi(self) -> None:
        del self.headers["Expect"]  # is answered already
        self.wfile.allow(self.server.most_bytes + FRAMING_BYTES, BODY_SECONDS)
        super().run_wsgi()

    def version_string(self) -> str:
        return "mecoq"

    def log(self, type: str, message: str, *args: object) -> None:
        """Nothing: the application says what failed."""


class Server(ThreadedWSGIServer):
    """Serves `app` at a socket that listens, to at most MOST_CONNECTIONS at a time; others get 503.

    Args:
        most_bytes: of a request's body.
    """

    def __init__(self, listener: socket.socket, app: "WSGIApplication", most_bytes: int) -> None:
        host, port = listener.getsockname()[:2]
        super().__init__(host, port, app, Handler, fd=listener.fileno())
        self.most_bytes = most_bytes
        self.free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        if not self.free.acquire(blocking=False):
            request.settimeout(0)
            request.send(BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.free.release()
            raise

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def wait_for_answers(self, seconds: float) -> None:
        """Let requests that are being answered end, for at most so many seconds."""
        deadline = time.monotonic() + seconds
        while self.free._value < MOST_CONNECTIONS and time.monotonic() < deadline:
            time.sleep(0.02)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that went away
            LOG.error("a connection failed: %s: %s", type(error).__name__, one_line(error))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises InputError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"cannot listen at {host} port {port} ({reason}): name another --port or --host") from error
