"""The schema of the format that a request wants its answer in."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NotRequired, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from qvl.errors import RequestError
from qvl.server.neutral_fields import without_null_fields, without_switched_off
from qvl.server.request_body import MAX_FIELDS
from qvl.types import JsonMapping, JsonObject

STRICT: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# One fault is told, so one is looked for: a body may hold any number of them. How many choices and prompts there may be
# is said further on; texts are counted among the fields of a body.
Texts: TypeAlias = Annotated[list[str], Field(max_length=MAX_FIELDS, fail_fast=True)]


@with_config(STRICT)
class JsonSchema(TypedDict):
    name: str
    schema: JsonObject
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]


@with_config(STRICT)
class SchemaFormat(TypedDict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


@with_config(STRICT)
class PlainFormat(TypedDict):
    type: Literal["text", "json_object"]


@with_config(STRICT)
class RegexFormat(TypedDict):
    type: Literal["regex"]
    pattern: str


@with_config(STRICT)
class ChoiceFormat(TypedDict):
    type: Literal["choice"]
    choices: Texts


ResponseFormat: TypeAlias = Annotated[
    PlainFormat | SchemaFormat | RegexFormat | ChoiceFormat,
    Field(discriminator="type"),
    BeforeValidator(without_null_fields),
]


@with_config(STRICT)
class StructuredOutputs(TypedDict):
    """vLLM's alternative to `response_format`; exactly one field must be set."""

    json: NotRequired[JsonObject]
    json_object: NotRequired[Literal[True]]
    regex: NotRequired[str]
    choice: NotRequired[Texts]
    grammar: NotRequired[str]


# None of them switched on is none at all.
Structured: TypeAlias = Annotated[StructuredOutputs, BeforeValidator(without_switched_off)] | None


def asked_format(form: JsonMapping | None, outputs: StructuredOutputs | None, name: str) -> JsonObject | None:
    """Return the form that a request wants its answer in, as a `response_format`; None if it wants none.

    `form` is what the request says in its field `name`.

    Raises:
        RequestError: it says more than one thing.
    """
    if not outputs:
        return None if form is None else {**form}
    if form is not None or len(outputs) != 1:
        raise RequestError(
            f"structured_outputs must be one of json, json_object, regex, choice, grammar, without {name}",
            param="structured_outputs",
            code="invalid_value",
        )
    if "json" in outputs:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": outputs["json"]}}
    if "regex" in outputs:
        return {"type": "regex", "pattern": outputs["regex"]}
    if "grammar" in outputs:
        return {"type": "grammar", "pattern": outputs["grammar"]}
    return {"type": "choice", "choices": outputs["choice"]} if "choice" in outputs else {"type": "json_object"}


def name_of_format(form: JsonMapping | None, outputs: StructuredOutputs | None) -> dict[str, str]:
    """Return what the client calls a `response_format`, where it is made of its `structured_outputs`."""
    return {"response_format": f"structured_outputs.{next(iter(outputs))}"} if outputs and form is None else {}
