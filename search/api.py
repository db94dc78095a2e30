"""The page and the JSON of `serve`, as a WSGI application; web/schema.json says what it takes and gives.

Requests name images by id only; what they get are names relative to the photo root, never paths.
"""

import hashlib
import ipaddress
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import numpy as np
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    InternalServerError,
    NotFound,
    RequestEntityTooLarge,
    ServiceUnavailable,
    UnsupportedMediaType,
)
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response

from decoding import MOST_PIXELS
from search.batching import Batching
from search.store import printable
from search.thumbnails import GoneError, Thumbnails
from utils import LOG, one_line

if TYPE_CHECKING:
    from search.decode import DecodingPool
    from search.searcher import Hit, Options, Searcher

WEB = Path(__file__).parent / "web"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/schema": ("schema.json", "application/json"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# parameter -> lowest, highest and usual value
NUMBERS = {"k": (1, 1000, 20), "rerank": (0, 100_000, 1000), "nprobe": (1, 65536, 64), "seed": (0, 2**31, 0)}
SEARCHED = ("k", "rerank", "nprobe", "under")
LARGEST = 1e6  # a vector's element
FACTS = ("images", "method", "M", "K", "D", "F", "bits", "features", "transform", "model_sha256", "index", "versions")
FORM, JSON = "multipart/form-data", "application/json"


@dataclass(frozen=True)
class Limits:
    """What a server takes: bytes of a request's body, searches at the same time, and whom it is called by.

    Attributes:
        hosts: Host headers, in lower case; a name without a port stands for all ports.
        any_address: whether IP addresses are taken, too.
    """

    most_bytes: int
    most_at_once: int
    hosts: frozenset[str]
    any_address: bool = False


class Api:
    """The application. Thread-safe.

    Args:
        decoder: of uploaded images, as the encoder takes them.
    """

    def __init__(self, searcher: "Searcher", decoder: "DecodingPool", thumbnails: Thumbnails, limits: Limits) -> None:
        self.searcher, self.store, self.encoder = searcher, searcher.store, Batching(searcher.encoder)
        self.decoder, self.thumbnails, self.limits = decoder, thumbnails, limits
        self.free = threading.BoundedSemaphore(limits.most_at_once)
        self.files = {place: (WEB / name).read_bytes() for place, (name, _) in FILES.items()}
        gets = {"/info": self.info, "/health": self.health, "/sample": self.sample, "/like/<id>": self.like,
                "/thumb/<id>": self.thumb} | dict.fromkeys(FILES, self.file)  # fmt: skip
        rules = [Rule(place, endpoint=answer, methods=["GET"]) for place, answer in gets.items()]
        rules.append(Rule("/search", endpoint=self.search, methods=["POST"]))
        self.rules = Map(rules, strict_slashes=True, merge_slashes=False, redirect_defaults=False)

    def __call__(self, environ: dict, start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        try:
            self.check_origin(request)
            answer, values = self.rules.bind("localhost", path_info=request.path).match(method=request.method)
            response = answer(request, **values)
        except HTTPException as error:
            response = self.refusal(error)
        except Exception as error:
            place = extract_tb(error.__traceback__)[-1]
            LOG.error("%s %s failed: %s: %s (%s:%d)", request.method, ascii(request.path), type(error).__name__,
                      one_line(error), Path(place.filename).name, place.lineno)  # fmt: skip
            response = self.refusal(InternalServerError("the search failed; the server's log says more"))
        response.headers.extend(HEADERS)
        return response(environ, start_response)

    def refusal(self, error: HTTPException) -> Response:
        """The JSON of an error, with its headers."""
        text = error.description
        if isinstance(error, RequestEntityTooLarge) and text == RequestEntityTooLarge.description:
            text = f"too large: at most {self.limits.most_bytes:,} bytes are taken"
        response = error.get_response()
        response.set_data(json.dumps({"error": text}) + "\n")
        response.mimetype = JSON
        return response

    def check_origin(self, request: Request) -> None:
        """Raise BadRequest if the Host header, or the page that sends the request, is another's: a page elsewhere may
        send requests to this address, or let its own name point here."""
        if not self.is_ours(request.environ.get("HTTP_HOST", "")):
            raise BadRequest("the server is not called by this name: --allow_host allows more names")
        origin = request.headers.get("Origin")
        if origin is not None and not self.is_ours(origin.partition("://")[2]):
            raise BadRequest("requests from other sites' pages are not answered")

    def is_ours(self, host: str) -> bool:
        name, _, port = host.lower().rpartition(":") if not host.endswith("]") else (host.lower(), "", "")
        name = name or port
        return {host.lower(), name} & self.limits.hosts != set() or (self.limits.any_address and is_address(name))

    @contextmanager
    def slot(self) -> Iterator[None]:
        """One of the searches that run at the same time. Raises ServiceUnavailable if there are as many already."""
        if not self.free.acquire(blocking=False):
            raise ServiceUnavailable("too many searches at once: try again", retry_after=1)
        try:
            yield
        finally:
            self.free.release()

    # ---------------------------------------------------------------- answers

    def file(self, request: Request) -> Response:
        content = self.files[request.path]
        response = Response(content, mimetype=FILES[request.path][1])
        return kept(response, request, hashlib.sha256(content).hexdigest()[:32])

    def info(self, request: Request) -> Response:
        facts = {name: self.store.info.get(name) for name in FACTS}
        limits = {"most_bytes": self.limits.most_bytes, "most_at_once": self.limits.most_at_once,
                  "most_results": NUMBERS["k"][1]}  # fmt: skip
        return answered(facts | {"image_size": self.searcher.encoder.image_size} | limits)

    def health(self, request: Request) -> Response:
        return answered({"status": "ok", "images": len(self.store.ids)})

    def sample(self, request: Request) -> Response:
        """Some images to begin with, drawn by `seed`."""
        given = parameters(request.args.items(multi=True), ("k", "seed", "under"))
        positions = np.arange(len(self.store.ids)) if given["under"] is None else self.store.under(given["under"])
        count = min(given["k"], len(positions))
        chosen = np.random.default_rng(given["seed"]).choice(len(positions), count, replace=False)
        ids = [int(id) for id in self.store.ids[positions[np.sort(chosen)]]]
        return answered({"hits": [
            {"id": id, "name": printable(name), "score": None, "cosine": None, "width": width, "height": height}
            for id, (name, width, height) in zip(ids, self.store.rows(ids), strict=True)
        ]})  # fmt: skip

    def like(self, request: Request, id: str) -> Response:
        options, known = self.options(request), self.known(id)
        start, (name, width, height) = time.perf_counter(), self.store.rows([known])[0]
        query = {"id": known, "name": printable(name), "width": width, "height": height}
        with self.slot():
            return answered({"query": query} | found(self.searcher.of_id(known, options), start))

    def thumb(self, request: Request, id: str) -> Response:
        known = self.known(id)
        try:
            tag = self.thumbnails.tag(known)
            if request.if_none_match.contains(tag):
                return kept(Response(), request, tag)
            return kept(Response(self.thumbnails.jpeg(known, tag), mimetype="image/jpeg"), request, tag)
        except GoneError:
            raise NotFound("the image's file is gone or no longer usable") from None

    def search(self, request: Request) -> Response:
        kind = request.mimetype
        if kind not in (JSON, FORM, "application/octet-stream") and not kind.startswith("image/"):
            raise UnsupportedMediaType("send an image as image/*, application/octet-stream or multipart/form-data, or "
                                       "a vector as application/json")  # fmt: skip
        with self.slot():
            body = self.body(request)
            if kind == JSON:
                return answered(self.of_json(request, body))
            return answered(self.of_image(request, file_of_form(request, body) if kind == FORM else body))

    def body(self, request: Request) -> bytes:
        """A request's body. Raises RequestEntityTooLarge, as soon as that is clear, and BadRequest."""
        request.max_content_length = self.limits.most_bytes + 1  # a body in chunks would be cut off there
        try:
            body = request.get_data(cache=False)
        except RequestEntityTooLarge:
            raise
        except (BadRequest, OSError):
            raise BadRequest("the request's body did not arrive whole and in time") from None
        if len(body) > self.limits.most_bytes:
            raise RequestEntityTooLarge
        return body

    def of_image(self, request: Request, content: bytes) -> dict:
        start, options = time.perf_counter(), self.options(request)
        if not content:
            raise BadRequest("there is no image in the request")
        decoded = self.decoder.content(content)
        if decoded.pixels is None:
            reason = decoded.reason if decoded.reason.startswith("its ") else f"it {decoded.reason}"
            refusal = RequestEntityTooLarge if f"more than {MOST_PIXELS}" in reason else BadRequest
            raise refusal(f"this file cannot be used: {reason}")
        vector, feature = self.encoder.encode(decoded.pixels)
        hits = self.searcher.search(vector, feature, options)
        width, height = decoded.size
        return {"query": {"id": None, "name": None, "width": width, "height": height}} | found(hits, start)

    def of_json(self, request: Request, body: bytes) -> dict:
        start = time.perf_counter()
        try:
            content = json.loads(body, parse_constant=float)
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        if not isinstance(content, dict) or "vector" not in content:
            raise BadRequest('the body is not an object with a "vector"')
        info = self.store.info
        vector = numbers(content.pop("vector"), info["D"], "vector")
        feature = content.pop("feature", None)
        if feature is not None:
            feature = numbers(feature, info["F"], "feature")
            if not feature.any():
                raise BadRequest("the feature is zero")
            feature /= np.linalg.norm(feature)
        return found(self.searcher.search(vector, feature, self.options(request, content)), start)

    def options(self, request: Request, content: dict | None = None) -> "Options":
        """How to search, by the URL's parameters and those of a JSON body. Raises BadRequest."""
        from search.searcher import Options

        given = parameters([*request.args.items(multi=True), *(content or {}).items()], SEARCHED)
        if given["under"] is not None and not len(self.store.under(given["under"])):
            raise BadRequest(f"no image is below {given['under']}")
        return Options(**given)

    def known(self, text: str) -> int:
        """The id of an image in the index. Raises NotFound."""
        if text.isascii() and text.isdigit() and len(text) < 19:
            try:
                self.store.position(int(text))
                return int(text)
            except KeyError:
                pass
        raise NotFound("there is no image of this id")


# ---------------------------------------------------------------- parts of requests and answers


def is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def answered(content: dict) -> Response:
    return Response(json.dumps(content, allow_nan=False) + "\n", mimetype=JSON, headers={"Cache-Control": "no-store"})


def found(hits: "list[Hit]", start: float) -> dict:
    """What a search found, and the seconds since its start."""
    seconds = round(time.perf_counter() - start, 4)
    return {"hits": [vars(hit) | {"name": printable(hit.name)} for hit in hits], "seconds": seconds}


def kept(response: Response, request: Request, tag: str) -> Response:
    """An answer that browsers keep and ask for again: another index may be served at the same address tomorrow."""
    response.headers["Cache-Control"] = "private, no-cache"
    response.set_etag(tag)
    return response.make_conditional(request)


def parameters(given: Iterable[tuple[str, object]], names: tuple[str, ...]) -> dict[str, Any]:
    """Values of `names`, given or usual; `under` is None unless given. Raises BadRequest."""
    values: dict[str, Any] = {name: NUMBERS[name][2] if name in NUMBERS else None for name in names}
    seen = set()
    for name, value in given:
        if name not in values or name in seen:
            raise BadRequest(f"{printable(name[:40])}: " + ("is given twice" if name in seen else "is no parameter"))
        seen.add(name)
        values[name] = whole(name, value) if name in NUMBERS else subfolder(value)
    return values


def whole(name: str, value: object) -> int:
    """A parameter's number. Raises BadRequest."""
    low, high, _ = NUMBERS[name]
    text = str(value) if type(value) in (int, str) else ""
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
        raise BadRequest(f"{name} must be a whole number from {low} to {high}")
    return int(text)


def subfolder(value: object) -> str | None:
    try:
        os.fsencode(value)
        return value.strip("/") or None
    except (TypeError, AttributeError, UnicodeEncodeError):
        raise BadRequest("under must be a folder's name") from None


def numbers(values: object, size: int, name: str) -> np.ndarray:
    """A list of finite numbers as float32 `[size]`. Raises BadRequest."""
    sound = isinstance(values, list) and len(values) == size
    if not sound or not all(type(value) in (int, float) and abs(value) <= LARGEST for value in values):
        raise BadRequest(f"{name} must be a list of {size} numbers of at most {LARGEST:g}")
    return np.array(values, dtype=np.float32)


def file_of_form(request: Request, body: bytes) -> bytes:
    """The one file of a form. Raises BadRequest."""
    options = parse_options_header(request.content_type)[1]
    parser = FormDataParser(lambda **_: BytesIO(), max_form_memory_size=2**16, max_form_parts=8, silent=False)
    try:
        files = list(parser.parse(BytesIO(body), FORM, len(body), options)[2].values())
    except ValueError:
        raise BadRequest("the form is not sound") from None
    if len(files) != 1:
        raise BadRequest("the form must hold one file")
    return files[0].read()
