"""The schema of the format that a request wants its answer in."""

from __future__ import annotations

from typing import Annotated, Final, Literal, NotRequired, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from qvl.server.neutral_fields import without_null_fields
from qvl.server.request_body import MAX_FIELDS
from qvl.types import JsonObject

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
