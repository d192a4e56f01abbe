"""The page at `/` and its static files, served without an API key; they contain nothing confidential."""

from __future__ import annotations

import functools
import hashlib
import mimetypes
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from qvl.html.page import theme
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange

_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    b"media-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# Shared with reports.
_THEME: Final = "theme.css"
_NAMES: Final = {"/": "index.html", "/docs": "docs.html"}


@functools.cache
def _file(name: str) -> tuple[bytes, bytes, bytes]:
    """Content, media type and entity tag of one file of this package."""
    data = theme().encode() if name == _THEME else (files("qvl.server") / "static" / name).read_bytes()
    kind = mimetypes.types_map.get("." + name.rpartition(".")[2], "application/octet-stream")
    if kind.startswith("text/") or kind.endswith("javascript"):
        kind += "; charset=utf-8"
    return data, kind.encode(), b'"' + hashlib.sha256(data).hexdigest()[:16].encode() + b'"'


@functools.cache
def static_names() -> frozenset[str]:
    own = (item.name for item in (files("qvl.server") / "static").iterdir() if item.is_file())
    return frozenset(own) | {_THEME}


async def page(exchange: Exchange) -> None:
    """Answer with one static file."""
    name = _NAMES.get(exchange.path) or exchange.path.removeprefix("/static/")
    if name not in static_names():
        raise HttpError(404, "page not found", code="not_found")
    data, kind, tag = _file(name)
    headers = [
        (b"etag", tag),
        (b"cache-control", b"no-cache"),
        (b"content-security-policy", _POLICY),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
    if exchange.headers.get(b"if-none-match") == tag:
        await exchange.send({"type": "http.response.start", "status": 304, "headers": headers})
        await exchange.end()
        return
    await exchange.respond(200, data, [(b"content-type", kind), *headers])


async def nothing(exchange: Exchange) -> None:
    """Answer 204 to /favicon.ico, which browsers request in any case."""
    await exchange.send({"type": "http.response.start", "status": 204, "headers": []})
    await exchange.end()
