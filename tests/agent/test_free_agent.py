from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from qvl.agent import Catalog
from qvl.agent.free_agent import build_agent
from qvl.errors import BackendUnavailableError
from tests.agent.conftest import down, model_of

SEARCH = [("search_products", {"brand": "NORVIK", "category": "mug", "attributes": {"color": "red"}})]
GOOD = "Take the Norvik Cima 500 for 10.90 EUR."


def ask(picture: str, text: str = "what is like it?") -> dict[str, Any]:
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    block = {"type": "image", "base64": data, "mime_type": "image/png"}
    return {"messages": [HumanMessage([{"type": "text", "text": text}, block])]}


def run(pipeline: Any, catalog: Catalog, picture: str) -> list[Any]:
    found: list[Any] = build_agent(pipeline, catalog, max_steps=6).invoke(ask(picture))["messages"]
    # In every case the first thing that happens is one look at the picture.
    assert isinstance(found[1], AIMessage)
    assert [call["name"] for call in found[1].tool_calls] == ["analyze_image"]
    assert isinstance(found[2], ToolMessage)
    assert '"NORVIK"' in found[2].text
    assert model_of(pipeline).looked == 1
    first = model_of(pipeline).requests[0].messages
    assert any(message.role == "tool" and "NORVIK" in message.text for message in first)
    assert isinstance(found[-1], AIMessage)
    assert found[-1].text
    return found


def test_it_looks_searches_and_answers(pipe: Any, catalog: Catalog, picture: str) -> None:
    found = run(pipe(SEARCH, GOOD), catalog, picture)
    assert found[-1].text == GOOD


def test_numbers_of_hits_become_their_names(pipe: Any, catalog: Catalog, picture: str) -> None:
    found = run(pipe(SEARCH, "Take [1]."), catalog, picture)
    assert found[-1].text == "Take Norvik Cima 500 (10.90 EUR, MU-0001)."


@pytest.mark.parametrize(
    "script",
    [
        ["It is a Nike Pegasus for 99 EUR!"],
        [SEARCH, "Take the Nike Pegasus."],
        [SEARCH, "Take the Norvik Cima 500 for 3.99 EUR."],
        [SEARCH, "Take the Zelpho one."],
        [SEARCH, ""],
    ],
)
def test_nothing_invented_reaches_the_user(pipe: Any, catalog: Catalog, picture: str, script: list[Any]) -> None:
    found = run(pipe(*script), catalog, picture)
    everything = " ".join(message.text for message in found if isinstance(message, AIMessage))
    for invention in ("Nike", "Pegasus", "3.99", "Zelpho", "99 EUR"):
        assert invention not in everything
    assert found[-1].text.startswith("The picture shows NORVIK mug")


@pytest.mark.parametrize("mode", ["messages", "updates", "values"])
def test_nothing_invented_is_streamed_either(pipe: Any, catalog: Catalog, picture: str, mode: str) -> None:
    aloud = [*SEARCH, "Surely a Nike Pegasus"]
    agent = build_agent(pipe(aloud, "Take the Nike Pegasus.", GOOD), catalog)
    streamed = list(agent.stream(ask(picture), stream_mode=mode))
    assert "Norvik Cima 500" in str(streamed)
    assert "Nike" not in str(streamed)


def test_a_picture_of_an_earlier_message_is_looked_at_too(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe(SEARCH, GOOD)
    earlier = [*ask(picture)["messages"], AIMessage("One moment."), HumanMessage("what is like it?")]
    agent = build_agent(pipeline, catalog)
    found = agent.invoke({"messages": earlier})["messages"]
    assert [call["name"] for call in found[3].tool_calls] == ["analyze_image"]
    assert found[-1].text == GOOD
    more = agent.invoke({"messages": [*found, HumanMessage("and?")]})["messages"]
    assert model_of(pipeline).looked == 1
    assert more[-1].text == GOOD


def test_async_runs_are_checked_alike(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe(SEARCH, "Take the Nike Pegasus.", GOOD)
    found = asyncio.run(build_agent(pipeline, catalog).ainvoke(ask(picture)))["messages"]
    assert [found[1].tool_calls[0]["name"], found[-1].text] == ["analyze_image", GOOD]
    assert "Nike" not in str(found)


def test_asked_again_it_may_do_better(pipe: Any, catalog: Catalog, picture: str) -> None:
    assert run(pipe(SEARCH, "Take the Nike Pegasus.", GOOD), catalog, picture)[-1].text == GOOD


def test_a_search_before_it_speaks_comes_after_the_look(pipe: Any, catalog: Catalog, picture: str) -> None:
    found = run(pipe([("search_products", {"text": "lamp"})], "A lamp, [1]."), catalog, picture)
    names = [message.name for message in found if isinstance(message, ToolMessage)]
    assert names == ["analyze_image", "search_products"]


def test_a_loop_ends_within_the_limit(pipe: Any, catalog: Catalog, picture: str) -> None:
    pipeline = pipe(SEARCH)
    found = run(pipeline, catalog, picture)
    assert len(model_of(pipeline).requests) == 6
    assert "ended after 6 steps" in found[-1].text
    assert "Norvik Cima 500" in found[-1].text


@pytest.mark.parametrize(
    "wrong",
    [
        [("delete_everything", {})],
        [("search_products", "{broken")],
        [("search_products", {"limit": "many"})],
        [("search_products", {"max_price": -1})],
        [("analyze_image", {"picture": 9})],
        [("search_products", "[1, 2]")],
    ],
)
def test_unknown_tools_and_broken_arguments_are_told_to_the_model(
    pipe: Any, catalog: Catalog, picture: str, wrong: Any
) -> None:
    pipeline = pipe(wrong, SEARCH, GOOD)
    assert run(pipeline, catalog, picture)[-1].text == GOOD
    told = model_of(pipeline).requests[1].messages[-1]
    assert told.role == "tool"
    endless = run(pipe(wrong), catalog, picture)
    assert "ended after 6 steps" in endless[-1].text


def test_an_endpoint_that_is_down_is_an_error_before_the_model_speaks(
    pipe: Any, catalog: Catalog, picture: str
) -> None:
    pipeline = pipe(seen=down())
    with pytest.raises(BackendUnavailableError, match="nothing listens"):
        build_agent(pipeline, catalog).invoke(ask(picture))
    assert model_of(pipeline).requests == []
