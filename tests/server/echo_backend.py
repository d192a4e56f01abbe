"""An in-process model for the server's tests: it says what it saw, as slowly as a test wants, and can die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from qvl.backends.base import Backend, Capabilities
from qvl.errors import BackendUnavailableError, EngineDeadError
from qvl.testing import echo
from qvl.types import ChatRequest, Chunk, Timing, ToolCallDelta, Usage


class EchoBackend(Backend):
    """Answers with the colours and sizes of the pictures and the question."""

    name = "echo"

    def __init__(
        self, model: str = "echo-vl", *, pause: float = 0.0, load: float = 0.0, fail_open: Exception | None = None
    ) -> None:
        self.model = model
        self.pause = pause
        self.load = load
        self.fail_open = fail_open
        self.running = 0
        self.started = 0
        self.refused = 0
        self.aborted = 0
        self.dead = False
        self.not_ready: str | None = None
        self.gone: str | None = None
        self.requests: list[ChatRequest] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            images=8, max_context=4096, response_formats=frozenset({"json_object", "json_schema", "choice"}), tools=True
        )

    async def open(self) -> None:
        began = time.monotonic()
        # A test that has seen enough of the loading sets `load` to 0.
        while time.monotonic() - began < self.load:
            await asyncio.sleep(0.01)
        if self.fail_open is not None:
            raise self.fail_open

    def unready(self) -> str | None:
        return "the engine is dead" if self.dead else self.not_ready

    def lost(self) -> str | None:
        return self.gone

    def stats(self) -> Mapping[str, float]:
        return {"num_running": float(self.running), "num_aborted_total": float(self.aborted)}

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        if self.not_ready:
            self.refused += 1
            raise BackendUnavailableError(self.not_ready)
        self.requests.append(request)
        asked = await asyncio.to_thread(_asked, request)
        self.running += 1
        self.started += 1
        finished = False
        try:
            written = 0
            said = echo.answer(asked)
            for index, choice in enumerate(said):
                last = index == len(said) - 1
                written += choice.completion_tokens
                if choice.call is not None:
                    name, arguments = choice.call
                    yield Chunk(index=index, tool_calls=(ToolCallDelta(0, f"call_{index}", name, ""),))
                    yield Chunk(index=index, tool_calls=(ToolCallDelta(0, arguments=arguments),))
                logprobs = echo.logprobs_of(choice.tokens, asked.logprobs or 0)
                for token, logprob in zip(choice.tokens, logprobs, strict=True):
                    if self.pause:
                        await asyncio.sleep(self.pause)
                    if self.dead:
                        raise EngineDeadError("the engine is dead")
                    yield Chunk(text=token, index=index, logprobs=(logprob,) if asked.logprobs is not None else ())
                usage = Usage(asked.prompt_tokens, written, asked.image_tokens)
                yield Chunk(
                    index=index,
                    finish_reason=choice.finish,
                    usage=usage if last else None,
                    timing=Timing(first_token=0.001) if last else None,
                )
            finished = True
        finally:
            self.running -= 1
            if not finished:
                self.aborted += 1


def _asked(request: ChatRequest) -> echo.EchoRequest:
    last = request.messages[-1]
    sampling = request.sampling
    wanted = request.response_format
    seen: list[Any] = []
    for picture in request.pictures:
        image = picture.rgb()
        seen.append(echo.PictureFacts(echo.colour_name(image), *image.size))
    return replace(
        echo.EchoRequest(last.text),
        history=" ".join(message.text for message in request.messages[:-1]),
        pictures=tuple(seen),
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        n=sampling.n,
        schema=wanted.schema,
        json_object=wanted.kind == "json_object",
        choices=wanted.choices,
        tools=tuple(tool.name for tool in request.tools),
        tool_schemas={tool.name: tool.parameters for tool in request.tools},
        tool_choice=request.tool_choice,
    )
