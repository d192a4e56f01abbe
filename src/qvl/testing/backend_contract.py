"""The contract of backends as a pytest suite.

```python
class TestMine(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls):
        return lambda: MyBackend("my-model")
```

A capability that the backend does not declare must be *refused*; nothing is skipped for lack of it. Overridable:
`question` and `long_question` (what to ask), `sight` (for models that see), `patience` (seconds a test may take).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from typing import ClassVar

import pytest

from qvl.backends.base import Backend
from qvl.chunks import fold
from qvl.errors import BackendError, ContextLengthError, QvlError
from qvl.media.video_parts import as_timed_pictures
from qvl.sampling import PARAMETERS
from qvl.testing.asking import Sight, ask, clip, collect, drain, endless, idle, in_loop, refused, square, watch
from qvl.testing.decision_contract import DecisionContract
from qvl.types import ChatRequest, JsonObject, Message, ResponseFormat, SamplingParams, TextPart, Tool

SCHEMA: JsonObject = {
    "type": "object",
    "properties": {"brand": {"type": "string", "enum": ["Acme", "Zenith"]}, "sure": {"type": "boolean"}},
    "required": ["brand", "sure"],
    "additionalProperties": False,
}


class BackendContract(DecisionContract):
    """The contract suite: subclass it, define `make_backend`, run it with pytest."""

    patience: ClassVar[float] = 120.0
    loop: ClassVar[asyncio.AbstractEventLoop]

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        """Return a factory of unopened backends, all of the same model and settings."""
        pytest.fail("define a class-scoped fixture make_backend that returns a factory")

    @pytest.fixture(scope="class")
    @classmethod
    def question(cls) -> str:
        return "Describe what is sold here, in a few words."

    @pytest.fixture(scope="class")
    @classmethod
    def long_question(cls) -> str:
        """Return a question whose answer has at least 24 tokens, or with `ignore_eos` as many as `max_tokens`."""
        return "Count: " + " ".join(f"number-{n}" for n in range(40))

    @pytest.fixture(scope="class")
    @classmethod
    def sight(cls) -> Sight | None:
        """Return the vision test of the model; override it for a model that sees."""
        return None

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _loop(cls) -> Iterator[None]:
        loop = asyncio.new_event_loop()
        cls.loop = loop
        yield
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, _loop: None, make_backend: Callable[[], Backend]) -> Iterator[Backend]:
        """Yield an open backend, shared by the tests that do not change it."""
        backend = make_backend()
        cls.loop.run_until_complete(asyncio.wait_for(backend.open(), cls.patience))
        yield backend
        cls.loop.run_until_complete(asyncio.wait_for(backend.aclose(), cls.patience))

    # The answer as a whole

    @in_loop
    async def test_a_stream_ends_with_finish_reason_and_usage(self, backend: Backend, question: str) -> None:
        chunks = await collect(backend, ask(question, max_tokens=8))
        assert chunks[-1].finish_reason in ("stop", "length")
        assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks[:-1])
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.prompt_tokens > 0
        assert 0 < usage.completion_tokens <= 8
        assert chunks[0].prompt_usage in (None, usage.of_prompt)
        assert all(chunk.prompt_usage is None for chunk in chunks[1:])

    @in_loop
    async def test_generate_is_the_folded_stream(self, backend: Backend, question: str) -> None:
        request = ask(question, max_tokens=12)
        result = await backend.generate(request)
        choices, usage, _ = fold(await collect(backend, request))
        assert (result.choices[0].text, result.finish_reason) == (choices[0].text, choices[0].finish_reason)
        assert result.usage.completion_tokens == usage.completion_tokens
        assert (result.model, result.backend) == (backend.model, backend.name)
        assert result.timing.total > 0

    @in_loop
    async def test_a_conversation_is_accepted(self, backend: Backend, question: str) -> None:
        turns = (("system", "Be brief."), ("user", question), ("assistant", "A shoe."), ("user", question))
        messages = tuple(Message(role, (TextPart(text),)) for role, text in turns)  # type: ignore[arg-type]
        result = await backend.generate(ChatRequest(messages, SamplingParams(max_tokens=4)))
        assert result.usage.prompt_tokens > 0

    @in_loop
    async def test_concurrent_streams_answer_as_each_alone(self, backend: Backend, question: str) -> None:
        requests = [ask(f"{question} Item {n}.", max_tokens=6) for n in range(8)]
        alone = [(await backend.generate(request)).text for request in requests]
        together = await asyncio.gather(*(backend.generate(request) for request in requests))
        assert [result.text for result in together] == alone

    # Ending early

    @in_loop
    async def test_closing_a_stream_frees_its_slot(self, backend: Backend, long_question: str) -> None:
        for _ in range(3):
            async with aclosing(backend.stream(endless(backend, long_question))) as chunks:
                await anext(chunks)
        await idle(backend)
        assert (await backend.generate(ask(long_question, max_tokens=2))).usage.completion_tokens > 0

    @in_loop
    async def test_a_stream_closed_before_its_first_chunk_costs_nothing(self, backend: Backend, question: str) -> None:
        await backend.stream(ask(question)).aclose()
        await idle(backend)

    @in_loop
    async def test_a_cancelled_task_frees_its_slot(self, backend: Backend, long_question: str) -> None:
        for delay in (0.0, 0.01, 0.05):
            task = asyncio.ensure_future(collect(backend, endless(backend, long_question)))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await idle(backend)
        assert (await backend.generate(ask(long_question, max_tokens=2))).usage.completion_tokens > 0

    @in_loop
    async def test_aclose_ends_work_in_flight_with_an_error_of_ours(
        self, make_backend: Callable[[], Backend], long_question: str
    ) -> None:
        backend = make_backend()
        await backend.open()
        stream = backend.stream(endless(backend, long_question))
        await anext(stream)
        rest = asyncio.ensure_future(drain(stream))
        await asyncio.sleep(0)
        await asyncio.wait_for(backend.aclose(), 30)
        outcome = (await asyncio.gather(rest, return_exceptions=True))[0]
        assert outcome is None or isinstance(outcome, BackendError)

    @in_loop
    async def test_open_and_aclose_may_be_called_twice(self, make_backend: Callable[[], Backend]) -> None:
        backend = make_backend()
        await backend.open()
        await backend.open()
        assert backend.unready() is None
        await backend.aclose()
        await backend.aclose()
        await make_backend().aclose()

    @in_loop
    async def test_a_closed_backend_answers_with_an_error_of_ours(
        self, make_backend: Callable[[], Backend], question: str
    ) -> None:
        backend = make_backend()
        await backend.open()
        await backend.aclose()
        with pytest.raises(BackendError):
            await backend.generate(ask(question))

    # Facts about the backend

    @in_loop
    async def test_identity_is_json_and_the_same_for_the_same_settings(
        self, backend: Backend, make_backend: Callable[[], Backend]
    ) -> None:
        other = make_backend()
        peeked = other.peek_identity()
        await other.open()
        try:
            text = json.dumps(other.identity(), sort_keys=True, allow_nan=False)
            assert text == json.dumps(backend.identity(), sort_keys=True)
            assert peeked is None or peeked == other.identity()
        finally:
            await other.aclose()

    @in_loop
    async def test_stats_are_numbers_by_snake_case_names(self, backend: Backend) -> None:
        stats = backend.stats()
        assert all(name.isidentifier() and name == name.lower() for name in stats)
        assert all(isinstance(value, int | float) for value in stats.values())
        assert "num_running" in stats
        assert backend.capabilities.sampling <= SamplingParams.names()

    # Sampling

    @in_loop
    async def test_each_sampling_field_is_accepted_or_refused_by_name(self, backend: Backend, question: str) -> None:
        have = backend.capabilities
        for name, known in PARAMETERS.items():
            example = min(2, have.top_logprobs) if name == "logprobs" and have.logprobs else known.example
            request = ask(question, **{"max_tokens": 3, name: example})
            if name in have.sampling:
                await backend.generate(request)
            else:
                await refused(backend, request, name)

    @in_loop
    async def test_max_tokens_ends_with_length(self, backend: Backend, long_question: str) -> None:
        result = await backend.generate(endless(backend, long_question, 2))
        assert (result.finish_reason, result.usage.completion_tokens) == ("length", 2)

    @in_loop
    async def test_stop_cuts_the_text_before_the_stop_string(self, backend: Backend, long_question: str) -> None:
        if "stop" not in backend.capabilities.sampling:
            await refused(backend, ask(long_question, stop=("a",)), "stop")
            return
        whole = (await backend.generate(ask(long_question, max_tokens=24))).text
        stop = whole[len(whole) // 2 :][:3]
        result = await backend.generate(ask(long_question, max_tokens=24, stop=(stop,)))
        assert result.text == whole[: whole.index(stop)]
        assert result.finish_reason == "stop"

    @in_loop
    async def test_n_gives_n_whole_choices(self, backend: Backend, question: str) -> None:
        request = ask(question, n=3, max_tokens=4)
        if "n" not in backend.capabilities.sampling:
            await refused(backend, request, "n")
            return
        chunks = await collect(backend, request)
        choices, usage, _ = fold(chunks)
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert all(choice.finish_reason in ("stop", "length") for choice in choices)
        for index in range(3):
            own = [chunk for chunk in chunks if chunk.index == index]
            assert own[-1].finish_reason is not None
            assert all(chunk.finish_reason is None for chunk in own[:-1])
        assert chunks[-1].usage is not None
        assert usage.completion_tokens >= 3

    @in_loop
    async def test_logprobs_have_each_token_once(self, backend: Backend, question: str) -> None:
        if not backend.capabilities.logprobs:
            await refused(backend, ask(question, logprobs=2, max_tokens=6), "logprobs")
            return
        most = backend.capabilities.top_logprobs
        if most < 20:
            await refused(backend, ask(question, logprobs=most + 1), "top_logprobs")
        request = ask(question, logprobs=min(2, most), max_tokens=6)
        result = await backend.generate(request)
        assert result.logprobs is not None
        assert len(result.logprobs) in (result.usage.completion_tokens, result.usage.completion_tokens - 1)
        assert b"".join(item.bytes for item in result.logprobs).decode("utf-8", "replace").startswith(result.text)
        for item in result.logprobs:
            assert item.logprob <= 1e-6
            assert len(item.top) == min(2, most)
            assert [top.logprob for top in item.top] == sorted((top.logprob for top in item.top), reverse=True)
        assert (await backend.generate(ask(question, max_tokens=2))).logprobs is None

    @in_loop
    async def test_a_seed_gives_the_same_text_again(self, backend: Backend, question: str) -> None:
        request = ask(question, seed=11, temperature=1.0, max_tokens=8)
        if not backend.capabilities.seed:
            await refused(backend, ask(question, seed=11), "seed")
            return
        first, *others = [(await backend.generate(request)).text for _ in range(3)]
        assert others == [first, first]

    @in_loop
    async def test_ignore_eos_goes_on_to_max_tokens(self, backend: Backend, question: str) -> None:
        request = ask(question, ignore_eos=True, max_tokens=40)
        if "ignore_eos" not in backend.capabilities.sampling:
            await refused(backend, request, "ignore_eos")
            return
        result = await backend.generate(request)
        assert (result.finish_reason, result.usage.completion_tokens) == ("length", 40)

    # What the answer must look like

    @in_loop
    async def test_each_response_format_is_enforced_or_refused(self, backend: Backend, question: str) -> None:
        pattern = "(Acme|Zenith)-[0-9]{2}"
        formats: dict[str, tuple[ResponseFormat, Callable[[str], bool]]] = {
            "json_object": (ResponseFormat("json_object"), lambda text: isinstance(json.loads(text), dict)),
            "json_schema": (ResponseFormat("json_schema", schema=SCHEMA), _fits_schema),
            "regex": (ResponseFormat("regex", pattern=pattern), lambda text: bool(re.fullmatch(pattern, text))),
            "choice": (ResponseFormat("choice", choices=("Acme", "Zenith")), lambda text: text in ("Acme", "Zenith")),
        }
        for kind, (form, fits) in formats.items():
            # Said in the question too: some endpoints refuse the JSON mode without the word.
            request = ask(f"{question} As JSON.", max_tokens=120).replace(response_format=form)
            if kind not in backend.capabilities.response_formats:
                await refused(backend, request, "response_format")
                continue
            result = await backend.generate(request)
            assert (kind == "json_object" and result.finish_reason == "length") or fits(result.text), result.text

    @in_loop
    async def test_a_named_tool_is_called_or_tools_are_refused(self, backend: Backend, question: str) -> None:
        tool = Tool("price_of", "Looks a price up.", SCHEMA)
        request = ask(question, max_tokens=120).replace(tools=(tool,), tool_choice="price_of")
        if not backend.capabilities.tools:
            await refused(backend, request, "tools")
            return
        result = await backend.generate(request)
        assert [call.name for call in result.tool_calls] == ["price_of"]
        assert result.finish_reason == "tool_calls"
        assert _fits_schema(result.tool_calls[0].arguments)

    @in_loop
    async def test_fields_nobody_knows_are_refused_unless_they_pass_through(
        self, backend: Backend, question: str
    ) -> None:
        if not backend.capabilities.extra_body:
            await refused(backend, ask(question).replace(extra={"zq_unknown": 1}), "zq_unknown")

    # Pictures

    @in_loop
    async def test_a_picture_lengthens_the_prompt_or_is_refused(self, backend: Backend, question: str) -> None:
        request = ask(question, square(), max_tokens=2)
        if not backend.capabilities.images:
            await refused(backend, request, "messages")
            return
        with_picture = (await backend.generate(request)).usage
        without = (await backend.generate(ask(question, max_tokens=2))).usage
        assert with_picture.prompt_tokens > without.prompt_tokens
        assert with_picture.image_tokens <= with_picture.prompt_tokens

    @in_loop
    async def test_more_pictures_than_declared_are_refused(self, backend: Backend, question: str) -> None:
        picture = square()
        await refused(backend, ask(question, *[picture] * (backend.capabilities.images + 1)), "messages")

    @in_loop
    async def test_videos_are_taken_in_the_declared_number(self, backend: Backend, question: str) -> None:
        """More frames make a longer prompt, whose tokens are a video's; one video more is refused, with its way out."""
        most = backend.capabilities.videos
        await refused(backend, watch(question, *[clip(1)] * (most + 1)), "messages")
        if most:
            shown = [(await backend.generate(watch(question, clip(count), max_tokens=2))).usage for count in (2, 6)]
            assert shown[1].prompt_tokens > shown[0].prompt_tokens
            assert shown[0].image_tokens == 0
        timed = as_timed_pictures(watch(question, clip(2), max_tokens=2))
        assert not timed.videos
        if backend.capabilities.images >= 2:
            assert (await backend.generate(timed)).choices

    @in_loop
    async def test_several_pictures_keep_their_order(self, backend: Backend, sight: Sight | None) -> None:
        if sight is None:
            pytest.skip("this model does not see")
        names = list(sight.pictures)
        for order in (names, names[::-1]):
            pictures = [sight.pictures[name] for name in order]
            result = await backend.generate(ask(sight.question, *pictures, max_tokens=64))
            assert sight.names_in(result.text) == order, result.text

    # Bad requests

    @in_loop
    async def test_a_prompt_longer_than_the_context_is_refused(self, backend: Backend) -> None:
        context = backend.capabilities.max_context
        if context is None or context > 200_000:
            return
        with pytest.raises(ContextLengthError):
            await backend.generate(ask("word " * (context + 10), max_tokens=2))
        await idle(backend)

    @in_loop
    async def test_only_errors_of_ours_escape(self, backend: Backend) -> None:
        strange = (
            ChatRequest((Message("user"),), SamplingParams(max_tokens=2)),
            ChatRequest((Message("tool", (TextPart("42"),), tool_call_id="x"),), SamplingParams(max_tokens=2)),
            ask("\x00\ud7ff \U0001f600 <|im_end|>", max_tokens=2),
            ask("x").replace(response_format=ResponseFormat("json_schema", schema={"type": "nonsense"})),
            ask("x").replace(response_format=ResponseFormat("regex", pattern="([a-")),
        )
        for request in strange:
            with suppress(QvlError):
                await backend.generate(request.replace(sampling=SamplingParams(max_tokens=2)))
        await idle(backend)


def _fits_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"brand", "sure"} and value["brand"] in ("Acme", "Zenith") and isinstance(value["sure"], bool)
