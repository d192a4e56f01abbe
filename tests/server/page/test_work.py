"""Analyze, Locate and Decide on the page: the schema editor, the table, places, bars, and the history of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from qvl.backends.local.backend import LocalBackend
from tests.pipeline.conftest import TalkingBackend
from tests.server.conftest import Running, picture, start
from tests.server.page.conftest import drop, go, shot

PICTURES = Path(__file__).parents[3] / "examples" / "pictures"


@pytest.fixture(scope="module")
def bundled():
    running = start(LocalBackend())
    yield running
    running.stop()


def add(page, *names: str) -> None:
    for number, name in enumerate(names):
        drop(page, name, (PICTURES / name).read_bytes(), f"image/{name.rpartition('.')[2]}")
        page.locator("#pictures img").nth(number).wait_for()


def analyzed(page) -> None:
    page.click("#analyze")
    page.wait_for_selector("#analyze:enabled")


def test_fields_of_ones_own_by_a_table_and_by_a_schema(page, serve) -> None:
    answer = {"brand": "NORVIK", "price": 12.5, "colour": "red"}
    server: Running = serve(TalkingBackend(reply=lambda request: json.dumps(answer)))
    go(page, server.url)
    page.click("#tab-analyze")
    drop(page, "mug.png", picture("red"))
    page.wait_for_selector("#pictures img")
    page.select_option("#schema-kind", "fields")
    page.get_by_label("Name of field 2").fill("price")
    page.get_by_label("Type of field 2").select_option("number")
    page.get_by_label("What field 2 means").fill("in euros")
    page.click("#add-field")
    page.get_by_label("Name of field 3").fill("colour")
    page.get_by_label("Type of field 3").select_option("one of")
    assert "list its values" in page.inner_text("#schema-wrong")
    page.get_by_label("Values of field 3").fill("red, blue")
    shot(page, "schema-fields")
    analyzed(page)
    assert page.locator(".field .value").all_inner_texts() == ["NORVIK", "12.5", "red"]
    page.select_option("#schema-kind", "json")
    schema = json.loads(page.input_value("#schema"))
    assert schema["properties"]["price"] == {"type": "number", "description": "in euros"}
    assert schema["properties"]["colour"] == {"enum": ["red", "blue"]}
    assert schema["required"] == ["brand"]
    assert server.backend.requests[-1].response_format.schema["properties"].keys() == schema["properties"].keys()
    # What a table cannot show stays a schema.
    page.fill("#schema", '{"type": "object", "properties": {"a": {"type": "object"}}}')
    page.select_option("#schema-kind", "fields")
    assert page.is_visible("#schema-json")
    assert "cannot show all" in page.inner_text("#schema-wrong")
    page.fill("#schema", '{\n"type": "object",,}')
    assert "not JSON: line 2" in page.inner_text("#schema-wrong")
    page.click("#analyze")
    assert "not JSON" in page.inner_text("#error")


def test_types_are_completed_in_a_schema(page, serve) -> None:
    server: Running = serve()
    go(page, server.url)
    page.click("#tab-analyze")
    page.select_option("#schema-kind", "json")
    page.fill("#schema", "")
    page.locator("#schema").press_sequentially('{"ty')
    assert page.locator("#schema-options li").all_inner_texts() == ["type"]
    page.keyboard.press("Enter")
    assert page.input_value("#schema") == '{"type": "string"'
    page.fill("#schema", "")
    page.locator("#schema").press_sequentially('{"type": "object", "properties": {"n": {"type": "')
    shown = page.locator("#schema-options li").all_inner_texts()
    assert shown[:3] == ["string", "number", "integer"]
    shot(page, "schema-completion")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.locator("#schema").press_sequentially('"}}}')
    assert json.loads(page.input_value("#schema"))["properties"] == {"n": {"type": "number"}}
    # The names of fields are nobody's to guess.
    page.fill("#schema", "")
    page.locator("#schema").press_sequentially('{"type": "object", "properties": {"t')
    assert page.locator("#schema-options li").count() == 0


def test_several_pictures_make_a_table_that_sorts_filters_and_leaves(page, bundled: Running) -> None:
    go(page, bundled.url)
    page.click("#tab-analyze")
    add(page, "norvik-mug-red.png", "shoe.webp", "kasumo-chair-orange.png")
    page.check("#where")
    analyzed(page)
    names = page.locator(".results .link")
    assert names.all_inner_texts() == ["norvik-mug-red.png", "shoe.webp", "kasumo-chair-orange.png"]
    page.get_by_role("button", name="brand", exact=True).click()
    brands = [row.split("\n")[0] for row in page.locator(".results tbody td:nth-child(2)").all_inner_texts()]
    assert brands == sorted(brands)
    page.get_by_role("button", name="brand ▲").click()
    assert page.locator("th[aria-sort=descending]").count() == 1
    again = page.locator(".results tbody td:nth-child(2)").all_inner_texts()
    assert [row.split("\n")[0] for row in again] == brands[::-1]
    page.get_by_label("Filter the rows").fill("mug")
    assert names.all_inner_texts() == ["norvik-mug-red.png"]
    assert "1 of 3" in page.inner_text(".results [role=status]")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))
    assert [(row["picture"], row["brand"]) for row in rows] == [("norvik-mug-red.png", "NORVIK")]
    page.get_by_label("Filter the rows").fill("")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="JSONL").click()
    told = [json.loads(one) for one in waiting.value.path().read_text().splitlines()]
    assert {one["picture"]: one["analysis"]["category"] for one in told}["norvik-mug-red.png"] == "mug"
    page.get_by_role("button", name="norvik-mug-red.png", exact=True).click()
    shot(page, "table")
    # A field and its box are joined, from either side.
    page.locator(".field[data-path=brand]").hover()
    assert page.locator(".place.on title").evaluate_all("(found) => found.map((one) => one.textContent)") == ["brand"]
    box = page.locator(".place rect").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 5)
    assert "category" in page.locator(".field.on").evaluate_all("(all) => all.map((one) => one.dataset.path)")
    page.get_by_role("button", name="Zoom in").click()
    assert page.inner_text(".tools .how") == "150 %"
    box = page.locator(".frame").bounding_box()
    before = page.locator(".moved").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 30, box["y"] + 40)
    page.mouse.up()
    after = page.locator(".moved").bounding_box()
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (-20, -10)
    shot(page, "zoomed")
    page.locator(".frame").press("0")
    assert page.inner_text(".tools .how") == "100 %"


def test_decisions_are_bars(page, bundled: Running) -> None:
    go(page, bundled.url)
    page.click("#tab-decide")
    add(page, "norvik-mug-red.png", "shoe.webp")
    page.click("#decide")
    assert page.inner_text("#error") == "Write a question first."
    page.get_by_label("Question 1", exact=True).fill("Is it red?")
    page.click("#add-question")
    page.get_by_label("Question 2", exact=True).fill("Which colour is it?")
    page.get_by_label("Kind of question 2").select_option("choice")
    page.get_by_label("Answers of question 2").fill("red, blue, green")
    page.click("#decide")
    page.wait_for_selector("#decide:enabled")
    assert page.locator(".decision").count() == 2
    assert page.locator(".decision").nth(1).locator(".share meter").count() == 3
    shares = page.locator(".decision").nth(1).locator("meter").evaluate_all("(all) => all.map((one) => one.value)")
    assert sum(shares) == pytest.approx(1)
    assert page.locator(".results tbody tr").count() == 2
    shot(page, "decide")


def test_a_text_alone_is_decided_about(page, bundled: Running) -> None:
    go(page, bundled.url)
    page.click("#tab-decide")
    page.get_by_label("Question 1", exact=True).fill("Is it new?")
    page.fill("#about", "A red mug, scratched.")
    page.click("#decide")
    page.wait_for_selector(".decision meter")
    assert page.is_hidden("#error")


def test_an_analysis_is_opened_again_from_the_history(page, bundled: Running) -> None:
    go(page, bundled.url)
    page.click("#tab-locate")
    add(page, "norvik-mug-red.png")
    page.click("#locate")
    page.wait_for_selector("#locate:enabled")
    page.locator("#history .entry", has_text="the brand").wait_for(state="attached")
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    page.locator("#history .entry", has_text="the brand").click()
    page.wait_for_selector("#answer .place rect")
    assert page.get_attribute("#tab-locate", "aria-selected") == "true"
    assert page.locator("#pictures img").count() == 1
    page.get_by_role("button", name="Remove norvik-mug-red.png").click()
    assert page.locator("#pictures li").count() == 0
