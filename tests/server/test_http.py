"""HTTP as old and odd clients speak it, over a real socket."""

from __future__ import annotations

import codecs
import gzip
import json
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from qvl.media.inflate import MAX_MEMBERS
from qvl.server.request_body import MAX_FIELDS
from qvl.server.run_uvicorn import GuardedProtocol
from tests.server.conftest import Running, data_url, question
from tests.server.echo_backend import EchoBackend

ROOT = Path(__file__).parents[2]
PATH = "/v1/chat/completions"


def request(body: bytes, *, version: str = "1.1", headers: tuple[str, ...] = ("Host: x",)) -> bytes:
    lines = [f"POST {PATH} HTTP/{version}", *headers, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def exchange(server: Running, data: bytes, *, half_close: bool = False) -> bytes:
    """Everything that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        found = b""
        while more := sock.recv(65536):
            found += more
        return found


def asked(text: str = "hello", **more: Any) -> bytes:
    return json.dumps({**question(text), **more}).encode()


class TestOldClients:
    def test_a_stream_to_http_1_0_ends_with_the_connection(self, server: Running) -> None:
        head, _, body = exchange(server, request(asked(stream=True), version="1.0")).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")

    def test_a_whole_answer_to_http_1_0_has_its_length(self, server: Running) -> None:
        head, _, body = exchange(server, request(asked(), version="1.0", headers=())).partition(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head.lower()
        assert json.loads(body)["choices"][0]["message"]["content"] == "hello"

    def test_http_1_0_is_not_told_to_continue(self, server: Running) -> None:
        head = ("Expect: 100-continue",)
        assert exchange(server, request(asked(), version="1.0", headers=head)).startswith(b"HTTP/1.1 200")


class TestHalfClosed:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    def test_a_client_that_has_closed_its_sending_side_is_answered(self, serve, stream: bool, version: str) -> None:
        found = exchange(
            serve(EchoBackend(pause=0.01)), request(asked(stream=stream), version=version), half_close=True
        )
        assert found.startswith(b"HTTP/1.1 200")
        assert b"hello" in found

    def test_answers_that_are_there_at_once_are_not_lost(self, server: Running) -> None:
        for _ in range(20):
            assert b"hello" in exchange(server, request(asked("hello again")), half_close=True)

    def test_one_that_waits_long_is_answered_behind_interim_answers(self, serve, monkeypatch) -> None:
        monkeypatch.setattr(GuardedProtocol, "probe_seconds", 0.02)
        found = exchange(serve(EchoBackend(pause=0.2)), request(asked("one two three")), half_close=True)
        interim, _, answer = found.rpartition(b"HTTP/1.1 200")
        assert interim
        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n" * interim.count(b"100")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]

    def test_one_that_is_gone_altogether_ends_its_work(self, serve, monkeypatch) -> None:
        monkeypatch.setattr(GuardedProtocol, "probe_seconds", 0.02)
        server = serve(EchoBackend(pause=0.5))
        with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
            sock.sendall(request(asked(" ".join(["word"] * 100))))
            while not server.backend.running:
                pass
        while not server.backend.aborted:
            pass
        assert server.backend.running == 0

    def test_a_body_that_will_not_come_any_more_is_not_waited_for(self, server: Running) -> None:
        assert exchange(server, request(asked())[:-5], half_close=True) == b""


class TestHeaders:
    @pytest.mark.parametrize(
        ("headers", "words"),
        [
            (("Host: x", "Host: y"), "2 Host headers"),
            (("Host: x", "host: x"), "2 Host headers"),
            (("Host: x", "Authorization: Bearer a", "Authorization: Bearer b"), "2 Authorization headers"),
            (("Host: x", "Content-Type: text/plain"), "2 Content-Type headers"),
            ((), "missing Host header"),
        ],
    )
    def test_what_can_be_read_in_two_ways_is_refused(self, server: Running, headers: tuple, words: str) -> None:
        head, _, body = exchange(server, request(asked(), headers=headers)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert words in json.loads(body)["error"]["message"]

    def test_a_body_that_does_not_say_that_it_is_json_is_told_how(self, server: Running) -> None:
        with server.client() as client:
            answer = client.post(PATH, content=asked(), headers={"Content-Type": "text/plain"})
            analyzed = client.post("/v1/analyze", content=b"GIF89a", headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415
        assert "add the header Content-Type: application/json)" in answer.json()["error"]["message"]
        assert analyzed.status_code == 415
        assert "application/json, or image/png" in analyzed.json()["error"]["message"]


class TestBodies:
    def post(self, server: Running, body: bytes, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with server.client() as client:
            return client.post(PATH, content=body, headers={"Content-Type": "application/json", **named})

    def test_a_byte_order_mark_is_no_part_of_the_json(self, server: Running) -> None:
        assert self.post(server, codecs.BOM_UTF8 + asked()).status_code == 200

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
    def test_other_encodings_are_named(self, server: Running, encoding: str) -> None:
        answer = self.post(server, asked().decode().encode(encoding))
        assert answer.status_code == 400
        assert encoding.upper() in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("encoding", "compress"),
        [
            ("gzip", gzip.compress),
            ("x-gzip", gzip.compress),
            ("GZIP", gzip.compress),
            ("gzip", lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:])),
            ("deflate", zlib.compress),
            ("deflate", lambda body: zlib.compress(body, wbits=-15)),
            ("deflate", gzip.compress),
            ("gzip", zlib.compress),
            ("x-deflate", zlib.compress),
            ('"gzip"', gzip.compress),
            ("identity, gzip", gzip.compress),
            ("gzip", lambda body: gzip.compress(body) + bytes(512)),
            ("identity", bytes),
        ],
    )
    def test_a_compressed_body_is_inflated(self, server: Running, encoding: str, compress: Any) -> None:
        long = asked("x" * 200_000 + " hello")
        for body in (asked(), long):
            assert self.post(server, compress(body), Content_Encoding=encoding).status_code == 200

    def test_it_is_inflated_within_the_limit_of_a_body(self, serve) -> None:
        server = serve(max_body_bytes=100_000)
        answer = self.post(server, gzip.compress(asked("x" * 50_000_000)), Content_Encoding="gzip")
        assert answer.status_code == 413
        assert server.core.held_bytes == 0

    @pytest.mark.parametrize(
        "body",
        [
            b"no gzip at all",
            gzip.compress(asked())[:-6],
            gzip.compress(asked()) + b"and more",
            gzip.compress(b"") * 300_000,
            gzip.compress(asked()) + gzip.compress(b"  ") * MAX_MEMBERS,
        ],
        ids=["other", "cut off", "followed", "empty members", "members"],
    )
    def test_one_that_is_not_whole_is_said(self, server: Running, body: bytes) -> None:
        answer = self.post(server, body, Content_Encoding="gzip")
        assert answer.status_code == 400
        assert "invalid gzip data" in answer.json()["error"]["message"]

    def test_an_encoding_that_is_not_known_is_named(self, server: Running) -> None:
        answer = self.post(server, asked(), Content_Encoding="br")
        assert answer.status_code == 415
        assert "'br'" in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "gzip, deflate"

    def test_many_fields_are_refused_before_they_are_read(self, server: Running) -> None:
        for body in (
            asked(metadata={f"k{number}": "1" for number in range(MAX_FIELDS)}),
            asked(messages=[{"role": "user", "content": "a"}] * MAX_FIELDS),
            asked(metadata={f"k{number}\\": "1" for number in range(MAX_FIELDS)}),
            asked(messages=[{"role": "user", "content": ["a"] * (MAX_FIELDS + 2)}]),
            b'{"metadata":' + b'{"a":' * (MAX_FIELDS + 1) + b"1" + b"}" * (MAX_FIELDS + 1) + b"}",
        ):
            answer = self.post(server, body)
            assert answer.status_code == 400
            assert f"more than {MAX_FIELDS} fields" in answer.json()["error"]["message"]

    def test_text_that_looks_like_fields_is_text(self, server: Running) -> None:
        assert self.post(server, asked('{"a": 1, "b": 2}, ' * MAX_FIELDS)).status_code == 200

    @pytest.mark.parametrize(
        "metadata", [{f"k{n}": "v" for n in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, {"k": {}}]
    )
    def test_metadata_has_openais_bounds(self, server: Running, metadata: Any) -> None:
        answer = self.post(server, asked(metadata=metadata))
        assert answer.status_code == 400
        assert "metadata" in answer.json()["error"]["message"]
        assert self.post(server, asked(metadata={f"k{n}": "v" * 512 for n in range(16)})).status_code == 200


class TestModelNames:
    def test_an_unknown_model_is_told_once_what_there_is_and_the_way_out(self, serve) -> None:
        answer = serve(EchoBackend("shop")).post(PATH, question("hi") | {"model": "gpt-4o"})
        message = answer.json()["error"]["message"]
        assert (answer.status_code, message.count("shop")) == (404, 1)
        assert "--served-model-name" in message
        assert "--any-model-name" in message

    def test_every_name_is_answered_where_that_is_wished(self, serve) -> None:
        server = serve(EchoBackend("shop"), any_model_name=True)
        answer = server.post(PATH, question("hi") | {"model": "gpt-4o"})
        assert (answer.status_code, answer.json()["model"]) == (200, "gpt-4o")
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["shop"]


HANGS = """
import asyncio, threading
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.server import run_uvicorn as runner
from qvl.server.app import create_app
from qvl.server.settings import ServerSettings
from tests.server.echo_backend import EchoBackend

class Hanging(EchoBackend):
    async def open(self):
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)

runner.EXIT_SECONDS = 0.2
settings = ServerSettings(drain_timeout=0.1, canary=False)
server = runner.make_server(create_app(AsyncPipeline(backend=Hanging(), cache="off"), settings))
server.when_settled = lambda: print("ready", flush=True)
runner.run_server(server, runner.bind("127.0.0.1", 0))
"""


def test_a_server_with_a_worker_that_hangs_ends_after_its_drain_timeout() -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1


def test_a_request_with_too_many_pictures_is_refused_on_every_route(serve) -> None:
    server = serve(max_images=2)
    assert server.get("/v1/models").json()["data"][0]["capabilities"]["max_images"] == 2
    url = data_url("red")
    bodies = {
        "/v1/chat/completions": lambda n: question("x", *[url] * n),
        "/v1/responses": lambda n: {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}] * n}]
        },
        "/v1/messages": lambda n: {
            "max_tokens": 8,
            "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": url}}] * n}],
        },
        "/v1/analyze": lambda n: {"images": [url] * n},
    }
    for path, body in bodies.items():
        assert server.post(path, body(2)).status_code == 200, path
        refused = server.post(path, body(3))
        assert refused.status_code == 400, path
        assert "at most 2" in refused.json()["error"]["message"]
