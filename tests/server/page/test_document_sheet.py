"""PDF documents in the page: a sheet with a field for its pages, asked about in every tab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvl.media.policy import MediaPolicy
from tests.media.papers import BAG, MUG, SHOE, locked, paper
from tests.server.conftest import Running
from tests.server.echo_backend import EchoBackend
from tests.server.page.conftest import go, shot


def test_a_document_is_shown_as_a_sheet_and_asked_about(page: Any, serve: Any, tmp_path: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"), media=MediaPolicy(allow_files=False, document_dpi=72))
    bill = tmp_path / "bill.pdf"
    bill.write_bytes(paper([MUG, BAG, SHOE]))
    go(page, server.url)
    page.set_input_files("#files", str(bill))
    field = page.get_by_label("Pages of bill.pdf")
    field.fill("2-3")
    page.fill("#question", "What is bought?")
    shot(page, "document")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    (request,) = server.backend.requests
    texts = [part.text for part in request.messages[-1].parts if hasattr(part, "text")]
    assert texts == ["Page 2:", "Page 3:", "What is bought?"]
    shown = "image => image.complete && image.naturalWidth > 0"
    assert page.eval_on_selector(".turn.user img", shown), "a sheet stands for the document"

    page.click("#tab-analyze")
    page.get_by_label("Pages of bill.pdf").fill("1")
    page.click("#analyze")
    page.wait_for_selector("#answer .facts dd")
    assert len(server.backend.requests[-1].pictures) == 1


def test_a_document_that_cannot_be_opened_is_told(page: Any, serve: Any, tmp_path: Path) -> None:
    server: Running = serve(EchoBackend("shop-vl"))
    (tmp_path / "locked.pdf").write_bytes(locked())
    go(page, server.url)
    page.set_input_files("#files", str(tmp_path / "locked.pdf"))
    page.get_by_label("Pages of locked.pdf").wait_for()
    page.fill("#question", "What?")
    page.click("#send")
    page.get_by_text("is encrypted").wait_for()
