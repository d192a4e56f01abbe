"""Tool calls in the XML form: read as they are streamed, held to schemas, and given back to the template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qvl.backends.local.model.model_folder import bundled_folder
from qvl.backends.local.model.sampler import Sampled
from qvl.backends.local.text.detokenizer import Detokenizer, Vocabulary
from qvl.backends.local.text.grammar import Grammars
from qvl.backends.local.text.prompt import PromptEncoder
from qvl.chunks import fold
from qvl.errors import RequestError
from qvl.types import ChatRequest, Choice, Message, TextPart, Tool, ToolCall

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call>, <function=name>, <parameter=name>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for name, value in call.function.arguments | items -%}
<parameter={{ name }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor -%}
</function>
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SEARCH = Tool(
    "search",
    "Search the catalogue.",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "kind": {"$ref": "#/$defs/kind"},
            "limit": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["query", "kind"],
        "additionalProperties": False,
        "$defs": {"kind": {"type": "string", "enum": ["mug", "cap"]}},
    },
)
NOW = Tool("now", "The time.", {"type": "object", "properties": {}, "additionalProperties": False})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers

    made = transformers.AutoTokenizer.from_pretrained(str(bundled_folder()))
    made.chat_template = TEMPLATE
    return made


def written(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def read(tokenizer: Any, text: str, tools: tuple[Tool, ...] = (SEARCH, NOW), reason: Any = "stop") -> Choice:
    """The answer's tokens one by one, as the engine gives them; every piece of arguments must only add to the last."""
    output = Detokenizer(Vocabulary(tokenizer), parse_tools=True, tools=tools)

    def chunks() -> Iterator[Any]:
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            chunk = output.push(Sampled(token, 0.0, ()))
            if chunk is not None:
                yield chunk
        yield output.finish(reason)

    (result,), _, _ = fold(chunks())
    return result


AWKWARD = [
    'a "quoted" word\nand a second line',
    "a < b </parameter> c",
    "it writes </tool_call> and </function> itself",
    "  kept spaces  ",
    "",
    "\\ 日本語 \t",
    "<parameter=kind>",
]


@pytest.mark.parametrize("query", AWKWARD)
def test_text_comes_back_word_for_word(tokenizer: Any, query: str) -> None:
    result = read(tokenizer, "Let me look. " + written("search", query=query, kind="mug"))
    assert result.text == "Let me look."
    assert result.finish_reason == "tool_calls"
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [
        ("search", {"query": query, "kind": "mug"})
    ]


def test_values_are_what_their_schemas_say(tokenizer: Any) -> None:
    text = written("search", query="12", kind="cap", limit="12", tags='["a", "b"]', more="12", flag="true")
    (call,) = read(tokenizer, text).tool_calls
    assert json.loads(call.arguments) == {
        "query": "12", "kind": "cap", "limit": 12, "tags": ["a", "b"], "more": "12", "flag": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "two words", "two words"),
        ({"type": "boolean"}, "True", True),
        ({"type": "number"}, "1.5", 1.5),
        ({"type": "integer"}, "many", "many"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({}, "[1]", [1]),
        ({"type": "object"}, '{"a": {"b": "c"}}', {"a": {"b": "c"}}),
    ],
)
def test_a_value_that_is_not_plainly_text(tokenizer: Any, schema: dict[str, Any], value: str, expected: object) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"x": schema}})
    (call,) = read(tokenizer, written("f", x=value), (tool,)).tool_calls
    assert json.loads(call.arguments) == {"x": expected}


def test_several_calls_and_one_without_parameters(tokenizer: Any) -> None:
    result = read(tokenizer, written("now") + "\n" + written("search", query="q", kind="mug"))
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == [
        ("now", {}),
        ("search", {"query": "q", "kind": "mug"}),
    ]
    assert result.text == ""


@pytest.mark.parametrize("cut", range(20, 100, 7))
def test_an_answer_that_is_cut_off_has_the_beginning_of_the_whole(tokenizer: Any, cut: int) -> None:
    text = written("search", query="one two three four five six", kind="mug")
    (whole,) = read(tokenizer, text).tool_calls
    for call in read(tokenizer, text[:cut], reason="length").tool_calls:
        assert call.name == "search"
        assert whole.arguments.startswith(call.arguments)


def test_json_calls_are_read_all_the_same(tokenizer: Any) -> None:
    (call,) = read(tokenizer, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>').tool_calls
    assert (call.name, call.arguments) == ("now", "{}")


def request(**settings: Any) -> ChatRequest:
    return ChatRequest((Message("user", (TextPart("hello"),)),), tools=(SEARCH, NOW), **settings)


def accepted(tokenizer: Any, matcher: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return all(matcher.consume_token(token) for token in ids) and bool(matcher.is_accepting())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (written("search", query="a\nb < c", kind="mug"), True),
        (written("search", query="a", kind="cap", limit="3", tags='["x"]'), True),
        (written("now"), True),
        (written("now") + "\n" + written("now"), True),
        (written("search", query="a", kind="sock"), False),
        (written("search", query="a"), False),
        (written("search", query="a", kind="mug", limit="many"), False),
        (written("other"), False),
        ("no call", False),
    ],
)
def test_a_forced_call_is_held_to_the_schema(tokenizer: Any, text: str, right: bool) -> None:
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    matcher = grammars.matcher(request(tool_choice="required"))
    assert accepted(tokenizer, matcher, text) is right


def test_text_may_come_before_a_call_that_is_held_to_its_schema(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    strict = ChatRequest(
        (Message("user", (TextPart("hello"),)),), tools=(Tool(SEARCH.name, "", SEARCH.parameters, strict=True), NOW)
    )
    for text, right in (
        ("Wait. " + written("search", query="a", kind="mug"), True),
        ("Wait. " + written("search", query="a", kind="sock"), False),
        ("no call", True),
    ):
        assert accepted(tokenizer, grammars.matcher(strict), text) is right


def test_earlier_calls_are_given_back_in_the_same_form(tokenizer: Any) -> None:
    call = ToolCall("1", "search", json.dumps({"query": "a <tool_call> b", "kind": "mug", "tags": ["x"]}))
    messages = (Message("user", (TextPart("hi"),)), Message("assistant", (), tool_calls=(call,)))
    ids, _ = PromptEncoder(tokenizer).encode(ChatRequest(messages, tools=(SEARCH,)))
    expected = written("search", query="a <tool_call> b", kind="mug", tags='["x"]')
    assert expected in tokenizer.decode(ids)
    # What a user typed is no marker.
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 2


def test_arguments_that_are_no_object_are_refused(tokenizer: Any) -> None:
    messages = (Message("user", (TextPart("hi"),)), Message("assistant", (), tool_calls=(ToolCall("7", "now", "[1]"),)))
    with pytest.raises(RequestError, match="arguments of the call 7 are not a JSON object"):
        PromptEncoder(tokenizer).encode(ChatRequest(messages, tools=(NOW,)))
