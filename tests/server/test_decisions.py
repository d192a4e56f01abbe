"""`POST /v1/decisions`, by OpenAI's client and by hand, over the bundled model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import openai
import pytest

from qvl.backends.base import Backend, Capabilities
from qvl.backends.local.backend import LocalBackend
from qvl.errors import RefusalError
from qvl.types import ChatRequest, Chunk, SamplingParams, TokenLogprob, Usage
from tests.server.conftest import Running, data_url, start
from tests.server.echo_backend import EchoBackend

CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "red"}, {"value": True}, {"value": "true"}]}
YES = {"type": "predicate", "instructions": "Is it red?"}


@pytest.fixture(scope="module")
def bundled() -> Iterator[Running]:
    running = start(LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=64 << 20))
    yield running
    running.stop()


def _image(colour: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(colour), "detail": "auto"}


def _json(data: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "input_json", "data": data}]}]


def _nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(levels - 1):
        inner = {"a": inner}
    return inner


def _everything() -> dict[str, Any]:
    """A request with items of every role, and pictures in all places."""
    breakpoint_ = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    return {
        "model": "bundled",
        "input": [
            {"role": "developer", "content": "Look well."},
            {"role": "system", "content": [{"type": "input_text", "text": "Be exact."}]},
            {"role": "user", "content": [_image("red"), {"type": "input_text", "text": "A mug.", **breakpoint_}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I see."}], "phase": "commentary"},
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [_image("blue")]},
            {"type": "custom_tool_call", "call_id": "b", "name": "note", "input": "a scratch"},
            {"type": "custom_tool_call_output", "call_id": "b", "output": "written"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_json", "data": {"price": 7}}]},
        ],
        "questions": [
            {**YES, "instructions": [{"type": "input_text", "text": "Is it this?"}, _image("red")]},
            {**CHOICE, "name": "which"},
            {"type": "score", "instructions": "How good?", "levels": [{"label": "bad"}, {"label": "good"}]},
        ],
        "prompt_cache_key": "mine",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "safety_identifier": "somebody",
    }


def _check(decision: Any) -> None:
    yes, which, good = decision.answers
    assert (yes.type, which.type, good.type) == ("predicate", "choice", "score")
    assert 0 < yes.probability < 1
    assert [item.value for item in which.probabilities] == ["red", True, "true"]
    assert which.confidence == max(item.probability for item in which.probabilities)
    assert [(item.label, item.value) for item in good.probabilities] == [("bad", 0), ("good", 1)]
    assert good.score == pytest.approx(good.probabilities[1].probability)
    for answer in (which, good):
        assert math.fsum(item.probability for item in answer.probabilities) == pytest.approx(1)
    assert (yes.name, which.name) == (None, "which")
    assert decision.model == "bundled"
    assert decision.usage.input_tokens > decision.usage.input_tokens_details.cached_tokens >= 0
    assert decision.usage.total_tokens == decision.usage.input_tokens + decision.usage.output_tokens


def test_openais_client_blocking_and_asynchronous(bundled: Running) -> None:
    body = _everything()
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="none", max_retries=0) as client:
        _check(client.decisions.create(**body))

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{bundled.url}/v1", api_key="none", max_retries=0) as client:
            return await client.decisions.create(**body)

    _check(asyncio.run(ask()))


def test_forty_questions_about_three_pictures_share_what_is_shown(bundled: Running) -> None:
    shown = [{"role": "user", "content": [_image(colour) for colour in ("red", "green", "blue")]}]
    questions = [{**CHOICE, "instructions": f"Which is number {number}?"} for number in range(40)]
    body = {"model": "bundled", "input": shown, "questions": questions}
    first = bundled.post("/v1/decisions", body)
    assert first.status_code == 200, first.text
    assert len(first.json()["answers"]) == 40
    assert first.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert first.headers["x-qvl-cache"] == "miss"
    again = bundled.post("/v1/decisions", body)
    assert again.headers["x-qvl-cache"] == "hit"
    assert again.json()["answers"] == first.json()["answers"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [YES] * 401}, "questions"),
        ({"questions": [{**YES, "instructions": ""}]}, "questions[0].instructions"),
        ({"questions": [YES, {**CHOICE, "choices": [{"value": "a"}]}]}, "questions[1].choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": str(n)} for n in range(256)]}]}, "questions[0].choices"),
        ({"questions": [{**YES, "instructions": [{"type": "input_audio"}]}]}, "questions[0].instructions[0].type"),
        ({"questions": [{**YES, "instructions": [{**_image("red"), "image_url": "data:,x"}]}]}, "questions[0].instruc"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": [], "output": "y"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": {}, "name": "a", "arguments": ""}]}, "input[0].call_id"),
        ({"questions": [{**YES, "type": ["predicate"]}]}, "questions[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]."),
        ({"input": _json(None)}, "input[0].content[0].data"),
        ({"input": _json("text")}, "input[0].content[0].data"),
        ({"input": _json([])}, "input[0].content[0].data"),
        ({"input": _json([{}, 1])}, "input[0].content[0].data"),
        ({"input": _json({"a": [0] * 10_000})}, "input[0].content[0].data"),
        ({"input": _json({"a": "x" * (256 << 10)})}, "input[0].content[0].data"),
        ({"input": _json(_nested(33))}, "input[0].content[0].data"),
        ({"questions": [{**YES, "instructions": _json(7)[0]["content"]}]}, "questions[0].instructions[0].data"),
        ({"prompt_cache_options": {"ttl": "1h"}}, "prompt_cache_options"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_bad_input_is_named(bundled: Running, change: dict[str, Any], param: str) -> None:
    answer = bundled.post("/v1/decisions", {"model": "bundled", "input": "A mug.", "questions": [YES], **change})
    assert answer.status_code == 400, answer.text
    assert str(answer.json()["error"]["param"]).startswith(param), answer.text


def test_the_most_pictures_of_a_request_are_counted_in_every_form() -> None:
    server = start(EchoBackend(), max_images=1)
    few = "allows at most 1"
    film = {"type": "video", "video": "data:video/mp4;base64,AAAA"}
    two: list[tuple[str, dict[str, Any]]] = [
        ("/v1/decisions", {"input": [{"role": "user", "content": [part, part]}], "questions": [YES]})
        for part in (_image("red"), {"type": "image_url", "image_url": {"url": data_url("red")}})
    ]
    assets = {name: {"data_base64": data_url("red").partition(",")[2]} for name in ("a.video.png", "b.video")}
    asked = {"new": {"type": "noul", "instructions": "Is it new?"}}
    two.append(("/v1/systemone", {"state": "See a.video.png and b.video", "questions": asked, "assets": assets}))
    try:
        for path, body in two:
            assert few in server.post(path, body).text
        body = {"input": [{"role": "user", "content": [_image("red"), film]}], "questions": [YES]}
        assert few not in server.post("/v1/decisions", body).text
    finally:
        server.stop()


def test_an_empty_list_is_no_wrong_type(bundled: Running) -> None:
    answer = bundled.post("/v1/decisions", {"model": "bundled", "input": [], "questions": [YES]})
    assert "at least 1 item" in answer.json()["error"]["message"], answer.text


class Moody(Backend):
    """An endpoint's kind of backend: the likeliest first tokens, which are an answer to what has a number alone."""

    name, model = "moody", "one"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(top_logprobs=5, sampling=SamplingParams.assumed())

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        self.refuse_unsupported(request)
        asked = request.messages[-1].text
        if "decline" in asked:
            raise RefusalError("not this one")
        text = "Hm" if "mood" in asked else "yes"
        top = TokenLogprob(text, -0.1)
        yield Chunk(text=text, logprobs=(TokenLogprob(text, -0.1, top=(top,)),) if request.sampling.logprobs else ())
        yield Chunk(finish_reason="stop", usage=Usage(1, 1))


def test_a_question_that_cannot_be_answered_is_a_refusal_and_the_others_are_answered(
    serve: Callable[..., Running],
) -> None:
    running = serve(Moody())
    asked = ["Is it new?", "What is its mood?", "Will you decline?"]
    questions = [{"type": "predicate", "name": text, "instructions": text} for text in asked]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        first, second, third = client.decisions.create(model="one", input="A mug.", questions=questions).answers
    assert (first.type, first.probability) == ("predicate", 1.0)
    assert (second.type, second.name) == ("refusal", "What is its mood?")
    assert (third.type, third.name) == ("refusal", "Will you decline?")
    many = {"type": "choice", "instructions": "Which?", "choices": [{"value": f"n{n}"} for n in range(6)]}
    answer = running.post("/v1/decisions", {"model": "one", "input": "A mug.", "questions": [YES, many]})
    # Without one of its answers among what was said it is a refusal as well.
    assert [item["type"] for item in answer.json()["answers"]] == ["predicate", "refusal"]
    many["choices"][0]["value"] = "yes"
    answer = running.post("/v1/decisions", {"model": "one", "input": "A mug.", "questions": [YES, many]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "questions[1]"
    assert "6 options" in answer.json()["error"]["message"]
