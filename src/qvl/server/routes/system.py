"""Health, readiness, metrics, version and the list of models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from qvl.errors import RequestError
from qvl.server.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.state import ServerCore


async def health(exchange: Exchange) -> None:
    """The process lives and its loop turns; nothing more."""
    await exchange.respond_json({"status": "ok"})


async def ready(exchange: Exchange) -> None:
    """Whether requests should be sent here, and why not."""
    core = exchange.core
    core.start()
    reason = core.unready()
    if reason is None:
        await exchange.respond_json({"status": "ready"})
    else:
        exchange.fields["reason"] = reason
        error = {"message": reason, "type": "server_error", "param": None, "code": "not_ready"}
        await exchange.respond_json(
            {"status": "unavailable", "reason": reason, "error": error}, [(b"retry-after", b"1")], status=503
        )


async def metrics(exchange: Exchange) -> None:
    """Prometheus' text format."""
    await exchange.respond(200, exchange.core.metrics.render(), [(b"content-type", CONTENT_TYPE.encode())])


async def version(exchange: Exchange) -> None:
    """What runs here. Never keys, addresses or paths of caches."""
    core = exchange.core
    backend = core.pipeline.backend
    await exchange.respond_json(
        {"version": core.version, "backend": backend.name, "models": list(core.names), "uptime": _uptime(core)}
    )


def _uptime(core: ServerCore) -> int:
    return max(0, int(time.time()) - core.created)


def _model(core: ServerCore, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"id": name, "object": "model", "created": core.created, "owned_by": "qvl"}
    if core.readiness.closed() is None:
        have = core.pipeline.backend.capabilities
        found["max_model_len"] = have.max_context
        found["max_images"] = have.images
    return found


async def models(exchange: Exchange) -> None:
    """Every name that may be asked for."""
    core = exchange.core
    await exchange.respond_json({"object": "list", "data": [_model(core, name) for name in core.names]})


async def model(exchange: Exchange) -> None:
    """One model by name; names may have slashes."""
    core = exchange.core
    name = unquote(exchange.path.removeprefix("/v1/models/"))
    if not name:
        raise RequestError("the model's name is missing", param="model")
    await exchange.respond_json(_model(core, core.served(name)))
