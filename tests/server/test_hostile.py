"""What nobody should send: mangled bodies, ids of others, the same thing at the same time, clients that go."""

from __future__ import annotations

import base64
import copy
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.server.batches.asking import jsonl, line
from tests.server.conftest import Running, data_url, start
from tests.server.echo_backend import EchoBackend

ASKED: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]
PICTURE = {"type": "image_url", "image_url": {"url": data_url(), "detail": "auto"}}
CLIP = (files("qvl.backends.openai") / "probe_clip.webm").read_bytes()
VIDEO = {
    "type": "video_url",
    "video_url": {"url": f"data:video/webm;base64,{base64.b64encode(CLIP).decode()}"},
    "nframes": 2,
    "video_start": 0.25,
}
FUNCTION = {
    "name": "look",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": "echo-vl",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE, VIDEO]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "x"},
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "stop": ["zz"],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "metadata": {"a": "b"},
        "mm_processor_kwargs": {"max_pixels": 4096},
    },
    "/v1/completions": {
        "model": "echo-vl",
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "n": 2,
        "stream": True,
        "logprobs": 1,
    },
    "/v1/responses": {
        "model": "echo-vl",
        "instructions": "be",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
        "stream": True,
    },
    "/v1/messages": {
        "model": "echo-vl",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "be"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]},
        ],
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "stream": True,
    },
    "/v1/analyze": {"image": data_url(), "language": "en", "max_tokens": 40},
    "/v1/decisions": {
        "model": "echo-vl",
        "input": [{"role": "user", "content": "red mug"}],
        "questions": [
            {"type": "choice", "instructions": "colour?", "choices": [{"value": "red"}, {"value": "blue"}]},
            {"type": "score", "instructions": "how?", "levels": [{"label": "a"}, {"label": "b"}]},
        ],
    },
    "/v1/batches": {"input_file_id": "file-0", "endpoint": "/v1/responses", "completion_window": "24h"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
DEEP: Any = 1
for _ in range(400):
    DEEP = [DEEP]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**400,
    1.5,
    "",
    "x" * 3000,
    "\x00",
    "../../etc/passwd",
    [],
    {},
]
ODD += [[None], [[]], [{}], {"": ""}, {"type": None}, {"type": {}}, {"type": []}, {"a": {"b": 1}}, DEEP, [0] * 2000]
ODD += [{"$ref": "#"}, {"enum": []}, {"allOf": [{"$ref": "#"}]}, {"type": "string", "pattern": "(a+)+$"}, [2**70]]
ODD += ["file:///etc/passwd", "data:image/png;base64,AAAA", "http://[::1", {"5": 1e300}, "<|im_end|>", "{{ 1 }}"]
RAW = [
    b"",
    b"null",
    b"[]",
    b"1",
    b"{",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"\xff\xfe{\x00}\x00",
    b'{"model": NaN}',
    b"\xed\xa0\x80",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(api_keys=("one", "two"), batch_dir=tmp_path_factory.mktemp("hostile"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def one(server: Running) -> Iterator[httpx.Client]:
    with server.client(headers={"Authorization": "Bearer one"}) as client:
        yield client


@pytest.fixture(scope="module")
def two(server: Running) -> Iterator[httpx.Client]:
    with server.client(headers={"Authorization": "Bearer two"}) as client:
        yield client


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


def mangled(dice: random.Random, body: Any) -> bytes:
    body = copy.deepcopy(body)
    *way, last = dice.choice(list(places(body)))
    node = body
    for step in way:
        node = node[step]
    if dice.random() < 0.8:
        node[last] = dice.choice(ODD)
    elif isinstance(node, dict):
        node[dice.choice(["frob", "type", "role", "content", "n", "echo", "stop"])] = dice.choice(ODD)
    raw = json.dumps(body).encode()
    # Half of a surrogate pair, two fields of one name, and bytes that are no UTF-8.
    how = dice.random()
    if how < 0.05:
        return raw.replace(b'"a"', b'"\\ud800"', 1)
    if how < 0.1:
        return raw[:-1] + b', "model": "x"}'
    return raw[:9] + bytes([dice.randrange(128, 256)]) + raw[9:] if how < 0.13 else raw


def check(answer: httpx.Response, sent: object) -> None:
    """An answer, or an error of its API in one line; never a fault of ours."""
    assert answer.status_code < 500 or answer.json()["error"]["code"] in ("analysis_failed", "endless_answer"), sent
    assert b"internal error" not in answer.content, sent
    if answer.status_code >= 400:
        message = answer.json()["error"]["message"]
        assert message, sent
        assert "\n" not in message, sent
        assert len(message) < 1500, sent


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_fault_of_ours(one: httpx.Client, server: Running, path: str) -> None:
    assert one.post(path, json=BODIES[path]).status_code in (200, 400, 404)
    dice = random.Random(path)
    kind = {"content-type": "application/json"}
    for raw in [*RAW, *(mangled(dice, BODIES[path]) for _ in range(40))]:
        check(one.post(path, content=raw, headers=kind), raw[:2000])
    for odd in ({"content-type": "text/plain"}, {"content-type": ""}, {**kind, "content-encoding": "br"}):
        assert one.post(path, json={}, headers=odd).status_code in (400, 415)
    assert settled(server)


def settled(server: Running) -> bool:
    """True once nothing of earlier requests is left."""
    end = time.monotonic() + 20
    core = server.core
    while core.requests_under_way or core.held_bytes or core.admission.running or server.backend.running:
        assert time.monotonic() < end, (core.requests_under_way, core.held_bytes, core.admission.running)
        time.sleep(0.01)
    return True


IDS = ["", ".", "..", "../../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a/b", "a b", "\x00", "a\r\nX-Bad: 1"]
IDS += ["é" * 300, "x" * 3000, "'; DROP TABLE files; --", "file-", "batch_", "resp_", "content", "cancel", "..%00", "*"]
PATHS = ["/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}", "/v1/batches/{}/cancel", "/v1/responses/{}"]
PATHS += ["/v1/responses/{}/input_items", "/v1/models/{}", "/static/{}"]


@pytest.mark.parametrize("path", PATHS)
def test_ids_of_nothing_are_not_found(one: httpx.Client, path: str) -> None:
    for ident in IDS:
        for method in ("GET", "DELETE", "POST", "HEAD"):
            for whole in (quote(ident, safe=""), quote(ident, safe="/%")):
                answer = one.request(method, path.format(whole))
                found = ident in ("", ".", "..") or "../" in ident
                assert answer.status_code in ((200, 400, 404, 405, 415, 422) if found else (400, 404, 405, 415)), whole
                assert "x-bad" not in answer.headers
                assert b"root:" not in answer.content
                if answer.status_code >= 400 and method != "HEAD" and "json" in answer.headers["content-type"]:
                    assert answer.json()["error"]["message"]


def test_headers_carry_nothing_of_the_clients(one: httpx.Client, server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        ident = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\x0bb\r\nConnection: close\r\n\r\n"
        raw.sendall(ident)
        head = b""
        while piece := raw.recv(65536):
            head += piece
    assert b"a\x0bb" not in head
    for ident in ("a b", "é", "x" * 200, "a\tb"):
        told = one.get("/health", headers={"x-request-id": ident.encode()}).headers["x-request-id"]
        assert told.startswith("qvl-")
    body = {"messages": ASKED, "request_id": "a\r\nX-Bad: 1"}
    assert one.post("/v1/chat/completions", json=body).status_code == 400


def uploaded(client: httpx.Client, name: str = "in.jsonl", *lines: Any) -> str:
    sent = client.post("/v1/files", files={"file": (name, jsonl(*(lines or (line("a"),))))}, data={"purpose": "batch"})
    assert sent.status_code == 200, sent.text
    return str(sent.json()["id"])


def test_names_of_files_are_labels(one: httpx.Client, server: Running) -> None:
    for name in ("../../x", "/etc/passwd", "..", "a\x00b", "C:\\x", "é.jsonl", "x" * 900, '"; x="'):
        told = one.get(f"/v1/files/{uploaded(one, name)}").json()
        assert not {"/", "\\", "\x00"} & set(told["filename"])
    assert server.core.batch_store is not None
    folder = server.core.batch_store.folder
    assert {path.name.partition("-")[0] for path in (folder / "files").iterdir()} == {"file"}


def test_nothing_of_another_key_can_be_reached(one: httpx.Client, two: httpx.Client) -> None:
    file = uploaded(one)
    batch = one.post(
        "/v1/batches", json=BODIES["/v1/batches"] | {"input_file_id": file, "endpoint": "/v1/chat/completions"}
    )
    response = one.post("/v1/responses", json={"input": "mine"}).json()["id"]
    for method, path in (
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", f"/v1/batches/{batch.json()['id']}"),
        ("POST", f"/v1/batches/{batch.json()['id']}/cancel"),
        ("GET", f"/v1/responses/{response}"),
        ("GET", f"/v1/responses/{response}/input_items"),
        ("DELETE", f"/v1/responses/{response}"),
    ):
        answer = two.request(method, path)
        absent = two.request(method, path.replace(file, "file-0").replace(response, "resp_0"))
        assert answer.status_code == 404, path
        assert "mine" not in answer.text
        assert answer.json()["error"]["code"] == absent.json()["error"]["code"]
    told = two.post("/v1/responses", json={"input": [{"type": "item_reference", "id": f"msg_{response[5:]}00"}]})
    assert told.status_code == 404
    assert two.post("/v1/responses", json={"input": "x", "previous_response_id": response}).status_code == 404


def at_once(work: Callable[[int], httpx.Response], count: int = 12) -> Counter[int]:
    with ThreadPoolExecutor(count) as pool:
        return Counter(answer.status_code for answer in pool.map(work, range(count)))


def test_the_same_at_the_same_time(one: httpx.Client, server: Running) -> None:
    file = uploaded(one)
    codes = at_once(lambda _: one.delete(f"/v1/files/{file}"))
    assert codes == {200: 1, 404: 11}
    response = one.post("/v1/responses", json={"input": "mine"}).json()["id"]
    codes = at_once(lambda _: one.delete(f"/v1/responses/{response}"))
    assert codes[200] >= 1
    assert codes.keys() <= {200, 404}
    file = uploaded(one, "in.jsonl", *(line(f"{n}", "word " * 40) for n in range(200)))
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = one.post("/v1/batches", json=body).json()["id"]
    paths = [f"/v1/batches/{batch}/cancel", f"/v1/files/{file}", f"/v1/batches/{batch}", f"/v1/files/{file}/content"]
    methods = ["POST", "DELETE", "GET", "GET"]
    codes = at_once(lambda n: one.request(methods[n % 4], paths[n % 4]), 24)
    assert codes.keys() <= {200, 404, 409}, codes
    end = time.monotonic() + 60
    while one.get(f"/v1/batches/{batch}").json()["status"] not in ("cancelled", "completed", "failed"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert settled(server)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_client_that_goes_in_mid_stream_leaves_nothing(path: str) -> None:
    backend = EchoBackend(pause=0.05)
    server = start(backend)
    try:
        text, limit = "word " * 200, "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        asked = {"/v1/completions": {"prompt": text}, "/v1/responses": {"input": text}}.get(path, asked)
        with server.client() as client:
            for _ in range(3):
                with client.stream("POST", path, json={**asked, "stream": True, limit: 500}) as answer:
                    assert next(answer.iter_lines())
                    assert backend.running
        assert settled(server)
        assert backend.running == 0
    finally:
        server.stop()
