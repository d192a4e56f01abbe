"""docs/fields.md says what the backends do: each is asked for every field."""

from __future__ import annotations

import pytest

from qvl.backends.openvino.grammar import structure
from qvl.errors import UnsupportedInputError
from qvl.sampling import PARAMETERS
from qvl.types import PROMPT_FIELDS, ChatRequest, Message, ResponseFormat, SamplingParams, TextPart, Tool
from tests.server.fields_page import ENGINES, FORMATS, NOTES, PAGE, page, takes

EXAMPLES: dict[str, object] = {
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "reasoning_effort": "none",
    "prompt": (1, 2),
    "priority": 3,
}
FORMS = {
    "json_schema": ResponseFormat("json_schema", schema={"type": "object"}),
    "regex": ResponseFormat("regex", pattern="a+"),
    "choice": ResponseFormat("choice", choices=("a", "b")),
    "grammar": ResponseFormat("grammar", pattern='root ::= "a"'),
}


def request(name: str) -> ChatRequest:
    """A request that has one field at a value that changes something."""
    asked = ChatRequest((Message("user", (TextPart("a"),)),))
    if name in PARAMETERS:
        return asked.replace(sampling=SamplingParams(**{name: PARAMETERS[name].example, **_beside(name)}))  # type: ignore[arg-type]
    if name in FORMATS:
        return asked.replace(response_format=FORMS.get(name) or ResponseFormat("json_object"))
    return asked.replace(tools=(Tool("look"),)) if name == "tools" else asked.replace(**{name: EXAMPLES[name]})


def _beside(name: str) -> dict[str, object]:
    return {"max_tokens": 4} if name == "min_tokens" else {}


def test_the_page_is_that_of_the_backends() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


@pytest.mark.parametrize("name", [*PARAMETERS, *(name for name, _ in PROMPT_FIELDS), "priority", *FORMATS, "tools"])
def test_what_is_not_there_is_refused_by_name(name: str) -> None:
    for engine, backend in ENGINES.items():
        have = backend.peek_capabilities()
        assert have is not None
        if takes(have, name):
            # One that tells the logprob of the chosen token alone has no example of more.
            if (name, engine) != ("logprobs", "openvino"):
                backend.refuse_unsupported(request(name))
            continue
        with pytest.raises(UnsupportedInputError) as caught:
            backend.refuse_unsupported(request(name))
        expected = "response_format" if name in FORMATS else name
        assert caught.value.param == expected
        assert expected in caught.value.message


def test_openvino_refuses_to_hold_calls_that_need_not_come() -> None:
    asked = ChatRequest((Message("user", (TextPart("a"),)),), tools=(Tool("look", strict=True),))
    loose = asked.replace(tools=(Tool("look"),))
    for held, param in ((asked, "tools"), (loose.replace(parallel_tool_calls=False), "parallel_tool_calls")):
        with pytest.raises(UnsupportedInputError) as caught:
            structure(held)
        assert caught.value.param == param
    assert structure(loose) == {}
    assert "grammar" in structure(asked.replace(tool_choice="required"))


def test_notes_are_of_fields_that_there_are() -> None:
    assert {name for name, _ in NOTES} <= {*PARAMETERS, *EXAMPLES, "tools"}
    assert {engine for _, engine in NOTES} <= ENGINES.keys()
