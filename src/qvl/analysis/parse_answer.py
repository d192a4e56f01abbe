"""Typed analyses: their messages, and the parsing and validation of their answers.

Confidence is the model's own: the product of the probabilities of the tokens that spell a value. It is the likelihood
of that text, not the rate at which such answers are correct; calibrate on your own data before relying on a threshold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

from pydantic import BaseModel, RootModel, ValidationError, create_model
from pydantic_core import to_jsonable_python

from qvl.analysis.find_json import Fits, JsonMatch, find_object
from qvl.analysis.product import ProductAnalysis, ProductFields
from qvl.analysis.prompts import LANGUAGES, PRODUCT_PROMPTS, PROMPT_VERSION, RETRY_PROMPTS, SCHEMA_PROMPTS
from qvl.errors import AnalysisError, ConfigError
from qvl.evidence.answer_form import form_of
from qvl.media.video_parts import media_parts
from qvl.types import JsonMapping, JsonObject, Message, Part, ResponseFormat, TextPart

if TYPE_CHECKING:
    from qvl.evidence.answer_form import AnswerForm
    from qvl.media.video import Medium

T = TypeVar("T", bound=BaseModel)
# A pydantic class, a JSON schema, a dataclass, a TypedDict, or another type that pydantic reads.
SchemaLike: TypeAlias = type[object] | JsonMapping
# Which of more numbers fill a Decimal is not looked for one by one.
MOST_DECIMALS: Final = 100
_EXACT: Final = json.JSONDecoder(parse_float=Decimal)


def check_language(language: str) -> str:
    """Return `language` if `analyze()` has prompts in it.

    Raises:
        ConfigError: unsupported language; the hint lists the supported ones.
    """
    if language not in LANGUAGES:
        raise ConfigError(f"unsupported language {language!r}", hint=f"one of {', '.join(LANGUAGES)}", param="language")
    return language


def generation_schema(schema: type[BaseModel]) -> JsonObject:
    """Return the JSON schema that the model's answer must follow."""
    return (ProductFields if schema is ProductAnalysis else schema).model_json_schema()


def boxed(schema: type[BaseModel]) -> type[BaseModel] | None:
    """Return a model whose only field is `answer` of type `schema`, for a RootModel of a list or scalar; else None.

    Endpoints accept only objects at the top of a schema.
    """
    if not issubclass(schema, RootModel):
        return None
    top = _top(schema.model_json_schema())
    if top.get("type") == "object" and form_of(top) is None:
        return None
    return create_model(schema_name(schema), __doc__=schema.__doc__, answer=(schema, ...))


def own_fields(value: object) -> JsonObject:
    """Return a validated answer as a JSON object; one that is a list or scalar becomes `{"answer": …}`."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else to_jsonable_python(value)
    return data if isinstance(data, dict) else {"answer": data}


def _top(schema: JsonObject) -> JsonObject:
    """`schema`, or the definition it refers to if it is only a `$ref`."""
    reference = str(schema.get("$ref", ""))
    return cast("JsonObject", schema.get("$defs", {}).get(reference.rpartition("/")[2], schema))


def prompt_version(schema: type[BaseModel]) -> str:
    """Return the version of the prompt for `schema`, a part of the cache key."""
    return PROMPT_VERSION if schema is ProductAnalysis else f"schema-{PROMPT_VERSION}"


def build_messages(
    pictures: Sequence[Medium],
    *,
    schema: type[BaseModel],
    language: str,
    spell_out_schema: bool,
    asked: JsonObject | None = None,
    evidence: str = "",
) -> tuple[Message, ...]:
    """Return the system and user turn of an analysis, pictures first.

    Args:
        spell_out_schema: put the schema into the prompt, for a custom schema or a backend without guided decoding.
        asked: the schema that the answer must follow, where it is not `generation_schema(schema)`.
        evidence: the sentence that asks for evidence.
    """
    if schema is ProductAnalysis:
        prompt = PRODUCT_PROMPTS[language]
        text = " ".join(filter(None, (prompt.user, evidence)))
        if spell_out_schema:
            text += "\n" + json.dumps(asked or generation_schema(schema), ensure_ascii=False)
    else:
        prompt = SCHEMA_PROMPTS[language]
        text = prompt.user.format(schema=json.dumps(asked or generation_schema(schema), ensure_ascii=False))
        text = "\n".join(filter(None, (text, evidence)))
    parts: tuple[Part, ...] = (*(part for medium in pictures for part in media_parts(medium)), TextPart(text))
    return Message("system", (TextPart(prompt.system),)), Message("user", parts)


def retry_messages(messages: Sequence[Message], raw: str, error: AnalysisError, language: str) -> tuple[Message, ...]:
    """Return `messages` plus the invalid answer `raw` and a user turn that names its `error`."""
    return (
        *messages,
        Message("assistant", (TextPart(raw),)),
        Message("user", (TextPart(RETRY_PROMPTS[language].format(error=error.message)),)),
    )


def response_format(schema: type[BaseModel], asked: JsonObject | None = None) -> ResponseFormat:
    """Return the format of an answer that follows `asked`, by default `generation_schema(schema)`."""
    from qvl.backends.grammar_schema import without_what_is_checked_afterwards

    # `parse` checks these once the answer is there; no grammar could, and some refuse the whole schema for them.
    enforced = without_what_is_checked_afterwards(asked or generation_schema(schema))
    return ResponseFormat("json_schema", schema=enforced, name=schema_name(schema))


def schema_name(schema: type[BaseModel]) -> str:
    """Return the class name with characters that endpoints refuse (as in `Box[int]`) replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", schema.__name__).strip("_")[:64] or "answer"


def parse(text: str, schema: type[T], *, complete: bool = True, form: AnswerForm | None = None) -> T:
    """Return the model's answer as an instance of `schema`; unambiguous faults (fences, commas, quotes) are repaired.

    `complete` False means that the answer was cut off by max_tokens; such text is never repaired. `form` is that of an
    answer with boxes and points in it, which are mapped before it is validated.

    Raises:
        AnalysisError: the answer does not fit `schema`; `raw` keeps the text.
    """
    model: type[BaseModel] = ProductFields if schema is ProductAnalysis else schema
    try:
        data = find(text, schema, complete=complete, form=form).value
        if form is not None:
            read = form.read(data)
            if read.faults:
                raise AnalysisError(read.faults[0], raw=text)
            data = read.value
        if not _is_about(data, names := _names(model)):
            raise AnalysisError(f"the answer has none of the fields {', '.join(sorted(names))}", raw=text)
        value = validate(data, model)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object"
        raise AnalysisError(f"{where}: {first['msg']}", raw=text) from exc
    if schema is ProductAnalysis:
        return ProductAnalysis(**value.model_dump())  # type: ignore[return-value]
    return value  # type: ignore[return-value]


def validate(data: object, schema: type[T]) -> T:
    """Return `data` validated in pydantic's JSON mode, so that strict models accept dates and sets written as JSON.

    Raises:
        ValidationError: `data` does not fit `schema`.
    """
    return schema.model_validate_json(json.dumps(data))


def find(text: str, schema: type[BaseModel], *, complete: bool, form: AnswerForm | None = None) -> JsonMatch:
    """Return the JSON object in the model's answer, unvalidated; long numbers for Decimal fields become strings.

    Boxes and points are in it as the model wrote them.

    Raises:
        AnalysisError: the answer has no JSON object.
    """
    model = ProductFields if schema is ProductAnalysis else schema
    names = _names(model)

    def own(data: JsonObject) -> JsonObject:
        return data if form is None else form.read(data).value

    def fits(data: JsonObject) -> bool:
        return _is_about(data, names) and _value(own(data), model) is not None

    try:
        match = find_object(text, complete=complete, fits=fits)
        bare = None if fits(match.value) else _bare(text, names, fits)
    except AnalysisError:
        if (bare := _bare(text, names, fits)) is None:
            raise
    except RecursionError as exc:
        raise AnalysisError("the answer is nested too deeply", raw=text) from exc
    return _with_all_digits(bare or match, text, model, own)


def _value(data: object, schema: type[T]) -> T | None:
    try:
        return validate(data, schema)
    except ValidationError:
        return None


def _with_all_digits(
    match: JsonMatch, text: str, schema: type[BaseModel], own: Callable[[JsonObject], JsonObject]
) -> JsonMatch:
    """`match` with numbers as strings where a float would lose digits that a Decimal of `schema` keeps.

    pydantic parses every JSON fraction as a float. A number stays one if its string would validate as something else.
    """
    bare = match.start == len(text)
    try:
        exact, _ = _EXACT.raw_decode(f'{{"answer": {_unfenced(text)}}}' if bare else text, 0 if bare else match.start)
        fractions: list[Decimal] = []
        _each_decimal(exact, fractions.append)
    except (ValueError, ArithmeticError, RecursionError):
        return match
    numbers = {number for number in fractions if number != Decimal(repr(float(number)))}
    value = _value(own(match.value), schema) if numbers and _each_decimal(exact, float) == match.value else None
    if value is None:
        return match
    texts: set[Decimal] = set()
    for more in (numbers, *({number} for number in sorted(numbers)[:MOST_DECIMALS])):
        known = texts | more
        data = _each_decimal(exact, partial(_spelt, texts=known))
        if _same_but_for_digits(own(cast("JsonObject", data)), value):
            texts, match = known, replace(match, value=cast("JsonObject", data))
        if texts == numbers:
            break
    return match


def _same_but_for_digits(data: object, value: BaseModel) -> bool:
    """True if `data` validates to `value`, ignoring digits of Decimals that `value` lost to floats."""
    try:
        other = validate(data, type(value))
        return _each_decimal(other.model_dump(), float) == _each_decimal(value.model_dump(), float)
    except Exception:  # noqa: BLE001 - a class that does not take or write numbers as text costs nobody the answer
        return False


def _spelt(number: Decimal, texts: Set[Decimal]) -> str | float:
    return str(number) if number in texts else float(number)


def _each_decimal(value: object, change: Callable[[Decimal], object]) -> object:
    """A copy of `value` with each Decimal in it replaced by `change(decimal)`."""
    if isinstance(value, Decimal):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_decimal(inner, change) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_each_decimal(inner, change) for inner in value]
        return items if isinstance(value, list) else tuple(items) if isinstance(value, tuple) else frozenset(items)
    return value


def _names(schema: type[BaseModel]) -> frozenset[str]:
    """The field names (aliases included) of an object of `schema`; empty if any name is allowed."""
    top = _top(schema.model_json_schema())
    if top.get("additionalProperties") or "patternProperties" in top:
        return frozenset()
    return frozenset(top.get("properties") or ()) | (schema.model_fields.keys() - {"root"})


def _is_about(data: JsonObject, names: frozenset[str]) -> bool:
    """False if `data` has none of the `names`: a schema without required fields would accept it as an empty object."""
    return not names or not data or not names.isdisjoint(data)


def _bare(text: str, names: frozenset[str], fits: Fits) -> JsonMatch | None:
    """The answer of a boxed schema, written without the object around its field `answer`."""
    if names != {"answer"}:
        return None
    try:
        value = {"answer": json.loads(_unfenced(text))}
    except (ValueError, RecursionError):
        return None
    return JsonMatch(value, len(text), exact=False) if fits(value) else None


def _unfenced(text: str) -> str:
    return text.strip().strip("`").removeprefix("json")
