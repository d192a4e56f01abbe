"""Each thing that changes an answer changes the key, and nothing else does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvl import media
from qvl.analysis.product import ProductFields
from qvl.caches import key as keys
from qvl.errors import CacheError, RequestError
from qvl.types import (
    ChatRequest,
    Choice,
    ImagePart,
    Message,
    ResponseFormat,
    Result,
    SamplingParams,
    TextPart,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

RED = media.load(Image.new("RGB", (32, 32), "red"))
BLUE = media.load(Image.new("RGB", (32, 32), "blue"))
TOOL = Tool("search", "finds", {"type": "object"})


def user(*parts: Any) -> Message:
    return Message("user", parts)


BASE = ChatRequest(messages=(user(ImagePart(RED), ImagePart(BLUE), TextPart("q")),), tools=(TOOL,))
ABOUT: dict[str, Any] = {"identity": {"backend": "b", "model": "m"}, "max_pixels": 1000}


def key(request: ChatRequest = BASE, **about: Any) -> str:
    return keys.hash_manifest(keys.build_manifest(request, **{**ABOUT, **about}))


CHANGES = {
    "picture order": BASE.replace(messages=(user(ImagePart(BLUE), ImagePart(RED), TextPart("q")),)),
    "picture place": BASE.replace(messages=(user(ImagePart(RED), TextPart("q"), ImagePart(BLUE)),)),
    "picture count": BASE.replace(messages=(user(ImagePart(RED), TextPart("q")),)),
    "question": BASE.replace(messages=(user(ImagePart(RED), ImagePart(BLUE), TextPart("q2")),)),
    "split text": BASE.replace(messages=(user(ImagePart(RED), ImagePart(BLUE), TextPart("q"), TextPart("")),)),
    "role": BASE.replace(messages=(Message("system", BASE.messages[0].parts),)),
    "system": BASE.replace(messages=(Message("system", (TextPart("s"),)), *BASE.messages)),
    "schema": BASE.replace(response_format=ResponseFormat("json_schema", schema={"type": "object"})),
    "regex": BASE.replace(response_format=ResponseFormat("regex", pattern="a+")),
    "choice": BASE.replace(response_format=ResponseFormat("choice", choices=("a",))),
    "tools": BASE.replace(tools=(dataclasses.replace(TOOL, description="other"),)),
    "tool_choice": BASE.replace(tool_choice="required"),
    "parallel": BASE.replace(parallel_tool_calls=False),
    "max_pixels": BASE.replace(max_pixels=512),
    "extra": BASE.replace(extra={"x": 1}),
    "template": BASE.replace(chat_template_kwargs={"add_vision_id": True}),
    "no opening": BASE.replace(add_generation_prompt=False),
    "going on": BASE.replace(continue_final_message=True),
    "effort": BASE.replace(reasoning_effort="low"),
    "prompt": BASE.replace(prompt="q"),
    "token ids": BASE.replace(prompt=(1, 2)),
    "salt": BASE.replace(cache_salt="s"),
    "grammar": BASE.replace(response_format=ResponseFormat("grammar", pattern="a+")),
}
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "max_tokens": 7,
    "stop": ("x",),
    "stop_token_ids": (3,),
    "ignore_eos": True,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "seed": 3,
    "logprobs": 2,
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


def test_every_sampling_field_is_tried() -> None:
    assert SAMPLING.keys() == SamplingParams.names()


def test_every_difference_in_the_request_is_another_key() -> None:
    requests = {**CHANGES, **{n: BASE.replace(sampling=SamplingParams(**{n: v})) for n, v in SAMPLING.items()}}
    found = {name: key(request) for name, request in requests.items()} | {"base": key()}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    "about",
    [
        {"task": "analyze"},
        {"prompt_version": "2"},
        {"language": "zh"},
        {"namespace": "tenant"},
        {"max_pixels": 999},
        {"identity": {"backend": "b", "model": "m2"}},
        {"identity": {"backend": "b", "model": "m", "dtype": "bf16"}},
    ],
)
def test_every_circumstance_is_another_key(about: dict[str, Any]) -> None:
    assert key(**about) != key()


def test_what_a_client_may_turn_is_not_in_the_key() -> None:
    assert key(BASE.replace(request_id="another")) == key()
    assert key(BASE.replace(max_pixels=5000)) == key()


def test_explain_names_the_field() -> None:
    a = keys.build_manifest(BASE, **ABOUT)
    b = keys.build_manifest(CHANGES["question"].replace(sampling=SamplingParams(seed=4)), **ABOUT)
    assert keys.explain(a, a) == []
    assert keys.explain(a, b) == [("messages[0].parts[2].text", "q", "q2"), ("sampling.seed", None, 4)]


def test_values_that_are_no_json_are_refused() -> None:
    for bad in ({"x": object()}, {"x": float("nan")}, {"x": "\ud800"}):
        with pytest.raises(RequestError):
            key(BASE.replace(extra=bad))


def test_the_same_number_is_the_same_key_however_it_is_written() -> None:
    one = key(BASE.replace(sampling=SamplingParams(temperature=0, top_p=1, seed=3, max_tokens=5)))
    assert one == key(BASE.replace(sampling=SamplingParams(temperature=0.0, top_p=1.0, seed=3, max_tokens=5)))


texts = st.text(max_size=20)
logprobs = st.builds(TokenLogprob, texts, st.floats(-50, 0), st.binary(max_size=4))
choices = st.builds(
    Choice,
    index=st.integers(0, 3),
    text=texts,
    reasoning=texts,
    tool_calls=st.lists(st.builds(ToolCall, texts, texts, texts), max_size=2).map(tuple),
    finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
    logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
)


@given(st.lists(choices, min_size=1, max_size=3), st.builds(Usage, st.integers(0, 9), st.integers(0, 9)))
def test_a_result_survives_the_cache(found: list[Choice], usage: Usage) -> None:
    result = Result(tuple(found), usage, model="m", backend="b", created_at=1.5, notes=("n",))
    assert keys.result_from_json(keys.result_to_json(result)) == result


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), max_size=4))
def test_a_broken_entry_is_a_cache_error(data: dict[str, Any]) -> None:
    with pytest.raises(CacheError):
        keys.result_from_json(data)


def test_answers_that_are_kept_are_found_by_the_next_release() -> None:
    """Who changes one of these loses every answer that users keep; a picture drawn here is 32 x 32 and red."""
    plain = ChatRequest(messages=(user(ImagePart(RED), TextPart("q")),))
    product = plain.replace(
        response_format=ResponseFormat("json_schema", schema=ProductFields.model_json_schema(), name="ProductFields")
    )
    manifests = [keys.build_manifest(one, identity={"model": "m"}, max_pixels=10**6) for one in (plain, product)]
    assert [keys.hash_manifest(manifest) for manifest in manifests] == [
        "sha256-0df9fb71c93e5add0baf2b2b27cc8dd695d603882ea41e8bf2f58324ebbff503",
        "sha256-98bd13bf10bcc3d2e23cf92a0b90e55e057bb46737619e06845f317a6ceaa2c1",
    ]
