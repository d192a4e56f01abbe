"""The base64 of large pictures is taken out before the JSON is read, and nobody can tell."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from qvl.backends.openai.backend import OpenAIBackend
from qvl.server.exchange import WATCH_SECONDS, Exchange
from qvl.server.lift_pictures import LONG, SHORTEST, lift
from tests.scripted_endpoint import Echo, ScriptedEndpoint
from tests.server.conftest import Running, start
from tests.server.processes import CHAT
from tests.server.test_load import until

MiB = 2**20


def noise(form: str, seed: int = 1, edge: int = 200) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(held, form)
    return held.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


JPEG, PNG = text_of(noise("JPEG")), text_of(noise("PNG"))


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedEndpoint]:
    with ScriptedEndpoint() as found:
        yield found


@pytest.fixture(scope="module")
def front(upstream: ScriptedEndpoint) -> Iterator[Running]:
    running = start(OpenAIBackend("echo", base_url=upstream.url, probe=False), cache="off")
    yield running
    running.stop()


def sent(front: Running, upstream: ScriptedEndpoint, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = front.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    return upstream.chats[-1].body["messages"][-1]["content"]


def test_pictures_are_passed_on_as_they_came(front: Running, upstream: ScriptedEndpoint) -> None:
    urls = [f"data:image/jpeg;base64,{JPEG}", f"data:image/png;base64,{PNG}", f"data:image/jpeg;base64,{JPEG}"]
    parts = sent(front, upstream, user(TEXT, *map(image, urls)))
    assert [part["image_url"]["url"] for part in parts[1:]] == urls


@pytest.mark.parametrize("edge", [200, 600], ids=["through the parser", "past it"])
@pytest.mark.parametrize("pause", [0.0, 2 * WATCH_SECONDS], ids=["at once", "while the client is watched"])
def test_a_body_is_let_go_with_its_answer(front: Running, upstream: ScriptedEndpoint, pause: float, edge: int) -> None:
    upstream.say(Echo(pause=pause))
    url = f"data:image/jpeg;base64,{text_of(noise('JPEG', edge=edge))}"
    gc.collect()
    gc.disable()
    try:
        # The first of them opens the connection on which the others are sent.
        for _ in range(3):
            sent(front, upstream, user(TEXT, image(url)))
        until(lambda: not any(issubclass(type(one), Exchange) for one in gc.get_objects()))
    finally:
        gc.enable()


def test_one_larger_than_a_loop_decodes_is_passed_on_as_well(front: Running, upstream: ScriptedEndpoint) -> None:
    url = f"data:image/png;base64,{text_of(noise('PNG', edge=1200))}"
    assert len(url) > 4 * MiB
    assert sent(front, upstream, user(image(url)))[0]["image_url"]["url"] == url


def test_what_is_not_quite_the_base64_of_its_bytes_is_put_right(front: Running, upstream: ScriptedEndpoint) -> None:
    data = noise("JPEG") + b"\0" * (-len(noise("JPEG")) % 3 + 1)
    text = text_of(data)
    assert text.endswith("AA==")
    parts = sent(front, upstream, user(image(f"data:image/jpeg;base64,{text[:-3]}B==")))
    assert parts[0]["image_url"]["url"] == f"data:image/jpeg;base64,{text}"


def test_the_label_of_the_bytes_counts_and_not_that_of_the_url(front: Running, upstream: ScriptedEndpoint) -> None:
    parts = sent(front, upstream, user(image(f"data:image/png;base64,{JPEG}")))
    assert parts[0]["image_url"]["url"] == f"data:image/jpeg;base64,{JPEG}"


def test_base64_that_is_no_picture_stays_where_it_is(front: Running, upstream: ScriptedEndpoint) -> None:
    long = JPEG[: 4 * LONG]
    parts = sent(front, upstream, user(image(f"data:image/png;base64,{PNG}"), {"type": "text", "text": long}))
    assert parts[1]["text"] == long
    assert parts[0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"


def test_anthropics_form_is_read_in_the_same_way(front: Running, upstream: ScriptedEndpoint) -> None:
    source = {"type": "base64", "media_type": "image/jpeg", "data": JPEG}
    body = user(TEXT, {"type": "image", "source": source})
    answer = front.post("/v1/messages", {"model": "echo", "max_tokens": 5, **body})
    assert answer.status_code == 200, answer.text
    assert upstream.chats[-1].body["messages"][-1]["content"][1]["image_url"]["url"] == f"data:image/jpeg;base64,{JPEG}"


URL = f"data:image/jpeg;base64,{JPEG}"
SHOWN = {
    "role": "user",
    "content": [{"type": "input_text", "text": "A shoe"}, {"type": "input_image", "image_url": URL}],
}
ROUTES = {
    "/v1/responses": {"input": [SHOWN], "store": False},
    "/v1/responses/input_tokens": {"input": [SHOWN]},
    "/v1/analyze": {"images": [URL, URL]},
    "/v1/locate": {"image": URL, "targets": "the brand"},
    "/v1/decisions": {"input": [SHOWN], "questions": [{"type": "predicate", "instructions": "Is it new?"}]},
    "/v1/systemone": {
        "state": "This is shoe.jpg",
        "questions": {"new": {"type": "noul", "instructions": "Is shoe.jpg new?"}},
        "assets": {"shoe.jpg": {"data_base64": JPEG}},
    },
    "/tokenize": user(TEXT, image(URL)),
    "/v1/messages/count_tokens": {
        "model": "echo",
        **user(TEXT, {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": JPEG}}),
    },
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_with_pictures_reads_them_so(
    front: Running, upstream: ScriptedEndpoint, monkeypatch: Any, path: str
) -> None:
    def answer() -> tuple[int, list[Any]]:
        before = len(upstream.requests)
        status = front.post(path, ROUTES[path]).status_code
        return status, [one.body and one.body.get("messages") for one in upstream.requests[before:]]

    with monkeypatch.context() as patch:
        # By which a body is read whole.
        patch.setattr("qvl.server.serving.validated", None)
        lifted = answer()
    monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
    assert answer() == lifted
    # What an endpoint without it says to /tokenize is no answer, but it was asked.
    assert URL in json.dumps(lifted[1])


def test_a_response_is_kept_with_its_pictures_as_they_came(upstream: ScriptedEndpoint) -> None:
    running = start(OpenAIBackend("echo", base_url=upstream.url, probe=False), cache="memory:")
    try:
        first = running.post("/v1/responses", {"input": [SHOWN]}).json()
        kept = running.get(f"/v1/responses/{first['id']}/input_items").json()
        assert kept["data"][0]["content"][1]["image_url"] == URL
        second = {"input": "And what colour?", "previous_response_id": first["id"]}
        assert running.post("/v1/responses", second).status_code == 200
        assert upstream.chats[-1].body["messages"][0]["content"][1]["image_url"]["url"] == URL
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/analyze", {"image": JPEG}),
        ("/v1/analyze", {"image": URL[:-8] + "*" + URL[-7:]}),
        ("/v1/analyze", {"image": URL[: len(URL) // 8 * 4]}),
        ("/v1/analyze", {"images": [URL], "language": URL}),
        ("/v1/analyze", {"image": URL, "pages": 2}),
        ("/v1/locate", {"image": JPEG, "targets": "the brand"}),
        ("/v1/locate", {"image": URL, "targets": URL, "points": "yes"}),
        ("/v1/responses", {"input": [{**SHOWN, "role": URL}], "store": False}),
        ("/v1/responses", {"input": [{**SHOWN, "content": [{"type": "input_image", "image_url": JPEG}]}]}),
        (
            "/v1/systemone",
            {
                "state": "a",
                "questions": {"q": {"type": "noul", "instructions": "?"}},
                "assets": {"a": {"data_base64": URL}},
            },
        ),
        ("/v1/decisions", {"input": [SHOWN], "questions": [{"type": "predicate", "instructions": ""}]}),
    ],
)
def test_other_routes_refuse_in_the_same_words_too(
    front: Running, monkeypatch: Any, path: str, body: dict[str, Any]
) -> None:
    lifted = front.post(path, body)
    monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
    plain = front.post(path, body)
    assert plain.status_code >= 400
    assert (lifted.status_code, lifted.json()) == (plain.status_code, plain.json())


def test_python_s_escaped_slashes_are_read_as_ever(front: Running, upstream: ScriptedEndpoint) -> None:
    url = f"data:image/jpeg;base64,{JPEG}"
    with front.client() as client:
        escaped = json.dumps(user(image(url))).replace("/", "\\/")
        answer = client.post(CHAT, content=escaped, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert upstream.chats[-1].body["messages"][-1]["content"][0]["image_url"]["url"] == url


SHORT = text_of(noise("JPEG", edge=8))


@pytest.mark.parametrize(
    "make",
    [
        lambda text: user(image(f"data:text/plain;base64,{text_of(b'no picture ' * (len(text) // 8))}")),
        lambda text: user(image(f"data:image/jpeg;base64,{text[: len(text) // 8 * 4]}")),
        lambda text: user(image(f"data:image/jpeg;base64,{text[:-8]}*{text[-7:]}")),
        lambda text: user(image(text)),
        lambda text: user(image(f"https,{text}")),
        lambda text: user(image(f"data:image/jpeg,{text}")),
        lambda text: user(image(f"data:image/jpeg;base64,{text}", detail=f"{text}")),
        lambda text: user({"type": "image_url", "image_url": f"data:image/jpeg;base64,{text}", "image": text}),
        lambda text: user({"type": "image", "image": text}),
        lambda text: user({"type": "video", "video": f"data:image/jpeg;base64,{text}"}),
        lambda text: user(image(f"data:image/jpeg;base64,{text}"), TEXT) | {"metadata": {"a": text}},
        lambda text: user(image(f"data:image/jpeg;base64,{text}"), TEXT) | {"temperature": "warm"},
        lambda text: user(image(f"data:image/jpeg;base64,{text}"), TEXT) | {"max_tokens": text},
        lambda text: {"messages": [{"role": text, "content": [image(f"data:image/jpeg;base64,{text}")]}]},
        lambda text: user(TEXT, image(f"data:image/jpeg;base64,{text}", max_pixels=-1)),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(front: Running, make: Any, monkeypatch: Any) -> None:
    lifted = front.post(CHAT, make(JPEG))
    monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
    plain = front.post(CHAT, make(JPEG))
    assert plain.status_code >= 400
    assert (lifted.status_code, lifted.json()) == (plain.status_code, plain.json())


@pytest.mark.parametrize("cut", [100, 5_000, 30_000, -1])
def test_json_that_is_broken_is_told_by_its_place_in_the_body(front: Running, cut: int) -> None:
    body = json.dumps(user(image(f"data:image/jpeg;base64,{JPEG}"), TEXT)).encode()
    with front.client() as client:
        answer = client.post(CHAT, content=body[:cut], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert f"column {len(body[:cut])}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("indent", [None, 2])
def test_marks_stand_where_base64_stood_and_nothing_else_is_changed(indent: int | None) -> None:
    body = json.dumps(user(TEXT, image(f"data:a;base64,{JPEG}"), image(PNG), TEXT), indent=indent).encode()
    lifted = lift(body, MiB)
    assert lifted is not None
    short = lifted.body
    assert len(short) < 1000
    for mark, (text, data) in lifted.found.items():
        assert data == base64.b64decode(text)
        short = short.replace(mark.encode(), bytes(text))
    assert short == body


def named(body: bytes) -> list[bytes]:
    """Texts between two quotation marks that strict base64 decodes, but for the label of a data: URL."""
    found = []
    for text in re.findall(rb'(?<=")[^"]{%d,}(?=")' % SHORTEST, body):
        bare = text.partition(b",")[2] or text
        with suppress(ValueError):
            base64.b64decode(bare, validate=True)
            found.append(bare)
    return found


@pytest.mark.parametrize("before", ["", '"', '""', '"a":"b",' * 3, "x" * (SHORTEST - 3) + '"', "x" * SHORTEST])
def test_texts_are_found_wherever_they_stand(before: str) -> None:
    for length in range(SHORTEST - 8, SHORTEST + 9, 4):
        texts = ("A" * length, "data:a;base64," + "A" * length, "not base64 " * (length // 11))
        body = (before + ",".join(f'"{text}"' for text in texts * 2)).encode()
        lifted = lift(body, MiB)
        found = [] if lifted is None else [bytes(text) for text, _ in lifted.found.values()]
        assert found == named(body)


def test_a_picture_behind_thousands_of_short_texts_is_found() -> None:
    body = json.dumps(user(*[TEXT] * 3000, image(f"data:image/jpeg;base64,{JPEG}"))).encode()
    lifted = lift(body, MiB)
    assert lifted is not None
    assert len(lifted.found) == 1


def test_a_short_text_in_base64_beside_a_picture_does_not_have_all_of_it_read(
    front: Running, upstream: ScriptedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = {"type": "thinking", "thinking": "A shoe.", "signature": text_of(b"signed" * 200)}
    body = {"messages": [{"role": "assistant", "content": [signature]}, *user(image(URL))["messages"]]}
    # By which a body is read whole.
    monkeypatch.setattr("qvl.server.serving.validated", None)
    assert sent(front, upstream, body)[0]["image_url"]["url"] == URL


LABELS = ["application/pdf", "Application/PDF", "video/mp4", "video/jpeg", "image/gif", "text/plain"]
LABELLED = {
    "small": noise("PNG", edge=30),
    "large": noise("PNG"),
    "a PDF": b"%PDF-1.7 " * 200,
    "nothing": b"no picture " * 200,
}


@pytest.mark.parametrize("data", LABELLED.values(), ids=LABELLED)
def test_a_label_counts_as_much_as_in_a_body_that_is_read_whole(
    front: Running, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    def answers() -> list[tuple[int, str]]:
        found = []
        for label in LABELS:
            url = f"data:{label};base64,{text_of(data)}"
            item = {
                "role": "user",
                "content": [{"type": "input_text", "text": "A"}, {"type": "file", "file_data": url}],
            }
            bodies = {
                CHAT: user(TEXT, image(url)),
                "/v1/analyze": {"image": url},
                "/v1/responses": {"input": [item], "store": False},
                "/v1/decisions": {"input": [item], "questions": [{"type": "predicate", "instructions": "Is it new?"}]},
            }
            for path, body in bodies.items():
                answer = client.post(path, json=body)
                found.append((answer.status_code, "" if answer.status_code == 200 else fault(answer)))
        return found

    with front.client() as client:
        lifted = answers()
        monkeypatch.setattr("qvl.server.serving.lift", lambda *_: None)
        assert lifted == answers()
    assert all(status in (200, 400, 502) for status, _ in lifted)


KINDS = [
    "text",
    "image_url",
    "input_image",
    "image",
    "video_url",
    "video",
    "file",
    "input_file",
    "document",
    "thinking",
]
FIELDS = ["text", "image_url", "image", "source", "data", "url", "video", "file", "file_data"]
LETTERS = "ACGT" * 300
VALUES: dict[str, Any] = {
    "letters": LETTERS,
    "a URL": URL,
    "an object with a URL": {"url": URL},
    "a source": {"type": "base64", "media_type": "image/jpeg", "data": JPEG},
    "a source of text": {"type": "text", "media_type": "text/plain", "data": LETTERS},
    "a source without a type": {"data": LETTERS},
    "a file": {"file_data": URL},
    "a list": [URL],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/decisions"])
def test_whatever_stands_in_a_part_is_answered_as_if_it_were_read_whole(
    front: Running, upstream: ScriptedEndpoint, path: str, value: Any
) -> None:
    def answers() -> list[tuple[int, str, str]]:
        found = []
        for kind, field in product(KINDS, FIELDS):
            messages = user({"type": kind, field: value})["messages"]
            body = {
                CHAT: {"messages": messages},
                "/v1/messages": {"model": "echo", "max_tokens": 5, "messages": messages},
                "/v1/responses": {"input": messages, "store": False},
                "/v1/decisions": {"input": messages, "questions": [{"type": "predicate", "instructions": "New?"}]},
            }[path]
            before = len(upstream.chats)
            answer = client.post(path, json=body)
            passed_on = json.dumps([chat.body["messages"] for chat in upstream.chats[before:]])
            found.append((answer.status_code, "" if answer.status_code == 200 else fault(answer), passed_on))
        return found

    with front.client(headers={"X-Request-Id": "id"}) as client:
        lifted = answers()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qvl.server.serving.lift", lambda *_: None)
            assert lifted == answers()
    assert not any(status >= 500 and "backend" not in told for status, told, _ in lifted)


def fault(answer: httpx.Response) -> str:
    told = answer.json()["error"]
    return f"{told['type']}: {told['message']}"


@pytest.mark.parametrize("body", [b"", b'"', b"{", b'{"a": 1}', b'"' * 5000, b'"' + b"A" * 70_000, b"A" * 70_000])
def test_a_body_without_any_is_left_alone(body: bytes) -> None:
    assert lift(body, MiB) is None


def test_what_is_larger_than_a_picture_may_be_is_left_to_the_gate() -> None:
    assert lift(json.dumps(user(image(f"data:image/jpeg;base64,{JPEG}"))).encode(), 1000) is None
