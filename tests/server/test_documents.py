"""Documents over HTTP, as the clients of each API send them."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest

from qvl.media.policy import MediaPolicy
from tests.media.papers import BAG, MUG, SHOE, locked, paper
from tests.server.echo_backend import EchoBackend

if TYPE_CHECKING:
    from tests.server.conftest import Running

GATE = MediaPolicy(allow_files=False, document_dpi=72)
BARE = base64.b64encode(paper([MUG, BAG, SHOE])).decode()
URL = f"data:application/pdf;base64,{BARE}"


@pytest.fixture(scope="module")
def server() -> Any:
    from tests.server.conftest import start

    running = start(EchoBackend(), media=GATE)
    yield running
    running.stop()


def shown(server: Running) -> tuple[int, str]:
    request = server.backend.requests[-1]
    return len(request.pictures), "".join(part.text for part in request.messages[-1].parts if hasattr(part, "text"))


def test_a_file_of_chat(server: Running) -> None:
    assert len(BARE) > 16 * 1024, "long enough to be taken out of the body"
    for data in (URL, BARE):
        part = {"type": "file", "file": {"file_data": data, "filename": "bill.pdf"}, "pages": "1-2"}
        content = [part, {"type": "text", "text": f"What is bought? {len(data)}"}]
        answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
        assert answer.status_code == 200, answer.text
        assert shown(server) == (2, f"Page 1:Page 2:What is bought? {len(data)}")


def test_an_input_file_of_responses(server: Running) -> None:
    part = {"type": "input_file", "file_data": URL, "filename": "bill.pdf"}
    content = [part, {"type": "input_text", "text": "What?"}]
    answer = server.post("/v1/responses", {"input": [{"role": "user", "content": content}]})
    assert answer.status_code == 200, answer.text
    assert shown(server) == (3, "Page 1:Page 2:Page 3:What?")


def test_a_document_of_messages(server: Running) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": BARE}
    block = {"type": "document", "source": source, "title": "The bill", "citations": {"enabled": False}}
    content = [block, {"type": "text", "text": "What?"}]
    body = {"model": "echo-vl", "max_tokens": 20, "messages": [{"role": "user", "content": content}]}
    answer = server.post("/v1/messages", body)
    assert answer.status_code == 200, answer.text
    assert shown(server) == (3, "The billPage 1:Page 2:Page 3:What?")


def test_analyze_and_locate(server: Running) -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
    answer = server.post("/v1/analyze", {"image": URL, "pages": 2, "schema": schema})
    assert answer.status_code == 200, answer.text
    assert shown(server)[0] == 1
    with server.client() as client:
        whole = base64.b64decode(BARE)
        direct = client.post("/v1/analyze?pages=3", content=whole, headers={"content-type": "application/pdf"})
    assert direct.status_code == 200, direct.text
    refused = server.post("/v1/locate", {"image": URL, "targets": "mug"})
    assert (refused.status_code, "places are told on one" in refused.text) == (400, True)


@pytest.mark.parametrize(
    ("part", "place", "words"),
    [
        ({"file_data": f"data:application/pdf;base64,{base64.b64encode(locked()).decode()}"}, "file_data", "encrypted"),
        ({"file_data": base64.b64encode(b"hello, world").decode()}, "file_data", "is not a PDF"),
        ({"file_data": base64.b64encode(paper([MUG])[:9000]).decode()}, "file_data", "is cut short"),
        ({"file_data": URL, "pages": "7"}, "file_data", "has 3 pages, so there is no page 7"),
        ({"file_data": URL, "pages": "x"}, "pages", "names no pages"),
        ({"file_url": "/etc/passwd"}, "file_url", "paths are not accepted"),
        ({"file_url": "http://127.0.0.1/bill.pdf"}, "file_url", "not public"),
        ({"file_id": "file-1"}, "file_id", "files are not looked up here"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(
    server: Running, part: dict[str, Any], place: str, words: str
) -> None:
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_file", **part}]
    answer = server.post("/v1/responses", {"input": [{"role": "user", "content": content}]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"input[0].content[1].{place}"), error
    assert words in error["message"]


def test_pages_count_as_pictures(serve: Any) -> None:
    server: Running = serve(EchoBackend(), media=GATE, max_images=2)
    content = [{"type": "file", "file": {"file_data": URL}}, {"type": "text", "text": "What?"}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    assert "has 3 pages, and more than the limit of 2" in answer.json()["error"]["message"]
    content[0]["pages"] = "1-2"  # type: ignore[index]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [*content[:1], *content]}]})
    assert "4 pictures in one request" in answer.json()["error"]["message"]
