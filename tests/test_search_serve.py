"""The page and the JSON of an index: answers, refusals, headers. What goes over sockets: test_search_server."""

import io
import json
import re
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from helpers import ROOT, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from search_fakes import MOST_BYTES, D, F, fake_api, photo
from werkzeug.test import Client

import search.api
from search import serve
from search.searcher import Options
from utils import InputError

LOCAL = {"base_url": "http://localhost:8000"}
SCHEMA = json.loads((ROOT / "search/web/schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of photographs; tests must not change it."""
    return tmp_path_factory.mktemp("photos")


@pytest.fixture
def own(tmp_path):
    """The same, for one test, and a client of it."""
    return tmp_path, Client(fake_api(tmp_path))


@pytest.fixture
def api(folder):
    return fake_api(folder)


@pytest.fixture
def client(api):
    return Client(api)


@pytest.fixture(scope="module")
def red(folder):
    return photo(folder.parent / "red.png")


def get(client, path, **more):
    return client.get(path, **(LOCAL | more))


def post(client, data, kind="image/png", query="", **more):
    return client.post(f"/search{query}", data=data, content_type=kind, **(LOCAL | more))


def refused(response, status, words=""):
    """Whether the answer is an error as the documents promise it."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    assert list(response.json) == ["error"] and words in response.json["error"], response.json
    assert "Traceback" not in response.text and "/secret" not in response.text
    return response


def obeys(value, schema):
    """Whether a value is as a part of the JSON schema says: types, required and allowed properties."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return obeys(value, SCHEMA["components"]["schemas"][name])
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    assert not kinds or any(isinstance(value, types[kind]) for kind in kinds), (value, schema)
    assert "enum" not in schema or value in schema["enum"]
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", ())) <= value.keys() <= schema["properties"].keys()
        for name, part in value.items():
            obeys(part, schema["properties"][name])
    for part in value if isinstance(value, list) else ():
        obeys(part, schema["items"])
    return True


# ---------------------------------------------------------------- what is found


def test_an_image_finds_what_its_vector_finds(client, api, red):
    answer = post(client, red, query="?k=7").json
    colour = np.float32([200, 30, 30] * 2) / 255
    expected = np.argsort(-(api.searcher.vectors @ colour), kind="stable")[:7] * 2
    assert [hit["id"] for hit in answer["hits"]] == expected.tolist()
    assert answer["query"] == {"id": None, "name": None, "width": 60, "height": 40}
    assert obeys(answer, {"$ref": "/Found"})
    vector = json.dumps({"vector": colour.tolist(), "k": 7})
    by_vector = post(client, vector, "application/json").json
    assert [hit["id"] for hit in by_vector["hits"]] == expected.tolist()
    assert by_vector["hits"][0]["cosine"] is None


def test_the_ways_to_send_an_image_are_equal(client, red):
    found = [
        post(client, red), post(client, red, "application/octet-stream"), post(client, red, "image/jpeg"),
        client.post("/search", data={"any": (io.BytesIO(red), "../../x.png")}, **LOCAL),
    ]  # fmt: skip
    assert len({json.dumps(answer.json["hits"]) for answer in found}) == 1


def test_going_on_from_an_image(client):
    answer = get(client, "/like/58?k=30").json
    assert answer["query"]["id"] == 58 and answer["query"]["name"] == "cats/\\udcff<b>.jpg"
    assert len(answer["hits"]) == 29 and 58 not in {hit["id"] for hit in answer["hits"]}
    assert obeys(answer, {"$ref": "/Found"})


def test_parameters_reach_the_search(client, api, red):
    post(client, red, query="?k=3&rerank=0&nprobe=9&under=dogs/small/")
    body = {"vector": [0.5] * D, "k": 3, "rerank": 0, "nprobe": 9, "under": "dogs/small"}
    post(client, json.dumps(body), "application/json")
    get(client, "/like/4?k=3&rerank=0&nprobe=9&under=dogs/small")
    assert api.searcher.asked == [Options(k=3, rerank=0, nprobe=9, under="dogs/small")] * 3


def test_a_feature_is_brought_to_unit_length(client, api):
    feature = np.arange(1, F + 1)
    body = {"vector": [1] * D, "feature": feature.tolist()}
    hits = post(client, json.dumps(body), "application/json").json["hits"]
    expected = api.searcher.features @ (feature / np.linalg.norm(feature))
    assert np.allclose([hit["cosine"] for hit in hits], [expected[hit["id"] // 2] for hit in hits], atol=1e-6)


def test_some_images_to_begin_with(client):
    first = get(client, "/sample?k=8").json
    assert first == get(client, "/sample?k=8&seed=0").json != get(client, "/sample?k=8&seed=1").json
    assert len(first["hits"]) == 8 and obeys(first, {"$ref": "/Found"})
    everything = get(client, "/sample?k=1000").json["hits"]
    assert [hit["id"] for hit in everything] == list(range(0, 60, 2))
    dogs = get(client, "/sample?k=1000&under=dogs").json["hits"]
    assert len(dogs) == 14 and all(hit["name"].startswith("dogs/") for hit in dogs)


def test_facts_say_what_a_client_needs_and_no_path(client):
    facts = get(client, "/info")
    assert obeys(facts.json, {"$ref": "/Info"}) and facts.json["D"] == D and facts.json["most_bytes"] == MOST_BYTES
    assert "/secret" not in facts.text
    assert get(client, "/health").json == {"status": "ok", "images": 30}
    assert get(client, "/schema").json == SCHEMA


def test_the_schema_names_every_place_and_parameter(api):
    answered = {re.sub(r"<(\w+)>", r"{\1}", rule.rule) for rule in api.rules.iter_rules()}
    page = {"/", "/page.css", "/page.js", "/icon.svg"}
    assert answered - page == set(SCHEMA["paths"])
    for name, row in SCHEMA["components"]["parameters"].items():
        if name in search.api.NUMBERS:
            values = row["schema"]
            assert (values["minimum"], values["maximum"], values["default"]) == search.api.NUMBERS[name]


# ---------------------------------------------------------------- thumbnails


def test_thumbnails_are_kept_until_the_file_changes(own):
    folder, client = own
    first = get(client, "/thumb/0")
    assert first.mimetype == "image/jpeg" and Image.open(io.BytesIO(first.data)).size == (24, 24)
    tag = first.headers["ETag"]
    again = get(client, "/thumb/0", headers={"If-None-Match": tag})
    assert again.status_code == 304 and not again.data
    assert get(client, "/thumb/0").data == first.data and len(client.application.thumbnails.kept) == 1
    photo(folder / "cats/00.jpg", (33, 44))
    changed = get(client, "/thumb/0", headers={"If-None-Match": tag})
    assert changed.status_code == 200 and changed.headers["ETag"] != tag and changed.data != first.data


def test_a_thumbnail_is_upright_and_the_middle(own):
    folder, client = own
    turned = Image.fromarray(np.repeat([[[255, 0, 0]], [[0, 0, 255]]], 40, axis=0).repeat(40, axis=1).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(folder / "cats/02.jpg", exif=exif, quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(get(client, "/thumb/4").data)), int)
    assert pixels[2, 12, 2] > 200 > 60 > pixels[2, 12, 0] and pixels[-2, 12, 0] > 200


@pytest.mark.parametrize("damage", ["missing", "text", "folder", "loop"])
def test_a_file_that_is_gone_is_not_found(own, damage):
    folder, client = own
    path = folder / "cats/04.jpg"
    path.unlink()
    if damage == "text":
        path.write_text("no image")
    elif damage == "folder":
        path.mkdir()
    elif damage == "loop":
        path.symlink_to(path.name)
    refused(get(client, "/thumb/8"), 404, "gone or no longer usable")
    assert get(client, "/like/8").status_code == 200


def test_only_so_many_thumbnails_are_kept(client, api, monkeypatch):
    monkeypatch.setattr("search.thumbnails.MOST_KEPT", 3)
    for image in (20, 22, 24, 20, 26):
        assert get(client, f"/thumb/{image}").status_code == 200
    kept = [api.thumbnails.tag(image) for image in (24, 20, 26)]
    assert list(api.thumbnails.kept) == kept


# ---------------------------------------------------------------- refusals


NO_IDS = ["1", "-2", "+2", "2.0", "60", 10**30, 2**63, 2**64, "x", "", "%00", "%D9%A2", "2%0a", "0x2", "9" * 5000,
          "..%2f..%2fetc%2fpasswd", "%2e%2e/2", "2/..", "2/", "/2", "%ff"]  # fmt: skip


@pytest.mark.parametrize("number", NO_IDS)
def test_what_is_no_id_is_not_found(client, number):
    for place in ("like", "thumb"):
        refused(get(client, f"/{place}/{number}"), 404)


@pytest.mark.parametrize("path", ["/x", "/../api.py", "/%2e%2e/api.py", "/..%5capi.py", "/web/page.html", "/page.html",
                                  "/page.css/", "/info/", "/etc/passwd", "/%00", "/search/x", "/\ud800"])  # fmt: skip
def test_there_are_no_files_but_the_pages_own(client, path):
    path = path.encode("utf-8", "surrogatepass").decode("latin-1")
    refused(get(client, path), 404)


def test_methods(client):
    assert refused(get(client, "/search"), 405).headers["Allow"] == "POST"
    for path in ("/", "/info", "/like/2", "/thumb/2", "/sample"):
        answer = refused(client.post(path, **LOCAL), 405)
        assert "GET" in answer.headers["Allow"]
        assert client.head(path, **LOCAL).status_code == 200
    refused(client.open("/info", method="BREW", **LOCAL), 405)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "video/mp4", "image", "text/html"]
)
def test_other_types_are_refused(client, red, kind):
    refused(post(client, red, kind), 415, "image/*")


@pytest.mark.parametrize("content", [b"", b"x", b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4", b"<svg/>", b"\0" * 1000])
def test_what_is_no_image_is_refused(client, content):
    refused(post(client, content), 400, "image")


def test_a_truncated_image_is_refused_or_used(client, folder):
    content = (folder / "cats/10.jpg").read_bytes()
    for end in range(0, len(content), len(content) // 20):
        assert post(client, content[:end], "image/jpeg").status_code in (200, 400)


def test_too_many_bytes(client):
    refused(post(client, b"\0" * (MOST_BYTES + 1)), 413, "200,000 bytes")
    refused(post(client, b"", environ_overrides={"CONTENT_LENGTH": str(10**30)}), 413, "200,000 bytes")
    refused(post(client, b"\0" * MOST_BYTES), 400, "it is not an image")


def bomb(width, height):
    """A PNG that says it has that many pixels."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 1000))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(12_000, 12_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels(client, size):
    refused(post(client, bomb(*size)), 413, "pixels")


FORMS = [
    b"", b"--x\r\n", b"--x--\r\n", b"\r\n--y\r\n",
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nx\r\n' * 2 + b"--x--\r\n",
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 100 + b"--x--\r\n",
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 100_000 + b"\r\n--x--\r\n",
]  # fmt: skip


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_unsound_forms(client, form):
    assert post(client, FORMS[form], "multipart/form-data; boundary=x").status_code in (400, 413)
    refused(post(client, FORMS[form], "multipart/form-data"), 400)


VECTORS = [
    "", "{", "[]", "1", '"x"', "null", "{}", '{"vector": 1}', '{"vector": null}', '{"vector": []}', "\x00",
    "[" * 100_000, '{"vector": ' + "[" * 50_000, '{"a":' * 30_000, json.dumps({"vector": [1] * (D - 1)}),
    json.dumps({"vector": [1] * (D + 1)}), json.dumps({"vector": [float("nan")] * D}),
    json.dumps({"vector": [float("inf")] * D}), json.dumps({"vector": [1e300] * D}), json.dumps({"vector": ["1"] * D}),
    json.dumps({"vector": [True] * D}), json.dumps({"vector": [[1]] * D}), json.dumps({"vector": [10**400] * D}),
    '{"vector": [' + "1" * 5000 + "]}", json.dumps({"vector": {str(i): 1 for i in range(D)}}),
    json.dumps({"vector": [1] * D, "feature": [1]}), json.dumps({"vector": [1] * D, "feature": [0] * F}),
    json.dumps({"vector": [1] * D, "path": "/etc/passwd"}), json.dumps({"vector": [1] * D, "k": True}),
    json.dumps({"vector": [1] * D, "k": 1.5}), json.dumps({"vector": [1] * D, "k": 10**4000}),
    json.dumps({"vector": [1] * D, "under": 3}), json.dumps({"vector": [1] * D, "under": "\ud800"}),
    json.dumps({"vector": [1] * D, "under": "nothing here"}), json.dumps({"vector": [1] * D, "k": None}),
]  # fmt: skip


@pytest.mark.parametrize("body", range(len(VECTORS)))
def test_unsound_vectors(client, body):
    refused(post(client, VECTORS[body].encode(), "application/json"), 400)


def test_a_body_in_another_encoding(client):
    refused(post(client, b"\xff\xfe\xff", "application/json"), 400)


PARAMETERS = ["k=0", "k=1001", "k=-1", "k=x", "k=", "k=1&k=2", "k=1e2", "k=%D9%A2", "rerank=-1", "rerank=100001",
              "nprobe=0", "seed=1", "path=/etc/passwd", "under=nowhere", "k=" + "9" * 500, "K=3",
              "under=cat"]  # fmt: skip


@pytest.mark.parametrize("query", PARAMETERS)
def test_unsound_parameters(client, red, query):
    refused(get(client, f"/like/2?{query}"), 400)
    refused(post(client, red, query=f"?{query}"), 400)


@given(st.binary(max_size=200), st.sampled_from(["image/png", "application/json", "multipart/form-data; boundary=x"]))
@settings(max_examples=150, deadline=None)
def test_no_body_is_an_error_of_the_server(tmp_path_factory, body, kind):
    client = Client(fake_api(tmp_path_factory.getbasetemp() / "any"))
    assert post(client, body, kind).status_code in (200, 400, 413)


# ---------------------------------------------------------------- who may ask


OTHERS = ["evil.example", "localhost", "localhost:80", "localhost:8000.evil.example", "", "[::1]:8000",
          "127.0.0.1:8001", "0.0.0.0:8000", "localhost:8000,evil.example", "localhost.:8000", "192.168.1.9:8000",
          "photos.example.evil"]  # fmt: skip


@pytest.mark.parametrize("host", OTHERS)
def test_other_hosts_are_refused(client, red, host):
    for path in ("/", "/info", "/thumb/2"):
        refused(client.get(path, headers={"Host": host}), 400, "--allow_host")
    refused(client.post("/search", data=red, content_type="image/png", headers={"Host": host}), 400, "--allow_host")


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "photos.example", "photos.example:99"]
)
def test_own_hosts_are_answered(client, host):
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_addresses_are_answered_if_all_are_served(folder):
    api = fake_api(folder)
    object.__setattr__(api.limits, "any_address", True)
    for host, status in (("192.168.1.9:8000", 200), ("[fe80::1]:8000", 200), ("evil.example:8000", 400)):
        assert Client(api).get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:8001", "file://", ""])
def test_pages_of_other_sites_are_refused(client, red, origin):
    refused(post(client, red, headers={"Origin": origin}), 400, "other sites")


def test_the_own_page_is_answered(client, red):
    assert post(client, red, headers={"Origin": "http://localhost:8000"}).status_code == 200


def test_every_answer_has_the_headers(client, red):
    answers = [get(client, path) for path in ("/", "/info", "/thumb/2", "/nothing", "/like/x", "/page.js")]
    answers += [post(client, red), post(client, b"x"), client.get("/", headers={"Host": "x"})]
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_page_refers_to_nothing_elsewhere_and_has_nothing_inline():
    web = {path.name: path.read_text() for path in (ROOT / "search/web").iterdir()}
    for name, text in web.items():
        assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", text), name
    html = web["page.html"]
    assert not re.search(r"<style|\bstyle=|\bon[a-z]+=|javascript:|<script(?![^>]*\bsrc=)", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.style\b", web["page.js"])
    ids = set(re.findall(r'id="(\w+)"', html))
    assert set(re.findall(r'\bat\("(\w+)"\)', web["page.js"])) <= ids
    for tag in re.findall(r"<img[^>]*>", html):
        assert "alt=" in tag


# ---------------------------------------------------------------- load and failures


def test_more_searches_than_allowed_get_503(api, client, red):
    api.decoder.may_go.clear()
    threads = [threading.Thread(target=post, args=(Client(api), red)) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: api.free._value == 0)
    for answer in (post(client, red), get(client, "/like/2")):
        assert refused(answer, 503, "too many").headers["Retry-After"] == "1"
    assert get(client, "/health").status_code == get(client, "/thumb/2").status_code == 200
    api.decoder.may_go.set()
    for thread in threads:
        thread.join()
    assert post(client, red).status_code == 200


def test_refused_requests_free_their_place(client, red):
    for _ in range(12):
        refused(post(client, b"no image"), 400)
        refused(post(client, b"{", "application/json"), 400)
        refused(post(client, b"\0" * (MOST_BYTES + 1)), 413)
    assert post(client, red).status_code == 200


def test_a_failure_is_one_line_in_the_log_and_none_of_it_in_the_answer(client, api, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("secret\nthing")

    monkeypatch.setattr(api.searcher, "search", fail)
    answer = refused(get(client, "/like/2"), 500, "the search failed")
    assert "secret" not in answer.text
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert "GET '/like/2' failed: RuntimeError: secret thing (test_search_serve.py:" in caplog.messages[0]
    assert get(client, "/health").status_code == 200


def test_images_of_several_threads_are_encoded_together(api, red, monkeypatch):
    sizes, encode, first = [], api.searcher.encode, threading.Event()

    def slow(pixels):
        sizes.append(len(pixels))
        if len(sizes) == 1:
            assert first.wait(30)
        return encode(pixels)

    api.encoder.encoder.encode = slow
    found = []
    threads = [threading.Thread(target=lambda: found.append(post(Client(api), red).json["hits"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(api.encoder.waiting) == 3)
    first.set()
    for thread in threads:
        thread.join()
    assert sizes == [1, 3] and all(hits == found[0] for hits in found)


def test_a_failing_encoder_fails_all_who_wait(api, red):
    def fail(_):
        raise RuntimeError("no memory")

    api.encoder.encoder.encode = fail
    refused(post(Client(api), red), 500)
    assert not api.encoder.waiting and api.free._value == 4


# ---------------------------------------------------------------- the command


def test_dry_run_opens_nothing(capsys):
    serve.main(["no.index", "--port", "8123", "--host", "::1", "--dry_run"])
    assert "would serve no.index at http://[::1]:8123/" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--port 65536", "--port -1", "--port x", "--most_at_once 0", "--most_bytes 0", "--x"])
def test_wrong_flags(flag):
    with pytest.raises(InputError):
        serve.main(["no.index", *flag.split(), "--dry_run"])


def test_hosts_by_which_it_is_called():
    def hosts(*flags):
        own = serve.build_parser().parse_args(["x", *flags])
        return serve.limits_of(own, own.port)

    assert hosts().hosts == {"localhost:8000", "127.0.0.1:8000", "[::1]:8000"} and not hosts().any_address
    assert "localhost" in hosts("--port", "80").hosts
    more = hosts("--host", "0.0.0.0", "--allow_host", "Photos.Example", "b:99")
    assert more.any_address and {"photos.example", "b:99"} <= more.hosts
    assert "[fe80::1]:8000" in hosts("--host", "fe80::1").hosts


def test_help_and_dry_run_import_no_torch(tmp_path):
    code = ("import sys, search.serve; search.serve.main(['x', '--dry_run']); "
            "assert not {'torch', 'faiss', 'numpy'} & sys.modules.keys() - {'numpy'}")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
