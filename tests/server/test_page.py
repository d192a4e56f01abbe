"""The page at `/`, in a real Chromium. Screenshots go to a folder that git ignores."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture
from tests.server.echo_backend import EchoBackend

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium here")]
SHOTS = Path(__file__).parents[2] / "screenshots"
DROP = """([name, bytes]) => {
  const held = new DataTransfer();
  held.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/png"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: held, bubbles: true}));
}"""

# Files are read when the test says so: `window.readNow()`.
SLOW_FILES = """
  const read = FileReader.prototype.readAsDataURL, waiting = [];
  FileReader.prototype.readAsDataURL = function (file) { waiting.push(() => read.call(this, file)); };
  window.readNow = () => waiting.splice(0).forEach((start) => start());
"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api")
    SHOTS.mkdir(exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page that fails the test when it reaches outside the server or throws."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    found = context.new_page()
    found.set_default_timeout(20_000)
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("request", lambda request: None if inside(request.url) else faults.append(request.url))
    yield found
    context.close()
    assert not faults


def inside(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def test_drop_ask_analyze_and_the_second_time_from_the_cache(page, serve) -> None:
    server: Running = serve(EchoBackend("shop-vl", pause=0.02))
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    page.evaluate(DROP, ["shoe.png", list(picture("red", (120, 90)))])
    page.wait_for_selector("#pictures img")
    page.fill("#question", "what colour is this shoe")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#facts dd")
    assert page.inner_text("#answer") == "red 120x90, what colour is this shoe"
    assert "miss" in page.inner_text("#facts")
    page.screenshot(path=str(SHOTS / "ask.png"))
    page.click("#send")
    page.locator("#facts", has_text="hit").wait_for()
    assert page.locator("#strip li").count() == 2
    page.click("#tab-analyze")
    page.click("#analyze")
    page.wait_for_selector(".field meter")
    assert page.locator(".field").count() >= 3
    page.screenshot(path=str(SHOTS / "analyze.png"))
    page.click("#analyze")
    page.locator("#facts", has_text="hit").wait_for()


def test_what_is_located_is_drawn_on_the_picture(page, serve) -> None:
    answer = '[{"bbox_2d": [100, 200, 700, 900], "label": "the <b>cap"}]'
    evidence = '{"brand": "NORVIK", "category": null, "attributes": {}, "evidence": {"brand": [100, 200, 700, 900]}}'
    replies = {"Locate": answer, "Give b": evidence}
    server: Running = serve(TalkingBackend("Qwen3-VL", reply=lambda asked: replies[asked.messages[-1].text[:6]]))
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    page.evaluate(DROP, ["shoe.png", list(picture("red", (120, 90)))])
    page.wait_for_selector("#pictures img")
    page.click("#tab-locate")
    page.fill("#targets", "the <b>cap")
    page.click("#locate")
    page.wait_for_selector("#answer .overlay")
    page.wait_for_function("document.querySelector('#answer .overlay').naturalWidth > 0")
    assert "12, 18, 84, 81" in page.inner_text("#answer .field")
    assert "the <b>cap" in page.inner_text("#answer .field")
    page.screenshot(path=str(SHOTS / "locate.png"))
    page.focus("#tab-locate")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#tab-analyze", "aria-selected") == "true"
    page.check("#where")
    page.click("#analyze")
    page.wait_for_selector("#answer .field meter")
    page.wait_for_function("document.querySelector('#answer .overlay').naturalWidth > 0")
    page.screenshot(path=str(SHOTS / "evidence.png"))


def test_a_picture_that_is_still_being_read_is_waited_for_and_sent(page, serve) -> None:
    server: Running = serve()
    page.add_init_script(SLOW_FILES)
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    page.evaluate(DROP, ["large.png", list(picture("red", (120, 90)))])
    assert "large.png" in page.inner_text("#pictures .reading")
    page.fill("#question", "what is it")
    page.click("#send")
    page.wait_for_selector("#answer.busy")
    page.evaluate("readNow()")
    page.wait_for_selector("#facts dd")
    assert page.inner_text("#answer") == "red 120x90, what is it"
    assert page.locator("#pictures img").count() == 1


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_sent_without_it(page, serve, tmp_path: Path) -> None:
    server: Running = serve()
    page.add_init_script(SLOW_FILES)
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    lost = tmp_path / "lost.png"
    lost.write_bytes(picture("red"))
    page.set_input_files("#files", str(lost))
    page.wait_for_selector("#pictures .reading")
    page.click("#send")
    lost.unlink()
    page.evaluate("readNow()")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("lost.png cannot be read")
    assert page.locator("#pictures li").count() == 0
    page.wait_for_selector("#send:enabled")
    assert server.backend.requests == []


def test_several_pictures_are_analyzed_one_by_one_and_a_bad_one_fails_alone(page, serve) -> None:
    server: Running = serve()
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    for name, data in (("a.png", picture("red")), ("broken.png", b"123"), ("b.png", picture("blue"))):
        page.evaluate(DROP, [name, list(data)])
    page.click("#tab-analyze")
    page.click("#analyze")
    page.locator(".analysis").nth(2).wait_for()
    page.wait_for_selector("#analyze:enabled")
    assert page.locator(".analysis h3").all_inner_texts() == ["a.png", "broken.png", "b.png"]
    assert page.locator(".analysis").nth(0).locator("meter").count() >= 3
    assert page.locator(".analysis").nth(1).inner_text().count("broken.png") == 2
    assert page.locator(".analysis").nth(2).locator("meter").count() >= 3
    assert [len(request.pictures) for request in server.backend.requests] == [1, 1]
    page.screenshot(path=str(SHOTS / "several.png"), full_page=True)


def test_by_keyboard_alone(page, serve) -> None:
    server: Running = serve()
    # With the first listener the browser is told to hand choosers over; told only at the key press, it may be late.
    page.on("filechooser", lambda chooser: None)
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    page.focus("#tab-ask")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-analyze"
    assert page.is_visible("#panel-analyze")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "question"
    page.focus("#drop")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture("blue")})
    page.wait_for_selector("#pictures img")


def test_an_error_is_shown_and_the_key_is_asked_for(page, serve) -> None:
    server: Running = serve(api_keys=("sesame",))
    page.goto(server.url)
    page.wait_for_selector("#key-dialog[open]")
    page.screenshot(path=str(SHOTS / "key.png"))
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state.ready")
    page.evaluate(DROP, ["broken.png", [1, 2, 3]])
    page.wait_for_selector("#pictures img", state="attached")
    page.click("#send")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("broken.png: data:image/png is not a picture")
    page.screenshot(path=str(SHOTS / "error.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, serve, scheme: str) -> None:
    server: Running = serve(EchoBackend("a-model-with-quite-a-long-name/Qwen3-VL-8B-Instruct"))
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#state.ready")
    page.evaluate(DROP, ["shoe.png", list(picture("green", (300, 80)))])
    page.click("#tab-analyze")
    page.click("#analyze")
    page.wait_for_selector(".field meter")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=str(SHOTS / f"phone-{scheme}.png"), full_page=True)
    page.goto(f"{server.url}/docs")
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=str(SHOTS / f"phone-docs-{scheme}.png"), full_page=True)
    context.close()


def test_the_examples_of_the_docs_run(page, serve) -> None:
    server: Running = serve()
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("details")
    for number in range(page.locator("details").count()):
        block = page.locator("details").nth(number)
        block.locator("summary").click()
        operation = block.locator("summary").inner_text().partition(" — ")[0]
        if operation == "GET /v1/models/{model}":
            block.locator("input").fill("/v1/models/echo-vl")
        block.locator("button").click()
        page.wait_for_function(
            "(n) => document.querySelectorAll('details')[n].querySelector('pre').innerText", arg=number
        )
        # What must be made first is not there; this model has no tokens to tell.
        absent = ("{" in operation and "model" not in operation) or "/files" in operation or "/batches" in operation
        wanted = "404" if absent else "4" if re.search("tokens|tokenize", operation) else "200"
        assert block.locator("pre").first.inner_text().startswith(wanted), operation
        block.locator("summary").click()
    page.screenshot(path=str(SHOTS / "docs.png"))
