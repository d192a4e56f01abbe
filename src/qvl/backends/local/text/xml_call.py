"""Tool calls as newer Qwen templates have them written: `<function=name>`, and an element for each parameter.

    <function=get_weather>
    <parameter=city>
    Lisbon
    </parameter>
    </function>

A value is bare text; what it means, the tool's schema says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qvl.backends.grammar_schema import call_schema
from qvl.backends.schema_bounds import at_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qvl.types import JsonObject, Tool

OPENS: Final = "<function="
_FUNCTION: Final = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_CLOSES: Final = "</parameter>"
# A value may speak of markup; it ends where another parameter follows, or the end.
_END: Final = re.compile(r"\n?</parameter>(?=\s*(?:<parameter=|</function>))")
_CALL_END: Final = re.compile(r"</function>()\s*</tool_call>")
_BEHIND: Final = ("<parameter=", "</function>")
_WORDS: Final[dict[str, object]] = {"True": True, "False": False, "None": None}
_CLOSING: Final = json.dumps("\n</parameter>\n")
MOST_REFERENCES: Final = 8
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def writes_xml(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return True if the model's chat template has tool calls written in this form."""
    return OPENS in str(tokenizer.chat_template)


def xml_end(text: str) -> tuple[int, int] | None:
    """Return where the first call of `text` ends, and where its `<tool_call>` block does; None while it goes on."""
    end = _CALL_END.search(text)
    return None if end is None else (end.start(1), end.end())


class XmlCallReader:
    """Parses one tool call while it is streamed; `feed` returns pieces of the arguments as JSON once `started`.

    Args:
        tools: whose schemas tell text from numbers, lists and objects.
    """

    __slots__ = ("_at", "_ended", "_first", "_parameters", "_text", "_tools", "name", "started")

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.name: str | None = None
        self.started = False
        self._tools = tools
        self._parameters: Mapping[str, object] = {}
        self._at = 0  # what lies before it is read
        self._first = True
        self._text = False  # in the middle of a value that is text
        self._ended = False

    def feed(self, body: str, *, whole: bool) -> str:
        """Return the new piece of the arguments; `body`: the call's text so far; `whole`: True if it is complete."""
        if not self.started:
            beginning = _FUNCTION.match(body)
            if beginning is None:
                return ""
            self.name, self.started, self._at = beginning[1].strip(), True, beginning.end()
            self._parameters = next((tool.parameters for tool in self._tools if tool.name == self.name), {})
            return "{" + self._rest(body, whole)
        return self._rest(body, whole)

    def _rest(self, body: str, whole: bool) -> str:
        return "".join(self._pieces(body, whole))

    def _pieces(self, body: str, whole: bool) -> Iterator[str]:
        while not self._ended:
            if self._text:
                end = _END.search(body, self._at)
                until = end.start() if end else len(body) if whole else _safe(body, self._at)
                yield json.dumps(body[self._at : until], ensure_ascii=False)[1:-1]
                self._at = until
                if end is None and not whole:
                    return
                self._text, self._at = False, end.end() if end else len(body)
                yield '"'
                continue
            opened = _PARAMETER.match(body, self._at)
            # The line break behind it may not be there yet.
            if opened is not None and opened.end() == len(body) and not whole and not opened[0].endswith("\n"):
                return
            if opened is None:
                behind = body[self._at :].strip()
                # A name may not be whole yet.
                if not (whole or behind.startswith("</function>")):
                    return
                self._ended = True
                yield "}"
                return
            schema = self._schema(opened[1])
            if _is_text(schema):
                yield self._key(opened[1]) + '"'
                self._text, self._at = True, opened.end()
                continue
            end = _END.search(body, opened.end())
            if end is None and not whole:
                return
            value = body[opened.end() : end.start() if end else len(body)].removesuffix("\n" if end is None else "")
            self._at = end.end() if end else len(body)
            yield self._key(opened[1]) + json.dumps(_value(value, schema), ensure_ascii=False)

    def _key(self, name: str) -> str:
        comma, self._first = "" if self._first else ", ", False
        return f"{comma}{json.dumps(name.strip(), ensure_ascii=False)}: "

    def _schema(self, name: str) -> object:
        properties = self._parameters.get("properties")
        return _resolved(properties.get(name.strip()) if isinstance(properties, Mapping) else None, self._parameters)


def _resolved(schema: object, root: Mapping[str, object]) -> object:
    """Return what a schema that is a reference into `root` points at; any other schema as it is."""
    for _ in range(MOST_REFERENCES):
        pointer = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(pointer, str):
            break
        schema = at_pointer(root, pointer)
    return schema


def _safe(body: str, start: int) -> int:
    """Return up to where a value is certain, however the text goes on."""
    for at in range(start, len(body)):
        if body[at] in "\n<" and _may_end(body[at:]):
            return at
    return len(body)


def _may_end(tail: str) -> bool:
    tail = tail.removeprefix("\n")
    if not tail.startswith(_CLOSES):
        return _CLOSES.startswith(tail)
    behind = tail.removeprefix(_CLOSES).lstrip()
    return any(mark.startswith(behind) for mark in _BEHIND)


def _is_text(schema: object) -> bool:
    """Return True if a parameter of this schema can be nothing but a string."""
    if not isinstance(schema, Mapping):
        return False
    if schema.get("type") == "string":
        return True
    return "type" not in schema and bool(schema.get("enum")) and all(isinstance(one, str) for one in schema["enum"])


def _value(text: str, schema: object) -> object:
    """Return what `text` stands for: JSON if it is some, as where the schema does not say text, else the text."""
    word = text.strip()
    if word in _WORDS:
        return _WORDS[word]
    try:
        value: object = json.loads(word)
    except (ValueError, RecursionError):
        return text
    # Without a schema a bare number may well be a name.
    return value if schema is not None or isinstance(value, dict | list | bool) or value is None else text


def xml_rules(tools: Sequence[Tool]) -> str:
    """Return the rules of a Lark grammar by which `body` is a call of any of `tools`.

    Parameters come in the order of the schema. Text is held to a list of choices where there is one, other values to
    their schemas.

    Raises:
        RequestError: as of `call_schema`.
    """
    root = call_schema(tools)
    definitions: JsonObject = root["$defs"]
    lines = ["body: " + " | ".join(f"f{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        parameters = definitions[f"t{number}"]
        properties = parameters.get("properties") or {}
        required = parameters.get("required") or ()
        names = []
        for index, (name, schema) in enumerate(properties.items()):
            rule = f"p{number}_{index}"
            names.append(rule if name in required else f"{rule}?")
            opens = json.dumps(f"<parameter={name}>\n")
            lines.append(f"{rule}: {opens} {_written(_resolved(schema, root), definitions)}")
        if not properties and parameters.get("additionalProperties") is not False:
            names.append("any*")
            lines.append('any: "<parameter=" /[^>\\n]+/ ">\\n" text_value')
        lines.append(f'f{number}: {json.dumps(f"<function={tool.name}>" + chr(10))} {" ".join(names)} "</function>"')
    lines.append("text_value[lazy]: /(?s:.*)\\n<\\/parameter>\\n/")
    return "\n".join(lines) + "\n"


def _written(schema: object, definitions: JsonObject) -> str:
    """Return how a value and the end of its element are written, in Lark's syntax."""
    if _is_text(schema) and isinstance(schema, Mapping):
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if not choices:
            return "text_value"
        return f"({' | '.join(json.dumps(one, ensure_ascii=False) for one in choices)}) {_CLOSING}"
    if not isinstance(schema, Mapping) or not schema:
        return "text_value"
    return f"%json {json.dumps({**schema, '$defs': definitions, 'x-guidance': _SPACING})} {_CLOSING}"
