"""Compare and Batch on the page: two answers side by side; many pictures, paused, reloaded, resumed."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path

from qvl.types import ChatRequest, Chunk, Usage
from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture
from tests.server.page.conftest import drop, go, shot


def test_one_question_to_two_models(page, serve) -> None:
    server: Running = serve(TalkingBackend(), served_model_names=("small", "large"))
    go(page, server.url)
    page.click("#tab-compare")
    page.select_option("#model-a", "small")
    page.select_option("#model-b", "large")
    with page.expect_request("**/v1/chat/completions") as first:
        page.click("#compare")
    assert first.value.post_data_json["model"] == "small"
    page.wait_for_selector("#compare:enabled")
    told = page.locator(".side .facts").all_inner_texts()
    assert ["small" in told[0], "large" in told[1]] == [True, True]


def test_one_question_with_two_settings_side_by_side(page, serve) -> None:
    said = {0.0: "NORVIK, a **mug**", 0.9: "NORVIK"}
    server: Running = serve(TalkingBackend(reply=lambda asked: said[asked.sampling.temperature]))
    go(page, server.url)
    page.click("#tab-compare")
    drop(page, "mug.png", picture("red"))
    page.wait_for_selector("#pictures img")
    page.fill("#compare-question", "what brand")
    page.fill("#temperature-b", "0.9")
    page.click("#compare")
    page.wait_for_selector("#compare:enabled")
    assert page.locator(".side .answer").all_inner_texts() == ["NORVIK, a mug", "NORVIK"]
    assert page.inner_text("#compare-result [role=status]") == "The answers differ."
    assert "temperature: 0.9" in page.locator(".side h3").nth(1).inner_text()
    for number in range(2):
        told = page.locator(".side .facts").nth(number).inner_text()
        assert "total" in told
        assert "tokens" in told
    assert [len(request.pictures) for request in server.backend.requests] == [1, 1]
    shot(page, "compare")
    page.fill("#temperature-b", "")
    page.click("#compare")
    page.locator("#compare-result [role=status]", has_text="the same").wait_for()
    page.wait_for_selector("#compare:enabled")
    assert page.locator("#model-a option").all_inner_texts() == ["as above", "parrot"]
    page.click("#history-button")
    page.locator("#history .entry").nth(1).click()
    page.locator("#compare-result [role=status]", has_text="differ").wait_for()


class Counted(TalkingBackend):
    """Answers as many requests as are allowed; the others wait."""

    allowed = 3

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        number = len(self.requests)
        self.requests.append(request)
        while number >= self.allowed:
            await asyncio.sleep(0.01)
        yield Chunk(text=f"{request.pictures[0].original[0]} {request.messages[-1].text}")
        yield Chunk(finish_reason="stop", usage=Usage(prompt_tokens=10, completion_tokens=2))


def folder(tmp_path: Path, number: int) -> Path:
    made = tmp_path / "shop"
    made.mkdir()
    for index in range(number):
        (made / f"{index}.png").write_bytes(picture("red", (40 + index, 40)))
    (made / "notes.txt").write_text("not a picture")
    return made


def test_a_folder_is_asked_paused_reloaded_and_resumed(page, serve, tmp_path: Path) -> None:
    server: Running = serve(Counted())
    go(page, server.url)
    page.click("#tab-batch")
    page.set_input_files("#batch-folder", str(folder(tmp_path, 12)))
    page.locator("#batch-chosen", has_text="shop: 12 to ask about. Left out: 1 file that is no picture").wait_for()
    page.select_option("#batch-kind", "ask")
    page.fill("#batch-question", "what colour is it")
    page.fill("#batch-at-once", "2")
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="3 of 12").wait_for()
    shot(page, "batch-running")
    # The page goes away in the middle, with two lines under way.
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#tab-batch")
    server.backend.allowed = 8
    page.locator(".batch [role=status]", has_text=re.compile("[4-8] of 12")).wait_for()
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Go on").wait_for()
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#tab-batch")
    server.backend.allowed = 100
    page.get_by_role("button", name="Go on").click()
    page.locator(".batch [role=status]", has_text="12 of 12 answered").wait_for()
    with page.expect_download() as waiting:
        page.locator(".batch").get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))
    assert [row["picture"] for row in rows] == [f"shop/{index}.png" for index in range(12)]
    assert [row["answer"] for row in rows] == [f"{40 + index} what colour is it" for index in range(12)]
    # What had been answered was not asked again; what was cut off was.
    assert 12 <= len(server.backend.requests) <= 12 + 2 * 2
    shot(page, "batch-done")
    page.get_by_role("button", name="Forget").click()
    page.wait_for_selector(".batch", state="detached")


def test_a_table_names_pictures_and_questions_and_failures_are_told(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    page.click("#tab-batch")
    page.select_option("#batch-kind", "ask")
    table = 'sku,image,question\n1,a.png,"what, exactly"\n2,b.png,\n3,"data:image/png;base64,AAAA",third\n'
    red = {"name": "a.png", "mimeType": "image/png", "buffer": picture("red")}
    files = [{"name": "shop.csv", "mimeType": "text/csv", "buffer": table.encode()}, red]
    page.set_input_files("#batch-files", files)
    page.locator("#error", has_text="line 3: b.png").wait_for()
    page.set_input_files("#batch-files", [*files, {**red, "name": "b.png", "buffer": picture("blue")}])
    page.locator("#batch-chosen", has_text="shop.csv: 3 to ask about. 2 have a question of their own.").wait_for()
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="2 of 3 answered, 1 failed").wait_for()
    assert page.locator(".batch .failed").count() == 1
    with page.expect_download() as waiting:
        page.locator(".batch").get_by_role("button", name="JSONL").click()
    told = [json.loads(line) for line in waiting.value.path().read_text().splitlines()]
    assert [one.get("answer") for one in told] == ["1:what, exactly", "1:What brand is it?", None]
    assert told[0]["row"]["sku"] == "1"
    assert told[2]["error"].startswith("data:image/png is not a picture")


def test_what_is_dropped_on_the_tab_is_its_batch(page, serve) -> None:
    server: Running = serve(TalkingBackend())
    go(page, server.url)
    page.click("#tab-batch")
    drop(page, "a.png", picture("red"))
    page.locator("#batch-chosen", has_text="Files: 1 to ask about.").wait_for()
    drop(page, "table.csv", b"name,colour\nx,red\n", "text/csv")
    page.locator("#error", has_text="table.csv has no column of pictures").wait_for()
    drop(page, "notes.txt", b"hello", "text/plain")
    page.locator("#error", has_text="There is no picture, video or PDF in it").wait_for()


def test_a_batch_waits_for_a_server_that_is_away(page, serve, tmp_path: Path) -> None:
    server: Running = serve(TalkingBackend(reply=lambda request: '{"brand": null, "category": null, "attributes": {}}'))
    go(page, server.url)
    page.click("#tab-batch")
    away = {"on": True}
    page.route("**/v1/analyze", lambda route: route.abort() if away["on"] else route.fallback())
    page.set_input_files("#batch-folder", str(folder(tmp_path, 2)))
    page.wait_for_selector("#batch-start:enabled")
    page.click("#batch-start")
    page.locator(".batch", has_text="The server cannot be reached; asked again in").wait_for()
    away["on"] = False
    page.locator(".batch [role=status]", has_text="2 of 2").wait_for()
