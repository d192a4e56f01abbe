"""Answers that must have a form have it, through the public seam, on real (tiny) weights."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from qvl.errors import RequestError
from qvl.types import ResponseFormat as Format
from qvl.types import Result, Tool
from tests.backends.local.requests import ask, run

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.backends.local.backend import LocalBackend
    from tests.backends.local.conftest import Opener

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["mug", "shoe", "bag"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_always_parses_in_the_spelling_of_json_dumps(opened: Opener, random_folder: Path, seed: int) -> None:
    backend = opened(random_folder)
    form = Format("json_schema", schema=SCHEMA)
    wanted = [
        ask(seed, "Describe the picture.", max_tokens=200, temperature=1.0, seed=seed).replace(response_format=form),
        ask("Say hello.", max_tokens=20),
        ask("Say hello.", max_tokens=200).replace(response_format=form),
    ]
    results = run(backend, *wanted)
    for result in (results[0], results[2]):
        value = json.loads(result.text)
        assert value["kind"] in ("mug", "shoe", "bag")
        assert 0 <= value["count"] <= 99
        assert result.text == json.dumps(value, ensure_ascii=False)
        assert result.finish_reason == "stop"


def test_regex_choice_and_json_object_are_kept(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    regex, choice, free = run(
        backend,
        ask("Say hello.", max_tokens=60).replace(response_format=Format("regex", pattern=r"[0-9]{3}-[a-f]{2}")),
        ask("Say hello.", max_tokens=60).replace(response_format=Format("choice", choices=("red mug", 'a "b"'))),
        ask("Say hello.", max_tokens=12).replace(response_format=Format("json_object")),
    )
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", regex.text)
    assert choice.text in ("red mug", 'a "b"')
    assert free.text.startswith("{")


def test_constrained_logprobs_are_of_the_constrained_choice(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    form = Format("choice", choices=("a", "b"))
    result = run(backend, ask("Say hello.", logprobs=5, max_tokens=5).replace(response_format=form))[0]
    assert result.logprobs is not None
    first = result.logprobs[0]
    assert {top.token for top in first.top} == {"a", "b"}
    assert sum(2.718281828**top.logprob for top in first.top) == pytest.approx(1, abs=1e-4)


def test_a_bad_schema_ends_its_own_request_alone(tiny: LocalBackend) -> None:
    async def both() -> tuple[Any, Result]:
        bad = ask("x").replace(response_format=Format("regex", pattern="[0-9"))
        return await asyncio.gather(tiny.generate(bad), tiny.generate(ask("x")), return_exceptions=True)  # type: ignore[return-value]

    error, good = asyncio.run(both())
    assert isinstance(error, RequestError)
    assert "\n" not in str(error)
    assert isinstance(good, Result)


@pytest.mark.parametrize("start", ["{\n", "{  ", " {", '{"a":1', '{"a" : 1'])
def test_white_space_beyond_that_of_json_dumps_is_no_json(tiny: LocalBackend, start: str) -> None:
    assert tiny._loaded is not None
    tokens = tiny._loaded.checkpoint.tokenizer(start)["input_ids"]
    for form in (Format("json_object"), Format("json_schema", schema={"type": "object"})):
        matcher = tiny._loaded.maker.grammars.matcher(ask("x").replace(response_format=form))
        assert matcher.deep_copy().try_consume_tokens(tokens) < len(tokens)
        good = tiny._loaded.checkpoint.tokenizer('{"a": 1}')["input_ids"]
        assert matcher.try_consume_tokens(good) == len(good)


def test_a_required_tool_is_called_with_arguments_of_its_schema(opened: Opener, random_folder: Path) -> None:
    backend = opened(random_folder)
    tools = (
        Tool("find", parameters={"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                 "additionalProperties": False}),
        Tool("ends", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
    )  # fmt: skip
    base = ask("Find it.", max_tokens=120).replace(tools=tools, parallel_tool_calls=False)
    required, named = run(backend, base.replace(tool_choice="required"), base.replace(tool_choice="find"))
    assert required.finish_reason == named.finish_reason == "tool_calls"
    assert required.tool_calls[0].name in ("find", "ends")
    assert named.tool_calls[0].name == "find"
    assert json.loads(named.tool_calls[0].arguments)["n"] in (1, 2)
    assert named.text == ""
