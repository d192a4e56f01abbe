"""`POST /v1/locate`: `locate()` of the pipeline over HTTP."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING, Literal, NotRequired

from typing_extensions import TypedDict

from qvl.errors import ConfigError, RequestError
from qvl.ids import new_id
from qvl.pipeline.locate_call import LocateCall
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.server.answers import Count, TokenUsage
from qvl.server.openai_format import usage_of
from qvl.server.schemas import LocateRequest, TaskFields
from qvl.server.serving import ServedRequest, cache_policy, read_request
from qvl.types import ChatRequest, JsonObject, Message

if TYPE_CHECKING:
    from qvl.evidence.located import Locations
    from qvl.evidence.overlay import Overlaid
    from qvl.pipeline.locate_call import LocateParams
    from qvl.server.exchange import Exchange

_NO_CHAT = ChatRequest((Message("user"),))


class LocatedObjects(TypedDict):
    """The things that were located: label, `box` or `point` in pixels of the original and relative, confidence."""

    id: str
    object: Literal["located"]
    created: Count
    model: str
    located: list[JsonObject]
    width: Count
    height: Count
    notes: list[str]
    usage: TokenUsage
    overlay: NotRequired[str]


async def locate(exchange: Exchange) -> None:
    """Answer with a box (or point) in pixels of the original picture, and a confidence, for everything located."""
    body = await read_request(exchange, LocateRequest, lambda body: [body.image])
    exchange.picture_params = lambda: ["image"]
    exchange.core.refuse_many_images([body.image])
    name = exchange.core.served(body.model)
    found = await exchange.until_done(lambda: _locate(exchange, body))
    answer: LocatedObjects = {
        "id": f"locate-{new_id()}",
        "object": "located",
        "created": int(found.result.created_at or time.time()),
        "model": name,
        "located": [item.to_json() for item in found],
        "width": found.pictures[0].original[0],
        "height": found.pictures[0].original[1],
        "notes": list(found.result.notes),
        "usage": usage_of(found.result.usage),
    }
    if body.overlay is not None:
        answer["overlay"] = await overlay_url(found, body.overlay)
    policy = cache_policy(exchange, deterministic=True)
    headers = ServedRequest(exchange, _NO_CHAT, name, exchange.core.fingerprint(name), policy).headers(found.result)
    await exchange.respond_json(answer, headers)


def task_params(exchange: Exchange, body: TaskFields) -> LocateParams:
    """Return what `body` has in common with other tasks of the pipeline, in their names; the length is each one's."""
    return {
        "request_id": exchange.request_id,
        "adapter": exchange.core.adapter_of(exchange.core.served(body.model)),
        "pages": body.pages,
        "max_pixels": body.max_pixels,
        "min_pixels": body.min_pixels,
        "seed": body.seed,
        "chat_template_kwargs": body.chat_template_kwargs,
        "cache_salt": body.cache_salt or "",
        "priority": body.priority or 0,
    }


async def _locate(exchange: Exchange, body: LocateRequest) -> Locations:
    core = exchange.core
    params: LocateParams = {**task_params(exchange, body), "max_tokens": body.max_tokens}
    try:
        call = LocateCall(
            exchange.as_sent(UnreadPicture(body.image)),
            body.targets,
            core.executor,
            cache_policy(exchange, deterministic=True),
            params,
            points=body.points,
            namespace=core.namespace(exchange.tenant),
            policy=core.settings.media,
            started=exchange.started,
        )
    except ConfigError as exc:
        raise RequestError(exc.message, hint=exc.hint, param=exc.param, code="invalid_value") from exc
    return await core.executor.execute(call)


async def overlay_url(result: Overlaid, form: Literal["png", "svg"]) -> str:
    """Return the overlay of a result's first picture as a data: URL, drawn in another thread."""

    def drawn() -> str:
        if form == "svg":
            kind, data = "image/svg+xml", result.overlay_svg().encode()
        else:
            kind, data = "image/png", result.overlay()
        return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"

    return await asyncio.to_thread(drawn)
