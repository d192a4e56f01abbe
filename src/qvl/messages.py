"""From what users write (strings, dictionaries in OpenAI's form, our own types) to a `ChatRequest`.

Pictures are collected first and brought through the media gate together, so that several are fetched at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from pydantic import BaseModel

from qvl.analysis import schema_name
from qvl.errors import ConfigError, MediaError, RequestError, UnsupportedInputError
from qvl.plugins import nearest
from qvl.types import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    ResponseFormat,
    SamplingParams,
    TextPart,
    Tool,
    ToolCall,
)

if TYPE_CHECKING:
    from qvl.media import MediaPolicy, Picture, PictureSource
    from qvl.seen import Seen

MessageLike: TypeAlias = Message | Mapping[str, Any]
ToolLike: TypeAlias = Tool | Mapping[str, Any]
ResponseFormatLike: TypeAlias = ResponseFormat | Mapping[str, Any] | type[BaseModel]
MAX_PICTURES: Final = 256
LOW_DETAIL_PIXELS: Final = 512 * 512
SAMPLING_NAMES: Final = SamplingParams.names()
GREEDY: Final = SamplingParams()
DETAILS: Final = (None, "auto", "low", "high", "original")
T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class _Pending:
    """A picture that is still to be loaded; `detail` low means a smaller budget than the gate's."""

    source: Any
    detail: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A request that is complete and checked but for its pictures: `sources` in order, with OpenAI's word for each."""

    sources: tuple[Any, ...]
    details: tuple[str | None, ...]
    messages: tuple[tuple[Message, tuple[Part | _Pending, ...]], ...]
    fields: Mapping[str, Any]

    def finished(self, pictures: Sequence[Picture]) -> ChatRequest:
        """The request with `pictures` in the places of `sources`."""
        coming = iter(pictures)
        return ChatRequest(
            messages=tuple(
                dataclasses.replace(
                    message,
                    parts=tuple([ImagePart(next(coming)) if isinstance(part, _Pending) else part for part in parts]),
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
    drafts = tuple(_draft(message, number) for number, message in enumerate(messages))
    pending = [part for _, parts in drafts for part in parts if isinstance(part, _Pending)]
    if len(pending) > MAX_PICTURES:
        raise RequestError(f"{len(pending)} pictures in one request", hint=f"at most {MAX_PICTURES}", param="messages")
    return Draft(
        sources=tuple(part.source for part in pending),
        details=tuple(part.detail for part in pending),
        messages=drafts,
        fields={
            "sampling": params,
            "response_format": read_response_format(response_format),
            "tools": tuple(read_tool(tool) for tool in tools),
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "max_pixels": pixel_budget(max_pixels),
            "cache_salt": cache_salt,
            "request_id": request_id,
            "extra": own_extra(extra),
        },
    )


async def load_pictures(
    sources: Sequence[PictureSource],
    policy: MediaPolicy,
    details: Sequence[str | None] = (),
    *,
    seen: Seen | None = None,
) -> list[Picture]:
    """Reads and hashes pictures at once, in order, without decoding them; the first that fails ends the rest.

    `details` are OpenAI's words for each picture: "low" bounds it to LOW_DETAIL_PIXELS, the rest is the policy's.

    Raises:
        MediaError: as `qvl.media.aload`.
    """
    from qvl import media

    if not sources:
        return []
    policies = _policies(policy, sources, details)
    return await _together(
        [
            _numbered(number, media.aload(source, own, decode=False, seen=seen))
            for number, (source, own) in enumerate(zip(sources, policies, strict=True))
        ]
    )


def load_picture_here(
    sources: Sequence[PictureSource], policy: MediaPolicy, details: Sequence[str | None], seen: Seen
) -> list[Picture] | None:
    """As `load_pictures`, in this thread, for at most one picture; None where others would do better.

    Changing threads for one takes longer than what is done there, while several are read and hashed side by side, and
    one from the web is waited for.
    """
    from qvl import media

    if len(sources) > 1 or any(media.is_remote(source) for source in sources):
        return None
    with _naming(0):
        return [
            media.load(source, own, decode=False, seen=seen)
            for source, own in zip(sources, _policies(policy, sources, details), strict=True)
        ]


async def ready_pictures(request: ChatRequest, *, pixels: bool) -> ChatRequest:
    """The request with every picture within the request's own pixel budget, and decoded, or checked without `pixels`.

    Raises:
        MediaError: a picture is cut short or broken.
    """
    from qvl import media

    pictures = request.pictures
    if not pictures:
        return request
    ready = await _together(
        [
            _numbered(number, media.aready(picture, request.max_pixels, pixels=pixels))
            for number, picture in enumerate(pictures)
        ]
    )
    return _with_pictures(request, pictures, ready)


def check_pictures_here(request: ChatRequest) -> ChatRequest:
    """As `ready_pictures` without pixels, in this thread."""
    from qvl import media

    ready = []
    for number, picture in enumerate(request.pictures):
        with _naming(number):
            ready.append(media.ready(picture, request.max_pixels, pixels=False))
    return _with_pictures(request, request.pictures, ready)


def _with_pictures(request: ChatRequest, before: Sequence[Picture], after: Sequence[Picture]) -> ChatRequest:
    if all(one is other for one, other in zip(before, after, strict=True)):
        return request
    coming = iter(after)
    return request.replace(
        messages=tuple(
            dataclasses.replace(
                message,
                parts=tuple([ImagePart(next(coming)) if isinstance(p, ImagePart) else p for p in message.parts]),
            )
            for message in request.messages
        )
    )


def _policies(policy: MediaPolicy, sources: Sequence[Any], details: Sequence[str | None]) -> list[MediaPolicy]:
    if "low" not in details:
        return [policy] * len(sources)
    # Only then: a policy checks itself whenever one is made.
    low = dataclasses.replace(policy, max_pixels=min(policy.max_pixels, LOW_DETAIL_PIXELS))
    return [low if detail == "low" else policy for detail in details]


@contextlib.contextmanager
def _naming(number: int) -> Iterator[None]:
    """A picture's error says which one it was."""
    try:
        yield
    except MediaError as exc:
        exc.picture = number
        raise


async def _numbered(number: int, work: Coroutine[Any, Any, T]) -> T:
    """`work` on the picture of this number, which its error then names."""
    with _naming(number):
        return await work


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; when one fails, the rest are cancelled and waited for before the error goes on."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def pixel_budget(given: int | None) -> int | None:
    """A request's own `max_pixels`.

    Raises:
        ConfigError: too few to see anything.
    """
    if given is not None and given < 1024:
        raise ConfigError(f"max_pixels={given} is too small", hint="at least 1024 (32 x 32)", param="max_pixels")
    return given


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
        ConfigError: a name that is none of its fields (the nearest is named), or a value of the wrong type or range.
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
        return ResponseFormat("json_schema", schema=wanted.model_json_schema(), name=schema_name(wanted))
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


def _draft(message: MessageLike, number: int) -> tuple[Message, tuple[Part | _Pending, ...]]:
    if isinstance(message, Message):
        return message, message.parts
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{number}] is a {type(message).__name__}, not an object", param="messages")
    role = message.get("role")
    role = "system" if role == "developer" else role
    content = message.get("content")
    parts: list[Part | _Pending]
    if content is None:
        parts = []
    elif isinstance(content, str):
        parts = [TextPart(content)] if content else []
    elif isinstance(content, Iterable) and not isinstance(content, Mapping):
        parts = [_part(part, f"messages[{number}].content[{i}]") for i, part in enumerate(content)]
    else:
        raise RequestError(f"messages[{number}].content is neither text nor a list of parts", param="messages")
    try:
        draft = Message(
            role=role,  # type: ignore[arg-type]
            tool_calls=tuple(_tool_call(call, number) for call in message.get("tool_calls") or ()),
            tool_call_id=message.get("tool_call_id"),
            name=message.get("name"),
        )
    except ConfigError as exc:
        raise RequestError(f"messages[{number}]: {exc.message}", hint=exc.hint, param="messages") from exc
    return draft, tuple(parts)


def _part(part: Any, where: str) -> Part | _Pending:
    if isinstance(part, TextPart | ImagePart):
        return part
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, Mapping):
        return _Pending(part)
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.text is missing", param="messages")
        return TextPart(part["text"])
    if kind in ("image_url", "input_image"):
        given = part.get("image_url")
        inner = given if isinstance(given, Mapping) else {"url": given, "detail": part.get("detail")}
        url, detail = inner.get("url"), inner.get("detail")
        if url is None:
            raise MediaError(f"{where}.image_url.url is missing", param="messages")
        if detail not in DETAILS:
            raise RequestError(f"{where} has the detail {detail!r}", hint="auto, low, high, original", param="messages")
        return _Pending(url, detail)
    if kind == "image":
        source = part.get("image", part.get("url", part.get("base64")))
        if "base64" in part and source is part["base64"]:
            source = f"data:{part.get('mime_type', 'image/png')};base64,{source}"
        if source is None:
            raise MediaError(f"{where} has no picture in it", param="messages")
        return _Pending(source)
    raise UnsupportedInputError(f"{where} has the type {kind!r}", hint="text or image_url", param="messages")


def _tool_call(call: Any, number: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise RequestError(f"messages[{number}].tool_calls has a call without a function name", param="messages")
    return ToolCall(str(call.get("id") or ""), str(function["name"]), str(function.get("arguments") or "{}"))
