"""From a validated request to the pipeline and back: what the families of routes have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvl.errors import MediaError, RequestError
from qvl.pipeline.call import RequestCall
from qvl.pipeline.load_pictures import load_pictures
from qvl.pipeline.parse_parts import is_picture, picture_field
from qvl.pipeline.parse_request import draft_request
from qvl.server.cache_headers import headers_for, policy_of
from qvl.server.neutral_fields import without_neutral

if TYPE_CHECKING:
    from qvl.caches.policy import CachePolicy
    from qvl.pipeline.job import Streaming
    from qvl.server.exchange import Exchange, Headers
    from qvl.server.state import ServerCore
    from qvl.types import ChatRequest, Result


@dataclass(slots=True)
class ServedRequest:
    """A request that was understood, and what its answer must repeat."""

    exchange: Exchange
    request: ChatRequest
    model: str
    fingerprint: str
    policy: CachePolicy
    fields: dict[str, Any] = field(default_factory=dict)

    def call(self) -> RequestCall:
        """Return what the executor is to execute."""
        exchange = self.exchange
        namespace = exchange.core.namespace(exchange.tenant)
        return RequestCall(self.request, self.policy, namespace=namespace, started=exchange.started)

    def headers(self, result: Result) -> Headers:
        """Headers of a finished answer; also counts it."""
        self.finished(result)
        headers = headers_for(result.cache, self.policy, result.created_at)
        headers.append((b"server-timing", server_timing(result)))
        headers.append((b"openai-processing-ms", b"%d" % round(result.timing.total * 1000)))
        return headers

    def stream_headers(self, streaming: Streaming) -> Headers:
        return headers_for(streaming.origin, self.policy, streaming.created_at)

    def finished(self, result: Result) -> None:
        """Counts an answer and notes it for the log line."""
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
            exchange.traced.answered(result, self.model)


def server_timing(result: Result) -> bytes:
    """The stages as a `Server-Timing` header, in milliseconds, as browsers show it."""
    timing = result.timing
    stages = (
        ("media", timing.media),
        ("cache", timing.cache),
        ("queue", timing.queue),
        ("first_token", timing.first_token),
        ("total", timing.total),
    )
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages if seconds).encode()


async def chat_request(
    exchange: Exchange,
    model: str | None,
    messages: Sequence[Mapping[str, Any]],
    params: dict[str, Any],
    extra: Mapping[str, Any] | None,
) -> ServedRequest:
    """Reads messages and pictures, and refuses what the backend would not honour.

    Raises:
        RequestError: naming the field at fault.
    """
    core = exchange.core
    name = core.served(model)
    given = without_neutral(extra or {}, passed_on=core.pipeline.backend.capabilities.extra_body)
    # Of these the limits are honoured for every backend; what else they say is looked at when those are taken out.
    refuse_extra(core, {name: value for name, value in given.items() if name != "mm_processor_kwargs"})
    try:
        draft = draft_request(messages, request_id=exchange.request_id, extra=given, **params)
        request = draft.finished(await load_pictures(draft.pictures, core.settings.media, seen=core.executor.digests))
    except MediaError as exc:
        core.metrics.media_errors.labels(exc.code).inc()
        raise
    refuse_extra(core, request.extra)
    core.pipeline.backend.refuse_unsupported(request)
    policy = policy_of(
        exchange.headers.get(b"cache-control"),
        core.executor.cache_mode,
        deterministic=request.sampling.deterministic,
    )
    if core.executor.store is None:
        policy = type(policy)(read=False, write=False)
    if exchange.traced is not None:
        exchange.traced.asked(request, name)
    return ServedRequest(exchange, request, name, core.fingerprint, policy)


def picture_places(name: str, items: Sequence[Mapping[str, Any]], *fields: str) -> list[str]:
    """Where each picture of a request stands in its body, in order: `messages[0].content[1].image_url`."""
    return [
        f"{name}[{number}].{field}[{place}].{picture_field(part)}"
        for number, item in enumerate(items)
        for field in fields
        if isinstance(item.get(field), list)
        for place, part in enumerate(item[field])
        if is_picture(part)
    ]


def refuse_extra(core: ServerCore, extra: Mapping[str, Any]) -> None:
    """Raises for the first field that neither this server nor its backend knows."""
    if extra and not core.pipeline.backend.capabilities.extra_body:
        name = next(iter(extra))
        raise RequestError(
            f"{name[:100]!r} is not honoured here", hint="leave it out", param=name[:100], code="unsupported_parameter"
        )


async def answer(exchange: Exchange, asked: ServedRequest) -> Result:
    """The whole answer."""
    return await exchange.core.executor.execute(asked.call())


async def started_stream(exchange: Exchange, asked: ServedRequest) -> Streaming:
    """An answer that begins."""
    return await exchange.core.executor.start(asked.call())
