"""`/v1/files`: the input and output files of batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

from qvl.errors import RequestError
from qvl.server.batches.upload import MARGIN, Upload, purpose_and_expiry, too_large
from qvl.server.errors import DrainingError, HttpError

if TYPE_CHECKING:
    from qvl.server.batches.store import BatchStore
    from qvl.server.exchange import Exchange

PREFIX: Final = "/v1/files/"
MAX_FILES_PAGE: Final = 10_000
_READ_BYTES: Final = 2**18


async def create_file(exchange: Exchange) -> None:
    """Store an uploaded file of requests, one JSON object a line (multipart/form-data: file, purpose=batch)."""
    store = batch_store(exchange)
    core = exchange.core
    _refuse_foreign_pages(exchange)
    refuse_if_draining(exchange)
    if exchange.headers.get(b"content-encoding", b"identity") != b"identity":
        hint = "send it without Content-Encoding"
        raise HttpError(415, "an upload cannot be compressed", hint=hint, code="unsupported_media_type")
    async with core.key_limits.enter(exchange.tenant):
        exchange.extra_headers += core.key_limits.headers(exchange.tenant)
        file_id, path = await asyncio.to_thread(store.begin_upload, exchange.tenant)
        try:
            upload = Upload(
                path,
                exchange.headers.get(b"content-type", b""),
                max_bytes=store.max_file_bytes,
                max_line=core.settings.max_body_bytes,
            )
            counted = 0

            def arrived(size: int) -> None:
                nonlocal counted
                store.count_upload(file_id, size)
                if size - counted > 2**23:
                    counted = size
                    store.refuse_if_full(exchange.tenant, 0)

            async with aclosing(_pieces(exchange, store.max_file_bytes + MARGIN)) as pieces:
                await upload.read(pieces, arrived)
            purpose, seconds = purpose_and_expiry(upload.fields)
            await asyncio.to_thread(store.refuse_if_full, exchange.tenant, 0)
            kept = await asyncio.to_thread(
                store.keep_upload, file_id, exchange.tenant, upload.filename, purpose, seconds
            )
        finally:
            await asyncio.to_thread(store.drop_upload, file_id)
    await exchange.respond_json(kept)


async def list_files(exchange: Exchange) -> None:
    """Answer with a page of the files of this key: `limit`, `after`, `order` and `purpose` as in OpenAI's API."""
    query = query_of(exchange, "limit", "after", "order", "purpose")
    newest = is_newest_first(query)
    page = await asyncio.to_thread(
        batch_store(exchange).files,
        exchange.tenant,
        limit=limit_of(query, MAX_FILES_PAGE, MAX_FILES_PAGE),
        after=query.get("after"),
        newest=newest,
        purpose=query.get("purpose"),
    )
    await exchange.respond_json(page)


async def get_file(exchange: Exchange) -> None:
    """Answer with the facts of one file."""
    store = batch_store(exchange)
    await exchange.respond_json(await asyncio.to_thread(store.file, _file_id(exchange), exchange.tenant))


async def delete_file(exchange: Exchange) -> None:
    """Delete one file, unless an unfinished batch needs it."""
    store = batch_store(exchange)
    await exchange.respond_json(await asyncio.to_thread(store.delete_file, _file_id(exchange), exchange.tenant))


async def file_content(exchange: Exchange) -> None:
    """Answer with the content of one file."""
    store = batch_store(exchange)
    found = await asyncio.to_thread(store.file, _file_id(exchange), exchange.tenant)
    try:
        file = await asyncio.to_thread(store.path(found["id"]).open, "rb")
    except OSError as exc:
        raise HttpError(404, "the content of the file is gone", code="file_not_found") from exc
    with file:
        headers = [(b"content-type", b"application/jsonl"), (b"content-length", b"%d" % found["bytes"])]
        headers.append((b"x-content-type-options", b"nosniff"))
        await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
        while exchange.method != "HEAD" and (piece := await asyncio.to_thread(file.read, _READ_BYTES)):
            await exchange.write(piece)
    await exchange.end()


def batch_store(exchange: Exchange) -> BatchStore:
    """Return where files and batches are kept.

    Raises:
        HttpError: 404, this server keeps none.
    """
    if exchange.core.batch_store is None:
        raise HttpError(404, "this server keeps no files", hint="qvl-serve --batch-dir FOLDER", code="not_found")
    return exchange.core.batch_store


def refuse_if_draining(exchange: Exchange) -> None:
    if exchange.core.draining:
        raise DrainingError("the server is shutting down", hint="send the request to another server")


def query_of(exchange: Exchange, *known: str) -> dict[str, str]:
    """Return the parameters behind the path.

    Raises:
        RequestError: one is not in `known`.
    """
    text = exchange.scope.get("query_string", b"").decode("latin-1")
    try:
        query = dict(parse_qsl(text, keep_blank_values=True, max_num_fields=20))
    except ValueError as exc:
        raise RequestError("too many parameters", code="invalid_value") from exc
    for name in query.keys() - set(known):
        what, hint = f"unknown parameter {name[:100]!r}", f"known: {', '.join(known)}"
        raise RequestError(what, hint=hint, param=name[:100], code="unsupported_parameter")
    return query


def limit_of(query: dict[str, str], default: int, most: int) -> int:
    """Return the number of objects that a page may have.

    Raises:
        RequestError: it is not a number from 1 to `most`.
    """
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal()) or len(text) > 6 or not 1 <= int(text) <= most:
        raise RequestError(f"limit must be 1 to {most}", param="limit", code="invalid_value")
    return int(text)


def is_newest_first(query: dict[str, str]) -> bool:
    """Return whether a page begins with the newest.

    Raises:
        RequestError: the `order` is neither asc nor desc.
    """
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc", param="order", code="invalid_value")
    return order == "desc"


def _file_id(exchange: Exchange) -> str:
    return exchange.path.removeprefix(PREFIX).removesuffix("/content")


def _refuse_foreign_pages(exchange: Exchange) -> None:
    """Refuse a form that a page of another site sends, since browsers send forms without asking the server first."""
    origin = exchange.headers.get(b"origin", b"").decode("latin-1")
    allowed = exchange.core.settings.cors_origins
    if not origin or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).netloc != exchange.headers.get(b"host", b"").decode("latin-1"):
        raise HttpError(403, "pages of other sites may not send files", hint="--cors-origin", code="origin_refused")


async def _pieces(exchange: Exchange, most: int) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives, at the pace that is asked of every body.

    Raises:
        HttpError: 413, it is larger than `most` bytes; 408, it is too slow.
        ClientGoneError: the client went away before the end.
    """
    announced = exchange.headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > most:
        raise too_large(most - MARGIN)
    size, last = 0, False
    while not last:
        piece, last = await exchange.next_piece(size)
        size += len(piece)
        if size > most:
            raise too_large(most - MARGIN)
        if piece:
            yield piece
