"""The page at `/`, in a real Chromium: pictures, questions, the tabs, the key, a phone, and the page of the API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qvl.html.page import page_html
from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import SLOW_FILES, drop, go, shot

ANSWER = ".turn.assistant .answer"


def test_drop_ask_analyze_and_the_second_time_from_the_cache(page, serve) -> None:
    server: Running = serve(EchoBackend("shop-vl", pause=0.02))
    go(page, server.url)
    drop(page, "shoe.png", picture("red", (120, 90)))
    page.wait_for_selector("#pictures img")
    page.fill("#question", "what colour is this shoe")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".turn .facts dd")
    assert page.inner_text(ANSWER) == "red 120x90, what colour is this shoe"
    assert "miss" in page.inner_text(".turn .facts")
    shot(page, "ask")
    assert page.inner_text("#send") == "Ask again"
    page.click("#send")
    page.locator(".turn .facts", has_text="hit").wait_for()
    assert page.locator(".turn.assistant").count() == 1
    page.click("#tab-analyze")
    page.wait_for_selector("#pictures img")
    page.click("#analyze")
    page.wait_for_selector(".field meter")
    assert page.locator(".field").count() >= 3
    shot(page, "analyze")
    page.click("#analyze")
    page.locator(".analysis .facts", has_text="hit").wait_for()


def test_what_is_located_is_drawn_on_the_picture(page, serve) -> None:
    answer = '[{"bbox_2d": [100, 200, 700, 900], "label": "the <b>cap"}]'
    evidence = '{"brand": "NORVIK", "category": null, "attributes": {}, "evidence": {"brand": [100, 200, 700, 900]}}'
    replies = {"Locate": answer, "Give b": evidence}
    server: Running = serve(TalkingBackend("Qwen3-VL", reply=lambda asked: replies[asked.messages[-1].text[:6]]))
    go(page, server.url)
    drop(page, "shoe.png", picture("red", (120, 90)))
    page.wait_for_selector("#pictures img")
    page.click("#tab-locate")
    page.fill("#targets", "the <b>cap")
    page.click("#locate")
    page.wait_for_selector("#answer .place rect")
    assert "12, 18, 84, 81" in page.inner_text("#answer .field")
    assert "the <b>cap" in page.inner_text("#answer .field")
    shot(page, "locate")
    page.focus("#tab-locate")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#tab-analyze", "aria-selected") == "true"
    page.check("#where")
    page.click("#analyze")
    page.wait_for_selector("#answer .field meter")
    page.wait_for_selector("#answer .place rect")
    shot(page, "evidence")


def test_a_picture_that_is_still_being_read_is_waited_for_and_sent(page, serve) -> None:
    server: Running = serve()
    page.add_init_script(SLOW_FILES)
    go(page, server.url)
    drop(page, "large.png", picture("red", (120, 90)))
    assert "large.png" in page.inner_text("#pictures .reading")
    page.fill("#question", "what is it")
    page.click("#send")
    page.wait_for_selector(".answer.busy")
    assert "large.png" in page.inner_text(".turn.user .reading")
    page.evaluate("readNow()")
    page.wait_for_selector(".turn .facts dd")
    assert page.inner_text(ANSWER) == "red 120x90, what is it"
    assert page.locator(".turn.user img").count() == 1


def test_a_question_stopped_while_its_picture_is_read_comes_back_whole(page, serve) -> None:
    server: Running = serve()
    page.add_init_script(SLOW_FILES)
    go(page, server.url)
    drop(page, "large.png", picture("red", (120, 90)))
    page.fill("#question", "what is it")
    page.click("#send")
    page.click("#stop")
    page.wait_for_selector("#send:enabled")
    assert page.input_value("#question") == "what is it"
    assert server.backend.requests == []
    page.evaluate("readNow()")
    page.wait_for_selector("#pictures img")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    assert page.inner_text(ANSWER) == "red 120x90, what is it"


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_sent_without_it(page, serve, tmp_path: Path) -> None:
    server: Running = serve()
    page.add_init_script(SLOW_FILES)
    go(page, server.url)
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
    go(page, server.url)
    for name, data in (("a.png", picture("red")), ("broken.png", b"123"), ("b.png", picture("blue"))):
        drop(page, name, data)
    page.click("#tab-analyze")
    page.click("#analyze")
    page.wait_for_selector("#analyze:enabled")
    rows = page.locator(".results tbody tr")
    assert page.locator(".results .link").all_inner_texts() == ["a.png", "broken.png", "b.png"]
    assert rows.nth(0).locator("meter").count() >= 3
    assert "broken.png is not a picture" in rows.nth(1).locator(".failed").inner_text()
    assert rows.nth(2).locator("meter").count() >= 3
    assert [len(request.pictures) for request in server.backend.requests] == [1, 1]
    shot(page, "several")


def test_by_keyboard_alone(page, serve) -> None:
    server: Running = serve()
    # With the first listener the browser is told to hand choosers over; told only at the key press, it may be late.
    page.on("filechooser", lambda chooser: None)
    go(page, server.url)
    page.focus("#tab-ask")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-analyze"
    assert page.is_visible("#panel-analyze")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture("blue")})
    page.wait_for_selector("#pictures img")


def test_an_error_is_shown_and_the_key_is_asked_for(page, serve) -> None:
    server: Running = serve(api_keys=("sesame",))
    page.goto(server.url)
    page.wait_for_selector("#key-dialog[open]")
    shot(page, "key")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state.ready")
    drop(page, "broken.png", b"123")
    page.wait_for_selector("#pictures img", state="attached")
    page.click("#send")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error").startswith("broken.png is not a picture")
    shot(page, "error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, serve, scheme: str) -> None:
    server: Running = serve(EchoBackend("a-model-with-quite-a-long-name/Qwen3-VL-8B-Instruct"))
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True)
    page = context.new_page()
    go(page, server.url)
    drop(page, "shoe.png", picture("green", (300, 80)))
    page.click("#tab-analyze")
    page.click("#analyze")
    page.wait_for_selector(".field meter")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, f"phone-{scheme}")
    page.goto(f"{server.url}/docs")
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, f"phone-docs-{scheme}")
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
    shot(page, "docs")


def test_reports_have_the_colours_of_the_page(page, serve) -> None:
    server: Running = serve()
    colours = server.get("/static/theme.css").text
    report = page_html("a report", "<p>text</p>")
    assert colours in report
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        back = "getComputedStyle(document.body).backgroundColor"
        go(page, server.url)
        wanted = page.evaluate(back)
        page.goto("about:blank")
        page.set_content(report)
        assert page.evaluate(back) == wanted
