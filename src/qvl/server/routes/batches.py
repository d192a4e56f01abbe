"""`/v1/batches`: files of requests that are answered in the background."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from qvl.errors import RequestError
from qvl.server.batches.objects import BatchRequest
from qvl.server.errors import HttpError
from qvl.server.routes.files import batch_store, limit_of, query_of, refuse_if_draining
from qvl.server.serving import validated

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange

PREFIX: Final = "/v1/batches/"


async def create_batch(exchange: Exchange) -> None:
    """Begin a batch: an uploaded file of requests to one endpoint, answered within `completion_window` (24h)."""
    store = batch_store(exchange)
    core = exchange.core
    # As for questions: a page elsewhere could send other types without being asked first.
    if exchange.media_type != b"application/json":
        hint = "add the header Content-Type: application/json"
        raise HttpError(415, "the body must be JSON", hint=hint, code="unsupported_media_type")
    refuse_if_draining(exchange)
    async with core.key_limits.enter(exchange.tenant):
        exchange.extra_headers += core.key_limits.headers(exchange.tenant)
        request = validated(BatchRequest, await exchange.body())
        if request.endpoint not in core.batch_endpoints:
            message = f"batches of {request.endpoint[:100]!r} are not possible"
            hint = ", ".join(sorted(core.batch_endpoints))
            raise RequestError(message, hint=hint, param="endpoint", code="invalid_value")
        batch = await asyncio.to_thread(store.create, request, exchange.tenant)
    core.wake_batches()
    await exchange.respond_json(batch)


async def list_batches(exchange: Exchange) -> None:
    """Answer with a page of the batches of this key, the newest first: `limit` and `after` as in OpenAI's API."""
    query = query_of(exchange, "limit", "after")
    limit, after = limit_of(query, 20, 100), query.get("after")
    store = batch_store(exchange)
    await exchange.respond_json(await asyncio.to_thread(store.batches, exchange.tenant, limit=limit, after=after))


async def get_batch(exchange: Exchange) -> None:
    """Answer with the state of one batch."""
    batch_id = exchange.path.removeprefix(PREFIX)
    await exchange.respond_json(await asyncio.to_thread(batch_store(exchange).batch, batch_id, exchange.tenant))


async def cancel_batch(exchange: Exchange) -> None:
    """Cancel a batch: requests under way are finished, and what was answered is kept in its output file."""
    batch_id = exchange.path.removeprefix(PREFIX).removesuffix("/cancel")
    batch = await asyncio.to_thread(batch_store(exchange).cancel, batch_id, exchange.tenant)
    exchange.core.wake_batches()
    await exchange.respond_json(batch)
