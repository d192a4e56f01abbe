"""`POST /v1/completions`: the legacy API, without pictures; each prompt becomes one user message."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qvl.errors import RequestError
from qvl.server.answers import Completion, CompletionChunk, TextChoice, TextLogprobs, TextPiece, data_event
from qvl.server.openai_format import StreamUsage, answer_head, finish_word, usage_of
from qvl.server.schemas import CompletionRequest, StreamOptions
from qvl.server.serving import chat_request, stream, validated
from qvl.types import Choice, Chunk, Result, TokenLogprob, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

MAX_PROMPTS: Final = 64


async def completions(exchange: Exchange) -> None:
    """Answer one or several prompts, as JSON or as server-sent events."""
    body = validated(CompletionRequest, await exchange.body())
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        problem = f"the request has {len(prompts)} prompts"
        raise RequestError(problem, hint=f"send 1 to {MAX_PROMPTS}", param="prompt", code="invalid_value")
    served = await exchange.until_done(lambda: _read(exchange, body, prompts))
    if body.stream:
        if len(served) > 1:
            raise RequestError("a stream must have one prompt", hint="send one request per prompt", param="prompt")
        await exchange.until_done(lambda: stream(served[0], CompletionWriter(served[0], body.stream_options)))
        return
    results = await exchange.until_done(lambda: asyncio.gather(*(one.answer() for one in served)))
    headers = [one.headers(result) for one, result in zip(served, results, strict=True)]
    await exchange.respond_json(_completion(results, served[0]), headers[0])


async def _read(exchange: Exchange, body: CompletionRequest, prompts: Sequence[str]) -> list[ServedRequest]:
    params = body.sampling()
    params["max_tokens"] = body.max_tokens or 16
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
    return [
        await chat_request(exchange, body.model, [{"role": "user", "content": prompt}], params, body.model_extra)
        for prompt in prompts
    ]


def _completion(results: Sequence[Result], served: ServedRequest) -> Completion:
    usage = Usage(
        prompt_tokens=sum(result.usage.prompt_tokens for result in results),
        completion_tokens=sum(result.usage.completion_tokens for result in results),
        cached_tokens=sum(result.usage.cached_tokens for result in results),
    )
    choices = [choice for result in results for choice in result.choices]
    return {
        **answer_head("cmpl", served.model, served.fingerprint, results[0].created_at),
        "object": "text_completion",
        "choices": [_choice(index, choice) for index, choice in enumerate(choices)],
        "usage": usage_of(usage),
    }


def _choice(index: int, choice: Choice) -> TextChoice:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs, 0),
        "finish_reason": finish_word(choice.finish_reason),
    }


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> TextLogprobs:
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


class CompletionWriter:
    """Writes the events of a streamed completion."""

    def __init__(self, served: ServedRequest, options: StreamOptions | None) -> None:
        self._usage = StreamUsage(options)
        self._head: CompletionChunk = {
            **answer_head("cmpl", served.model, served.fingerprint),
            "object": "text_completion",
            "choices": [],
        }
        self._offsets: Counter[int] = Counter()

    def write(self, chunk: Chunk) -> bytes:
        """Return the event of one chunk; b"" if it has nothing that this API can represent."""
        usage = self._usage.after(chunk)
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return b""
        offset = self._offsets[chunk.index]
        self._offsets[chunk.index] += len(chunk.text)
        piece: TextPiece = {
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": _logprobs(chunk.logprobs, offset) if chunk.logprobs else None,
            "finish_reason": None if chunk.finish_reason is None else finish_word(chunk.finish_reason),
        }
        return data_event({**self._head, "choices": [piece], **usage})

    def close(self, result: Result) -> bytes:
        """Return the usage event, if requested, and `[DONE]`."""
        return self._usage.close(self._head, result)
