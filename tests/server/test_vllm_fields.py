"""The fields that vLLM adds to OpenAI's requests, through OpenAI's client, a real server and the bundled model."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import anthropic
import openai
import pytest
from openai.types.shared.reasoning_effort import ReasoningEffort

import qvl.tiny
from qvl.backends.local.backend import LocalBackend
from tests.server.conftest import Running, data_url, start

QUESTION: list[Any] = [{"role": "user", "content": "What is on the picture?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Lima", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
# Opens the thought itself unless it is told not to, and numbers pictures where that is asked for.
THINKING = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{%- if add_vision_id %}{{- 'Picture: ' }}{%- endif %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


def served(path: Path | None = None) -> Running:
    model = None if path is None else str(path)
    backend = LocalBackend(model, device="cpu", dtype="float32", kv_cache_bytes=64 << 20)
    running = start(backend, wait=False)
    deadline = time.monotonic() + 120
    while running.get("/ready").status_code != 200:
        assert time.monotonic() < deadline, "the model was never ready"
        time.sleep(0.05)
    return running


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    running = served()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose template opens `<think>`, with the bundled model's weights."""
    folder = tmp_path_factory.mktemp("thinking") / "model"
    shutil.copytree(Path(qvl.tiny.__file__).parent / "weights", folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": THINKING}), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    whole = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": THINKING}
    settings.write_text(json.dumps(whole), encoding="utf-8")
    running = served(folder)
    yield running
    running.stop()


CLIENTS: dict[str, openai.OpenAI] = {}


def client(running: Running) -> openai.OpenAI:
    url = f"{running.url}/v1"
    if url not in CLIENTS:
        CLIENTS[url] = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    return CLIENTS[url]


@pytest.fixture(scope="module", autouse=True)
def _closed_clients() -> Iterator[None]:
    yield
    for one in CLIENTS.values():
        one.close()


def chat(running: Running, messages: list[Any] = QUESTION, **fields: Any) -> Any:
    extra = fields.pop("extra", {})
    model = client(running).models.list().data[0].id
    return client(running).chat.completions.create(model=model, messages=messages, extra_body=extra, **fields)


def told(answer: Any, name: str) -> Any:
    return (answer.model_extra or {}).get(name)


def refused(running: Running, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(running, **fields)
    return caught.value.param


def test_token_ids_of_prompt_and_answer_come_whole_and_in_streams(local: Running) -> None:
    whole = chat(local, extra={"return_token_ids": True}, max_tokens=6)
    ids = told(whole.choices[0], "token_ids")
    assert len(ids) == whole.usage.completion_tokens
    assert len(told(whole, "prompt_token_ids")) == whole.usage.prompt_tokens
    events = list(chat(local, extra={"return_token_ids": True}, max_tokens=6, stream=True))
    assert told(events[0], "prompt_token_ids") == told(whole, "prompt_token_ids")
    pieces = [told(event.choices[0], "token_ids") or [] for event in events if event.choices]
    assert [token for piece in pieces for token in piece] == ids
    assert "token_ids" not in (chat(local, max_tokens=6).choices[0].model_extra or {})


def test_a_prompt_of_token_ids_is_continued_as_it_stands(local: Running) -> None:
    first = chat(local, extra={"return_token_ids": True}, max_tokens=6)
    prompt = told(first, "prompt_token_ids")
    complete = client(local).completions.create
    again = complete(model="bundled", prompt=prompt, max_tokens=6)
    assert again.choices[0].text == first.choices[0].message.content
    both = complete(model="bundled", prompt=[prompt, prompt[:-4]], max_tokens=4)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == again.choices[0].text[: len(both.choices[0].text)]
    with pytest.raises(openai.BadRequestError, match="not in the vocabulary"):
        complete(model="bundled", prompt=[10**7])


def test_several_prompts_stream_together(local: Running) -> None:
    complete = client(local).completions.create
    prompts = ["What brand is it?", "What is on the picture?"]
    whole = [choice.text for choice in complete(model="bundled", prompt=prompts, max_tokens=6).choices]
    texts = ["", ""]
    options: Any = {"include_usage": True}
    for event in complete(model="bundled", prompt=prompts, max_tokens=6, stream=True, stream_options=options):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == whole
    assert event.usage is not None
    assert event.usage.completion_tokens > 2


def test_an_echo_with_logprobs_scores_the_prompt(local: Running) -> None:
    """As evaluation harnesses read the likelihood of a text."""
    complete = client(local).completions.create
    text = "I need a picture."
    answer = complete(model="bundled", prompt=text, echo=True, logprobs=1, max_tokens=1).choices[0]
    scores = answer.logprobs
    assert answer.text.startswith(text)
    assert scores is not None
    assert scores.token_logprobs is not None
    assert scores.tokens is not None
    assert scores.token_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:])
    assert "".join(scores.tokens) == answer.text
    assert scores.text_offset == [len("".join(scores.tokens[:at])) for at in range(len(scores.tokens))]
    only = complete(model="bundled", prompt=text, echo=True, logprobs=1, max_tokens=0)
    assert only.choices[0].text == text
    assert only.choices[0].logprobs is not None
    prompts = only.choices[0].logprobs.token_logprobs or []
    assert prompts == scores.token_logprobs[: len(prompts)]
    assert only.usage is not None
    assert only.usage.completion_tokens == 0
    events = complete(model="bundled", prompt=text, echo=True, max_tokens=1, stream=True)
    assert "".join(choice.text for event in events for choice in event.choices) == answer.text


def test_prompt_logprobs_are_those_of_the_tokens_where_they_stand(local: Running) -> None:
    answer = chat(local, extra={"prompt_logprobs": 2, "return_token_ids": True}, max_tokens=2)
    first, *others = told(answer, "prompt_logprobs")
    assert first is None
    for token, place in zip(told(answer, "prompt_token_ids")[1:], others, strict=True):
        own = place[str(token)]
        assert 2 <= len(place) <= 3
        assert (own["rank"] == 1) == (own["logprob"] == max(one["logprob"] for one in place.values()))


def test_rules_about_tokens_hold(local: Running) -> None:
    plain = chat(local, max_tokens=12)
    assert "picture" in plain.choices[0].message.content
    assert "picture" not in chat(local, extra={"bad_words": ["picture"]}, max_tokens=12).choices[0].message.content
    long = chat(local, extra={"min_tokens": 20}, max_tokens=24)
    assert plain.usage.completion_tokens < 20 <= long.usage.completion_tokens
    ids = told(
        chat(local, extra={"allowed_token_ids": [300, 301], "return_token_ids": True}, max_tokens=4).choices[0],
        "token_ids",
    )
    assert set(ids) <= {300, 301}
    ids = told(
        chat(local, logit_bias={"300": 100}, extra={"return_token_ids": True}, max_tokens=4).choices[0], "token_ids"
    )
    assert ids == [300] * 4
    assert refused(local, logit_bias={"9999999": 1}) == "logit_bias"
    assert refused(local, extra={"min_tokens": 5}, max_tokens=4) == "min_tokens"
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes"]}}}
    assert refused(local, extra={"allowed_token_ids": [300]}, response_format=form) == "allowed_token_ids"


def test_each_sampling_field_shapes_the_answer_as_it_says(local: Running) -> None:
    """Against the same request without it, so that none can be dropped on the way from the client to the engine."""

    def ids(**extra: Any) -> list[int]:
        answer = chat(local, extra={"return_token_ids": True, "ignore_eos": True, **extra}, max_tokens=16)
        return list(told(answer.choices[0], "token_ids"))

    greedy = ids()
    hot = {"temperature": 2.0, "seed": 5}
    assert ids(**hot) == ids(**hot) != greedy
    assert ids(**hot) != ids(**{**hot, "seed": 6})
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(**hot, **narrow) == greedy
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert ids(**hot, **{name: 2.0}) != ids(**hot), name
    assert ids(stop_token_ids=[greedy[2]])[-1] == greedy[2]
    assert len(ids(stop_token_ids=[greedy[2]])) == greedy.index(greedy[2]) + 1
    assert len(ids(ignore_eos=False)) < len(greedy)
    assert ids(bad_words=["picture"]) != greedy
    assert len(chat(local, extra=hot, n=3, max_tokens=4).choices) == 3


def test_what_is_shown_of_the_end(local: Running) -> None:
    plain = chat(local).choices[0].message.content
    stop = plain[3:6]
    assert chat(local, stop=stop).choices[0].message.content == plain[: plain.index(stop)]
    ended = chat(local, stop=stop, extra={"include_stop_str_in_output": True}).choices[0]
    assert ended.message.content == plain[: plain.index(stop) + 3]
    both = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert chat(local, extra=both).choices[0].message.content == plain + "<|im_end|>"


def test_logprobs_of_named_tokens(local: Running) -> None:
    answer = chat(local, logprobs=True, extra={"logprob_token_ids": [300, 301, 302]}, max_tokens=2)
    named = {local.post("/detokenize", {"tokens": [token]}).json()["prompt"] for token in (300, 301, 302)}
    for token in answer.choices[0].logprobs.content:
        assert {other.token for other in token.top_logprobs} == named
    assert refused(local, extra={"logprob_token_ids": [300]}) == "logprob_token_ids"


def test_an_assistants_turn_goes_on(local: Running) -> None:
    whole = chat(local).choices[0].message.content
    begun = whole.rpartition(" ")[0]
    turns = [*QUESTION, {"role": "assistant", "content": begun}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert begun + chat(local, turns, extra=fields).choices[0].message.content == whole
    assert chat(local, turns, extra={**fields, "echo": True}).choices[0].message.content == whole
    assert refused(local, messages=turns, extra={**fields, "add_generation_prompt": True}) == "add_generation_prompt"
    assert refused(local, extra={"echo": True}) == "echo"


def test_only_the_end_of_a_long_prompt(local: Running) -> None:
    whole = told(chat(local, extra={"return_token_ids": True}, max_tokens=2), "prompt_token_ids")
    cut = chat(local, extra={"truncate_prompt_tokens": 8, "return_token_ids": True}, max_tokens=2)
    assert (told(cut, "prompt_token_ids"), cut.usage.prompt_tokens) == (whole[-8:], 8)
    parts = [{"type": "image_url", "image_url": {"url": data_url("red", (64, 64))}}, {"type": "text", "text": "What?"}]
    shown = [{"role": "user", "content": parts}]
    size = chat(local, shown, max_tokens=2).usage.prompt_tokens
    assert chat(local, shown, extra={"truncate_prompt_tokens": 5}, max_tokens=2).usage.prompt_tokens == 5
    assert refused(local, messages=shown, extra={"truncate_prompt_tokens": size - 6}) == "truncate_prompt_tokens"


@pytest.mark.parametrize("grammar", ['root ::= "red" | "blue"', 'start: "red" | "blue"'])
def test_a_grammar_in_either_notation(local: Running, grammar: str) -> None:
    answer = chat(local, extra={"structured_outputs": {"grammar": grammar}})
    assert answer.choices[0].message.content in ("red", "blue")


@pytest.mark.parametrize("grammar", ["root ::= other", "start: nothing_like_it", "((("])
def test_a_broken_grammar_is_the_requests_fault(local: Running, grammar: str) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(local, extra={"structured_outputs": {"grammar": grammar}})


def test_ids_salts_and_priority(local: Running) -> None:
    named = chat(local, extra={"request_id": "mine-7", "priority": -1}, max_tokens=2)
    assert named.id == "chatcmpl-mine-7"
    body = {"messages": QUESTION, "max_tokens": 2, "request_id": "mine-8", "cache_salt": "a"}
    first = local.post("/v1/chat/completions", body)
    assert first.headers["x-request-id"] == "mine-8"
    assert local.post("/v1/chat/completions", body).headers["x-qvl-cache"] == "hit"
    assert local.post("/v1/chat/completions", {**body, "cache_salt": "b"}).headers["x-qvl-cache"] == "miss"


def test_what_is_not_there_is_refused_by_name(local: Running) -> None:
    assert refused(local, extra={"chat_template_kwargs": {"frobnicate": 1}}) == "chat_template_kwargs.frobnicate"
    assert refused(local, extra={"chat_template_kwargs": {"messages": []}}) == "chat_template_kwargs.messages"
    assert refused(local, extra={"mm_processor_kwargs": {"crop": 2}}) == "mm_processor_kwargs"
    assert refused(local, reasoning_effort="high") == "reasoning_effort"
    assert chat(local, extra={"chat_template_kwargs": {"enable_thinking": False}}, max_tokens=2).choices
    with pytest.raises(openai.BadRequestError) as caught:
        client(local).completions.create(model="bundled", prompt="a", suffix="b")
    assert caught.value.param == "suffix"


def test_only_the_allowed_tools_can_be_called(local: Running) -> None:
    only: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": only}
    calls = chat(local, tools=[CLOCK, WEATHER], tool_choice=choice).choices[0].message.tool_calls
    assert {call.function.name for call in calls} == {"get_weather"}
    only["tools"][0]["function"]["name"] = "get_tide"
    assert refused(local, tools=[WEATHER], tool_choice=choice).startswith("tool_choice.allowed_tools")


def test_a_tools_result_may_be_a_picture(local: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    picture = {"type": "image_url", "image_url": {"url": data_url("red", (64, 64))}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Seen:"}, picture]},
    ]
    usage = chat(local, turns, tools=[WEATHER], max_tokens=4).usage
    assert usage.prompt_tokens_details.model_dump()["image_tokens"] > 0


def test_arguments_come_as_they_are_written(local: Running) -> None:
    place: Any = {"type": "object", "properties": {"at": {"type": "string", "minLength": 6, "maxLength": 8}}}
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {**place, "required": ["at"]}}}
    events = list(chat(local, tools=[tool], tool_choice="required", parallel_tool_calls=False, stream=True))
    deltas = [call for event in events if event.choices for call in event.choices[0].delta.tool_calls or ()]
    assert 6 <= len(json.loads("".join(delta.function.arguments or "" for delta in deltas))["at"]) <= 8
    assert deltas[0].function.name == "look"
    assert len(deltas) > 2


def test_a_template_that_opens_the_thought(thinking: Running) -> None:
    budget = {"thinking_token_budget": 4}
    message = chat(thinking, extra=budget, max_tokens=24).choices[0].message
    thought = told(message, "reasoning_content")
    assert thought
    assert told(message, "reasoning") == thought
    assert "</think>" not in message.content
    events = list(chat(thinking, extra=budget, max_tokens=24, stream=True))
    deltas = [event.choices[0].delta for event in events if event.choices]
    assert "".join(told(delta, "reasoning_content") or "" for delta in deltas) == thought
    assert "".join(told(delta, "reasoning") or "" for delta in deltas) == thought
    assert "".join(delta.content or "" for delta in deltas) == message.content
    hidden = chat(thinking, extra={**budget, "include_reasoning": False}, max_tokens=24).choices[0].message
    assert told(hidden, "reasoning") is None
    assert hidden.content == message.content
    events = list(chat(thinking, extra={**budget, "include_reasoning": False}, max_tokens=24, stream=True))
    deltas = [event.choices[0].delta for event in events if event.choices]
    assert not any(told(delta, name) for delta in deltas for name in ("reasoning", "reasoning_content"))
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_reasoning_is_an_item_of_a_response(thinking: Running) -> None:
    ask = client(thinking).responses.create
    model = client(thinking).models.list().data[0].id
    found = ask(model=model, input="What?", max_output_tokens=24, extra_body={"thinking_token_budget": 4})
    assert [item.type for item in found.output] == ["reasoning", "message"]
    quick = ask(model=model, input="What?", max_output_tokens=24, reasoning={"effort": "none"})
    assert [item.type for item in quick.output] == ["message"]


def test_thinking_is_switched_off_where_the_template_has_no_switch(thinking: Running) -> None:
    for fields in ({"extra": {"chat_template_kwargs": {"enable_thinking": False}}}, {"reasoning_effort": "none"}):
        message = chat(thinking, max_tokens=8, **fields).choices[0].message
        assert told(message, "reasoning_content") is None
        assert message.content


def test_a_budget_is_a_bound_of_the_thought(thinking: Running) -> None:
    def thought(**extra: Any) -> int:
        answer = chat(thinking, extra={"ignore_eos": True, **extra}, max_tokens=40)
        return int(answer.usage.completion_tokens_details.reasoning_tokens)

    two, nine = thought(thinking_token_budget=2), thought(thinking_token_budget=9)
    assert 0 < two < nine < thought()
    assert refused(thinking, extra={"thinking_token_budget": -1}) == "thinking_token_budget"


def test_the_form_of_an_answer_is_enforced_on_every_route(local: Running) -> None:
    asking, model = client(local), client(local).models.list().data[0].id
    choice: Any = {"structured_outputs": {"choice": ["quince", "medlar"]}}
    fruits = ("quince", "medlar")
    for prompt in ("What?", [300, 301]):
        whole = asking.completions.create(model=model, prompt=prompt, max_tokens=16, extra_body=choice)
        assert whole.choices[0].text in fruits
    events = asking.completions.create(model=model, prompt="What?", max_tokens=16, stream=True, extra_body=choice)
    assert "".join(event.choices[0].text for event in events if event.choices) in fruits
    form = {"response_format": {"type": "regex", "pattern": "[0-9]{3}"}}
    assert asking.completions.create(model=model, prompt="x", max_tokens=9, extra_body=form).choices[0].text.isdigit()
    assert asking.responses.create(model=model, input="What?", extra_body=choice).output_text in fruits
    for fields in ({"text": {"format": {"type": "json_object"}}, **choice}, {"structured_outputs": {"regex": "("}}):
        with pytest.raises(openai.BadRequestError) as caught:
            asking.responses.create(model=model, input="What?", extra_body=fields)
        assert str(caught.value.param).startswith("structured_outputs")


def test_a_prompt_that_is_only_repeated_counts_the_same_in_a_stream(local: Running) -> None:
    model = client(local).models.list().data[0].id
    ask = client(local).completions.create
    fields: Any = {"model": model, "prompt": "A red mug", "max_tokens": 0, "echo": True}
    whole = ask(**fields)
    # The token that is written and not told may be the last of the model's answer.
    facts = (Path(qvl.tiny.__file__).parent / "weights" / "generation_config.json").read_text(encoding="utf-8")
    ending: Any = {"logit_bias": {str(json.loads(facts)["eos_token_id"][0]): 100}}
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    nothing: Any = {}
    for extra in (nothing, ending):
        events = list(ask(**fields, **extra, stream=True, stream_options=options))
        assert [event.usage.completion_tokens for event in events if event.usage] == [0] * len(events)
        assert events[-1].usage == whole.usage
        pieces = [event.choices[0] for event in events if event.choices]
        assert "".join(piece.text for piece in pieces) == whole.choices[0].text == "A red mug"
        assert pieces[-1].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_stream_begins_with_the_length_of_its_prompt(local: Running) -> None:
    model = client(local).models.list().data[0].id
    body: Any = {"max_tokens": 8, "messages": QUESTION, "model": model}
    with anthropic.Anthropic(base_url=local.url, api_key="none") as claude:
        # The second comes from the cache.
        for _ in range(2):
            with claude.messages.stream(**body) as stream:
                began = next(event.message.usage for event in stream if event.type == "message_start")
                ended = stream.get_final_message().usage
            assert began.input_tokens + (began.cache_read_input_tokens or 0) > 10
            assert (began.input_tokens, began.cache_read_input_tokens, began.output_tokens) == (
                ended.input_tokens,
                ended.cache_read_input_tokens,
                0,
            )
            assert ended.output_tokens > 0
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    events = list(chat(local, max_tokens=8, stream=True, stream_options=options))
    assert len(events) > 2
    assert len({event.usage.prompt_tokens for event in events}) == 1
    prompts: Any = ["A red mug", "A blue mug beside a green one"]
    asked = client(local).completions.create(
        model=model, prompt=prompts, max_tokens=8, stream=True, stream_options=options
    )
    told = [event.usage for event in asked if event.usage]
    assert [usage.completion_tokens for usage in told] == sorted(usage.completion_tokens for usage in told)
    assert told[-2] == told[-1]


def test_every_published_effort_is_known(thinking: Running) -> None:
    ask, model = client(thinking).responses.create, client(thinking).models.list().data[0].id
    for effort in get_args(get_args(ReasoningEffort)[0]):
        given: Any = effort
        fields: Any = {"max_tokens": 2, "reasoning_effort": given}
        assert chat(thinking, **fields).choices
        assert ask(model=model, input="What?", max_output_tokens=2, reasoning={"effort": given}).output


def test_a_completion_tells_each_token_beside_the_likeliest(local: Running) -> None:
    model = client(local).models.list().data[0].id
    for most in (0, 1):
        bias = {"300": 100, "301": 100}
        answer = client(local).completions.create(
            model=model, prompt="What?", max_tokens=4, logprobs=most, seed=3, temperature=2, logit_bias=bias
        )
        told: Any = answer.choices[0].logprobs
        for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert top[token] == value
            assert len(top) <= most + 1


def test_an_effort_is_a_bound_of_the_thought(thinking: Running) -> None:
    """A model that never ends its thought by itself leaves a quarter of its tokens for the answer."""
    answer = chat(thinking, reasoning_effort="low", max_tokens=24, extra={"ignore_eos": True})
    assert told(answer.choices[0].message, "reasoning_content")
    assert answer.choices[0].message.content


def test_an_answer_behind_a_thought_has_its_form(thinking: Running) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}
    answer = chat(thinking, extra={"thinking_token_budget": 3}, response_format=form, max_tokens=40)
    assert json.loads(answer.choices[0].message.content) in ("yes", "no")
    assert told(answer.choices[0].message, "reasoning_content")


def test_variables_reach_the_template(thinking: Running) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url("red", (64, 64))}}
    shown = [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}]
    plain = chat(thinking, shown, max_tokens=2).usage.prompt_tokens
    numbered = chat(thinking, shown, extra={"chat_template_kwargs": {"add_vision_id": True}}, max_tokens=2)
    assert numbered.usage.prompt_tokens > plain


@pytest.mark.parametrize(("path", "more"), [("/v1/analyze", {}), ("/v1/locate", {"targets": ["the brand"]})])
def test_variables_reach_the_template_of_a_task_too(thinking: Running, path: str, more: dict[str, Any]) -> None:
    body = {"image": data_url("red", (64, 64)), "max_tokens": 64, **more}
    # A template without a switch of its own is told all the same.
    variables = {"enable_thinking": False}
    plain = thinking.post(path, {**body, "chat_template_kwargs": variables})
    assert plain.status_code == 200, plain.text
    numbered = thinking.post(path, {**body, "chat_template_kwargs": {**variables, "add_vision_id": True}})
    assert numbered.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]
    bad = thinking.post(path, {**body, "chat_template_kwargs": {"messages": []}})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "chat_template_kwargs.messages")
    salted = [thinking.post(path, {**body, "chat_template_kwargs": variables, "cache_salt": salt}) for salt in "aab"]
    assert [answer.headers["x-qvl-cache"] for answer in salted] == ["miss", "hit", "miss"]
    assert thinking.post(path, {**body, "priority": "high"}).json()["error"]["param"] == "priority"


def test_tokens_of_the_thought_are_counted(thinking: Running) -> None:
    """They are those before the mark that ends it, whichever route tells them."""
    mark = thinking.post("/tokenize", {"prompt": "</think>"}).json()["tokens"]
    assert len(mark) == 1
    budget = {"thinking_token_budget": 6}
    whole = chat(thinking, extra={**budget, "return_token_ids": True}, max_tokens=24)
    count = told(whole.choices[0], "token_ids").index(mark[0])
    assert count > 3
    assert whole.usage.completion_tokens_details.reasoning_tokens == count
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    events = list(chat(thinking, extra=budget, max_tokens=24, stream=True, stream_options=options))
    running = [event.usage.completion_tokens_details.reasoning_tokens for event in events]
    assert running == sorted(running)
    assert running[-1] == count
    ask, model = client(thinking).responses.create, client(thinking).models.list().data[0].id
    asked: Any = {"model": model, "input": QUESTION, "max_output_tokens": 24, "extra_body": budget}
    assert ask(**asked).usage.output_tokens_details.reasoning_tokens == count
    assert [*ask(**asked, stream=True)][-1].response.usage.output_tokens_details.reasoning_tokens == count
    thought: Any = {"type": "enabled", "budget_tokens": 6}
    body: Any = {"max_tokens": 24, "messages": QUESTION, "model": model, "thinking": thought}
    with anthropic.Anthropic(base_url=thinking.url, api_key="none") as claude:
        assert claude.messages.create(**body).usage.output_tokens_details.thinking_tokens == count
        with claude.messages.stream(**body) as stream:
            assert stream.get_final_message().usage.output_tokens_details.thinking_tokens == count
    two = chat(thinking, extra=budget, max_tokens=24, n=2, seed=5, temperature=0.1).usage
    assert two.completion_tokens_details.reasoning_tokens > count
    quick = chat(thinking, max_tokens=8, reasoning_effort="none").usage
    assert quick.completion_tokens_details.reasoning_tokens == 0
