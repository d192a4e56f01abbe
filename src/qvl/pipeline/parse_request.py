"""From what users write (strings, dictionaries in OpenAI's form, our own types) to a `ChatRequest`.

Pictures are collected first and brought through the media gate together, so that several are fetched at once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from pydantic import BaseModel

from qvl.analysis.parse_answer import schema_name
from qvl.backends.grammar_schema import without_what_is_checked_afterwards
from qvl.errors import ConfigError, RequestError, UnsupportedInputError
from qvl.media.smart_resize import NO_LIMITS, PixelLimits, read_limits
from qvl.pipeline.parse_message import MessageLike, Turn, read_turn
from qvl.pipeline.parse_parts import PARTS, UnreadPicture, read_part
from qvl.suggest import nearest
from qvl.types import (
    ChatRequest,
    ImagePart,
    ResponseFormat,
    SamplingParams,
    TextPart,
    Tool,
)

if TYPE_CHECKING:
    from qvl.media.picture import Picture

ToolLike: TypeAlias = Tool | Mapping[str, Any]
ResponseFormatLike: TypeAlias = ResponseFormat | Mapping[str, Any] | type[BaseModel]
MAX_PICTURES: Final = 256
SAMPLING_NAMES: Final = SamplingParams.names()
GREEDY: Final = SamplingParams()
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A request that is complete and checked but for its `pictures`, which stand in their order."""

    pictures: tuple[UnreadPicture, ...]
    messages: tuple[Turn, ...]
    fields: Mapping[str, Any]

    def finished(self, pictures: Sequence[Picture]) -> ChatRequest:
        """The request with `pictures` in the places of its own."""
        coming = iter(pictures)
        return ChatRequest(
            messages=tuple(
                dataclasses.replace(
                    message,
                    parts=tuple([ImagePart(next(coming)) if isinstance(p, UnreadPicture) else p for p in parts]),
                )
                for message, parts in self.messages
            ),
            **self.fields,
        )


def draft_request(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[ToolLike] = (),
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    response_format: ResponseFormatLike | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    cache_salt: str = "",
    request_id: str = "",
    extra: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> Draft:
    """Reads messages and checks every value; pictures are left to be loaded.

    Raises:
        ConfigError: an unknown parameter (the nearest known one is named) or a value out of range.
        RequestError: a message that is malformed.
    """
    if isinstance(messages, str | Mapping):
        raise RequestError("messages must be a list", hint='[{"role": "user", "content": …}]', param="messages")
    params = sampling_params(sampling)
    own = own_extra(extra)
    limits = request_limits(max_pixels, min_pixels, own)
    turns = tuple(_limited(read_turn(item, f"messages[{number}]"), limits) for number, item in enumerate(messages))
    pictures = tuple([part for _, parts in turns for part in parts if isinstance(part, UnreadPicture)])
    if len(pictures) > MAX_PICTURES:
        raise RequestError(f"{len(pictures)} pictures in one request", hint=f"at most {MAX_PICTURES}", param="messages")
    return Draft(
        pictures=pictures,
        messages=turns,
        fields={
            "sampling": params,
            "response_format": read_response_format(response_format),
            "tools": tuple(read_tool(tool) for tool in tools),
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "cache_salt": cache_salt,
            "request_id": request_id,
            "extra": own,
        },
    )


def listed(pictures: Any) -> list[Any]:
    """One picture or several, as a list."""
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]


def question_messages(pictures: Any, question: str, system: str | None) -> list[dict[str, Any]]:
    """What `ask` asks, as a conversation.

    Raises:
        ConfigError: nothing is asked.
    """
    if not isinstance(question, str) or not question.strip():
        said = "empty" if isinstance(question, str) else f"a {type(question).__name__}"
        raise ConfigError(f"the question is {said}", hint="ask(pictures, question)", param="question")
    content = [
        picture if isinstance(picture, PARTS) else {"type": "image", "image": picture} for picture in listed(pictures)
    ]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def request_limits(max_pixels: Any, min_pixels: Any, extra: dict[str, Any]) -> PixelLimits:
    """A request's own limits for all of its pictures; those in `extra` as `mm_processor_kwargs` are taken out of it.

    Raises:
        ConfigError: an argument that cannot work.
        RequestError: the same in `mm_processor_kwargs`, named by its place.
    """
    named = read_limits({"max_pixels": max_pixels, "min_pixels": min_pixels})
    kwargs = extra.get("mm_processor_kwargs")
    if not isinstance(kwargs, Mapping):
        return named
    rest = dict(kwargs)
    told: dict[str, Any] = {name: rest.pop(name, None) for name in ("max_pixels", "min_pixels")}
    size = rest.get("size")
    if isinstance(size, Mapping) and size.keys() <= {"longest_edge", "shortest_edge"}:
        # The names that transformers' image processors give to the same two limits.
        told = {"max_pixels": size.get("longest_edge"), "min_pixels": size.get("shortest_edge")} | {
            name: value for name, value in told.items() if value is not None
        }
        del rest["size"]
    if rest:
        extra["mm_processor_kwargs"] = rest
    else:
        del extra["mm_processor_kwargs"]
    return named.over(read_limits(told, "mm_processor_kwargs"))


def unread_pictures(sources: Sequence[Any], limits: PixelLimits) -> list[UnreadPicture]:
    """Pictures outside of messages, each a source or a part, with `limits` where they have none of their own.

    Raises:
        RequestError: a part that is not a picture.
    """
    found = []
    for number, source in enumerate(sources):
        picture = UnreadPicture(source) if not isinstance(source, PARTS) else read_part(source, f"pictures[{number}]")
        if not isinstance(picture, UnreadPicture):
            raise RequestError(f"pictures[{number}] is not a picture", param=f"pictures[{number}]")
        found.append(dataclasses.replace(picture, limits=picture.limits.over(limits)))
    return found


def _limited(turn: Turn, limits: PixelLimits) -> Turn:
    """The turn with the request's `limits` for every picture that has none of its own."""
    message, parts = turn
    if limits == NO_LIMITS or all(isinstance(part, TextPart) for part in parts):
        return turn
    found: list[TextPart | ImagePart | UnreadPicture] = []
    for part in parts:
        if isinstance(part, ImagePart):
            part = UnreadPicture(part.picture)
        if isinstance(part, UnreadPicture):
            part = dataclasses.replace(part, limits=part.limits.over(limits))
        found.append(part)
    return message, tuple(found)


def own_extra(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `extra`: who changes theirs while the request waits changes neither the request nor its key.

    Raises:
        RequestError: it holds what no request can carry.
    """
    if not given:
        return {}
    try:
        return copy.deepcopy(dict(given))
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"extra cannot be sent: {exc}", hint="pass only JSON values", param="extra") from exc


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from keyword arguments.

    Raises:
        ConfigError: a name that is not one of its fields (the nearest is named), or a value of the wrong type or range.
    """
    if not given:
        return GREEDY
    known = SAMPLING_NAMES
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown parameter {name!r}", hint=nearest(name, known), param=name)
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except (TypeError, OverflowError) as exc:
        raise ConfigError(f"a sampling parameter has the wrong type: {exc}") from exc


def read_tool(tool: ToolLike) -> Tool:
    """A Tool, or OpenAI's `{"type": "function", "function": {…}}`."""
    if isinstance(tool, Tool):
        return tool
    function = tool.get("function", tool)
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping) or not function.get("name"):
        raise UnsupportedInputError("a tool must be a function with a name", param="tools")
    return Tool(
        name=str(function["name"]),
        description=str(function.get("description") or ""),
        parameters=function.get("parameters") or {"type": "object", "properties": {}},
        strict=bool(function.get("strict")),
    )


def read_response_format(wanted: ResponseFormatLike | None) -> ResponseFormat:
    """A ResponseFormat, a pydantic class, or OpenAI's `{"type": "json_schema", "json_schema": {…}}`."""
    if wanted is None:
        return ResponseFormat()
    if isinstance(wanted, ResponseFormat):
        return wanted
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        # Who gives a class reads the answer with it, which checks what no grammar can.
        schema = without_what_is_checked_afterwards(wanted.model_json_schema())
        return ResponseFormat("json_schema", schema=schema, name=schema_name(wanted))
    if not isinstance(wanted, Mapping):
        raise RequestError(f"response_format cannot be a {type(wanted).__name__}", param="response_format")
    kind = wanted.get("type")
    if kind in ("text", "json_object"):
        return ResponseFormat(kind)
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
            raise RequestError("response_format.json_schema.schema is missing", param="response_format")
        return ResponseFormat(kind, schema=inner["schema"], name=str(inner.get("name") or "answer"))
    if kind == "regex":
        return ResponseFormat(kind, pattern=str(wanted.get("pattern") or ""))
    if kind == "choice":
        return ResponseFormat(kind, choices=tuple(str(choice) for choice in wanted.get("choices") or ()))
    raise UnsupportedInputError(f"unknown response_format {kind!r}", param="response_format")
