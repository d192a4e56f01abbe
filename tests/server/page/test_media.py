"""PDFs and videos in every tab of the page: compared, asked in a batch, located on and drawn as the page they show."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.media.policy import MediaPolicy
from tests.media.films import film
from tests.media.papers import BAG, MUG, SHOE, locked, paper
from tests.server.conftest import Running, picture, start
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import go, shot

MEDIA = MediaPolicy(allow_files=False, document_dpi=72)


@pytest.fixture(scope="module")
def bundled():
    running = start(LocalBackend(), media=MEDIA)
    yield running
    running.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a PDF of three pages, a video, a picture, a locked PDF, and a text."""
    made = tmp_path / "shop"
    made.mkdir()
    (made / "bill.pdf").write_bytes(paper([MUG, BAG, SHOE]))
    (made / "locked.pdf").write_bytes(locked())
    film(made / "clip.webm", frames=32)
    (made / "red.png").write_bytes(picture("red"))
    (made / "notes.txt").write_text("neither")
    return made


def texts(request: Any) -> list[str]:
    return [part.text for part in request.messages[-1].parts if hasattr(part, "text")]


def batched(page: Any) -> list[dict[str, Any]]:
    """The lines of the batch that has ended, from its JSONL."""
    with page.expect_download() as waiting:
        page.locator(".batch").first.get_by_role("button", name="JSONL").click()
    return [json.loads(line) for line in waiting.value.path().read_text().splitlines()]


def table_of(page: Any) -> list[dict[str, str]]:
    """The rows of the batch that has ended, from its CSV."""
    with page.expect_download() as waiting:
        page.locator(".batch").get_by_role("button", name="CSV").click()
    return list(csv.DictReader(io.StringIO(waiting.value.path().read_text())))


def test_both_sides_of_a_comparison_see_the_document_and_the_video(page: Any, serve: Any, folder: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"), media=MEDIA)
    go(page, server.url)
    page.click("#tab-compare")
    page.set_input_files("#files", [str(folder / "bill.pdf"), str(folder / "clip.webm")])
    page.get_by_label("Pages of bill.pdf").fill("2-3")
    page.locator("#pictures .frame-at").first.wait_for(state="attached")
    page.fill("#compare-question", "What is bought?")
    page.fill("#temperature-b", "0.9")
    page.click("#compare")
    page.wait_for_selector("#compare:enabled")
    assert page.locator(".side .failed").count() == 0
    assert page.locator(".side .facts").count() == 2
    left, right = server.backend.requests
    assert texts(left)[:3] == texts(right)[:3] == ["Page 2:", "Page 3:", "<0.0 seconds>"]
    assert {left.sampling.temperature, right.sampling.temperature} == {0.0, 0.9}
    shot(page, "compare-media")
    # What the history kept is asked again as it was.
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    page.click("#history .entry")
    page.locator(".side .facts").nth(1).wait_for()
    assert page.get_by_label("Pages of bill.pdf").input_value() == "2-3"
    page.click("#compare")
    page.wait_for_selector("#compare:enabled")
    assert texts(server.backend.requests[-1])[:2] == ["Page 2:", "Page 3:"]


def test_a_folder_of_pictures_videos_and_documents_is_a_batch(page: Any, serve: Any, folder: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"), media=MEDIA)
    go(page, server.url)
    page.click("#tab-batch")
    page.set_input_files("#batch-folder", str(folder))
    page.locator("#batch-chosen", has_text="shop: 4 to ask about. Left out: 1 file that is no picture").wait_for()
    page.select_option("#batch-kind", "ask")
    page.fill("#batch-question", "What is it?")
    page.fill("#batch-at-once", "1")
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="3 of 4 answered, 1 failed").wait_for()
    assert page.locator(".batch .failed").inner_text().startswith("shop/locked.pdf is encrypted")
    shot(page, "batch-media")
    bill, clip, red = server.backend.requests
    assert texts(bill) == ["Page 1:", "Page 2:", "Page 3:", "What is it?"]
    assert texts(clip)[:2] == ["<0.0 seconds>", "<0.6 seconds>"]
    assert len(red.pictures) == 1
    told = {line["picture"]: line for line in batched(page)}
    assert told["shop/locked.pdf"]["error"].startswith("shop/locked.pdf is encrypted")
    assert told["shop/bill.pdf"]["answer"].count("320x240") == 3


def test_a_table_names_pages_of_a_document_and_a_video(page: Any, serve: Any, folder: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"), media=MEDIA)
    go(page, server.url)
    page.click("#tab-batch")
    page.select_option("#batch-kind", "ask")
    table = "sku,document,question\n1,bill.pdf#page=2-3,what\n2,scans/bill.pdf#page=1,\n3,clip.webm,when\n"
    rows = {"name": "shop.csv", "mimeType": "text/csv", "buffer": table.encode()}
    media = [
        {"name": name, "mimeType": "", "buffer": (folder / name).read_bytes()} for name in ("bill.pdf", "clip.webm")
    ]
    page.set_input_files("#batch-files", [rows, *media])
    page.fill("#batch-at-once", "1")
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="3 of 3 answered").wait_for()
    first, second, third = server.backend.requests
    assert texts(first) == ["Page 2:", "Page 3:", "what"]
    assert [len(second.pictures), texts(second)] == [1, ["Page 1:", "What brand is it?"]]
    assert [texts(third)[0], texts(third)[-1]] == ["<0.0 seconds>", "when"]
    assert [row["document"] for row in table_of(page)] == ["bill.pdf#page=2-3", "scans/bill.pdf#page=1", "clip.webm"]


def test_each_field_of_a_document_in_a_batch_has_its_page(page: Any, bundled: Running, folder: Path) -> None:
    go(page, bundled.url)
    page.click("#tab-batch")
    page.set_input_files("#batch-files", str(folder / "bill.pdf"))
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="1 of 1 answered").wait_for()
    (row,) = table_of(page)
    assert row["category"]
    assert row["pages.category"] in {"1", "2", "3"}


def test_places_on_a_document_are_drawn_on_the_page_that_was_shown(page: Any, bundled: Running, folder: Path) -> None:
    go(page, bundled.url)
    page.click("#tab-locate")
    page.set_input_files("#files", str(folder / "bill.pdf"))
    page.click("#locate")
    page.locator("#error", has_text="bill.pdf has 3 pages").wait_for()
    page.get_by_label("Pages of bill.pdf").fill("2")
    page.click("#locate")
    page.wait_for_selector("#answer .place rect")
    sizes = "image => [image.naturalWidth, image.naturalHeight]"
    assert page.eval_on_selector(".viewer img", sizes) == [320, 240]
    assert page.get_attribute(".viewer .places", "viewBox") == "0 0 320 240"
    whole, box = page.locator(".viewer img").bounding_box(), page.locator(".place rect").bounding_box()
    assert whole["y"] <= box["y"] <= box["y"] + box["height"] <= whole["y"] + whole["height"] + 3
    shot(page, "locate-document")
    with page.expect_request("**/v1/analyze") as asked:
        page.click("#tab-analyze")
        page.check("#where")
        page.get_by_label("Pages of bill.pdf").fill("1")
        page.click("#analyze")
    assert asked.value.post_data_json["overlay"] == "svg"
    page.wait_for_selector("#answer .field.placed")
    page.reload()
    page.wait_for_selector("#state.ready")
    page.click("#history-button")
    page.locator("#history .entry").first.click()
    page.wait_for_selector("#answer .place rect")
    assert page.eval_on_selector(".viewer img", sizes) == [320, 240]
    # Of several pages the first is drawn, and each field says its own.
    page.get_by_label("Pages of bill.pdf").fill("")
    page.click("#analyze")
    page.locator("#answer .field .value", has_text="page").first.wait_for()
    shot(page, "analyze-document")


def test_decisions_about_a_video_show_its_frames(page: Any, bundled: Running, folder: Path) -> None:
    go(page, bundled.url)
    page.click("#tab-decide")
    page.set_input_files("#files", str(folder / "clip.webm"))
    page.get_by_label("Question 1", exact=True).fill("Is it red?")
    page.click("#decide")
    page.wait_for_selector(".decision meter")
    assert page.locator(".viewer .frame-at").count() == 8
    page.click("#tab-locate")
    page.click("#locate")
    page.locator("#error", has_text="clip.webm is a video, and places are told on pictures alone").wait_for()
