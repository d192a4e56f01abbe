"""Typed analyses: what to ask, how to read the answer, and how sure it is.

Confidence is the model's own: the product of the probabilities of the tokens that spell a value. It says how likely
the model was to write just that, not how often such answers are right; calibrate on your own data before you act on
a threshold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel, ValidationError, create_model
from pydantic_core import to_jsonable_python

from qvl.analysis.find_json import Found, find_object
from qvl.analysis.prompts import LANGUAGES, PRODUCT_PROMPTS, PROMPT_VERSION, RETRY_PROMPTS, SCHEMA_PROMPTS
from qvl.errors import AnalysisError, ConfigError
from qvl.types import ImagePart, Message, Part, ResponseFormat, Result, TextPart, TokenLogprob

if TYPE_CHECKING:
    from qvl.media.gate import Picture

CONFIDENCE_METHOD: Final = "token_probability_product"
T = TypeVar("T", bound=BaseModel)
V = TypeVar("V")
# A pydantic class, a JSON schema, a dataclass, a TypedDict, or another type that pydantic reads.
SchemaLike: TypeAlias = type[Any] | Mapping[str, Any]


class _Origin:
    """Holds the Result beside an analysis; all are equal, since where it came from is no part of its value."""

    __slots__ = ("result",)

    def __init__(self, result: Result | None = None) -> None:
        self.result = result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)

    __hash__ = None  # type: ignore[assignment]


class ProductFields(BaseModel):
    """What the model itself fills in; `ProductAnalysis` adds where it came from and how sure it is."""

    model_config = ConfigDict(extra="forbid")

    brand: str | None
    category: str | None
    attributes: dict[str, str] = Field(default_factory=dict)


class ProductAnalysis(ProductFields):
    """The default analysis of a product picture.

    `confidence` is of the whole answer, `field_confidence` per field ("brand", "attributes.color"), both from 0 to 1
    and by `confidence_method`; all three are empty or None where the backend gives no probabilities.
    """

    confidence: float | None = None
    field_confidence: dict[str, float] = Field(default_factory=dict)
    confidence_method: str | None = None
    language: str = "en"
    model: str = ""
    prompt_version: str = PROMPT_VERSION
    created_at: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def _repr_html_(self) -> str:
        from qvl.html.cards import analysis_html

        return analysis_html(self, self._origin.result)

    def came_from(self, result: Result) -> None:
        """Remembers the Result, so that a notebook can show the picture beside the fields."""
        self._origin.result = result


@dataclass(frozen=True, slots=True)
class AnalysisResult(Generic[V]):
    """An analysis and how it came about: `value` is what `analyze()` returns."""

    value: V
    result: Result
    confidence: float | None = None
    field_confidence: dict[str, float] = field(default_factory=dict)
    confidence_method: str | None = None


def check_language(language: str) -> str:
    """`language` if there are prompts for it.

    Raises:
        ConfigError: naming the languages that there are.
    """
    if language not in LANGUAGES:
        raise ConfigError(
            f"no prompts for language {language!r}", hint=f"one of {', '.join(LANGUAGES)}", param="language"
        )
    return language


def generation_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema that the model's answer must follow."""
    return (ProductFields if schema is ProductAnalysis else schema).model_json_schema()


def boxed(schema: type[BaseModel]) -> type[BaseModel] | None:
    """An object whose field `answer` is `schema`, for a RootModel that is a list or a plain value; None for all others.

    Endpoints take objects alone as a schema's top.
    """
    if not issubclass(schema, RootModel) or _top(schema.model_json_schema()).get("type") == "object":
        return None
    return create_model(schema_name(schema), __doc__=schema.__doc__, answer=(schema, ...))


def own_fields(value: Any) -> dict[str, Any]:
    """The fields of a user's schema as JSON values; what is no object stands under `answer`."""
    found = value.model_dump(mode="json") if isinstance(value, BaseModel) else to_jsonable_python(value)
    return found if isinstance(found, dict) else {"answer": found}


def _top(schema: dict[str, Any]) -> dict[str, Any]:
    """The definition that a schema of one reference stands for."""
    reference = str(schema.get("$ref", ""))
    return cast("dict[str, Any]", schema["$defs"][reference.rpartition("/")[2]]) if reference else schema


def prompt_version(schema: type[BaseModel]) -> str:
    return PROMPT_VERSION if schema is ProductAnalysis else f"schema-{PROMPT_VERSION}"


def build_messages(
    pictures: Sequence[Picture], *, schema: type[BaseModel], language: str, spell_out_schema: bool
) -> tuple[Message, ...]:
    """System and user turn of an analysis, pictures first.

    `spell_out_schema` repeats the schema in the prompt, for a custom schema or a backend that does not enforce it.
    """
    if schema is ProductAnalysis:
        prompt = PRODUCT_PROMPTS[language]
        text = prompt.user
        if spell_out_schema:
            text += "\n" + json.dumps(generation_schema(schema), ensure_ascii=False)
    else:
        prompt = SCHEMA_PROMPTS[language]
        text = prompt.user.format(schema=json.dumps(generation_schema(schema), ensure_ascii=False))
    parts: tuple[Part, ...] = (*(ImagePart(picture) for picture in pictures), TextPart(text))
    return Message("system", (TextPart(prompt.system),)), Message("user", parts)


def retry_messages(messages: Sequence[Message], raw: str, error: AnalysisError, language: str) -> tuple[Message, ...]:
    """The conversation once more, with the bad answer and what was wrong with it."""
    return (
        *messages,
        Message("assistant", (TextPart(raw),)),
        Message("user", (TextPart(RETRY_PROMPTS[language].format(error=error.message)),)),
    )


def response_format(schema: type[BaseModel]) -> ResponseFormat:
    from qvl.backends.grammar_schema import without_what_is_checked_afterwards

    # `parse` checks these once the answer is there; no grammar could, and some refuse the whole schema for them.
    given = without_what_is_checked_afterwards(generation_schema(schema))
    return ResponseFormat("json_schema", schema=given, name=schema_name(schema))


def schema_name(schema: type[BaseModel]) -> str:
    """The class's name in the letters that endpoints accept, which `Box[int]` is not made of."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", schema.__name__).strip("_")[:64] or "answer"


def parse(text: str, schema: type[T], *, complete: bool = True) -> T:
    """Reads the model's answer as `schema`, repairing what is unambiguous (code fences, text around, commas, quotes).

    `complete` False says that the answer was cut off by max_tokens; such text is never repaired.

    Raises:
        AnalysisError: it is no such object; `raw` keeps the text.
    """
    wanted: type[BaseModel] = ProductFields if schema is ProductAnalysis else schema
    try:
        value = validate(find(text, schema, complete=complete).value, wanted)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object"
        raise AnalysisError(f"{where}: {first['msg']}", raw=text) from exc
    if schema is ProductAnalysis:
        return ProductAnalysis(**value.model_dump())  # type: ignore[return-value]
    return value  # type: ignore[return-value]


def validate(data: Any, schema: type[T]) -> T:
    """`data` as `schema`; read as JSON, so that a strict model takes the dates and sets that JSON can only spell.

    Raises:
        ValidationError: it does not fit.
    """
    return schema.model_validate_json(json.dumps(data))


def find(text: str, schema: type[BaseModel], *, complete: bool) -> Found:
    """The JSON object in the model's answer, as it stands there.

    Raises:
        AnalysisError: there is none.
    """
    wanted = ProductFields if schema is ProductAnalysis else schema

    def fits(data: dict[str, Any]) -> bool:
        try:
            validate(data, wanted)
        except ValidationError:
            return False
        return True

    return find_object(text, complete=complete, fits=fits)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the value at `path` stands in the JSON text: characters [start, end)."""

    path: str
    start: int
    end: int


def value_spans(text: str, start: int | None = None) -> list[_Span]:
    """Where each leaf value of the object at `start` (the first) stands; paths are dotted, list items by number."""
    start = text.find("{") if start is None else start
    if start < 0:
        return []
    try:
        return list(_walk(text, start, ""))
    except (ValueError, IndexError, StopIteration, RecursionError):
        return []


def _skip(text: str, i: int) -> int:
    while text[i] in " \t\r\n":
        i += 1
    return i


def _walk(text: str, i: int, path: str) -> Iterator[_Span]:
    """Yields the leaves of the value that starts at `i`; the position after it is found by the json module."""
    opening = text[i]
    if opening not in "{[":
        _, end = json.JSONDecoder().raw_decode(text, i)
        yield _Span(path, i, end)
        return
    closing = "}" if opening == "{" else "]"
    i = _skip(text, i + 1)
    number = 0
    while text[i] != closing:
        name = str(number)
        if opening == "{":
            name, i = scanstring(text, i + 1)
            i = _skip(text, _skip(text, i) + 1)
        yield from _walk(text, i, f"{path}.{name}" if path else name)
        _, i = json.JSONDecoder().raw_decode(text, i)
        i = _skip(text, i)
        if text[i] == ",":
            i = _skip(text, i + 1)
        number += 1


def confidences(
    text: str, logprobs: Sequence[TokenLogprob] | None, start: int | None = None
) -> tuple[float | None, dict[str, float]]:
    """(of the whole, per leaf) from token probabilities, or (None, {}) when the tokens do not spell `text`.

    A token that spells parts of two values counts for both. The quotes of a value belong to it, since the first decides
    between a text and null, and the last where it ends; keys count for none.
    """
    if not logprobs:
        return None, {}
    spelt = b"".join(item.bytes or item.token.encode() for item in logprobs)
    raw = text.encode()
    offset = spelt.find(raw)
    if offset < 0:
        return None, {}
    fields: dict[str, float] = {}
    total = 0.0
    counted: set[int] = set()
    for span in value_spans(text, start):
        start = offset + len(text[: span.start].encode())
        end = offset + len(text[: span.end].encode())
        log = 0.0
        position = 0
        for number, item in enumerate(logprobs):
            after = position + len(item.bytes or item.token.encode())
            if position < end and after > start:
                log += item.logprob
                if number not in counted:
                    counted.add(number)
                    total += item.logprob
            position = after
        fields[span.path] = math.exp(min(0.0, log))
    return (math.exp(min(0.0, total)) if fields else None), fields
