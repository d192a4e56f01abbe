"""Every error has OpenAI's body, its true status, and says nothing it should not."""

from __future__ import annotations

import base64
import json
import random
import socket
import sys

import pytest

from qvl.errors import MediaError, QvlError
from tests.server.conftest import Running, data_url, question
from tests.server.echo_backend import EchoBackend

CHAT = "/v1/chat/completions"


def well_formed(answer, status: int | None = None) -> dict:
    assert status is None or answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert answer.headers["x-request-id"]
    return error


def test_wrong_addresses_and_methods(server: Running) -> None:
    assert well_formed(server.get("/nope"), 404)["code"] == "not_found"
    assert well_formed(server.get("/v1/nope"), 404)["code"] == "not_found"
    answer = server.get(CHAT)
    assert well_formed(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert server.post("/v1/models", {}).headers["allow"] == "GET, HEAD"
    with server.client() as client:
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            well_formed(client.request(method, CHAT), 405)
        assert client.head("/health").status_code == 200
        well_formed(client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
        assert (
            well_formed(client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}), 400)["code"]
            == "invalid_json"
        )


def test_an_unknown_model_is_not_found(server: Running) -> None:
    error = well_formed(server.post(CHAT, {**question(), "model": "gpt-7"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.user.content.0"),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "response_format"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ],
)
def test_what_cannot_be_served_is_named(server: Running, change: dict, param: str) -> None:
    error = well_formed(server.post(CHAT, {**question(), **change}), 400)
    assert error["param"] is not None
    assert error["param"].startswith(param.split(".")[0])


def test_pictures_that_cannot_be_read(server: Running) -> None:
    for url, code in (
        ("data:image/png;base64,AAAA", "image_decode_failed"),
        ("data:text/html;base64,AAAA", "image_url_blocked"),
        ("file:///etc/passwd", "image_url_blocked"),
        ("/etc/passwd", "image_url_blocked"),
        ("ftp://example.org/x.png", "image_url_blocked"),
        (data_url("red", (4000, 4))[:-20], None),
    ):
        error = well_formed(server.post(CHAT, question("x", url)), 400)
        assert code is None or error["code"] == code, (url, error)


BROKEN = "data:image/png;base64,AAAA"
CUT_SHORT = data_url("red", (400, 300))[:-400]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", [BROKEN, CUT_SHORT])
def test_the_picture_at_fault_is_named_by_its_place(server: Running, broken: str, stream: bool) -> None:
    """A header that is none is seen when the picture is read, pixels that are cut short when it is decoded."""
    text = {"type": "text", "text": "x"}
    good, bad = ({"type": "image_url", "image_url": {"url": url}} for url in (data_url(), broken))
    earlier = [{"role": "user", "content": [text, good]}, {"role": "assistant", "content": "y"}]
    chat = {"messages": [*earlier, {"role": "user", "content": [text, good, bad]}], "stream": stream}
    inputs = [{"type": "input_image", "image_url": url} for url in (data_url(), broken)]
    asked = [
        (CHAT, chat, "messages[2].content[2].image_url"),
        (
            "/v1/responses",
            {"instructions": "z", "input": [{"role": "user", "content": inputs}], "stream": stream},
            "input[0].content[1].image_url",
        ),
    ]
    if not stream:
        asked.append(("/v1/analyze", {"images": [data_url(), broken]}, "images[1]"))
        asked.append(("/v1/analyze", {"image": broken}, "image"))
    for path, body, place in asked:
        error = well_formed(server.post(path, body), 400)
        assert error["param"] == place
        assert error["message"].startswith(f"{place}: data:image/png")


def test_an_error_before_the_first_token_has_its_status_in_a_stream(server: Running) -> None:
    body = {**question("x", "data:image/png;base64,AAAA"), "stream": True}
    well_formed(server.post(CHAT, body), 400)


class FaultyBackend(EchoBackend):
    """Fails in a way nobody foresaw, before or in the middle of an answer."""

    def __init__(self, after: int, error: Exception) -> None:
        super().__init__()
        self.after = after
        self.error = error

    async def stream(self, request):
        chunks = super().stream(request)
        for _ in range(self.after):
            yield await anext(chunks)
        await chunks.aclose()
        raise self.error


def test_a_fault_of_ours_shows_a_request_id_and_nothing_else(serve) -> None:
    server = serve(FaultyBackend(0, RuntimeError("the secret path /srv/x")))
    answer = server.post(CHAT, question(), x_request_id="abc-1")
    error = well_formed(answer, 500)
    assert "secret" not in answer.text
    assert "abc-1" in error["message"]
    assert answer.headers["x-request-id"] == "abc-1"
    assert server.get("/ready").status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_error_after_the_headers_is_an_event(serve, path: str) -> None:
    server = serve(FaultyBackend(1, QvlError("broken pipe to the model", code="bad_backend_response")))
    text = "one two three"
    body = {CHAT: question(text), "/v1/completions": {"prompt": text}, "/v1/responses": {"input": text}}[path]
    answer = server.post(path, {**body, "stream": True})
    assert answer.status_code == 200
    last = [line for line in answer.text.split("\n") if line.startswith("data: ")][-1]
    told = json.loads(last.removeprefix("data: "))
    assert (told.get("error") or told)["code"] == "bad_backend_response"
    assert "[DONE]" not in answer.text


def test_a_body_that_is_announced_too_large_is_not_read(serve) -> None:
    server = serve(max_body_bytes=1000)
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
        sock.sendall(head.encode())
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer
    with server.client() as client:

        def endless():
            for _ in range(100):
                yield b" " * 100

        well_formed(client.post(CHAT, content=endless(), headers={"Content-Type": "application/json"}), 413)


def test_what_is_no_http_is_told_so_in_json(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"invalid_http" in answer


def test_the_server_says_little_about_itself(server: Running) -> None:
    answer = server.get("/version")
    assert "server" not in answer.headers
    assert set(answer.json()) == {"version", "backend", "models", "uptime"}


def mutated(rng: random.Random) -> bytes:
    """A body that is wrong in one of many ways."""
    body = {**question("hello", data_url()), "temperature": 0, "n": 1, "stop": ["x"], "stream": False}
    odd = [None, True, -1, 1e308, "", "x" * 300, [], {}, [[]], {"a": 1}, "\ud800", 2**70, ["\x00"]]
    kind = rng.randrange(4)
    if kind == 0:
        raw = json.dumps(body).encode()
        place = rng.randrange(len(raw))
        return raw[:place] + rng.randbytes(rng.randrange(8)) + raw[place + rng.randrange(20) :]
    if kind == 1:
        body[rng.choice([*body, "tools", "response_format", "tool_choice", "logprobs"])] = rng.choice(odd)
    elif kind == 2:
        body["messages"][0][rng.choice(["role", "content", "name"])] = rng.choice(odd)
    else:
        body["messages"][0]["content"][0]["image_url"] = rng.choice([*odd, {"url": rng.choice(odd)}])
        raw = rng.randbytes(40)
        if rng.random() < 0.5:
            body["messages"][0]["content"][0]["image_url"] = {"url": f"data:image/png;base64,{raw.hex()}"}
    return json.dumps(body).encode()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/analyze"])
def test_malformed_bodies_get_well_formed_errors(server: Running, path: str) -> None:
    rng = random.Random(path)
    with server.client() as client:
        for _ in range(250):
            body = mutated(rng)
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code != 200:
                well_formed(answer)
        assert client.get("/ready").status_code == 200


def test_a_code_of_a_remote_endpoint_makes_no_series_of_its_own(serve) -> None:
    server = serve(EchoBackend())
    for code in ("image_too_large", "their_word_17", "their_word_18"):
        server.core.note_error(MediaError("refused", code=code))
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith("qvl_media_errors_total{")]
    assert sorted(lines) == [
        'qvl_media_errors_total{code="image_too_large"} 1.0',
        'qvl_media_errors_total{code="invalid_image"} 2.0',
    ]


def test_a_package_that_the_server_lacks_is_the_servers_fault(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    url = "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.4\n%%EOF").decode()
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": url}}
    body = {**question(), "messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q"}]}]}
    error = well_formed(server.post(CHAT, body), 500)
    assert (error["code"], error["type"]) == ("missing_dependency", "server_error")
    assert "qvl[documents]" in error["message"]
