"""The wire of OpenAI's decisions, as of openai-python 3.57: requests to messages and questions, decisions to answers.

It is in beta and has changed within minor releases of the client, so all that is said about it stands in this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal, NotRequired, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from qvl.decisions.answers import Decision, Decisions
from qvl.decisions.questions import APART, MAX_QUESTIONS, Score
from qvl.errors import UnsupportedInputError
from qvl.pipeline.parse_fields import refuse_others, text_of, unknown, wrong
from qvl.pipeline.parse_parts import UnreadPicture, is_picture, picture_field
from qvl.server.responses_input import messages_of
from qvl.server.schemas import CONTENT, MAX_MESSAGES, STRICT, TEXT, read_by_hand
from qvl.types import JsonMapping, JsonObject, Usage

KINDS: Final = ("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")
# Of one input_json, as OpenAI limits it.
MAX_JSON_LEVELS: Final = 32
MAX_JSON_VALUES: Final = 10_000
MAX_JSON_BYTES: Final = 256 << 10
_CALLS: Final = {"function_call_output": "function_call", "custom_tool_call_output": "custom_tool_call"}
_ECHOES: Final = frozenset({"id", "status", "namespace"})

Items: TypeAlias = Annotated[
    list[
        Annotated[
            JsonObject,
            read_by_hand(
                type={"enum": list(KINDS)},
                role={"enum": ["user", "developer", "system", "assistant"]},
                content=CONTENT,
                call_id=TEXT,
                name=TEXT,
                arguments=TEXT,
                input=TEXT,
                output=CONTENT,
            ),
        ]
    ],
    Field(min_length=1, max_length=4 * MAX_MESSAGES, fail_fast=True),
]
Questions: TypeAlias = Annotated[
    list[
        Annotated[
            JsonObject,
            read_by_hand(
                type={"enum": ["predicate", "choice", "score"]},
                name=TEXT,
                instructions=CONTENT,
                choices={"type": "array", "items": {"type": "object"}, "minItems": 2, "maxItems": 255},
                levels={"type": "array", "items": {"type": "object"}, "minItems": 2, "maxItems": 255},
            ),
        ]
    ],
    Field(min_length=1, max_length=MAX_QUESTIONS, fail_fast=True),
]


@with_config(STRICT)
class PromptCacheOptions(TypedDict):
    """The options of OpenAI's prompt cache, accepted and unused: a server of one's own keeps prefixes by itself."""

    mode: NotRequired[Literal["implicit", "explicit"] | None]
    ttl: NotRequired[Literal["30m"]]


class DecisionRequest(BaseModel):
    """`POST /v1/decisions`: questions with a fixed set of answers about one input."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "input": "A red mug, scratched at the handle.",
                    "questions": [
                        {"type": "predicate", "name": "new", "instructions": "Is it new?"},
                        {
                            "type": "choice",
                            "instructions": "Which colour has it?",
                            "choices": [{"value": "red"}, {"value": "blue", "description": "any kind of blue"}],
                        },
                        {
                            "type": "score",
                            "instructions": "How worn is it?",
                            "levels": [{"label": "not"}, {"label": "very"}],
                        },
                    ],
                }
            ]
        },
    )

    model: str | None = None
    input: str | Items
    questions: Questions
    prompt_cache_key: str | None = Field(None, description="Computed prefixes are kept apart by it.")
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: str | None = Field(None, max_length=512)


class DecisionInputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class DecisionOutputDetails(TypedDict):
    reasoning_tokens: int


class DecisionUsage(TypedDict):
    input_tokens: int
    input_tokens_details: DecisionInputDetails
    output_tokens: int
    output_tokens_details: DecisionOutputDetails
    total_tokens: int


class DecisionAnswers(TypedDict):
    """The answers in the order of the questions, with `label_mass` and `method` beside OpenAI's fields."""

    answers: list[JsonObject]
    model: str
    usage: DecisionUsage


def messages_from(
    given: str | Sequence[JsonObject], shown: Callable[[UnreadPicture], UnreadPicture] = lambda picture: picture
) -> list[JsonObject]:
    """Return the input as messages whose last is the user's, behind which the questions are asked.

    `shown` returns a picture as it was sent.

    Raises:
        RequestError: an invalid item; the error names the item, the part and the field.
    """
    if isinstance(given, str):
        if not given.strip():
            raise wrong("input", "is empty")
        return [{"role": "user", "content": [{"type": "text", "text": given + APART}]}]
    called: dict[object, str] = {}
    items = []
    for number, item in enumerate(given):
        where, kind = f"input[{number}]", item.get("type") or ("message" if "role" in item else None)
        if kind not in KINDS:
            raise wrong(f"{where}.type", "is missing") if kind is None else unknown(f"{where}.type", kind, KINDS)
        if kind != "message" and not isinstance(item.get("call_id"), str):
            raise wrong(f"{where}.call_id", "is missing" if item.get("call_id") is None else "must be text")
        if kind in _CALLS:
            if called.get(item.get("call_id")) != _CALLS[kind]:
                raise wrong(f"{where}.call_id", f"names no {_CALLS[kind]} before it")
        elif kind != "message":
            called[item.get("call_id")] = kind
        items.append(_item(item, kind, where))
    messages = messages_of(items, b"", "input")
    for message in messages:
        parts = message["content"]
        message["content"] = parts and [shown(part) if isinstance(part, UnreadPicture) else part for part in parts]
    if messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": []})
    elif messages[-1]["content"]:
        messages[-1]["content"].append({"type": "text", "text": APART})
    return messages


def _item(item: JsonObject, kind: str, where: str) -> JsonObject:
    """Return the item as one of the Responses API."""
    if kind == "custom_tool_call":
        refuse_others(item, ("type", "call_id", "name", "input"), _ECHOES, where)
        arguments = json.dumps({"input": text_of(item, "input", where)}, ensure_ascii=False)
        return {
            "type": "function_call",
            "call_id": item.get("call_id"),
            "name": item.get("name"),
            "arguments": arguments,
        }
    field = "content" if kind == "message" else "output"
    parts = item.get(field)
    if isinstance(parts, list):
        item = {**item, field: [_part(part, f"{where}.{field}[{number}]") for number, part in enumerate(parts)]}
    return {**item, "type": kind.replace("custom_tool_call", "function_call")}


def _part(part: object, where: str) -> object:
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "input_json":
        refuse_others(part, ("type", "data"), frozenset({"prompt_cache_breakpoint"}), where)
        return {"type": "input_text", "text": _json_text(part.get("data"), f"{where}.data")}
    if part.get("file_id") is not None:
        what = f"{where}.file_id: pictures are not read from files"
        raise UnsupportedInputError(what, hint="send image_url", param=f"{where}.file_id")
    return part


def _json_text(data: object, where: str) -> str:
    """Return an object, or a list of objects, as text."""
    if not isinstance(data, Mapping) and not (
        isinstance(data, list) and data and all(isinstance(item, Mapping) for item in data)
    ):
        raise wrong(where, "is missing" if data is None else "must be an object or a list of objects")
    level: list[object] = [data]
    values = 0
    for _ in range(MAX_JSON_LEVELS):
        values += len(level)
        level = [inner for item in level for inner in _inner(item)]
    # Not written as text before it is known to be shallow.
    try:
        text = "" if level or values > MAX_JSON_VALUES else json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError as exc:
        raise wrong(where, "has NaN or Infinity, which JSON does not know") from exc
    if not text or len(text.encode("utf-8", "replace")) > MAX_JSON_BYTES:
        raise wrong(where, f"has more than {MAX_JSON_LEVELS} levels, {MAX_JSON_VALUES:,} values or 256 KiB")
    return text


def _inner(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def picture_paths(body: DecisionRequest) -> list[str]:
    """Return the path of each picture in the body, those of the input first."""
    found = []
    for number, item in enumerate(body.input if not isinstance(body.input, str) else ()):
        for field in ("content", "output"):
            found += _paths(item.get(field), f"input[{number}].{field}")
    for number, question in enumerate(body.questions):
        found += _paths(question.get("instructions"), f"questions[{number}].instructions")
    return found


def _paths(parts: object, where: str) -> list[str]:
    if not isinstance(parts, list):
        return []
    return [f"{where}[{index}].{picture_field(part)}" for index, part in enumerate(parts) if is_picture(part)]


def questions_from(questions: Sequence[JsonMapping]) -> list[JsonObject]:
    """Return the questions as `read_questions` takes them, their parts checked."""
    found = []
    for number, question in enumerate(questions):
        parts = question.get("instructions")
        if isinstance(parts, list):
            where = f"questions[{number}].instructions"
            parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(parts)]
        found.append({**question, "instructions": parts})
    return found


def answers_from(decisions: Decisions, model: str) -> DecisionAnswers:
    """Return the body of the answer.

    Raises:
        UnsupportedInputError: the backend tells no probabilities, which the wire must have.
    """
    told = [_answer(answer, f"questions[{number}]") for number, answer in enumerate(decisions)]
    return {"answers": told, "model": model, "usage": _usage(decisions.usage)}


def _answer(answer: Decision, where: str) -> JsonObject:
    if answer.refused:
        return {"type": "refusal", "name": answer.name, "reason": answer.notes[-1], "method": answer.method}
    if answer.abstained is not None:
        told = {"reason": answer.abstained, "method": answer.method, "label_mass": answer.label_mass}
        return {"type": "refusal", "name": answer.name, **told, **answer.sureness()}
    shares = answer.probabilities
    if shares is None:
        what = f"{where}: {answer.notes[-1]}, which this answer must have"
        raise UnsupportedInputError(what, hint="a local model, vLLM, or an endpoint with logprobs", param=where)
    head = {"type": answer.type, "name": answer.name, "label_mass": answer.label_mass, "method": answer.method}
    if answer.type == "predicate":
        return {**head, "probability": shares[True], **(answer.sureness() if answer.calibrated else {})}
    if isinstance(answer.question, Score):
        levels = [
            {"label": label, "probability": share, "value": value}
            for value, (label, share) in enumerate(shares.items())
        ]
        return {**head, "score": answer.score, **answer.sureness(), "probabilities": levels}
    options = [{"value": value, "probability": share} for value, share in shares.items()]
    return {**head, "choice": answer.value, **answer.sureness(), "probabilities": options}


def _usage(usage: Usage) -> DecisionUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
