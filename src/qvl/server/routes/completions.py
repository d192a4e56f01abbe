"""`POST /v1/completions`: the legacy API, without pictures.

A prompt of text becomes one user message. Token ids, and text that the answer is to repeat (`echo`), are continued as
they stand.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

from qvl.errors import RequestError
from qvl.server.answers import Completion, CompletionChunk, TextChoice, TextLogprobs, TextPiece, data_event
from qvl.server.format_schemas import asked_format, name_of_format
from qvl.server.openai_format import StreamUsage, answer_head, finish_word, notes_of, prompt_scores, usage_of
from qvl.server.schemas import CompletionRequest
from qvl.server.serving import chat_request, name_request, stream, stream_together, validated
from qvl.types import Choice, Chunk, FinishReason, PromptFacts, Result, TokenLogprob, Usage

if TYPE_CHECKING:
    from qvl.server.exchange import Exchange
    from qvl.server.serving import ServedRequest

MAX_PROMPTS: Final = 64
_NAMES: Final = {"messages": "prompt", "top_logprobs": "logprobs", "max_completion_tokens": "max_tokens"}


async def completions(exchange: Exchange) -> None:
    """Answer one or several prompts, as JSON or as server-sent events."""
    body = validated(CompletionRequest, await exchange.body())
    name_request(exchange, body)
    exchange.field_names = _NAMES | name_of_format(body.response_format, body.structured_outputs)
    if body.echo:
        # What it is made of.
        made = {name: "echo" for name in ("return_token_ids", "prompt_logprobs") if getattr(body, name) is None}
        exchange.field_names = {**exchange.field_names, **made}
    _check(body)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    prompts = _prompts(body)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        problem = f"the request has {len(prompts)} prompts"
        raise RequestError(problem, hint=f"send 1 to {MAX_PROMPTS}", param="prompt", code="invalid_value")
    served = await exchange.until_done(lambda: _read(exchange, body, prompts))
    if body.stream:
        writer = CompletionWriter(served, body)
        if len(served) > 1:
            await exchange.until_done(lambda: stream_together(served, writer))
        else:
            await exchange.until_done(lambda: stream(served[0], writer))
        return
    results = await exchange.until_done(lambda: asyncio.gather(*(one.answer() for one in served)))
    headers = [one.headers(result) for one, result in zip(served, results, strict=True)]
    await exchange.respond_json(_completion(results, served, body), headers[0])


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise RequestError(
            "suffix: text behind the answer is not supported",
            hint="leave it out",
            param="suffix",
            code="unsupported_parameter",
        )
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: must be 1 or more without echo", param="max_tokens", code="invalid_value")
    if body.logprob_token_ids and body.logprobs is None:
        raise RequestError("logprob_token_ids needs logprobs", param="logprob_token_ids", code="invalid_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            f"best_of={body.best_of}: no more answers are written than n={body.n or 1}",
            hint="leave it out",
            param="best_of",
            code="unsupported_parameter",
        )


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return cast("list[str] | list[list[int]]", prompt)


async def _read(exchange: Exchange, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> list[ServedRequest]:
    params = body.sampling()
    params["max_tokens"] = body.max_tokens or (1 if body.echo else 16)
    form = asked_format(body.response_format, body.structured_outputs, "response_format")
    if form is not None:
        params["response_format"] = form
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
    if body.echo:
        # What the answer repeats is told by whoever read it.
        params["return_token_ids"] = True
        if body.logprobs is not None:
            params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    served = []
    for prompt in prompts:
        given, text = params.copy(), prompt if isinstance(prompt, str) else ""
        if body.echo or not isinstance(prompt, str):
            if "prompt" not in exchange.core.pipeline.backend.capabilities.fields:
                name = "echo" if isinstance(prompt, str) else "prompt"
                what = f"{name}: the backend takes no prompt but messages"
                raise RequestError(what, hint="send text, without echo", param=name, code="unsupported_parameter")
            given["prompt"] = prompt
        message = {"role": "user", "content": text}
        served.append(await chat_request(exchange, body.model, [message], given, body.model_extra))
    return served


def _completion(results: Sequence[Result], served: Sequence[ServedRequest], body: CompletionRequest) -> Completion:
    usage = Usage.sum(result.usage for result in results)
    if body.max_tokens == 0:
        usage = replace(usage, completion_tokens=0)
    choices = [(choice, result) for result in results for choice in result.choices]
    model, fingerprint = served[0].model, served[0].fingerprint
    return {
        **answer_head("cmpl", model, fingerprint, results[0].created_at, body.request_id or ""),
        "object": "text_completion",
        "choices": [_choice(index, choice, result.prompt, body) for index, (choice, result) in enumerate(choices)],
        "usage": usage_of(usage),
        **notes_of(*results),
    }


def _choice(index: int, choice: Choice, prompt: PromptFacts | None, body: CompletionRequest) -> TextChoice:
    if body.max_tokens == 0:
        logprobs = None if choice.logprobs is None else ()
        choice = replace(choice, text="", logprobs=logprobs, token_ids=(), finish_reason="length")
    echoed = prompt if body.echo else None
    written: TextChoice = {
        "index": index,
        "text": choice.text if echoed is None else echoed.text + choice.text,
        "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs, 0, echoed),
        "finish_reason": finish_word(choice.finish_reason),
    }
    if body.return_token_ids:
        written["token_ids"] = list(choice.token_ids)
    if prompt is not None and body.return_token_ids:
        written["prompt_token_ids"] = list(prompt.token_ids)
    if prompt is not None and body.prompt_logprobs is not None:
        written["prompt_logprobs"] = prompt_scores(prompt)
    return written


def _logprobs(tokens: Sequence[TokenLogprob], offset: int, echoed: PromptFacts | None = None) -> TextLogprobs:
    """Return the logprobs of `tokens`, behind those of the prompt that the answer repeats."""
    offsets = []
    names: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    before: Sequence[TokenLogprob | None] = () if echoed is None else echoed.logprobs
    for token in (*before, *tokens):
        offsets.append(offset)
        if token is None:
            assert echoed is not None
            # The text of the first token is what the others leave of the prompt.
            rest = sum(len(one.token) for one in before[1:] if one is not None)
            names.append(echoed.text[: len(echoed.text) - rest])
            values.append(None)
            tops.append(None)
        else:
            names.append(token.token)
            value = max(token.logprob, -9999.0)
            values.append(value)
            alternatives = {top.token: max(top.logprob, -9999.0) for top in token.top}
            # The token itself is told beside the likeliest, as by OpenAI and vLLM.
            tops.append(alternatives | {token.token: value})
        offset += len(names[-1])
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _without_answer(chunk: Chunk) -> Chunk:
    """Return a chunk of an answer that only repeats its prompt, for which one token was written all the same."""
    usage = None if chunk.usage is None else replace(chunk.usage, completion_tokens=0)
    reason: FinishReason | None = None if chunk.finish_reason is None else "length"
    return replace(chunk, text="", logprobs=(), token_ids=(), usage=usage, finish_reason=reason)


class CompletionWriter:
    """Writes the events of a streamed completion."""

    def __init__(self, served: Sequence[ServedRequest], body: CompletionRequest) -> None:
        self._body = body
        self._usage = StreamUsage(body.stream_options)
        self._head: CompletionChunk = {
            **answer_head("cmpl", served[0].model, served[0].fingerprint, ident=body.request_id or ""),
            "object": "text_completion",
            "choices": [],
        }
        self._offsets: Counter[int] = Counter()
        self._choices = body.n or 1
        self._prompts: dict[int, PromptFacts] = {}
        self._begun: set[int] = set()

    def write_of(self, number: int, chunk: Chunk) -> bytes:
        """Return the events of a chunk of the prompt `number`: the choices of each follow those of the one before."""
        if chunk.prompt is not None:
            self._prompts[number] = chunk.prompt
        return self._write(replace(chunk, index=number * self._choices + chunk.index), number)

    def close_all(self, results: Sequence[Result]) -> bytes:
        """Return the usage of all prompts together, if requested, and `[DONE]`."""
        notes = tuple(notes_of(*results).get("notes", ()))
        return self.close(replace(results[0], usage=Usage.sum(result.usage for result in results), notes=notes))

    def write(self, chunk: Chunk) -> bytes:
        """Return the event of one chunk; b"" if it has nothing that this API can represent."""
        if chunk.prompt is not None:
            self._prompts[0] = chunk.prompt
        return self._write(chunk, 0)

    def _write(self, chunk: Chunk, number: int) -> bytes:
        if self._body.max_tokens == 0:
            chunk = _without_answer(chunk)
        usage = self._usage.after(chunk, number)
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return b""
        first, prompt = chunk.index not in self._begun, self._prompts.get(number)
        self._begun.add(chunk.index)
        echoed = prompt if self._body.echo and first else None
        offset = self._offsets[chunk.index]
        text = chunk.text if echoed is None else echoed.text + chunk.text
        self._offsets[chunk.index] += len(text)
        listed = chunk.logprobs or (echoed is not None and echoed.logprobs)
        piece: TextPiece = {
            "index": chunk.index,
            "text": text,
            "logprobs": _logprobs(chunk.logprobs, offset, echoed) if listed else None,
            "finish_reason": None if chunk.finish_reason is None else finish_word(chunk.finish_reason),
        }
        if self._body.return_token_ids:
            piece["token_ids"] = list(chunk.token_ids)
            if first and prompt is not None:
                piece["prompt_token_ids"] = list(prompt.token_ids)
        if first and prompt is not None and self._body.prompt_logprobs is not None:
            piece["prompt_logprobs"] = prompt_scores(prompt)
        return data_event({**self._head, "choices": [piece], **usage})

    def close(self, result: Result) -> bytes:
        """Return the event with usage and notes, if there is any need of one, and `[DONE]`."""
        if self._body.max_tokens == 0:
            result = replace(result, usage=replace(result.usage, completion_tokens=0))
        empty: TextPiece = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        return self._usage.close(self._head, result, empty)
