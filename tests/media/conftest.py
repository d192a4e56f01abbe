from __future__ import annotations

import gzip
import io
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def fixtures() -> Path:
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def noise() -> Callable[[int, int], Image.Image]:
    """A picture of the given width and height in which every pixel differs from its neighbours."""

    def make(width: int, height: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))

    return make


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """`encoded(image, "PNG")`: the file as bytes."""

    def encode(image: Image.Image, form: str, **options: object) -> bytes:
        out = io.BytesIO()
        image.save(out, form, **options)
        return out.getvalue()

    return encode


class PictureSite(ThreadingHTTPServer):
    """A real web server on a free port of 127.0.0.1 with one path for each way in which a server can behave."""

    daemon_threads = True

    def __init__(self, picture: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.picture = picture
        self.port = self.server_address[1]
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.hung_up = threading.Event()
        self.closing = threading.Event()

    def url(self, path: str = "/ok.png") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class _Handler(BaseHTTPRequestHandler):
    server: PictureSite
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        name = urlsplit(self.path).path.strip("/").split(".")[0].replace("-", "_").replace("/", "_")
        self.close_connection = True
        try:
            getattr(self, f"on_{name}", self.on_missing)()
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def on_ok(self) -> None:
        self.answer({"Content-Type": "image/png"})

    def on_untyped(self) -> None:
        self.answer({})

    def on_octets(self) -> None:
        self.answer({"Content-Type": "application/octet-stream"})

    def on_page(self) -> None:
        self.answer({"Content-Type": "text/html; charset=utf-8"}, b"<html>hello</html>")

    def on_broken(self) -> None:
        self.answer({"Content-Type": "image/png"}, self.server.picture[:-40])

    def on_coded(self) -> None:
        """With the Content-Encoding of the query, whatever the body is."""
        self.answer({"Content-Type": "image/png", "Content-Encoding": unquote(urlsplit(self.path).query)})

    def on_packed(self) -> None:
        """Truly packed, by the query: `form,Content-Encoding`."""
        form, _, coding = unquote(urlsplit(self.path).query).partition(",")
        raw = zlib.compressobj(wbits=-15)
        body = {
            "gzip": lambda: gzip.compress(self.server.picture),
            "members": lambda: gzip.compress(self.server.picture[:99]) + gzip.compress(self.server.picture[99:]),
            "padded": lambda: gzip.compress(self.server.picture) + bytes(512),
            "followed": lambda: gzip.compress(self.server.picture) + b"and more",
            "twice": lambda: gzip.compress(gzip.compress(self.server.picture)),
            "cut": lambda: gzip.compress(self.server.picture)[:-20],
            "zlib": lambda: zlib.compress(self.server.picture),
            "raw": lambda: raw.compress(self.server.picture) + raw.flush(),
            "bomb": lambda: gzip.compress(bytes(2_000_000)),
            "junk": lambda: b"\xce\xb2\xcf\x81 not a picture, nor what it is called",
        }[form]()
        self.answer({"Content-Type": "image/png", **({"Content-Encoding": coding} if coding else {})}, body)

    def on_labelled(self) -> None:
        self.answer({"Content-Type": urlsplit(self.path).query})

    def on_status(self) -> None:
        self.begin(int(urlsplit(self.path).query), {"Content-Length": str(len(self.server.picture))})
        self.wfile.write(self.server.picture)

    def on_missing(self) -> None:
        self.send_error(404)

    def on_failing(self) -> None:
        self.send_error(503)

    def on_empty(self) -> None:
        self.answer({"Content-Type": "image/png"}, b"")

    def on_announces_more(self) -> None:
        self.answer({"Content-Type": "image/png", "Content-Length": str(len(self.server.picture) + 1000)})

    def on_announces_less(self) -> None:
        self.answer({"Content-Type": "image/png", "Content-Length": "20"})

    def on_announces_much(self) -> None:
        self.answer({"Content-Type": "image/png", "Content-Length": str(10 * 2**30)})

    def on_endless(self) -> None:
        self.begin(200, {"Content-Type": "image/png"})
        while not self.server.closing.is_set():
            self.wfile.write(b"\x00" * 65536)

    def on_silent(self) -> None:
        self.server.closing.wait(30)

    def on_dripping(self) -> None:
        self.begin(200, {"Content-Type": "image/png"})
        while not self.server.closing.wait(0.02):
            self.wfile.write(b"\x89")
            self.wfile.flush()

    def on_reset(self) -> None:
        self.connection.close()

    def on_hop(self) -> None:
        left = int(urlsplit(self.path).query)
        self.redirect("/ok.png" if left == 1 else f"/hop?{left - 1}")

    def on_loop(self) -> None:
        self.redirect("/loop")

    def on_to(self) -> None:
        self.redirect(urlsplit(self.path).query)

    def redirect(self, location: str) -> None:
        self.begin(302, {"Location": location, "Content-Length": "0"})

    def answer(self, headers: dict[str, str], body: bytes | None = None) -> None:
        body = self.server.picture if body is None else body
        self.begin(200, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the tests look at `seen`."""


@pytest.fixture
def site(fixtures: Path) -> Iterator[PictureSite]:
    server = PictureSite((fixtures / "plain.png").read_bytes())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()
