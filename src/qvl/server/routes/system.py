"""Health, readiness, metrics, version and the list of models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from qvl.errors import RequestError
from qvl.server.answers import Health, Model, ModelList, Ready, Unready, Version
from qvl.server.messages_answers import AnthropicModel, AnthropicModelList
from qvl.server.metrics import CONTENT_TYPE
from qvl.server.routes.files import limit_of, query_of
from qvl.server.routes.messages import MESSAGE_ERRORS

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.state import ServerCore

# As in Anthropic's API.
MODELS_PAGE: Final = 20
MAX_MODELS_PAGE: Final = 1000


async def health(exchange: Exchange) -> None:
    """Answer 200 if the process and its event loop are alive; the model is not checked."""
    await exchange.respond_json(Health(status="ok"))


async def ready(exchange: Exchange) -> None:
    """Answer 200 if requests should be sent here, else 503 with the reason."""
    core = exchange.core
    core.start()
    reason = core.unready()
    if reason is None:
        await exchange.respond_json(Ready(status="ready"))
        return
    exchange.fields["reason"] = reason
    answer: Unready = {
        "status": "unavailable",
        "reason": reason,
        "error": {"message": reason, "type": "server_error", "param": None, "code": "not_ready"},
    }
    await exchange.respond_json(answer, [(b"retry-after", b"1")], status=503)


async def metrics(exchange: Exchange) -> None:
    """Answer with the metrics in Prometheus' text format."""
    await exchange.respond(200, await exchange.core.scrape(), [(b"content-type", CONTENT_TYPE.encode())])


async def version(exchange: Exchange) -> None:
    """Answer with version, backend, models and uptime; never keys, addresses or paths of caches."""
    core = exchange.core
    answer: Version = {
        "version": core.version,
        "backend": core.pipeline.backend.name,
        "models": list(core.names),
        "uptime": max(0, int(time.time()) - core.created),
    }
    await exchange.respond_json(answer)


def _model(core: ServerCore, name: str) -> Model:
    backend = core.pipeline.backend
    model: Model = {
        "id": name,
        "object": "model",
        "created": core.created,
        "owned_by": "qvl",
        "root": backend.model or backend.name,
        "parent": core.names[0] if core.adapter_of(name) else None,
    }
    if core.readiness.closed() is None:
        capabilities = backend.capabilities
        model["max_model_len"] = capabilities.max_context
        model["max_images"] = core.max_images
        if core.settings.media.max_videos is not None:
            model["max_videos"] = core.settings.media.max_videos
        model["max_body_bytes"] = core.settings.max_body_bytes
        if isinstance(rules := backend.identity().get("processor"), Mapping):
            most = min(rules["max_pixels"], core.settings.media.max_pixels)
            model["processor"] = {
                "patch_size": rules["patch_size"],
                "merge_size": rules["merge_size"],
                "min_pixels": min(rules["min_pixels"], most),
                "max_pixels": most,
            }
        model["capabilities"] = {
            "vision": core.max_images > 0,
            "tools": capabilities.tools,
            "logprobs": capabilities.logprobs,
            "response_formats": sorted({"text", *capabilities.response_formats}),
            "max_images": core.max_images,
        }
    return model


def _anthropic_model(core: ServerCore, name: str) -> AnthropicModel:
    loaded = core.readiness.closed() is None
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "lifecycle": "active",
        "created_at": datetime.fromtimestamp(core.created, UTC).isoformat(),
        "max_input_tokens": core.pipeline.backend.capabilities.max_context if loaded else None,
    }


async def models(exchange: Exchange) -> None:
    """Answer with the list of model names that requests may use.

    In Anthropic's form to a client that names an `anthropic-version`, a page at a time: `limit`, and `after_id` or
    `before_id`.
    """
    core = exchange.core
    if exchange.errors is MESSAGE_ERRORS:
        await exchange.respond_json(_anthropic_page(core, query_of(exchange, "limit", "after_id", "before_id", "beta")))
    else:
        await exchange.respond_json(ModelList(object="list", data=[_model(core, name) for name in core.names]))


def _anthropic_page(core: ServerCore, query: dict[str, str]) -> AnthropicModelList:
    """Return a page of the models, of which Anthropic's API has the cursors that `query` may name.

    Raises:
        RequestError: a wrong limit, a cursor that is no model, or both cursors.
    """
    limit = limit_of(query, MODELS_PAGE, MAX_MODELS_PAGE)
    names = list(core.names)
    if "after_id" in query and "before_id" in query:
        raise RequestError("after_id and before_id exclude each other", param="before_id", code="invalid_value")
    for cursor in query.keys() & {"after_id", "before_id"}:
        if query[cursor] not in names:
            raise RequestError(f"{cursor}: no model {query[cursor][:100]!r}", param=cursor, code="invalid_value")
        at = names.index(query[cursor])
        names = names[:at] if cursor == "before_id" else names[at + 1 :]
    shown = names[-limit:] if "before_id" in query else names[:limit]
    ends = (shown[0], shown[-1]) if shown else (None, None)
    return {
        "data": [_anthropic_model(core, name) for name in shown],
        "has_more": len(shown) < len(names),
        "first_id": ends[0],
        "last_id": ends[1],
    }


async def model(exchange: Exchange) -> None:
    """Answer with one model by name; names may have slashes."""
    core = exchange.core
    form = _anthropic_model if exchange.errors is MESSAGE_ERRORS else _model
    name = unquote(exchange.path.removeprefix("/v1/models/"))
    if not name:
        raise RequestError("the model's name is missing", param="model")
    await exchange.respond_json(form(core, core.served(name)))
