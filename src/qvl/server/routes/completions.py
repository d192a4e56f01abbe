"""`POST /v1/completions`: the older form, without pictures; every prompt is a user's message of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from qvl.errors import RequestError
from qvl.ids import new_id
from qvl.server.errors import from_validation
from qvl.server.openai_format import RunningUsage, dumps, finish_word, usage_of, wants_running_usage
from qvl.server.schemas import CompletionRequest
from qvl.server.serving import answer, chat_request, started_stream
from qvl.types import Choice, Chunk, Result, TokenLogprob, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

MAX_PROMPTS: Final = 64


async def completions(exchange: Exchange) -> None:
    """Answers prompts, at once or as events."""
    body = await exchange.body()
    try:
        wanted = CompletionRequest.model_validate_json(body)
    except ValidationError as exc:
        raise from_validation(exc, body) from exc
    if wanted.stream_options is not None and not wanted.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    prompts = [wanted.prompt] if isinstance(wanted.prompt, str) else wanted.prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"{len(prompts)} prompts", hint=f"1 to {MAX_PROMPTS}", param="prompt", code="invalid_value")
    asked = await exchange.until_done(lambda: _read(exchange, wanted, prompts))
    if wanted.stream:
        if len(asked) > 1:
            raise RequestError("a stream answers one prompt", hint="send them apart", param="prompt")
        await exchange.until_done(lambda: _stream(exchange, wanted, asked[0]))
        return
    results = await exchange.until_done(lambda: asyncio.gather(*(answer(exchange, one) for one in asked)))
    headers = [one.headers(result) for one, result in zip(asked, results, strict=True)]
    await exchange.respond_json(_completion(results, asked[0]), headers[0])


async def _read(exchange: Exchange, wanted: CompletionRequest, prompts: Sequence[str]) -> list[ServedRequest]:
    params = wanted.sampling() | {"max_tokens": wanted.max_tokens or 16}
    if wanted.logprobs is not None:
        params["logprobs"] = wanted.logprobs
    return [
        await chat_request(
            exchange, wanted.model, [{"role": "user", "content": prompt}], dict(params), wanted.model_extra
        )
        for prompt in prompts
    ]


def _completion(results: Sequence[Result], asked: ServedRequest) -> dict[str, Any]:
    choices = [choice for result in results for choice in result.choices]
    usage = Usage(
        prompt_tokens=sum(result.usage.prompt_tokens for result in results),
        completion_tokens=sum(result.usage.completion_tokens for result in results),
        cached_tokens=sum(result.usage.cached_tokens for result in results),
    )
    return {
        "id": f"cmpl-{new_id()}",
        "object": "text_completion",
        "created": int(results[0].created_at or time.time()),
        "model": asked.model,
        "choices": [_choice(index, choice) for index, choice in enumerate(choices)],
        "usage": usage_of(usage),
        "system_fingerprint": asked.fingerprint,
    }


def _choice(index: int, choice: Choice) -> dict[str, Any]:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs, 0),
        "finish_reason": finish_word(choice.finish_reason),
    }


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older logprobs object: parallel lists, with each token's place in the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        "top_logprobs": [{top.token: max(top.logprob, -9999.0) for top in token.top} for token in tokens],
        "text_offset": offsets,
    }


async def _stream(exchange: Exchange, wanted: CompletionRequest, asked: ServedRequest) -> None:
    streaming = await started_stream(exchange, asked)
    async with aclosing(streaming.items) as items:
        async for piece in _events(items, wanted, asked):
            if not exchange.streaming:
                await exchange.start_events(asked.stream_headers(streaming))
            await exchange.write(piece)
    await exchange.end(b"data: [DONE]\n\n")


async def _events(
    items: AsyncGenerator[Chunk | Result, None], wanted: CompletionRequest, asked: ServedRequest
) -> AsyncGenerator[bytes, None]:
    include_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
    base: dict[str, Any] = {
        "id": f"cmpl-{new_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": asked.fingerprint,
    }
    if include_usage:
        base["usage"] = None
    running = RunningUsage() if wants_running_usage(wanted.stream_options) else None
    offsets: dict[int, int] = {}
    async for item in items:
        if isinstance(item, Result):
            asked.finished(item)
            if include_usage:
                yield _event({**base, "choices": [], "usage": usage_of(item.usage)})
            continue
        if running is not None:
            base["usage"] = running.after(item)
        if not item.text and not item.logprobs and item.finish_reason is None:
            continue
        offset = offsets.get(item.index, 0)
        offsets[item.index] = offset + len(item.text)
        choice = {
            "index": item.index,
            "text": item.text,
            "logprobs": _logprobs(item.logprobs, offset) if item.logprobs else None,
            "finish_reason": None if item.finish_reason is None else finish_word(item.finish_reason),
        }
        yield _event({**base, "choices": [choice]})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"
