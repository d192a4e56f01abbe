"""`QvlDecisionModel` as LangChain's decision model, over the bundled model."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.decisions import BaseDecisionModel, Box, Choice, Noul, NoulCriteria, Score
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from PIL import Image

from qvl import AsyncPipeline, Pipeline
from qvl.agent import QvlDecisionModel
from qvl.errors import ConfigError, MissingDependencyError, RequestError


def _picture(colour: str) -> dict[str, str]:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, "PNG")
    return {"type": "image", "base64": base64.b64encode(out.getvalue()).decode(), "mime_type": "image/png"}


RED = _picture("red")
NEW = Noul(instructions="Is it new?", criteria=NoulCriteria(true="Never worn."))
COLOUR = Choice(instructions=["Like", RED, "?"], criteria={"red": None, "blue": {"like": "the sea"}})
WORN = Score(instructions={"task": "rate the wear"}, criteria=["not at all", {"text": "a little"}, "very"])
ASKED = {"new": NEW, "colour": COLOUR, "worn": WORN}


@pytest.fixture(scope="module")
def model() -> Iterator[QvlDecisionModel]:
    with Pipeline(cache="memory:") as pipeline:
        yield QvlDecisionModel(pipeline=pipeline)


def test_it_answers_every_kind_of_question(model: QvlDecisionModel) -> None:
    assert isinstance(model, BaseDecisionModel)
    told = model.invoke({"state": "A mug.", "questions": ASKED})
    assert told.model == model.model == "local:bundled"
    assert 0 < told.nouls["new"].noul < 1
    colour, worn = told.choices["colour"], told.scores["worn"]
    assert colour.probabilities[colour.choice] == colour.confidence == max(colour.probabilities.values())
    assert worn.legend == {0: "not at all", 1: {"text": "a little"}, 2: "very"}
    assert math.fsum(worn.probabilities.values()) == pytest.approx(1)
    assert worn.score == pytest.approx(sum(level * share for level, share in worn.probabilities.items()))
    assert told.usage is not None
    assert told.usage["input_tokens"] > 0
    assert told.request_id


LOOK = {"name": "look", "args": {}, "id": "a"}
STATES: list[Any] = [
    HumanMessage([{"type": "text", "text": "See:"}, RED]),
    [SystemMessage("Be exact."), HumanMessage([RED]), AIMessage("I see."), HumanMessage("Well?")],
    [HumanMessage("Look."), AIMessage("", tool_calls=[LOOK]), ToolMessage([RED], tool_call_id="a")],
    {"title": "A mug", "photo": RED, "said": [HumanMessage([RED]), None, 1.5, {"deep": [RED]}]},
    ["A mug", RED],
]


@pytest.mark.parametrize("state", STATES, ids=["message", "conversation", "tool", "object", "list"])
def test_pictures_in_the_state_are_seen(model: QvlDecisionModel, state: Any) -> None:
    """Wherever they stand: another picture in their place gives other probabilities."""

    def swapped(value: Any) -> Any:
        if value == RED:
            return _picture("blue")
        if isinstance(value, dict):
            return {key: swapped(item) for key, item in value.items()}
        if isinstance(value, list):
            return [swapped(item) for item in value]
        if hasattr(value, "content"):
            return value.model_copy(update={"content": swapped(value.content)})
        return value

    ask = {"new": Noul(instructions="Is it new?")}
    one, other = (model.invoke({"state": each, "questions": ask}) for each in (state, swapped(state)))
    assert one.nouls["new"].noul != other.nouls["new"].noul


def test_asynchronously_in_batches_in_a_chain_and_traced(model: QvlDecisionModel) -> None:
    class Seen(BaseCallbackHandler):
        def __init__(self) -> None:
            self.metadata: list[Any] = []

        def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            self.metadata.append(kwargs.get("metadata"))

        on_llm_start = on_chain_start

    seen = Seen()
    chain = RunnableLambda(lambda text: {"state": text, "questions": {"new": NEW}}) | model
    told = chain.batch(["A mug.", "A cup."], config={"callbacks": [seen]})
    assert [set(one.answers) for one in told] == [{"new"}, {"new"}]
    assert any((each or {}).get("ls_provider") == "qvl-local" for each in seen.metadata)

    async def ask() -> None:
        assert await model.ainvoke({"state": "A mug.", "questions": {"new": NEW}}) is not None
        async with AsyncPipeline(cache="off") as pipeline:
            own = QvlDecisionModel(pipeline=pipeline)
            answered = await own.ainvoke({"state": "A mug.", "questions": {"new": NEW}})
            # The two of a batch may share a step, whose sums in bfloat16 differ a little from those of one alone.
            assert answered.nouls["new"].noul == pytest.approx(told[0].nouls["new"].noul, abs=0.01)
            with pytest.raises(ConfigError, match="only async methods"):
                own.invoke({"state": "A mug.", "questions": {"new": NEW}})

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"questions": {}}, "no question"),
        ({"questions": {"where": Box(instructions="the mug")}}, "questions.where: boxes are no decision here"),
        ({"questions": {"q": {"type": "noul"}}}, "questions.q.noul.instructions: Field required"),
        ({"questions": {"q": {"type": "guess", "instructions": "?"}}}, "questions.q"),
        ({"questions": {"q": Noul(instructions=" ")}}, "questions.q.instructions: the instructions are empty"),
        ({"questions": {"q": Choice(instructions="?", criteria={"a": None})}}, "questions.q.criteria: 1 choice"),
        ({"questions": {"q": Choice(instructions="?", criteria={"a": [RED], "b": None})}}, "a picture stands in a des"),
        ({"state": {"photo": {"type": "image", "url": "/etc/passwd"}}}, "not a file"),
        ({"state": [HumanMessage([{"type": "image", "url": "mug.png"}])]}, "not a file"),
        ({"state": {"clip": {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"}}}, "audio"),
        ({"state": {"a": math.nan}}, "NaN"),
        ({"state": {"a": object()}}, "object is not JSON"),
        ({"state": {1: "a"}}, "the keys of an object must be text"),
        ({"state": b"bytes"}, "must be text, messages, an object or a list"),
    ],
)
def test_bad_input_is_one_clear_line(model: QvlDecisionModel, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as failed:
        model.invoke({"state": "A mug.", "questions": {"new": NEW}, **change})
    assert said in str(failed.value)
    assert "\n" not in str(failed.value)


def test_the_model_is_the_pipelines(model: QvlDecisionModel) -> None:
    with pytest.raises(ValueError, match="model 'gpt' is not the pipeline's, 'local:bundled'"):
        QvlDecisionModel(pipeline=model.pipeline, model="gpt")


def test_an_older_langchain_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qvl.agent.integrations.langchain_decisions")
    monkeypatch.setitem(sys.modules, "langchain_core.decisions", None)
    with pytest.raises(MissingDependencyError, match=r"decision models need langchain-core 1\.8 or later"):
        importlib.import_module("qvl.agent.integrations.langchain_decisions")
