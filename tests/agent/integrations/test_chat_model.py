from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any, TypedDict

import pytest
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration
from PIL import Image
from pydantic import BaseModel

from qvl import AsyncPipeline, Pipeline
from qvl.agent.integrations.langchain import QvlCache, QvlChatModel
from qvl.errors import AnalysisError, ConfigError, RequestError, UnsupportedInputError
from qvl.testing import echo
from qvl.types import ChatRequest
from tests.agent.conftest import ShopModel
from tests.agent.integrations.langchain_suites import IntegrationSuite, UnitSuite


def reply(request: ChatRequest) -> Any:
    """What a small, obedient model says: it calls the tool it is told of, fills schemas, and else repeats."""
    last = request.messages[-1]
    answered = last.role == "tool"
    if request.response_format.schema is not None:
        return json.dumps(echo.example(request.response_format.schema))
    if request.response_format.kind == "json_object":
        return '{"setup": "a", "punchline": "b"}'
    if request.tools and request.tool_choice != "none" and not answered:
        named = [tool for tool in request.tools if request.tool_choice in ("auto", "required", tool.name)]
        arguments = echo.example(named[0].parameters)
        if named[0].name == "magic_function":
            arguments = {"input": 3}
        if named[0].name == "unicode_customer":
            arguments = {"customer_name": last.text, "description": last.text}
        if named[0].name == "my_adder_tool":
            arguments = {"a": 1, "b": 2}
        return [(named[0].name, arguments)]
    return f"I see {len(request.pictures)} pictures and read 3 words: {last.text}"


@pytest.fixture(scope="module", autouse=True)
def _closing() -> Iterator[None]:
    yield
    for pipeline in MADE:
        pipeline.close()


MADE: list[Pipeline] = []


def scripted() -> Pipeline:
    MADE.append(Pipeline(backend=ShopModel(reply), cache="off"))
    return MADE[-1]


class TestUnit(UnitSuite):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"pipeline": scripted()}


class TestIntegration(IntegrationSuite):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"pipeline": scripted()}


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": png(), "mime_type": "image/png"},
        {"type": "image", "source_type": "base64", "data": png(), "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png()}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{png()}"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{png()}", "detail": "low"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png()}},
        {"type": "image", "data": png(), "mimeType": "image/png"},
        {"type": "image", "image": f"data:image/png;base64,{png()}", "max_pixels": 1024},
    ],
)
def test_pictures_in_standard_blocks_reach_the_model(block: dict[str, Any]) -> None:
    answer = QvlChatModel(pipeline=scripted()).invoke([HumanMessage([{"type": "text", "text": "hi"}, block])])
    assert answer.text.startswith("I see 1 pictures")


def test_files_are_not_opened_for_a_message(picture: str) -> None:
    with pytest.raises(UnsupportedInputError, match="not a file"):
        QvlChatModel(pipeline=scripted()).invoke([HumanMessage([{"type": "image", "url": picture}])])


def test_broken_arguments_are_kept_apart() -> None:
    pipeline = Pipeline(backend=ShopModel([("look", "{not json"), ("look", {"a": 1})]), cache="off")
    MADE.append(pipeline)
    answer = QvlChatModel(pipeline=pipeline).invoke("x")
    assert [call["args"] for call in answer.tool_calls] == [{"a": 1}]
    assert [call["args"] for call in answer.invalid_tool_calls] == ["{not json"]


def test_an_async_pipeline_serves_async_calls_and_refuses_others() -> None:
    async def main() -> None:
        async with AsyncPipeline(backend=ShopModel("one two"), cache="off") as pipeline:
            model = QvlChatModel(pipeline=pipeline)
            assert (await model.ainvoke([SystemMessage("x"), AIMessage("y"), HumanMessage("z")])).text == "one two"
            assert [chunk.text async for chunk in model.astream("x")][:2] == ["one", " two"]
            with pytest.raises(ConfigError, match="AsyncPipeline"):
                model.invoke("x")

    asyncio.run(main())


class Shoe(BaseModel):
    size: int


def test_structured_output_gives_the_class_or_says_why_not() -> None:
    pipeline = Pipeline(backend=ShopModel('{"size": 4}', "none"), cache="off")
    MADE.append(pipeline)
    model = QvlChatModel(pipeline=pipeline).with_structured_output(Shoe, include_raw=True)
    assert model.invoke("x")["parsed"] == Shoe(size=4)  # type: ignore[index]
    failed = model.invoke("x")
    assert failed["parsed"] is None  # type: ignore[index]
    assert failed["parsing_error"] is not None  # type: ignore[index]


class Size(TypedDict):
    """A size."""

    size: int


BY_NAME = {"title": "Shoe", "type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}


@pytest.mark.parametrize("schema", [Shoe, BY_NAME, Size])
@pytest.mark.parametrize("include_raw", [False, True])
def test_structured_output_that_was_cut_off_says_so(schema: Any, include_raw: bool) -> None:
    with Pipeline(cache="off") as pipeline:
        model = QvlChatModel(pipeline=pipeline, max_tokens=2).with_structured_output(schema, include_raw=include_raw)
        if not include_raw:
            with pytest.raises(AnalysisError, match=r"cut off \(raise max_tokens\)"):
                model.invoke("What size?")
            return
        found: Any = model.invoke("What size?")
        assert found["parsed"] is None
        assert "cut off" in str(found["parsing_error"])
        assert found["raw"].response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("text", ['So {well}: {"size": 4} {x}', '[{"size": 4}]', '{"no": 1} or {"size": 4}'])
def test_structured_output_by_name_is_found_among_other_text(text: str) -> None:
    with Pipeline(backend=ShopModel(text), cache="off") as pipeline:
        assert QvlChatModel(pipeline=pipeline).with_structured_output(BY_NAME).invoke("x") == {"size": 4}


def test_answers_are_kept_for_langchain(tmp_path: Any) -> None:
    backend = ShopModel("first", "second")
    pipeline = Pipeline(backend=backend, cache="off")
    MADE.append(pipeline)
    cache = QvlCache(f"sqlite:///{tmp_path / 'answers.db'}")
    set_llm_cache(cache)
    try:
        model = QvlChatModel(pipeline=pipeline)
        assert [model.invoke("x").text, model.invoke("x").text] == ["first", "first"]
        assert len(backend.requests) == 1
        assert model.invoke("y").text == "second"
    finally:
        set_llm_cache(None)
    cache.clear()
    assert cache.lookup("x", "y") is None
    cache.update("x", "y", [ChatGeneration(message=AIMessage("kept"))])
    assert cache.lookup("x", "y")[0].text == "kept"
    cache.cache.close()


def test_a_wrong_block_is_named_by_its_place_in_the_conversation() -> None:
    model = QvlChatModel(pipeline=scripted())
    block = {"type": "image_url", "image_url": {"url": "http://a/b.png", "detail": "medium"}}
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[1\]\.image_url\.detail: .*'medium'"):
        model.invoke([SystemMessage("be kind"), HumanMessage([{"type": "text", "text": "hi"}, block])])


def test_a_block_says_how_large_its_picture_is_shown() -> None:
    backend = ShopModel(reply)
    MADE.append(Pipeline(backend=backend, cache="off"))
    block = {"type": "image", "base64": png(), "mime_type": "image/png", "resized_height": 64, "resized_width": 96}
    QvlChatModel(pipeline=MADE[-1]).invoke([HumanMessage([{"type": "text", "text": "hi"}, block])])
    (shown,) = backend.requests[-1].pictures
    assert (shown.width, shown.height) == (96, 64)
