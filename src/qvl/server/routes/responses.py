"""`/v1/responses`: text, pictures and function calls in, output items out; kept, if the server has a cache."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar, get_args
from urllib.parse import unquote

from qvl.errors import ContextLengthError, RequestError
from qvl.ids import new_id
from qvl.pipeline.parse_fields import unknown
from qvl.server.answers import DeletedResponse, InputItemList, InputTokens, OutputItem, Response
from qvl.server.errors import HttpError
from qvl.server.format_schemas import asked_format, name_of_format
from qvl.server.response_store import PREFIX, KeptResponse, not_found, not_kept
from qvl.server.responses_input import item_texts, messages_of
from qvl.server.responses_output import EventWriter, ItemMaker, finished
from qvl.server.responses_schemas import ENCRYPTED, LOGPROBS, Included, ResponsesRequest
from qvl.server.routes.files import is_newest_first, limit_of, query_of
from qvl.server.serving import chat_request, name_request, picture_params, read_request, refuse_untold, stream
from qvl.server.tool_choice import choose_tools
from qvl.types import ChatRequest, JsonMapping, JsonObject

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

T = TypeVar("T")
PATH: Final = "/v1/responses/"
# OpenAI's.
ITEMS_PAGE: Final = 20
MAX_ITEMS_PAGE: Final = 100
_REFERENCE: Final = "item_reference"
_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
_EFFORT: Final = {"reasoning_effort": "reasoning.effort"}


async def responses(exchange: Exchange) -> None:
    """Answer one request of the Responses API, as JSON or as server-sent events.

    The response is kept for `previous_response_id`, unless `store` is false or the server has no cache.
    """
    body = await _body(exchange)
    await exchange.until_done(lambda: _answer(exchange, body))


async def input_tokens(exchange: Exchange) -> None:
    """Answer with the number of tokens of a request to `/v1/responses`, pictures, tools and earlier turns included."""
    body = await _body(exchange)
    await exchange.until_done(lambda: _count(exchange, body))


async def _count(exchange: Exchange, body: ResponsesRequest) -> None:
    served, _ = await _asked(exchange, body)
    tokens = await exchange.core.pipeline.backend.tokenize(served.request)
    await exchange.respond_json(InputTokens(object="response.input_tokens", input_tokens=len(tokens.ids)))


async def _body(exchange: Exchange) -> ResponsesRequest:
    body = await read_request(exchange, ResponsesRequest, lambda body: item_texts(body.input))
    name_request(exchange, body)
    exchange.field_names = _NAMES | name_of_format(None, body.structured_outputs)
    if "reasoning_effort" not in (body.model_extra or ()):
        exchange.field_names |= _EFFORT
    return body


async def _answer(exchange: Exchange, body: ResponsesRequest) -> None:
    core = exchange.core
    if body.background:
        what = "background: responses are answered while you wait"
        hint = "leave it out, or send a batch to /v1/batches"
        raise RequestError(what, hint=hint, param="background", code="unsupported_parameter")
    if body.store and not core.responses.available:
        raise not_kept("store")
    namespace = core.namespace(exchange.tenant)
    served, items = await _asked(exchange, body)
    head = _head(body, served, kept=body.store is not False and core.responses.available)
    reasoning = body.reasoning
    maker = ItemMaker(
        head["id"],
        summary=reasoning is not None and (reasoning.summary or reasoning.generate_summary) is not None,
        key=core.keys.signing_key if ENCRYPTED in (body.include or ()) else None,
        reasoning_shown=body.include_reasoning is not False,
    )

    async def keep(response: Response) -> None:
        if response["store"]:
            whole = items if exchange.lifted is None else exchange.lifted.written_out(items)
            kept: KeptResponse = {"response": response, "input": whole, "previous": body.previous_response_id}
            await core.responses.keep(namespace, kept)

    if body.stream:
        writer = EventWriter(head, maker)
        exchange.error_event = writer.failed

        async def settle() -> None:
            assert writer.whole is not None
            await keep(writer.whole)

        await _fitting(served, body, lambda: stream(served, writer, settle))
        return
    result = await _fitting(served, body, served.answer)
    output: list[OutputItem] = maker.items(result.choices[0]) if result.choices else []
    response = finished(head, output, result)
    await keep(response)
    await exchange.respond_json(response, served.headers(result))


async def _fitting(served: ServedRequest, body: ResponsesRequest, run: Callable[[], Awaitable[T]]) -> T:
    """Return what `run` gives; with truncation "auto", the oldest turns are left out until the rest fits."""
    while True:
        try:
            return await run()
        except ContextLengthError:
            shorter = without_oldest(served.request) if body.truncation == "auto" else None
            if shorter is None or served.exchange.streaming:
                raise
            served.request = shorter


def without_oldest(request: ChatRequest) -> ChatRequest | None:
    """Return the request without its oldest turn and the answers to it; None if it is the only one."""
    messages = request.messages
    start = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
    end = start + 1
    while end < len(messages) and messages[end].role in ("assistant", "tool"):
        end += 1
    if not any(message.role != "system" for message in messages[end:]):
        return None
    return request.replace(messages=messages[:start] + messages[end:])


async def _asked(exchange: Exchange, body: ResponsesRequest) -> tuple[ServedRequest, list[JsonObject]]:
    """Return the request, with the earlier turns of its conversation, and the items of its input."""
    core = exchange.core
    items = await _items(exchange, body)
    before = []
    if body.previous_response_id is not None:
        before = await core.responses.turns(core.namespace(exchange.tenant), body.previous_response_id)

    def params() -> list[str]:
        earlier = picture_params("previous_response_id", before, "content", "output")
        return ["previous_response_id"] * len(earlier) + picture_params("input", items, "content", "output")

    exchange.picture_params = params
    return await _read(exchange, body, before, items), items


async def _items(exchange: Exchange, body: ResponsesRequest) -> list[JsonObject]:
    """Return the input as items, with each reference to an item replaced by the item."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    core = exchange.core
    items = []
    for number, item in enumerate(body.input):
        if item.get("type") == _REFERENCE or (item.keys() == {"id"} and isinstance(item["id"], str)):
            param, ident = f"input[{number}].id", str(item.get("id"))
            if not core.responses.available:
                raise not_kept(param)
            response = PREFIX + ident.partition("_")[2][:32]
            kept = await core.responses.find(core.namespace(exchange.tenant), response, param)
            known: list[JsonMapping] = [*kept["response"]["output"], *_sent(kept)]
            found = next((one for one in known if one["id"] == ident), None)
            if found is None:
                raise not_found(ident, param)
            item = {**found}
        items.append(item)
    return items


async def _read(
    exchange: Exchange, body: ResponsesRequest, before: list[JsonObject], items: list[JsonObject]
) -> ServedRequest:
    refuse_untold(body, "return_token_ids", "prompt_logprobs")
    params = body.sampling()
    fields: JsonObject = {**(body.model_extra or {})}
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.parallel_tool_calls is not None:
        params["parallel_tool_calls"] = body.parallel_tool_calls
    if body.max_output_tokens is not None:
        params["max_tokens"] = body.max_output_tokens
    if LOGPROBS in (body.include or ()):
        params["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RequestError(f"top_logprobs needs include: ['{LOGPROBS}']", param="top_logprobs", code="invalid_value")
    if body.tools:
        params["tools"] = [{"type": "function", "function": tool} for tool in _tools(body)]
    if body.tool_choice is not None:
        params.update(choose_tools(params.get("tools", ()), body.tool_choice))
    if body.text is not None and body.text.verbosity is not None:
        fields["verbosity"] = body.text.verbosity
    form: JsonObject | None = None if body.text is None or body.text.format is None else {**body.text.format}
    if form is not None and form["type"] == "json_schema":
        form = {"type": form.pop("type"), "json_schema": form}
    if (form := asked_format(form, body.structured_outputs, "text.format")) is not None:
        params["response_format"] = form
    key = exchange.core.keys.signing_key
    messages: list[JsonObject] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += messages_of(before, key, "previous_response_id")
    messages += messages_of(items, key)
    if not messages:
        raise RequestError("input is empty", param="input", code="invalid_value")
    return await chat_request(exchange, body.model, messages, params, fields)


def _tools(body: ResponsesRequest) -> list[JsonObject]:
    """Return the tools in the form of chat completions, without null and false fields."""
    return [
        {name: value for name, value in tool.items() if name not in ("type", "cache_control")}
        for tool in body.tools or ()
    ]


def _head(body: ResponsesRequest, served: ServedRequest, *, kept: bool) -> Response:
    """Return the response in progress, before it has any output."""
    sampling = served.request.sampling
    tools = [
        {"type": "function", "description": None, "parameters": {}, "strict": False, **tool} for tool in _tools(body)
    ]
    return {
        "id": f"resp_{new_id()}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": served.model,
        "output": [],
        "parallel_tool_calls": served.request.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning is not None else None,
            "summary": body.reasoning.summary if body.reasoning is not None else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": kept,
        "temperature": sampling.temperature,
        "text": {
            "format": (body.text.format if body.text is not None else None) or {"type": "text"},
            "verbosity": (body.text.verbosity if body.text is not None else None) or "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _ident(exchange: Exchange, suffix: str = "") -> str:
    return unquote(exchange.path.removeprefix(PATH).removesuffix(suffix))


async def retrieve(exchange: Exchange) -> None:
    """Answer with a response that was kept for this API key."""
    query = _query(exchange, "stream", "include_obfuscation")
    if query.get("stream", "false") != "false":
        what = "stream: a response that is kept is not streamed again"
        raise RequestError(what, hint="leave it out", param="stream", code="unsupported_parameter")
    kept = await exchange.core.responses.find(exchange.core.namespace(exchange.tenant), _ident(exchange))
    await exchange.respond_json(kept["response"])


async def delete(exchange: Exchange) -> None:
    """Delete a response that was kept for this API key; conversations that go on from it end there."""
    ident = _ident(exchange)
    await exchange.core.responses.delete(exchange.core.namespace(exchange.tenant), ident)
    await exchange.respond_json(DeletedResponse(id=ident, object="response.deleted", deleted=True))


async def input_items(exchange: Exchange) -> None:
    """Answer with a page of what was sent for a response: `limit`, `after` and `order` as in OpenAI's API."""
    query = _query(exchange, "limit", "after", "order")
    limit, newest = limit_of(query, ITEMS_PAGE, MAX_ITEMS_PAGE), is_newest_first(query)
    ident = _ident(exchange, "/input_items")
    kept = await exchange.core.responses.find(exchange.core.namespace(exchange.tenant), ident)
    found = _sent(kept)[:: -1 if newest else 1]
    if (after := query.get("after")) is not None:
        at = next((place for place, item in enumerate(found) if item["id"] == after), None)
        if at is None:
            raise RequestError(f"nothing has the id {after[:100]!r}", param="after", code="invalid_value")
        found = found[at + 1 :]
    data = found[:limit]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    more = len(found) > limit
    answer: InputItemList = {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": more}
    await exchange.respond_json(answer)


def _query(exchange: Exchange, *known: str) -> dict[str, str]:
    """Return the parameters behind the path; what `include` may name stands in what is kept, if it was asked for."""
    query = query_of(exchange, *known, "include", "include[]")
    for name in ("include", "include[]"):
        if query.get(name, LOGPROBS) not in get_args(Included):
            raise unknown("include", query[name], get_args(Included))
    return query


def _sent(kept: KeptResponse) -> list[JsonObject]:
    """Return the items that were sent for a response, oldest first, each with an id."""
    made = f"in_{kept['response']['id'].removeprefix(PREFIX)}"
    return [_listed(item) | {"id": item.get("id") or f"{made}{at:02x}"} for at, item in enumerate(kept["input"])]


def _listed(item: JsonObject) -> JsonObject:
    """Return an input item with what a client may leave out."""
    if "role" not in item:
        return item
    content = item["content"]
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    if isinstance(content, str):
        part = {"type": kind, "text": content}
        content = [part | {"annotations": []} if kind == "output_text" else part]
    return {"type": "message", "status": "completed", **item, "content": content}


async def cancel(exchange: Exchange) -> None:
    """Refuse: only a response in the background can be cancelled, and there are none."""
    await exchange.core.responses.find(exchange.core.namespace(exchange.tenant), _ident(exchange, "/cancel"))
    raise HttpError(400, "only background responses can be cancelled, and there are none", code="invalid_request")
