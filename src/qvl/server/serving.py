"""The common steps of the routes: validation, the pipeline call, and the answer as JSON or events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError

from qvl.caches.policy import UNCACHED, CachePolicy
from qvl.errors import RequestError
from qvl.media import base64_codec
from qvl.media.base64_codec import Base64Picture
from qvl.media.decode_threads import in_worker
from qvl.media.gate import MEDIUM, SMALL
from qvl.media.video import Video, paged
from qvl.pipeline.call import RequestCall
from qvl.pipeline.load_pictures import load_pictures, read_pictures
from qvl.pipeline.parse_parts import is_picture, picture_field
from qvl.pipeline.parse_request import draft_request
from qvl.server.cache_headers import headers_for, policy_of
from qvl.server.errors import from_validation
from qvl.server.known_body import LONGEST_KEPT, KnownBody
from qvl.server.lift_pictures import LONG, SHORTEST, lift
from qvl.server.neutral_fields import without_neutral, without_neutral_params
from qvl.server.request_body import checked_json
from qvl.types import ChatRequest, Chunk, JsonMapping, JsonObject, Result

if TYPE_CHECKING:
    from qvl.media.video import Medium
    from qvl.pipeline.parse_request import Draft, RequestParams
    from qvl.server.exchange import Exchange, Headers
    from qvl.server.schemas import QuestionFields
    from qvl.server.state import ServerCore

# What routes whose bodies do not name these may ask for all the same.
OF_THE_PROMPT: Final = (
    "chat_template_kwargs",
    "reasoning_effort",
    "thinking_token_budget",
    "continue_final_message",
    "add_generation_prompt",
)
# Of these, what says how pictures and videos are shown is honoured here.
OF_MEDIA: Final = ("mm_processor_kwargs", "media_io_kwargs")
BodyT = TypeVar("BodyT", bound=BaseModel)


class AnswerWriter(Protocol):
    """Encodes a streamed answer as server-sent events."""

    def write(self, chunk: Chunk) -> bytes: ...

    def close(self, result: Result) -> bytes: ...


class SeveralWriter(Protocol):
    """Encodes the streamed answers of several requests; `write_of` is told the number of the request."""

    def write_of(self, number: int, chunk: Chunk) -> bytes: ...

    def close_all(self, results: Sequence[Result]) -> bytes: ...


def validated(schema: type[BodyT], body: bytes) -> BodyT:
    """Return `body` as a request of the form `schema`.

    Raises:
        RequestError: invalid JSON or fields; the error names the field.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as exc:
        raise from_validation(exc, body) from exc


async def read_request(exchange: Exchange, schema: type[BodyT], texts: Callable[[BodyT], Iterable[str]]) -> BodyT:
    """Return the body of the request in the form `schema`.

    `texts` are those in it that are read as sources of pictures, all by way of `Exchange.as_sent`: a mark may stand
    there in the place of base64.

    Raises:
        RequestError: invalid JSON or fields; the error names the field.
    """
    raw = await exchange.raw_body()
    max_bytes = exchange.core.settings.media.max_bytes
    at_once = len(raw) <= (MEDIUM if base64_codec.FAST else SMALL)
    # What else is in base64, where no picture is read, is mostly short: then long texts alone are taken out.
    for least in (SHORTEST, LONG):
        take_out = partial(lift, raw, max_bytes, least)
        lifted = take_out() if at_once else await in_worker(take_out)
        if lifted is None:
            break
        try:
            if len(lifted.body) <= LONGEST_KEPT:
                known = exchange.core.known_body(exchange.tenant, schema, lifted.body)
            else:
                known = KnownBody(schema, await checked_json(lifted.body))
        except ValidationError:
            # Of which the whole body tells more.
            break
        if known.lifts_all is None:
            known.lifts_all = lifted.are_all_in(texts(known.body))
        if known.lifts_all:
            exchange.lifted, exchange.known = lifted, known
            return known.body
        if all(len(text) > LONG for text, _ in lifted.found.values()):
            break
    return validated(schema, await checked_json(raw))


@dataclass(slots=True)
class ServedRequest:
    """A validated request, and the fields that its answer repeats."""

    exchange: Exchange
    request: ChatRequest
    model: str
    fingerprint: str
    policy: CachePolicy

    def call(self) -> RequestCall:
        """Return the Call for the executor."""
        exchange = self.exchange
        namespace = exchange.core.namespace(exchange.tenant)
        return RequestCall(self.request, self.policy, namespace=namespace, started=exchange.started)

    async def answer(self) -> Result:
        """Return the whole answer."""
        return await self.exchange.core.executor.execute(self.call())

    def headers(self, result: Result) -> Headers:
        """Return the headers of a finished answer, and record the answer as `finished` does."""
        self.finished(result)
        headers = headers_for(result.cache, self.policy, result.created_at)
        headers.append((b"server-timing", server_timing(result)))
        headers.append((b"openai-processing-ms", b"%d" % round(result.timing.total * 1000)))
        return headers

    def finished(self, result: Result) -> None:
        """Record an answer in the metrics and in the request's log line."""
        exchange = self.exchange
        exchange.core.note_result(result)
        usage, timing = result.usage, result.timing
        exchange.fields.update(
            model=self.model,
            cache=result.cache,
            finish_reason=result.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            pictures=len(result.pictures),
            media_s=round(timing.media, 4),
            cache_s=round(timing.cache, 4),
            queue_s=round(timing.queue, 4),
            first_token_s=round(timing.first_token, 4),
        )
        if usage.image_tokens:
            exchange.fields["image_tokens"] = usage.image_tokens
        if result.notes:
            exchange.fields["notes"] = list(result.notes)
        if exchange.traced is not None:
            exchange.traced.note_result(result, self.model)


def server_timing(result: Result) -> bytes:
    """Return the `Server-Timing` header of a result: milliseconds per stage."""
    timing = result.timing
    stages = (
        ("media", timing.media),
        ("cache", timing.cache),
        ("queue", timing.queue),
        ("first_token", timing.first_token),
        ("total", timing.total),
    )
    return ", ".join([f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages if seconds]).encode()


async def chat_request(
    exchange: Exchange,
    model: str | None,
    messages: Sequence[JsonMapping],
    params: RequestParams,
    extra: JsonMapping | None,
) -> ServedRequest:
    """Return the request with its messages parsed and pictures loaded; unsupported fields are refused.

    Raises:
        RequestError: an invalid or unsupported field; the error names it.
    """
    return await served_request(exchange, model, draft_of(exchange, model, messages, params, extra))


def draft_of(
    exchange: Exchange,
    model: str | None,
    messages: Sequence[JsonMapping],
    params: RequestParams,
    extra: JsonMapping | None,
) -> Draft:
    """Return the request with its messages parsed; unsupported fields are refused.

    Raises:
        HttpError: 404, the model does not exist.
        RequestError: an invalid or unsupported field; the error names it.
    """
    core = exchange.core
    name = core.served(model)
    if extra:
        params["extra"] = _extra_fields(core, extra, params)
    without_neutral_params(params, core.pipeline.backend.capabilities.fields)
    params["request_id"], params["adapter"] = exchange.request_id, core.adapter_of(name)
    return draft_request(messages, **params)


def draft_once(exchange: Exchange, model: str | None, make: Callable[[], Draft]) -> Draft:
    """Return the draft that `make` returns, or did for an equal body but for the pictures."""
    if (known := exchange.known) is None:
        return make()
    core = exchange.core
    return known.draft(core.pipeline.backend.capabilities, core.adapter_of(model or ""), make)


async def served_request(exchange: Exchange, model: str | None, draft: Draft) -> ServedRequest:
    """Return the request with the pictures of `draft` loaded.

    Raises:
        HttpError: 404, the model does not exist.
        RequestError: it has too many pictures, or what the backend does not support.
        MediaError: a picture cannot be read.
    """
    core = exchange.core
    name = core.served(model)
    backend = core.pipeline.backend
    core.refuse_many_images(picture for picture in draft.pictures if not picture.video)
    pictures = exchange.all_as_sent(draft.pictures)
    media, digests = core.settings.media, core.executor.digests
    # Alone, and decoded since it was taken out of the body, it is read sooner than the coroutines for several are made.
    loaded: Sequence[Medium] | None = None
    if len(pictures) == 1 and isinstance(pictures[0].source, Base64Picture):
        loaded = read_pictures(pictures, media, digests, may_wait=False)
    if loaded is None:
        loaded = await load_pictures(pictures, media, digests=digests)
    core.refuse_many_images(shown for shown in paged(loaded) if not isinstance(shown, Video))
    request = draft.finished(loaded, exchange.request_id)
    refuse_extra(core, request.extra)
    backend.refuse_unsupported(backend.capabilities.taken(request))
    policy = cache_policy(exchange, deterministic=request.sampling.deterministic)
    if exchange.traced is not None:
        exchange.traced.note_request(request, name)
    return ServedRequest(exchange, request, name, core.fingerprint(name), policy)


def _extra_fields(core: ServerCore, extra: JsonMapping, params: RequestParams) -> JsonObject:
    """Return the fields of `extra` that say something; those of the prompt that the backend honours go to `params`.

    Raises:
        RequestError: neither this server nor its backend supports one of them.
    """
    have, fields = core.pipeline.backend.capabilities, dict(extra)
    for field in OF_THE_PROMPT:
        if field in fields and field in have.fields | have.sampling:
            cast("JsonObject", params)[field] = fields.pop(field)
    fields = without_neutral(fields, passed_on=have.extra_body)
    # Of these the limits are honoured for every backend; what else they say is looked at when those are taken out.
    refuse_extra(core, {name: value for name, value in fields.items() if name not in OF_MEDIA})
    return fields


def cache_policy(exchange: Exchange, *, deterministic: bool) -> CachePolicy:
    """Return the cache policy of the request.

    Raises:
        RequestError: its `Cache-Control` is malformed.
    """
    executor = exchange.core.executor
    policy = policy_of(exchange.headers.get(b"cache-control"), executor.cache_mode, deterministic=deterministic)
    return policy if executor.store is not None else UNCACHED


def name_request(exchange: Exchange, body: QuestionFields) -> None:
    """Give the exchange the request id of the body, if that has one."""
    if body.request_id:
        exchange.request_id = body.request_id


def refuse_untold(body: QuestionFields, *names: str) -> None:
    """Raise for the first of the fields `names` that is asked for: answers of the route have no place for it.

    Raises:
        RequestError: one of them has a value other than null, false and [].
    """
    for name in names:
        value = getattr(body, name)
        if value is not None and value is not False and value != []:
            what = f"{name}: answers in this form have no place for it"
            raise RequestError(what, hint="ask /v1/chat/completions", param=name, code="unsupported_parameter")


def picture_params(name: str, items: Sequence[JsonMapping], *fields: str) -> list[str]:
    """Return the path of each picture in the request body, in order: `messages[0].content[1].image_url`."""
    return [
        f"{name}[{number}].{field}[{index}].{picture_field(part)}"
        for number, item in enumerate(items)
        for field in fields
        if isinstance(item.get(field), list)
        for index, part in enumerate(item[field])
        if is_picture(part)
    ]


def refuse_extra(core: ServerCore, extra: JsonMapping) -> None:
    """Raise for the first field of `extra` that neither this server nor its backend supports."""
    if extra and not core.pipeline.backend.capabilities.extra_body:
        name = next(iter(extra))
        message = f"unsupported parameter {name[:100]!r}"
        raise RequestError(message, hint="leave it out", param=name[:100], code="unsupported_parameter")


async def stream_together(several: Sequence[ServedRequest], writer: SeveralWriter) -> None:
    """Stream the answers of several requests of one exchange as they come."""
    exchange = several[0].exchange
    arrived: asyncio.Queue[tuple[int, Chunk | Result | Exception]] = asyncio.Queue(maxsize=len(several))
    results: list[Result | None] = [None] * len(several)

    async def pump(number: int, served: ServedRequest) -> None:
        try:
            streaming = await exchange.core.executor.start(served.call())
            async with aclosing(streaming.items) as items:
                async for item in items:
                    await arrived.put((number, item))
        except Exception as exc:  # noqa: BLE001 - raised where they are read
            await arrived.put((number, exc))

    pumps = [asyncio.create_task(pump(number, served)) for number, served in enumerate(several)]
    try:
        while any(result is None for result in results):
            number, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Result):
                results[number] = item
                several[number].finished(item)
            elif events := writer.write_of(number, item):
                if not exchange.streaming:
                    await exchange.start_events([])
                await exchange.write(events)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
    await exchange.end(writer.close_all([result for result in results if result is not None]))


async def stream(
    served: ServedRequest, writer: AnswerWriter, settle: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Stream the answer as events encoded by `writer`; `settle` is called before its last events are sent."""
    exchange = served.exchange
    streaming = await exchange.core.executor.start(served.call())
    async with aclosing(streaming.items) as items:
        async for item in items:
            events = writer.write(item) if isinstance(item, Chunk) else writer.close(item)
            # The headers wait for the first piece, so that what fails before it has its true status.
            if events and not exchange.streaming:
                await exchange.start_events(headers_for(streaming.origin, served.policy, streaming.created_at))
            if not isinstance(item, Chunk):
                served.finished(item)
                if settle is not None:
                    await settle()
                await exchange.end(events)
            elif events:
                await exchange.write(events)
