from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from typing import Any

import openai
import pytest

from qvl.backends.openai import failures
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.failures import Failed, crossing
from qvl.chunks import fold
from qvl.errors import ConfigError, QvlError, UnsupportedInputError
from qvl.testing import EchoBackend
from qvl.testing.asking import ask, collect, square
from qvl.types import ChatRequest, Message, ResponseFormat, SamplingParams, TextPart, Tool, ToolCall, Usage
from tests.scripted_endpoint import Events, ScriptedEndpoint, Status, Text

pytestmark = pytest.mark.anyio


def plain(endpoint: ScriptedEndpoint, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("echo", base_url=endpoint.url, **{"probe": False, **options})


async def sent(endpoint: ScriptedEndpoint, request: ChatRequest, **options: Any) -> dict[str, Any]:
    async with plain(endpoint, **options) as backend:
        await backend.generate(request)
    body: dict[str, Any] = endpoint.chats[-1].body
    return body


class TestRequest:
    async def test_greedy_is_said_and_not_left_to_the_endpoint(self, endpoint: ScriptedEndpoint) -> None:
        body = await sent(endpoint, ask("hello"))
        assert (body["temperature"], body["top_p"], body["stream"]) == (0.0, 1.0, True)
        assert body["stream_options"] == {"include_usage": True}
        assert body["messages"] == [{"role": "user", "content": "hello"}]
        assert body.keys() == {"model", "messages", "stream", "stream_options", "temperature", "top_p"}

    async def test_a_probed_endpoint_gets_no_penalty_from_its_generation_config(
        self, endpoint: ScriptedEndpoint
    ) -> None:
        body = await sent(endpoint, ask("hello"), probe=True)
        assert (body["repetition_penalty"], body["top_k"], body["min_p"]) == (1.0, -1, 0.0)

    async def test_a_salt_goes_only_where_vllms_fields_are_known(self, endpoint: ScriptedEndpoint) -> None:
        request = ask("hello").replace(cache_salt="one tenant")
        assert (await sent(endpoint, request, probe=True))["cache_salt"] == "one tenant"
        with ScriptedEndpoint(refuses=("top_k", "min_p", "repetition_penalty", "cache_salt")) as other:
            assert "cache_salt" not in await sent(other, request, probe=True)
            async with plain(other, probe=True) as backend:
                assert "cache_salt" not in backend.capabilities.fields
        async with plain(endpoint, probe=True) as backend:
            assert "cache_salt" in backend.capabilities.fields

    @pytest.mark.parametrize("call", ["generate", "tokenize"])
    async def test_a_refused_request_does_not_wait_for_the_garbage_collector(
        self, endpoint: ScriptedEndpoint, call: str
    ) -> None:
        """Its pictures would pile up until then."""
        words = f"refused by {call}"
        endpoint.say(Status(400, {"error": {"message": "no", "code": 400}}))
        async with plain(endpoint) as backend:
            gc.disable()
            try:
                with contextlib.suppress(QvlError):
                    await getattr(backend, call)(ask(words))
                # By its type: what else is there may warn when it is asked what it is.
                kept = [one for one in gc.get_objects() if type(one) is ChatRequest]
            finally:
                gc.enable()
        assert [one for one in kept if one.messages[-1].text == words] == []

    async def test_every_sampling_field_is_sent_under_the_name_servers_know(self, endpoint: ScriptedEndpoint) -> None:
        values: dict[str, Any] = {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "max_tokens": 9,
            "stop": ("a", "b"),
            "stop_token_ids": (1, 2),
            "ignore_eos": True,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "seed": 5,
            "logprobs": 3,
            "n": 2,
            "min_tokens": 2,
            "bad_words": ("x",),
            "allowed_token_ids": (3,),
            "logit_bias": {3: 1.0},
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "prompt_logprobs": 1,
            "logprob_token_ids": (3,),
            "return_token_ids": True,
            "truncate_prompt_tokens": 100,
            "thinking_token_budget": 8,
        }
        assert values.keys() == SamplingParams.names()
        body = await sent(endpoint, ask("one two three", **values))
        assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
        for name in values.keys() - {"logprobs"}:
            assert body[name] == json.loads(json.dumps(values[name]))

    async def test_pictures_and_text_stay_where_they_stood(self, endpoint: ScriptedEndpoint) -> None:
        red, blue = square((220, 30, 30)), square((30, 60, 220))
        request = ask("first", red)
        parts = (*request.messages[0].parts, *ask("second", blue).messages[0].parts)
        request = request.replace(messages=(Message("user", parts),))
        content = (await sent(endpoint, request))["messages"][0]["content"]
        assert [part["type"] for part in content] == ["image_url", "text", "image_url", "text"]
        assert [part["image_url"]["url"] for part in content[::2]] == [red.data_url(), blue.data_url()]

    async def test_max_pixels_shrinks_what_is_sent(self, endpoint: ScriptedEndpoint) -> None:
        async with plain(endpoint) as backend:
            result = await backend.generate(ask("size?", square(edge=640)).replace(max_pixels=64 * 64))
        assert "64x64" in result.text

    async def test_a_tool_conversation(self, endpoint: ScriptedEndpoint) -> None:
        tool = Tool("price_of", "Looks up.", {"type": "object"}, strict=True)
        messages = (
            Message("user", (TextPart("price?"),)),
            Message("assistant", tool_calls=(ToolCall("c1", "price_of", "{}"),)),
            Message("tool", (TextPart("7"),), tool_call_id="c1"),
        )
        request = ChatRequest(messages, tools=(tool,), tool_choice="none", parallel_tool_calls=False)
        body = await sent(endpoint, request)
        assert body["messages"][1] == {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "price_of", "arguments": "{}"}}],
        }
        assert body["messages"][2] == {"role": "tool", "content": "7", "tool_call_id": "c1"}
        assert body["tools"][0]["function"]["strict"] is True
        assert (body["tool_choice"], body["parallel_tool_calls"]) == ("none", False)

    async def test_formats_beyond_openai_go_as_vllm_spells_them(self, endpoint: ScriptedEndpoint) -> None:
        body = await sent(endpoint, ask("x").replace(response_format=ResponseFormat("regex", pattern="a+")))
        assert body["structured_outputs"] == {"regex": "a+"}
        body = await sent(endpoint, ask("x").replace(response_format=ResponseFormat("choice", choices=("a", "b"))))
        assert body["structured_outputs"] == {"choice": ["a", "b"]}

    async def test_extra_fields_pass_and_cannot_replace_ours(self, endpoint: ScriptedEndpoint) -> None:
        body = await sent(endpoint, ask("x").replace(extra={"chat_template_kwargs": {"enable_thinking": False}}))
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        async with plain(endpoint) as backend:
            with pytest.raises(UnsupportedInputError, match="'stream'"):
                await backend.generate(ask("x").replace(extra={"stream": False}))

    async def test_key_and_headers_travel(self, endpoint: ScriptedEndpoint) -> None:
        await sent(endpoint, ask("x"), api_key="secret", extra_headers={"X-Tenant": "shoes"})
        headers = endpoint.chats[-1].headers
        assert (headers["authorization"], headers["x-tenant"]) == ("Bearer secret", "shoes")


class TestAnswer:
    async def test_reasoning_is_kept_apart(self, endpoint: ScriptedEndpoint) -> None:
        endpoint.say(Text("a shoe", reasoning="hm, laces"), Text("<think>\nhm, laces\n</think>\n\na shoe"))
        async with plain(endpoint) as backend:
            for _ in range(2):
                result = await backend.generate(ask("what?"))
                assert (result.text, result.reasoning) == ("a shoe", "hm, laces")

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
    async def test_a_think_tag_may_come_in_pieces(self, endpoint: ScriptedEndpoint, size: int) -> None:
        text = " <think>if a < b </thin no </think>\n\nx <think> y"
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        endpoint.say(Events([*events, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]))
        async with plain(endpoint) as backend:
            result = await backend.generate(ask("what?"))
        assert result.text == "x <think> y"
        assert result.reasoning == "if a < b </thin no "

    @pytest.mark.parametrize("text", ["<", "<thi", " <b>bold</b>", "<think"])
    async def test_what_only_looks_like_a_tag_stays_text(self, endpoint: ScriptedEndpoint, text: str) -> None:
        endpoint.say(Text(text))
        async with plain(endpoint) as backend:
            assert (await backend.generate(ask("what?"))).text == text

    async def test_usage_has_its_details(self, endpoint: ScriptedEndpoint) -> None:
        details = {"cached_tokens": 5, "image_tokens": 4}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": details}
        done = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
        endpoint.say(Events([done, {"choices": [], "usage": usage}]), Events([{**done, "usage": usage}], done=False))
        async with plain(endpoint) as backend:
            for _ in range(2):
                found = (await backend.generate(ask("what?"))).usage
                assert (found.prompt_tokens, found.completion_tokens) == (9, 1)
                assert (found.cached_tokens, found.image_tokens) == (5, 4)

    async def test_counts_below_zero_are_read_as_zero(self, endpoint: ScriptedEndpoint) -> None:
        details = {"cached_tokens": -2, "image_tokens": -3}
        usage = {"prompt_tokens": -1, "completion_tokens": 4, "prompt_tokens_details": details}
        done = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
        endpoint.say(Events([done, {"choices": [], "usage": usage}]))
        async with plain(endpoint) as backend:
            assert (await backend.generate(ask("what?"))).usage == Usage(0, 4)

    async def test_an_endpoint_that_does_not_stream_is_understood(self, endpoint: ScriptedEndpoint) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": "whole"}, "finish_reason": "stop"}
        endpoint.say(Status(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}))
        async with plain(endpoint) as backend:
            result = await backend.generate(ask("what?"))
        assert (result.text, result.usage.total_tokens) == ("whole", 4)

    async def test_tool_calls_come_together_from_their_pieces(self, endpoint: ScriptedEndpoint) -> None:
        def piece(index: int, **function: str) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": index, "function": function}]}}]}

        first = piece(0, name="a", arguments="")
        first["choices"][0]["delta"]["tool_calls"][0]["id"] = "c0"
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        endpoint.say(Events([first, piece(0, arguments='{"x"'), piece(0, arguments=": 1}"), piece(1, name="b"), end]))
        async with plain(endpoint) as backend:
            result = await backend.generate(ask("what?"))
        calls = [(call.id, call.name, call.arguments) for call in result.tool_calls]
        assert calls == [("c0", "a", '{"x": 1}'), ("", "b", "")]
        assert result.finish_reason == "tool_calls"

    async def test_the_stream_is_the_same_as_that_of_the_model_behind_it(self, endpoint: ScriptedEndpoint) -> None:
        for options in ({}, {"n": 3}, {"logprobs": 2, "max_tokens": 3}, {"stop": ("cd",)}):
            request = ask("ab cd ef", square(), **options)
            async with plain(endpoint) as backend, EchoBackend() as echo:
                ours = fold(await collect(backend, request), want_logprobs=True)
                its = fold(await collect(echo, request), want_logprobs=True)
            assert ours[:2] == its[:2]

    async def test_a_connection_is_used_again(self, endpoint: ScriptedEndpoint) -> None:
        async with plain(endpoint) as backend:
            for _ in range(5):
                await backend.generate(ask("what?"))
        assert endpoint.connections == 1


class TestProbe:
    async def test_what_is_ignored_in_silence_is_noticed(self) -> None:
        fields = ("response_format", "n", "logprobs", "tools", "image_url", "top_k", "min_p", "ignore_eos")
        with ScriptedEndpoint(ignores=fields) as endpoint:
            async with OpenAIBackend("echo", base_url=endpoint.url) as backend:
                have = backend.capabilities
        assert have.images == 0
        assert not have.tools
        assert not have.response_formats & {"json_schema", "json_object"}
        assert not have.sampling & {"n", "logprobs", "top_k", "min_p", "ignore_eos"}
        assert {"temperature", "top_p", "max_tokens", "stop", "seed"} <= have.sampling

    async def test_a_new_openai_model_is_spoken_to_in_its_dialect(self) -> None:
        refuses = ("max_tokens", "temperature", "top_k", "min_p", "stop_token_ids", "ignore_eos", "repetition_penalty")
        with ScriptedEndpoint(refuses=refuses) as endpoint:
            endpoint.refusal = "Unsupported parameter: '{}' is not supported, use 'max_completion_tokens' instead."
            async with OpenAIBackend("echo", base_url=endpoint.url) as backend:
                assert "temperature" not in backend.capabilities.sampling
                assert (await backend.generate(ask("one two three", max_tokens=2))).finish_reason == "length"
                with pytest.raises(UnsupportedInputError):
                    await backend.generate(ask("x", temperature=0.5))
            body = endpoint.chats[-1].body
        assert body["max_completion_tokens"] == 2
        assert not body.keys() & set(refuses)

    async def test_an_endpoint_is_probed_once_a_process(self, endpoint: ScriptedEndpoint) -> None:
        async with OpenAIBackend("echo", base_url=endpoint.url):
            count = len(endpoint.requests)
        again = OpenAIBackend("echo", base_url=endpoint.url)
        assert again.peek_capabilities() is not None
        async with again:
            assert len(endpoint.requests) == count

    async def test_the_only_model_need_not_be_named(self, endpoint: ScriptedEndpoint) -> None:
        async with OpenAIBackend(base_url=endpoint.url) as backend:
            assert backend.model == "echo"
            assert backend.capabilities.max_context == 100_000
            assert backend.capabilities.lists
        endpoint.models = ("a", "b")
        with pytest.raises(ConfigError, match="a, b"):
            await OpenAIBackend(base_url=endpoint.url).open()


class TestIdentity:
    def test_equal_names_at_different_places_do_not_share_answers(self) -> None:
        def identity(*urls: str, **options: Any) -> dict[str, Any]:
            return OpenAIBackend("m", base_url=urls, **options).identity()

        assert identity("http://a:1") != identity("http://b:1")
        assert identity("http://a:1", "http://b:1") == identity("http://b:1/v1/", "http://a:1/v1")
        assert identity("http://a:1", identity="fleet") == identity("http://b:1", identity="fleet")
        assert identity("http://me:secret@a:1") == identity("http://a:1")
        assert "secret" not in json.dumps(identity("http://me:secret@a:1?key=secret"))

    def test_the_environment_names_the_endpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", "http://a:1/v1,http://b:1/v1")
        assert [state.url for state in OpenAIBackend("m").endpoints()] == ["http://a:1/v1", "http://b:1/v1"]
        monkeypatch.delenv("OPENAI_BASE_URL")
        assert [state.url for state in OpenAIBackend("m").endpoints()] == ["https://api.openai.com/v1"]

    @pytest.mark.parametrize(
        "options",
        [
            {"base_url": "ftp://a"},
            {"base_url": "host:8000"},
            {"base_url": []},
            {"base_url": ["http://a:1", "http://a:1/v1/"]},
            {"max_retries": -1},
            {"token_timeout": 0},
            {"policy": "best"},
            {"weights": [1, 2]},
            {"limit": -1},
        ],
    )
    def test_settings_that_cannot_work_are_refused_at_once(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            OpenAIBackend("m", **{"base_url": "http://a:1", **options})


KNOWN = {
    "OpenAIError",
    "SubjectTokenProviderError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APIConnectionError",
    "APITimeoutError",
    "BadRequestError",
    "AuthenticationError",
    "OAuthError",
    "PermissionDeniedError",
    "NotFoundError",
    "ConflictError",
    "UnprocessableEntityError",
    "RateLimitError",
    "InternalServerError",
    "LengthFinishReasonError",
    "ContentFilterFinishReasonError",
    "InvalidWebhookSignatureError",
    "WebSocketConnectionClosedError",
    "WebSocketQueueFullError",
}


class TestForeignErrors:
    def test_every_exception_of_the_openai_package_is_known(self) -> None:
        from openai import _exceptions

        found = {
            name
            for name, value in vars(_exceptions).items()
            if isinstance(value, type) and issubclass(value, Exception) and value.__module__.startswith("openai")
        }
        assert found <= KNOWN, "a new exception: see that failures.crossing maps it"

    def test_each_becomes_one_of_ours(self) -> None:
        http = failures.http_library()
        request = http.Request("POST", "http://a/v1")
        response = http.Response(429, request=request)
        made = [
            openai.APIConnectionError(request=request),
            openai.APITimeoutError(request),
            openai.APIError("x", request, body=None),
            openai.APIResponseValidationError(response, body=None),
            openai.APIStatusError("x", response=response, body=None),
            openai.OpenAIError("x"),
            http.ReadTimeout("x"),
            http.ConnectError("x"),
            http.RemoteProtocolError("x"),
            http.DecodingError("x"),
        ]
        for error in made:
            with pytest.raises(Failed) as caught, crossing("http://a/v1"):
                raise error
            assert isinstance(caught.value.error, QvlError)
            assert "http://a/v1" in str(caught.value.error)

    def test_errors_of_the_program_pass_untouched(self) -> None:
        with pytest.raises(ZeroDivisionError), crossing("http://a/v1"):
            _ = 1 / 0
        with pytest.raises(asyncio.CancelledError), crossing("http://a/v1"):
            raise asyncio.CancelledError

    def test_importing_the_backend_does_not_import_openai(self) -> None:
        import subprocess
        import sys

        code = "import sys, qvl.backends.openai; sys.exit('openai' in sys.modules or 'httpx' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
