"""Backends for tests: `EchoBackend` answers from the request, `RecordingBackend` keeps the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from qvl.backends.base import Backend, Capabilities
from qvl.backends.wrapper import WrappingBackend
from qvl.errors import BackendUnavailableError, ContextLengthError
from qvl.testing import echo
from qvl.types import ChatRequest, Chunk, JsonObject, Timing, ToolCallDelta, Usage

ECHO_CAPABILITIES = Capabilities(
    images=8,
    max_context=100_000,
    sampling=frozenset(
        {"temperature", "top_k", "min_p", "max_tokens", "stop", "ignore_eos", "seed", "logprobs", "n", "top_p"}
    ),
    response_formats=frozenset({"json_object", "json_schema", "choice"}),
    tools=True,
)


class EchoBackend(Backend):
    """Names the colours of the request's pictures, in order, and repeats the question.

    Args:
        model: any name.
        pause: seconds before each token.
        capabilities: what to declare; what is not declared is refused.
        fail: raised by every stream, before the first token.
    """

    name = "echo"

    def __init__(
        self,
        model: str = "echo",
        *,
        pause: float = 0.0,
        capabilities: Capabilities = ECHO_CAPABILITIES,
        fail: Exception | None = None,
    ) -> None:
        self.model = model
        self.pause = pause
        self.fail = fail
        self._capabilities = capabilities
        self._open = False
        self._running: set[asyncio.Event] = set()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def open(self) -> None:
        self._open = True

    async def aclose(self) -> None:
        self._open = False
        for closed in self._running:
            closed.set()

    def peek_identity(self) -> JsonObject | None:
        return self.identity()

    def stats(self) -> Mapping[str, float]:
        return {"num_running": len(self._running), "num_waiting": 0}

    def unready(self) -> str | None:
        return None if self._open else "not open"

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        if not self._open:
            raise BackendUnavailableError("echo is not open", hint="await backend.open()")
        if self.fail is not None:
            raise self.fail
        closed = asyncio.Event()
        self._running.add(closed)
        try:
            async with aclosing(self._say(request)) as chunks:
                async for chunk in chunks:
                    if self.pause:
                        await self._wait(closed)
                    else:
                        await asyncio.sleep(0)
                    if closed.is_set():
                        raise BackendUnavailableError("echo was closed while a request was running")
                    yield chunk
        finally:
            self._running.discard(closed)

    async def _wait(self, closed: asyncio.Event) -> None:
        try:
            await asyncio.wait_for(closed.wait(), self.pause)
        except TimeoutError:
            return

    async def _say(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        question = echo_request(request)
        context = self._capabilities.max_context
        if context is not None and question.prompt_tokens > context:
            raise ContextLengthError(f"the prompt has {question.prompt_tokens} tokens, the context {context}")
        choices = echo.answer(question)
        usage = Usage(
            prompt_tokens=question.prompt_tokens,
            completion_tokens=sum(choice.completion_tokens for choice in choices),
            image_tokens=question.image_tokens,
        )
        for index, choice in enumerate(choices):
            whole = usage if index == len(choices) - 1 else None
            if choice.call is not None:
                name, arguments = choice.call
                yield Chunk(index=index, tool_calls=(ToolCallDelta(0, f"call_{index}", name, arguments),))
            notes = echo.logprobs_of(choice.tokens, request.sampling.logprobs or 0)
            with_logprobs = request.sampling.logprobs is not None
            for token, note in zip(choice.tokens, notes, strict=True):
                yield Chunk(text=token, index=index, logprobs=(note,) if with_logprobs else ())
            yield Chunk(index=index, finish_reason=choice.finish, usage=whole, timing=Timing() if whole else None)


def echo_request(request: ChatRequest) -> echo.EchoRequest:
    """Return the EchoRequest of a ChatRequest; its question is the text of the last user message."""
    params, form = request.sampling, request.response_format
    last = next((m for m in reversed(request.messages) if m.role == "user"), request.messages[-1])
    return echo.EchoRequest(
        question=last.text,
        history=" ".join(message.text for message in request.messages if message is not last),
        pictures=tuple(
            echo.PictureFacts(echo.colour_name(picture.rgb()), picture.width, picture.height)
            for picture in request.pictures
        ),
        temperature=params.temperature,
        narrow=params.top_k == 1 or params.min_p == 1.0,
        max_tokens=params.max_tokens,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        logprobs=params.logprobs,
        n=params.n,
        schema=form.schema,
        json_object=form.kind == "json_object",
        choices=form.choices,
        tools=tuple(tool.name for tool in request.tools),
        tool_schemas={tool.name: tool.parameters for tool in request.tools},
        tool_choice=request.tool_choice,
    )


class RecordingBackend(WrappingBackend):
    """Passes everything to `inner` and keeps the requests: `backend.requests[-1].sampling.seed`."""

    def __init__(self, inner: Backend | None = None) -> None:
        super().__init__(inner or EchoBackend())
        self.requests: list[ChatRequest] = []
        self.finished = 0
        self.closed_early = 0

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        done = False
        try:
            async with aclosing(self.inner.stream(request)) as chunks:
                async for chunk in chunks:
                    done = done or chunk.usage is not None
                    yield chunk
        finally:
            self.finished += done
            self.closed_early += not done
