"""The page in a real browser, at the width of a desktop and of a phone, with all other hosts blocked.

Needs `pip install playwright` and a Chromium (MECOQ_CHROMIUM names another one than the one that is found).
"""

import os
import shutil
import threading
from pathlib import Path

import pytest
from helpers import HOSTILE, wait_for
from search_fakes import MOST_BYTES, fake_api, photo

from search.connections import Server, listening

CHROMIUM = os.environ.get("MECOQ_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"),
    pytest.mark.skipif(not HOSTILE, reason="takes half a minute: MECOQ_HOSTILE=1"),
]
BLOCKED = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
DROP = """([bytes, name, how]) => {
    const file = new File([new Uint8Array(bytes)], name, { type: "image/png" }), data = new DataTransfer();
    data.items.add(file);
    const event = how === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(how, { dataTransfer: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    return fake_api(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def place(api):
    """Where the page is."""
    with listening("127.0.0.1", 0) as listener:
        server = Server(listener, api, MOST_BYTES)
    object.__setattr__(api.limits, "hosts", frozenset({f"127.0.0.1:{server.port}"}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", BLOCKED])


@pytest.fixture(params=WIDTHS)
def page(request, browser, place):
    """The page, loaded; it must ask no other host, and break no rule of its security policy."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("filechooser", lambda _: None)  # so that the browser opens none of its own from the start
    page.set_default_timeout(15_000)
    page.goto(place)
    page.wait_for_selector("#results li")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert asked and all(url.startswith(place) for url in asked)
    assert all(text.startswith("Failed to load resource: the server responded with") for text in complaints)
    context.close()


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "red.png"
    photo(path)
    return path


def hits(page):
    """The ids of the results that are shown."""
    return page.eval_on_selector_all("#results a", "links => links.map(link => link.hash)")


def until(page, expression, argument=None):
    """Wait until a JavaScript expression holds. Playwright's own waiting is a script that the page's policy forbids."""
    wait_for(lambda: page.evaluate(expression, argument))


def wait_until_shown(page, words):
    until(page, "words => document.getElementById('asked').textContent.includes(words)", words)
    until(page, "!document.getElementById('results').hasAttribute('aria-busy')")


def choose(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#choose")
    chooser.value.set_files(path)


def test_upload_results_going_on_and_back(page, red):
    assert len(hits(page)) == 20 and page.is_hidden("#query")
    first = hits(page)
    page.click("text=Show others")
    until(page, "location.hash === '#seed=1' && !document.querySelector('[aria-busy]')")
    assert hits(page) != first
    choose(page, red)
    wait_until_shown(page, "Like red.png")
    found = hits(page)
    assert "most alike first (by cosine)" in page.inner_text("#status") and page.is_visible("#preview")
    until(page, "[...document.querySelectorAll('#results img')].slice(0, 3).every(i => i.naturalWidth)")
    page.click("#results li:nth-child(3) a")
    wait_until_shown(page, ".jpg")
    assert page.url.endswith(found[2]) and found[2] not in hits(page)
    address = page.url
    page.go_back()
    wait_until_shown(page, "Like red.png")
    assert hits(page) == found
    page.go_forward()
    wait_until_shown(page, ".jpg")
    page.reload()
    wait_until_shown(page, ".jpg")
    assert page.url == address
    page.click("text=Back to the start")
    until(page, "document.getElementById('query').hidden")
    assert hits(page) == first


def test_number_and_folder_stay(page):
    page.select_option("#k", "10")
    page.fill("#under", "dogs")
    page.press("#under", "Enter")
    until(page, "document.querySelectorAll('#results li').length === 10")
    until(page, "[...document.querySelectorAll('.folder')].every(f => f.textContent.startsWith('dogs'))")
    page.click("#results li:first-child a")
    wait_until_shown(page, ".jpg")
    assert "k=10" in page.url and "under=dogs" in page.url and len(hits(page)) == 10
    page.fill("#under", "nowhere")
    page.press("#under", "Enter")
    page.wait_for_selector("text=No image is below nowhere")
    page.go_back()
    until(page, "document.querySelectorAll('#results li').length === 10")


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_drop_and_paste(page, red, how):
    content = list(red.read_bytes())
    if how == "drop":
        page.evaluate(DROP, [content, "x.png", "dragenter"])
        assert page.is_visible("#drop")
    page.evaluate(DROP, [content, f"{how}.png", how])
    wait_until_shown(page, f"Like {how}.png")
    assert page.is_hidden("#drop") and len(hits(page)) == 20
    page.evaluate(
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))"
    )
    page.wait_for_selector("text=What was dropped is no file")


def test_errors_are_shown(page, api, tmp_path, red):
    for name, content, words in (
        ("text.jpg", b"no image", "it is not an image that can be read"),
        ("large.jpg", b"\0" * (MOST_BYTES + 1), "This image is too large (0.2 MB; at most 0.2 MB are taken)"),
        ("empty.jpg", b"", "There is no image"),
    ):
        (tmp_path / name).write_bytes(content)
        choose(page, tmp_path / name)
        page.wait_for_selector(f"#error:has-text({words!r})")
        assert not hits(page)
    page.evaluate("facts.most_bytes = Infinity")
    choose(page, tmp_path / "large.jpg")
    page.wait_for_selector("#error:has-text('This image is too large (at most 200,000 bytes are taken).')")
    held = [api.free.acquire(blocking=False) for _ in range(api.limits.most_at_once)]
    choose(page, red)
    page.wait_for_selector("#error:has-text('The server is busy')")
    for _ in held:
        api.free.release()
    page.evaluate("location.hash = '#like=99999'")
    page.wait_for_selector("#error:has-text('There is no image of this id.')")
    page.evaluate("location.hash = '#upload=77'")
    page.wait_for_selector("#error:has-text('choose it again')")
    choose(page, red)
    wait_until_shown(page, "Like red.png")
    assert page.inner_text("#error") == ""


def test_keys_alone(page, red):
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("/")
    chooser.value.set_files(red)
    wait_until_shown(page, "Like red.png")
    found = hits(page)
    focused = "document.activeElement.hash"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == found[0]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == found[1]
    page.keyboard.press("ArrowDown")
    top = "[...document.querySelectorAll('#results a')].filter((a, _, all) => a.offsetTop === all[0].offsetTop).length"
    assert page.evaluate(focused) == found[1 + page.evaluate(top)]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is nothing further left
    assert page.evaluate(focused) == found[0]
    page.keyboard.press("End")
    assert page.evaluate(focused) == found[-1]
    page.keyboard.press("Enter")
    wait_until_shown(page, ".jpg")
    assert page.url.endswith(found[-1]) and page.evaluate(focused) == hits(page)[0]
    page.go_back()
    wait_until_shown(page, "Like red.png")
    page.focus("#under")
    page.keyboard.type("o/")  # is text there
    assert page.input_value("#under") == "o/"


def test_a_file_that_is_gone_leaves_a_note(page, api):
    path = api.store.path(24)
    path.rename(path.with_suffix(".away"))
    try:
        page.select_option("#k", "50")
        page.wait_for_selector("text=file is gone")
    finally:
        path.with_suffix(".away").rename(path)
