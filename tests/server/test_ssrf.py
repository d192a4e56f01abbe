"""Addresses that lead inward are refused, whatever they are spelt like, and say nothing of what is there."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from qvl.media.policy import MediaPolicy
from tests.server.conftest import Running, picture, question

CHAT = "/v1/chat/completions"
INWARD = [
    "http://127.0.0.1:{port}/x.png",
    "http://127.1:{port}/x.png",
    "http://2130706433:{port}/x.png",
    "http://0x7f.0.0.1:{port}/x.png",
    "http://0177.0.0.1:{port}/x.png",
    "http://0:{port}/x.png",
    "http://localhost:{port}/x.png",
    "http://LOCALHOST.:{port}/x.png",
    "http://a.localhost:{port}/x.png",
    "http://[::1]:{port}/x.png",
    "http://[::ffff:127.0.0.1]:{port}/x.png",
    "http://[::ffff:7f00:1]:{port}/x.png",
    "http://[64:ff9b::7f00:1]:{port}/x.png",
    "http://[::]:{port}/x.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/x.png",
    "http://[fd00::1]/x.png",
    "http://10.0.0.1/x.png",
    "http://172.16.0.1/x.png",
    "http://192.168.1.1/x.png",
    "http://100.64.0.1/x.png",
    "http://metadata.google.internal/x.png",
    "http://user:pass@127.0.0.1:{port}/x.png",
    "http://127.0.0.1:{port}@example.org/x.png",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "/etc/passwd",
    "gopher://127.0.0.1:{port}/x",
    "data:text/html;base64,PGI+",
]


TEN_GB = 10 * 2**30


class Inner(http.server.BaseHTTPRequestHandler):
    """What must not be reached, unless it is allowed by name.

    /inward redirects, /endless sends 10 GB without saying so, /announced says so; `sent` counts what went out.
    """

    asked: list[str]
    sent = 0

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/inward":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.2:1/secret.png")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        if self.path in ("/endless", "/announced"):
            if self.path == "/announced":
                self.send_header("Content-Length", str(TEN_GB))
            self.end_headers()
            try:
                while Inner.sent < TEN_GB:
                    Inner.sent += self.wfile.write(b"\x00" * 65536)
            except OSError:
                return
        body = picture("green")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def inner() -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Inner,), {"asked": asked}))
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found.server_address[1], asked
    found.shutdown()
    found.server_close()


def body_for(path: str, url: str) -> dict:
    """A request to `path` about the picture at `url`."""
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    return {CHAT: question("x", url), "/v1/analyze": {"image": url}, "/v1/responses": {"input": [item]}}[path]


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/analyze"])
def test_nothing_inside_is_reached(server: Running, inner: tuple[int, list[str]], path: str) -> None:
    port, asked = inner
    for pattern in INWARD:
        url = pattern.format(port=port)
        answer = server.post(path, body_for(path, url))
        assert answer.status_code == 400, (url, answer.text)
        error = answer.json()["error"]
        assert error["code"] in ("image_url_blocked", "invalid_image", "image_fetch_failed"), (url, error)
        assert "root:" not in answer.text
    assert asked == []


def test_a_redirect_inward_and_an_endless_body_are_cut(serve, inner: tuple[int, list[str]]) -> None:
    port, _ = inner
    gate = MediaPolicy(allow_files=False, allowed_private=("127.0.0.1",), max_bytes=1_000_000)
    server = serve(media=gate)
    base = f"http://127.0.0.1:{port}"
    fine = server.post(CHAT, question("x", f"{base}/x.png"))
    assert fine.json()["choices"][0]["message"]["content"] == "green 64x64, x"
    inward = server.post(CHAT, question("x", f"{base}/inward"))
    assert inward.json()["error"]["code"] == "image_url_blocked"
    for path in ("endless", "announced"):
        Inner.sent = 0
        endless = server.post(CHAT, question("x", f"{base}/{path}"))
        assert endless.json()["error"]["code"] == "image_too_large"
        # What the sockets hold between the two comes on top of what was read.
        assert Inner.sent < 50_000_000


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/analyze"])
def test_a_name_with_a_public_and_a_private_address_is_not_asked(
    server: Running, inner: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    port, asked = inner
    resolve = socket.getaddrinfo
    looked_up: list[str] = []

    def both(host, port, *args, **options):
        if host != "pictures.example":
            return resolve(host, port, *args, **options)
        looked_up.append(host)
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("93.184.215.14", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    answer = server.post(path, body_for(path, f"http://pictures.example:{port}/x.png"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "image_url_blocked"
    assert (looked_up, asked) == (["pictures.example"], [])


def test_only_the_allowed_hosts_are_asked(serve, inner: tuple[int, list[str]]) -> None:
    port, asked = inner
    gate = MediaPolicy(allow_files=False, allowed_private=("127.0.0.0/8",), allowed_domains=("pictures.example",))
    answer = serve(media=gate).post(CHAT, question("x", f"http://127.0.0.1:{port}/x.png"))
    assert answer.json()["error"]["code"] == "image_url_blocked"
    assert asked == []


def test_pictures_behind_urls_count_as_if_they_had_come_in_the_body(serve, inner: tuple[int, list[str]]) -> None:
    port, _ = inner
    gate = MediaPolicy(allow_files=False, allowed_private=("127.0.0.1",))
    server = serve(media=gate, max_body_bytes=40_000)
    picture = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/x.png"}}

    def post(number: int):
        content = [picture] * number + [{"type": "text", "text": "x"}]
        return server.post(CHAT, {"messages": [{"role": "user", "content": content}]})

    assert post(1).status_code == 200
    assert server.core.held_bytes == 0
    padded = server.post(CHAT, question("x", f"http://127.0.0.1:{port}/endless"))
    assert (padded.status_code, padded.json()["error"]["code"]) == (413, "request_too_large")
    assert "pictures behind its URLs" in padded.json()["error"]["message"]
    assert server.core.held_bytes == 0


def test_bytes_that_are_fetched_count_in_what_the_server_holds(serve, inner: tuple[int, list[str]]) -> None:
    port, _ = inner
    gate = MediaPolicy(allow_files=False, allowed_private=("127.0.0.1",))
    server = serve(media=gate, max_held_bytes=40_000)
    answer = server.post(CHAT, question("x", f"http://127.0.0.1:{port}/endless"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "engine_overloaded")
    assert server.core.held_bytes == 0
    assert server.post(CHAT, question("x", f"http://127.0.0.1:{port}/x.png")).status_code == 200
