"""Documents in every verb of a pipeline: their pages as pictures, each behind its number."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qvl import Box, MediaPolicy, Pipeline
from qvl.errors import AnalysisError, ConfigError, MediaError, RequestError, UnsupportedInputError
from qvl.media.load_document import load_document
from qvl.types import ImagePart, TextPart
from tests.media.papers import BAG, MUG, SHOE, paper
from tests.pipeline.conftest import TalkingBackend

SMALL = MediaPolicy(document_dpi=72, allowed_private=("127.0.0.1",))


@pytest.fixture
def backend() -> TalkingBackend:
    return TalkingBackend()


@pytest.fixture
def pipeline(backend: TalkingBackend) -> Iterator[Pipeline]:
    with Pipeline(backend=backend, cache="memory:", media=SMALL) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("papers") / "bill.pdf"
    path.write_bytes(paper([MUG, BAG, SHOE]))
    return path


def test_pages_are_pictures_behind_their_numbers(pipeline: Pipeline, backend: TalkingBackend, bill: Path) -> None:
    result = pipeline.ask(bill, "What is it?", pages="1,3")
    assert pipeline.ask(f"{bill}#page=1,3", "What is it?").cache == "hit"
    assert pipeline.ask(bill.read_bytes(), "What is it?", pages=[1, 3]).cache == "hit"
    assert pipeline.ask(io.BytesIO(bill.read_bytes()), "What is it?", pages=[1, 3]).cache == "hit"
    assert pipeline.ask(load_document(bill, SMALL, result_pages()), "What is it?").cache == "hit"
    (request,) = backend.requests
    parts = request.messages[-1].parts
    assert [part.text for part in parts if isinstance(part, TextPart)] == ["Page 1:", "Page 3:", "What is it?"]
    assert [isinstance(part, ImagePart) for part in parts] == [False, True, False, True, False]
    assert [picture.source for picture in result.pictures] == [f"{bill}#page=1", f"{bill}#page=3"]


def result_pages() -> Any:
    from qvl.media.page_choice import read_pages

    return read_pages("1,3")


def test_a_document_of_one_page_is_its_picture_alone(pipeline: Pipeline, backend: TalkingBackend) -> None:
    pipeline.ask(paper([MUG]), "q")
    assert [type(part) for part in backend.requests[0].messages[-1].parts] == [ImagePart, TextPart]


def test_every_verb_takes_documents(pipeline: Pipeline, backend: TalkingBackend, bill: Path) -> None:
    assert "".join(chunk.text for chunk in pipeline.stream(bill, "q")).startswith("3:")
    backend.reply = lambda request: f'{{"total": {len(request.pictures)}}}'
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    assert pipeline.analyze(bill, schema=schema, pages="2-") == {"total": 2}
    items = list(pipeline.map([bill, f"{bill}#page=2", f"{bill}#page=9"], schema=schema))
    assert [item.value for item in items] == [{"total": 3}, {"total": 1}, None]
    assert isinstance(items[2].error, MediaError)
    backend.reply = lambda request: '[{"bbox_2d": [0, 0, 500, 500], "label": "mug"}]'
    (found,) = pipeline.locate(f"{bill}#page=1", "mug")
    assert found.box is not None
    assert (found.box.x2, found.box.y2) == (160, 120), "pixels of the page at the policy's resolution"
    with pytest.raises(RequestError, match=r"has 3 pages, and places are told on one .*#page=1"):
        pipeline.locate(bill, "mug")


@pytest.mark.parametrize("name", ["file", "input_file", "document", "langchain", "older langchain", "image_url"])
def test_every_form_of_a_part_is_one_answer(pipeline: Pipeline, backend: TalkingBackend, bill: Path, name: str) -> None:
    bare = base64.b64encode(bill.read_bytes()).decode()
    url = f"data:application/pdf;base64,{bare}"
    source = {"type": "base64", "media_type": "application/pdf", "data": bare}
    part: dict[str, Any] = {
        "file": {"type": "file", "file": {"file_data": url, "filename": "bill.pdf"}},
        "input_file": {"type": "input_file", "file_data": bare, "filename": "bill.pdf"},
        "document": {"type": "document", "source": source},
        "langchain": {"type": "file", "base64": bare, "mime_type": "application/pdf"},
        "older langchain": {"type": "file", "source_type": "base64", "data": bare, "mime_type": "application/pdf"},
        "image_url": {"type": "image_url", "image_url": {"url": url}},
    }[name]
    wanted = pipeline.ask(bill, "q", pages=2).key
    turn = {"role": "user", "content": [{**part, "pages": "2"}, {"type": "text", "text": "q"}]}
    assert pipeline.chat([turn]).key == wanted
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "file", "file": {"file_id": "file-1"}}, r"content\[0\].file.file_id: files are not looked up here"),
        ({"type": "file", "file": {}}, r"content\[0\].file: has no document"),
        ({"type": "file", "file": "a.pdf"}, r"content\[0\].file: must be an object, not text"),
        ({"type": "input_file", "file_data": "a", "file_url": "b"}, "names a document by file_data and by file_url"),
        ({"type": "document", "source": {"type": "text", "data": "a"}}, r"source.type: unknown value 'text'"),
        ({"type": "input_file", "file_data": "AAAA", "pages": "x"}, r"content\[0\].pages='x' names no pages"),
        ({"type": "input_file", "file_data": "AAAA", "colour": 1}, r"content\[0\].colour: unknown field"),
    ],
)
def test_parts_that_name_no_document_are_refused(pipeline: Pipeline, part: Any, words: str) -> None:
    with pytest.raises((RequestError, UnsupportedInputError), match=words):
        pipeline.chat([{"role": "user", "content": [part]}])


def test_pages_of_what_is_no_document(pipeline: Pipeline, backend: TalkingBackend, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "cat.pdf"
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    pipeline.ask(picture, "q")
    assert len(backend.requests[0].pictures) == 1, "a picture is one, whatever it is called"
    for source, pages in ((picture, "1"), (f"{picture}#page=1", None)):
        with pytest.raises(MediaError, match=r"cat.pdf is not a PDF, so no pages can be chosen"):
            pipeline.ask(source, "q", pages=pages)
    with pytest.raises(ConfigError, match="pages='x' names no pages"):
        pipeline.ask(picture, "q", pages="x")
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    pipeline.chat([{"role": "user", "content": [{"type": "input_file", "file_data": url}]}])


def test_an_error_names_the_document_among_the_pictures(pipeline: Pipeline, bill: Path) -> None:
    damaged = bill.read_bytes().replace(b"/Contents 5 0 R", b"/Contents 999 R", 1)
    with pytest.raises(MediaError) as caught:
        pipeline.ask([bill, damaged[: len(damaged) // 2], bill], "q")
    assert caught.value.picture == 1


class PaperSite(BaseHTTPRequestHandler):
    files: dict[str, tuple[str, bytes]]

    def do_GET(self) -> None:
        kind, data = self.files[self.path]
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(bill: Path) -> Iterator[str]:
    data = bill.read_bytes()
    PaperSite.files = {
        "/bill.pdf": ("application/pdf", data),
        "/download?id=7": ("application/octet-stream", data),
        "/wrong": ("text/html; charset=utf-8", data),
        "/picture": ("image/png", data),
        "/page.pdf": ("application/pdf", b"<!doctype html><title>Sign in</title>"),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), PaperSite)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_url_is_what_its_bytes_are(pipeline: Pipeline, site: str) -> None:
    keys = {pipeline.ask(f"{site}{path}#page=2", "q").key for path in ("/bill.pdf", "/download?id=7", "/wrong")}
    keys.add(pipeline.ask(f"{site}/picture", "q", pages=2).key)
    assert len(keys) == 1
    with pytest.raises(MediaError, match=r"page.pdf is not a PDF: it starts like a web page"):
        pipeline.ask(f"{site}/page.pdf", "q")
    with pytest.raises(MediaError, match=r"page.pdf is not a PDF: it starts like a web page"):
        pipeline.chat([{"role": "user", "content": [{"type": "input_file", "file_url": f"{site}/page.pdf"}]}])


def test_read_gives_each_page_with_its_elements(pipeline: Pipeline, backend: TalkingBackend, bill: Path) -> None:
    backend.model = "Qwen3-VL"
    backend.reply = lambda request: '```html\n<h1 data-bbox="0 0 500 500">Mug</h1>\n```'
    pages = list(pipeline.read(bill, form="html", pages="3,1"))
    assert [(page.number, page.count, page.source) for page in pages] == [
        (3, 2, f"{bill}#page=3"),
        (1, 2, f"{bill}#page=1"),
    ]
    assert pages[0].text == '<h1 data-bbox="0 0 500 500">Mug</h1>\n'
    (element,) = pages[0].elements
    assert (element.kind, element.text, element.box.x2, element.box.y2) == ("h1", "Mug", 160, 120)
    assert (pages[0].width, pages[0].height) == (320, 240)
    assert {request.messages[-1].text for request in backend.requests} == {"qwenvl html"}
    assert {request.sampling.max_tokens for request in backend.requests} == {4096}
    assert [page.result.cache for page in pipeline.read(bill, form="html") if page.result] == ["hit", "miss", "hit"]


def test_read_goes_on_behind_a_page_that_fails(pipeline: Pipeline, backend: TalkingBackend) -> None:
    def reply(request: Any) -> str:
        if request.pictures[0].source.endswith("=2"):
            raise RequestError("no")
        return "text"

    backend.reply = reply
    pages = list(pipeline.read(paper(["a", "b", "c"])))
    assert [(page.ok, page.text) for page in pages] == [(True, "text\n"), (False, ""), (True, "text\n")]
    assert pages[1].to_json()["error"] == {"code": "invalid_request", "message": "no"}
    assert "Write everything on this page as Markdown" in backend.requests[0].messages[-1].text
    with pytest.raises(ConfigError, match="unknown form 'latex'"):
        next(pipeline.read(paper(["a"]), form="latex"))  # type: ignore[arg-type]


BILL = {
    "type": "object",
    "properties": {"total": {"type": "number"}, "seller": {"type": ["string", "null"]}},
    "required": ["total", "seller"],
}


def test_an_analysis_tells_the_page_of_each_field(pipeline: Pipeline, backend: TalkingBackend, bill: Path) -> None:
    backend.reply = lambda request: '{"total": 3, "seller": null, "page_of": {"total": 2, "seller": null}}'
    for cache in ("miss", "hit"):
        found = pipeline.analyze_result(bill, schema=BILL, pages="1-2")
        assert (found.value, found.pages, found.result.cache) == ({"total": 3, "seller": None}, {"total": 2}, cache)
        assert set(found.field_confidence) == {"total", "seller"}
    (request,) = backend.requests
    asked = request.response_format.schema["properties"]["page_of"]["properties"]["total"]["anyOf"][0]
    assert asked == {"type": "integer", "enum": [1, 2]}
    assert "page_of: for each field the number of the page" in request.messages[-1].text
    backend.reply = lambda request: '{"total": 3, "seller": null}'
    assert pipeline.analyze_result(f"{bill}#page=2", schema=BILL).pages == {}, "of one page nothing is asked"


def test_boxes_tell_pages_by_themselves(pipeline: Pipeline, backend: TalkingBackend, bill: Path) -> None:
    place = '{"picture": 2, "bbox_2d": [0, 0, 500, 500]}'
    backend.reply = lambda request: f'{{"total": 3, "seller": null, "evidence": {{"total": {place}, "seller": null}}}}'
    found = pipeline.analyze_result(bill, schema=BILL, evidence=True, pages="1,3")
    assert found.pages == {"total": 3}
    assert found.evidence["total"] is not None


class Invoice(BaseModel):
    total: float
    seller: str | None
    lines: list[str]


def per_page(request: Any) -> str:
    number = int(request.pictures[0].source.rpartition("=")[2])
    told = {
        1: '"total": null, "seller": "ACORN"',
        2: '"total": null, "seller": null',
        3: '"total": 7.5, "seller": null',
    }
    return f'{{{told[number]}, "lines": ["line of page {number}"]}}'


def test_a_document_beyond_the_budget_is_asked_page_by_page(backend: TalkingBackend, bill: Path) -> None:
    backend.reply = per_page
    tight = MediaPolicy(document_dpi=72, max_document_pixels=2 * 320 * 240)
    with Pipeline(backend=backend, cache="memory:", media=tight) as pipeline:
        found = pipeline.analyze_result(bill, schema=Invoice)
        assert found.value == Invoice(total=7.5, seller="ACORN", lines=[f"line of page {n}" for n in (1, 2, 3)])
        assert found.pages == {"total": 3, "seller": 1, "lines.0": 1, "lines.1": 2, "lines.2": 3}
        assert found.confidence is not None
        assert found.field_confidence["total"] == pytest.approx(0.5)
        assert [len(request.pictures) for request in backend.requests] == [1, 1, 1]
        assert found.result.usage.prompt_tokens == 30
        assert "asked page by page: 3 pages are more than one request takes" in found.result.notes[0]
        assert [picture.source for picture in found.result.pictures] == [f"{bill}#page={n}" for n in (1, 2, 3)]
        assert pipeline.analyze_result(bill, schema=Invoice).result.cache == "hit"
        assert len(backend.requests) == 3, "each page is in the cache by itself"
        (item,) = pipeline.map([bill], schema=Invoice)
        assert item.value == found.value
        backend.reply = lambda request: '{"total": null, "seller": null, "lines": []}'
        with pytest.raises(AnalysisError, match=r"merged from its pages, total does not fit the schema"):
            pipeline.analyze(bill, schema=Invoice, language="zh")
        with pytest.raises(RequestError, match="boxes as fields cannot be merged"):
            pipeline.analyze(bill, schema=Placed)
        backend.reply = lambda request: '{"brand": "NORVIK", "category": "mug", "attributes": {"colour": "blue"}}'
        product = pipeline.analyze(bill)
        assert (product.brand, product.attributes, product.model) == ("NORVIK", {"colour": "blue"}, "parrot")


class Placed(BaseModel):
    brand: Box


def test_more_pages_than_a_backend_takes_are_asked_page_by_page(pipeline: Pipeline, backend: TalkingBackend) -> None:
    backend.reply = lambda request: f'{{"total": {len(backend.requests)}, "seller": null}}'
    found = pipeline.analyze_result(paper(["a"] * 9), schema=BILL)
    assert len(backend.requests) == 9, "the backend takes 8 pictures"
    place = '{"evidence": {"total": [0, 0, 500, 500], "seller": null}, "total": 1, "seller": null}'
    backend.reply = lambda request: place
    found = pipeline.analyze_result(paper(["a"] * 9), schema=BILL, evidence=True)
    assert found.evidence["total"] is not None
    assert found.evidence["total"].shape.picture == 0
    assert found.pages["total"] == 1
