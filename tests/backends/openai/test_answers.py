"""What endpoints of other dialects answer, read as what they mean."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from qvl import AsyncPipeline, Tool
from qvl.backends.openai.backend import OpenAIBackend
from qvl.errors import AnalysisError, BackendResponseError, RefusalError
from qvl.testing.asking import ask, collect
from qvl.types import Result
from tests.scripted_endpoint import Events, ScriptedEndpoint

pytestmark = pytest.mark.anyio
PRICE = Tool("price_of", "", {"type": "object", "properties": {"sku": {"type": "string"}}})


def piece(finish: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def call(arguments: Any = None, **more: Any) -> dict[str, Any]:
    function = {name: more.pop(name) for name in ("name",) if name in more}
    return {"type": "function", "function": {**function, "arguments": arguments}, **more}


async def answer_to(endpoint: ScriptedEndpoint, *events: Any, model: str = "m", tools: tuple[Tool, ...] = ()) -> Result:
    endpoint.say(Events(list(events)))
    async with OpenAIBackend(model, base_url=endpoint.url, probe=False) as backend:
        return await backend.generate(ask("hello").replace(tools=tools))


async def calls_of(endpoint: ScriptedEndpoint, *deltas: Iterable[dict[str, Any]]) -> list[tuple[str, str, Any]]:
    events = [piece(tool_calls=list(delta)) for delta in deltas]
    result = await answer_to(endpoint, *events, piece("tool_calls"), tools=(PRICE,))
    return [(one.id, one.name, json.loads(one.arguments)) for one in result.tool_calls]


TWO = [("a", "price_of", {"sku": "X1"}), ("b", "price_of", {"sku": "X2"})]
X1, X2 = '{"sku": "X1"}', '{"sku": "X2"}'


class TestToolCalls:
    @pytest.mark.parametrize("more", [{"index": 0}, {}, {"index": None}])
    async def test_parallel_calls_under_one_index_or_none_are_two(self, endpoint, more) -> None:
        first, second = (call(x, id=i, name="price_of", **more) for i, x in (("a", X1), ("b", X2)))
        assert await calls_of(endpoint, [first], [second]) == TWO
        assert await calls_of(endpoint, [first, second]) == TWO

    @pytest.mark.parametrize("more", [{"index": 0}, {}])
    async def test_without_ids_a_call_ends_with_its_object(self, endpoint, more) -> None:
        found = await calls_of(
            endpoint,
            [call('{"sku": ', name="price_of", **more)],
            [call('"X1"}', **more)],
            [call(X2, name="price_of", **more)],
        )
        assert found == [("", "price_of", {"sku": "X1"}), ("", "price_of", {"sku": "X2"})]

    async def test_pieces_of_two_calls_that_alternate_go_to_their_own(self, endpoint) -> None:
        found = await calls_of(
            endpoint,
            [call('{"sku": ', id="a", name="price_of", index=0)],
            [call('{"sku": ', id="b", name="price_of", index=1)],
            [call('"X1"}', index=0), call('"X2"}', index=1)],
        )
        assert found == TWO

    @pytest.mark.parametrize(
        "later", [{"id": "a", "name": "price_of"}, {"id": ""}, {}, {"id": "another-at-every-piece"}, {"name": ""}]
    )
    async def test_pieces_of_one_call_stay_one(self, endpoint, later) -> None:
        found = await calls_of(
            endpoint,
            [call('{"sku"', id="a", name="price_of", index=0)],
            [call(': "X', index=0, **later)],
            [call('1"}', index=0, **later)],
        )
        assert found == TWO[:1]

    async def test_calls_that_share_an_id_are_told_apart(self, endpoint) -> None:
        first, second = (call(x, id="f", name="price_of") for x in (X1, X2))
        found = [("f", "price_of", {"sku": "X1"}), ("f", "price_of", {"sku": "X2"})]
        numbered = [{**first, "index": 0}, {**second, "index": 1}]
        for deltas in ([numbered], [[one] for one in numbered], [[first], [second]], [[first, second]]):
            assert await calls_of(endpoint, *deltas) == found
        pieces = [
            call(piece, id="f", index=at, **more)
            for piece, more in ((X1[:8], {"name": "price_of"}), (X1[8:], {}))
            for at in (0, 1)
        ]
        assert await calls_of(endpoint, *([piece] for piece in pieces)) == found[:1] * 2

    @pytest.mark.parametrize("more", [{"index": 0}, {}])
    async def test_another_name_begins_another_call(self, endpoint, more) -> None:
        events = [piece(tool_calls=[call("", name=name, **more)]) for name in ("price_of", "stock")]
        result = await answer_to(endpoint, *events, piece("tool_calls"), tools=(PRICE,))
        assert [(one.name, one.arguments) for one in result.tool_calls] == [("price_of", ""), ("stock", "")]

    @pytest.mark.parametrize("more", [{"index": 0}, {}, {"id": "a"}])
    async def test_a_name_that_comes_again_without_arguments_begins_none(self, endpoint, more) -> None:
        again = call("", name="price_of", **more)
        found = await calls_of(endpoint, [call(X1, name="price_of", **more)], [again])
        assert found == [(more.get("id", ""), "price_of", {"sku": "X1"})]

    async def test_arguments_as_an_object_and_the_older_form_of_one_call(self, endpoint) -> None:
        assert await calls_of(endpoint, [call({"sku": "X1"}, id="a", name="price_of")]) == TWO[:1]
        old = piece(function_call={"name": "price_of", "arguments": X1})
        result = await answer_to(endpoint, old, piece("function_call"), tools=(PRICE,))
        assert [(one.name, one.arguments) for one in result.tool_calls] == [("price_of", X1)]
        assert result.finish_reason == "tool_calls"


class TestReasoning:
    @pytest.mark.parametrize("cut", [1, 3, 8, 1000])
    async def test_what_comes_before_a_lone_end_is_reasoning(self, endpoint, cut) -> None:
        text = "The print {in red} may say Acme.\n</think>\n\nNorvik"
        events = [piece(content=text[i : i + cut]) for i in range(0, len(text), cut)]
        result = await answer_to(endpoint, *events, piece("stop"))
        assert (result.text, result.reasoning) == ("Norvik", "The print {in red} may say Acme.")

    @pytest.mark.parametrize(
        "text",
        [
            "Write `</think>` at its end.",
            'It is called "</think>".',
            "I <think> so </think> too.",
            "So:\n```\n</think>\n```\n",
            '{"note": "It ends </think> there."}',
        ],
    )
    async def test_a_tag_that_is_quoted_stays_in_the_answer(self, endpoint, text) -> None:
        result = await answer_to(endpoint, piece(content=text), piece("stop"))
        assert (result.text, result.reasoning) == (text, "")

    async def test_once_seen_streams_keep_reasoning_apart(self, endpoint) -> None:
        events = [piece(content=word) for word in ("It may ", "be red.\n", "</think>\n", "\nred", " mug")]
        async with OpenAIBackend("m", base_url=endpoint.url, probe=False) as backend:
            endpoint.say(Events([*events, piece("stop")]), Events([*events, piece("stop")]))
            await backend.generate(ask("hello"))
            chunks = await collect(backend, ask("hello"))
        assert [chunk.text for chunk in chunks if chunk.text] == ["red", " mug"]
        assert "".join(chunk.reasoning for chunk in chunks) == "It may be red."

    @pytest.mark.parametrize(
        "text",
        [
            "So:\n<think>\nhm\n</think>\nred",
            "So:\n```\n</think>\n```\n",
            'It prints "</think>\n" then.',
            "a\n</think>\nb",
        ],
    )
    async def test_one_answer_with_the_tag_holds_no_later_stream_back(self, endpoint, text) -> None:
        words = [piece(content="one "), piece(content="two"), piece("stop")]
        quoting = [piece(content="Use "), piece(content="`</think>`"), piece(content=" there."), piece("stop")]
        endpoint.say(Events([piece(content=text), piece("stop")]), Events(quoting), Events(words))
        async with OpenAIBackend("m", base_url=endpoint.url, probe=False) as backend:
            await backend.generate(ask("hello"))
            quoted = await backend.generate(ask("hello"))
            chunks = await collect(backend, ask("hello"))
        assert (quoted.text, quoted.reasoning) == ("Use `</think>` there.", "")
        assert [chunk.text for chunk in chunks if chunk.text] == ["one ", "two"]

    async def test_reasoning_that_quotes_the_tag_goes_on_behind_it(self, endpoint) -> None:
        said = [piece(content=word) for word in ("Should I end with `</thi", "nk>`? ", "Yes.\n</think>", "\n\nred")]
        result = await answer_to(endpoint, *said, piece("stop"), model="Qwen3-VL-8B-Thinking")
        assert (result.text, result.reasoning) == ("red", "Should I end with `</think>`? Yes.")

    async def test_a_thinking_model_is_known_by_its_name_and_may_not_think(self, endpoint) -> None:
        name = "Qwen3-VL-8B-Thinking"
        thought = [piece(content="hm\n</think>"), piece(content="\n\nred"), piece("stop")]
        result = await answer_to(endpoint, *thought, model=name)
        assert (result.text, result.reasoning) == ("red", "hm")
        result = await answer_to(endpoint, piece(content="red"), piece("stop"), model=name)
        assert (result.text, result.reasoning) == ("red", "")
        result = await answer_to(endpoint, piece(content="on and on"), piece("length"), model=name)
        assert (result.text, result.reasoning) == ("", "on and on")
        apart = [piece(reasoning_content="hm"), piece(content="red"), piece("stop")]
        result = await answer_to(endpoint, *apart, model=name)
        assert (result.text, result.reasoning) == ("red", "hm")

    async def test_an_analysis_is_read_behind_the_reasoning(self, endpoint, tmp_path) -> None:
        said = 'It says {Acme}.\n</think>\n\n{"brand": "Norvik", "category": "mug", "attributes": {}}'
        endpoint.say(Events([piece(content=said), piece("stop")]))
        backend = OpenAIBackend("m", base_url=endpoint.url, probe=False)
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            found = await pipe.analyze("examples/pictures/norvik-mug-red.png")
        assert found.brand == "Norvik"


class TestRefusals:
    WORDS = "I cannot help with that."

    def refusals(self) -> list[list[dict[str, Any]]]:
        whole = {
            "choices": [{"index": 0, "message": {"refusal": self.WORDS, "content": None}, "finish_reason": "stop"}]
        }
        part = [{"type": "refusal", "refusal": self.WORDS}]
        return [
            [piece(content=""), piece(refusal="I cannot help "), piece(refusal="with that."), piece("stop")],
            [whole],
            [piece(content=part), piece("stop")],
            [piece(refusal=self.WORDS), piece("refusal")],
        ]

    async def test_the_words_are_the_error_and_nothing_is_kept(self, endpoint) -> None:
        for events in self.refusals():
            endpoint.say(Events(events), Events([piece(content="red"), piece("stop")]))
            backend = OpenAIBackend("m", base_url=endpoint.url, probe=False)
            async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
                with pytest.raises(RefusalError, match="refused to answer: I cannot help with that") as caught:
                    await pipe.chat([{"role": "user", "content": "who is it?"}])
                assert caught.value.status == 422
                assert not caught.value.retryable
                assert (await pipe.chat([{"role": "user", "content": "who is it?"}])).text == "red"

    async def test_an_analysis_is_not_asked_for_again(self, endpoint) -> None:
        endpoint.say(Events([piece(refusal=self.WORDS), piece("stop")]))
        backend = OpenAIBackend("m", base_url=endpoint.url, probe=False)
        async with AsyncPipeline(backend=backend, cache="off") as pipe:
            with pytest.raises((RefusalError, AnalysisError), match="I cannot help"):
                await pipe.analyze("examples/pictures/norvik-mug-red.png")
        assert len(endpoint.chats) == 1


class TestFinishReasons:
    @pytest.mark.parametrize(
        "reason", ["end", "eos", "STOP", "END_TURN", "complete", "stop_sequence", "FINISH_REASON_STOP"]
    )
    async def test_an_unknown_reason_keeps_the_answer(self, endpoint, reason) -> None:
        result = await answer_to(endpoint, piece(content="hello"), piece(reason))
        assert (result.text, result.finish_reason) == ("hello", "stop")

    @pytest.mark.parametrize("reason", ["eos_token", "stop_token", "END_OF_TEXT_TOKEN", True, {"type": "stop"}])
    async def test_the_token_that_ends_an_answer_is_no_limit(self, endpoint, reason) -> None:
        assert (await answer_to(endpoint, piece(content="hello"), piece(reason))).finish_reason == "stop"

    @pytest.mark.parametrize(
        "reason",
        [
            *("model_length", "MAX_TOKENS", "max-tokens", "maxTokens", "incomplete", "truncated", "max tokens"),
            *("token limit", "max_output_reached", "max_seq_len", "num_predict", "stopped_limit"),
        ],
    )
    async def test_cut_off_in_other_words(self, endpoint, reason) -> None:
        assert (await answer_to(endpoint, piece(content="hel"), piece(reason))).finish_reason == "length"

    @pytest.mark.parametrize("reason", ["tool_call", "tool_use", "toolUse", "stop", "TOOL_CALLS"])
    async def test_calls_in_other_words(self, endpoint, reason) -> None:
        called = piece(tool_calls=[call(X1, id="a", name="price_of")])
        assert (await answer_to(endpoint, called, piece(reason), tools=(PRICE,))).finish_reason == "tool_calls"

    @pytest.mark.parametrize("reason", ["error", "networkError", "parse_failed"])
    async def test_what_means_no_answer_is_an_error(self, endpoint, reason) -> None:
        endpoint.say(Events([piece(content="hel"), piece(reason)]))
        async with OpenAIBackend("m", base_url=endpoint.url, probe=False, max_retries=0) as backend:
            with pytest.raises(BackendResponseError):
                await backend.generate(ask("hello"))

    @pytest.mark.parametrize(
        "reason",
        [
            *("content_filter", "contentFilter", "SAFETY", "guardrail_intervened", "content_policy_violation"),
            *("blocked", "moderation", "unsafe", "filtered"),
        ],
    )
    async def test_an_answer_that_was_withheld_is_a_refusal_and_not_kept(self, endpoint, reason) -> None:
        endpoint.say(Events([piece(reason)]), Events([piece(content="red"), piece("stop")]))
        backend = OpenAIBackend("m", base_url=endpoint.url, probe=False)
        async with AsyncPipeline(backend=backend, cache="memory:") as pipe:
            with pytest.raises(RefusalError, match="content filter") as caught:
                await pipe.chat([{"role": "user", "content": "who is it?"}])
            assert (caught.value.code, len(endpoint.chats)) == ("content_filter", 1)
            assert (await pipe.chat([{"role": "user", "content": "who is it?"}])).text == "red"

    @pytest.mark.parametrize("reason", [None, "", "null"])
    async def test_done_ends_an_answer_that_gives_no_reason(self, endpoint, reason) -> None:
        result = await answer_to(endpoint, piece(content="hel"), piece(reason, content="lo"))
        assert (result.text, result.finish_reason) == ("hello", "stop")
        called = piece(reason, tool_calls=[call(X1, id="a", name="price_of")])
        result = await answer_to(endpoint, called, tools=(PRICE,))
        assert (result.tool_calls[0].arguments, result.finish_reason) == (X1, "tool_calls")
        assert len(endpoint.chats) == 2

    @pytest.mark.parametrize(
        "delta",
        [
            {"content": ""},
            {"reasoning_content": "hm"},
            {"content": "<think>hm"},
            {"tool_calls": [call('{"sku": ', id="a", name="price_of")]},
        ],
    )
    async def test_done_is_no_end_where_there_is_no_answer(self, endpoint, delta) -> None:
        endpoint.say(Events([piece(**delta)]))
        async with OpenAIBackend("m", base_url=endpoint.url, probe=False, max_retries=0) as backend:
            with pytest.raises(BackendResponseError, match="before the answer was complete"):
                await backend.generate(ask("hello"))


class TestSurrogates:
    """An escape of half a character, as servers write it that escape token by token."""

    async def test_halves_in_two_events_are_one_character(self, endpoint) -> None:
        halves = [b'{"choices": [{"delta": {"%s": "%s"}}]}' % (b"content", half) for half in (b"a\\ud83d", b"\\ude00b")]
        result = await answer_to(endpoint, *halves, piece("stop"))
        assert result.text == "a\U0001f600b"
        thought = [half.replace(b"content", b"reasoning_content") for half in halves]
        assert (await answer_to(endpoint, *thought, piece("stop"))).reasoning == "a\U0001f600b"

    async def test_in_the_arguments_of_a_call(self, endpoint) -> None:
        first = call('{"sku": "\ud83d', id="a", name="price_of", index=0)
        halves = [first, call('\ude00"}', index=0)]
        events = [json.dumps(piece(tool_calls=[half])).encode() for half in halves]
        result = await answer_to(endpoint, *events, piece("tool_calls"), tools=(PRICE,))
        assert json.loads(result.tool_calls[0].arguments) == {"sku": "\U0001f600"}

    async def test_a_half_at_the_end_of_arguments_is_marked(self, endpoint) -> None:
        event = json.dumps(piece(tool_calls=[call('{"sku": "\ud83d', id="a", name="price_of", index=0)])).encode()
        result = await answer_to(endpoint, event, piece("length"), tools=(PRICE,))
        assert result.tool_calls[0].arguments == '{"sku": "\ufffd'

    async def test_a_half_that_stays_alone_is_marked(self, endpoint) -> None:
        alone = b'{"choices": [{"delta": {"content": "a\\ud83d"}}]}'
        assert (await answer_to(endpoint, alone, piece(content="b"), piece("stop"))).text == "a\ufffdb"
        assert (await answer_to(endpoint, alone, piece("stop"))).text == "a\ufffd"
