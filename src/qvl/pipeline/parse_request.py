"""Conversion of user input (strings, dictionaries in OpenAI's format, qvl's types) to a `ChatRequest`.

Pictures are collected first and loaded by the media gate together, so that several are fetched in parallel.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict, cast

from pydantic import BaseModel

from qvl.analysis.parse_answer import schema_name
from qvl.backends.grammar_schema import without_what_is_checked_afterwards
from qvl.caches.policy import CacheMode
from qvl.calibration.abstain import AbstainLike
from qvl.errors import ConfigError, RequestError, UnsupportedInputError
from qvl.ids import new_request_id
from qvl.media.page_choice import PageChoice, PagesLike, read_pages
from qvl.media.picture import Picture
from qvl.media.smart_resize import NO_LIMITS, PixelLimits, read_limits
from qvl.media.video_parts import media_parts
from qvl.media.video_sampling import DEFAULT_SAMPLING, VIDEO_FIELDS, VideoSampling, read_sampling
from qvl.pipeline.parse_message import MessageLike, Turn, read_turn
from qvl.pipeline.parse_parts import PARTS, ContentPart, PictureLike, Pictures, UnreadPicture, read_part
from qvl.suggest import nearest
from qvl.types import (
    ChatRequest,
    ImagePart,
    JsonMapping,
    JsonObject,
    Part,
    ResponseFormat,
    SamplingParams,
    TextPart,
    Tool,
)

if TYPE_CHECKING:
    from qvl.media.video import Medium

ToolLike: TypeAlias = Tool | JsonMapping
ResponseFormatLike: TypeAlias = ResponseFormat | JsonMapping | type[BaseModel]
MAX_PICTURES: Final = 256
# What vLLM's `media_io_kwargs` may say of videos.
MEDIA_FIELDS: Final = ("fps", "num_frames")
# Parameters of an analysis that are not SamplingParams.
OF_REQUEST: Final = frozenset(
    {"request_id", "extra", "max_pixels", "min_pixels", "video", "pages", "language", "cache", "evidence", "abstain"}
    | {"calibrated", "adapter", "chat_template_kwargs", "reasoning_effort", "cache_salt", "priority"}
)
SAMPLING_NAMES: Final = SamplingParams.names()
GREEDY: Final = SamplingParams()
FREE_TEXT: Final = ResponseFormat()


class RequestParams(TypedDict, total=False):
    """Parameters of a request: sampling (None is the default), response format and tools, pixel limits of pictures."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logprobs: int | None
    n: int | None
    min_tokens: int | None
    bad_words: str | Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    return_token_ids: bool | None
    truncate_prompt_tokens: int | None
    thinking_token_budget: int | None
    response_format: ResponseFormatLike | None
    tools: Sequence[ToolLike]
    tool_choice: str
    parallel_tool_calls: bool
    max_pixels: int | None
    min_pixels: int | None
    video: VideoSampling | JsonMapping | None
    pages: PagesLike | None
    cache_salt: str
    request_id: str | None
    extra: JsonMapping | None
    chat_template_kwargs: JsonMapping | None
    add_generation_prompt: bool
    continue_final_message: bool
    reasoning_effort: str | None
    prompt: str | Sequence[int] | None
    priority: int
    adapter: str


class AnalyzeParams(RequestParams, total=False):
    """Keyword arguments of `analyze()`.

    `abstain` is the least confidence to be told, of every field or of each that it names; `calibrated=False` asks for
    the raw confidences of a pipeline with a calibration, for a schema that it is not of.
    """

    language: str | None
    cache: CacheMode | None
    evidence: bool
    abstain: AbstainLike | None
    calibrated: bool


class MapParams(AnalyzeParams, total=False):
    """Keyword arguments of `map()`; `system` needs a `question`."""

    system: str | None
    concurrency: int | None
    progress: bool
    keep_pictures: bool
    engine: str | None
    replicas: int | None
    ray_address: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A validated request whose `pictures` are not loaded yet; `turns` refer to them in order."""

    pictures: tuple[UnreadPicture, ...]
    turns: tuple[Turn, ...]
    request: ChatRequest
    written: dict[Hashable, Sequence[bytes]] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def finished(self, pictures: Sequence[Medium], request_id: str = "") -> ChatRequest:
        """Return the ChatRequest with the loaded `pictures`, and with `request_id` instead of its own, if given."""
        coming = iter(pictures)
        messages = [message.with_parts(with_loaded(parts, coming)) for message, parts in self.turns]
        # One picture in the place of each: the texts around them stay what they are.
        alike = all(isinstance(picture, Picture) for picture in pictures)
        return self.request.with_messages(tuple(messages), request_id, written=self.written if alike else None)


def with_loaded(parts: Iterable[ContentPart], coming: Iterator[Medium]) -> tuple[Part, ...]:
    """Return `parts` with what comes next in the place of each that was not loaded."""
    whole: list[Part] = []
    for part in parts:
        whole += media_parts(next(coming)) if isinstance(part, UnreadPicture) else (part,)
    return tuple(whole)


def draft_request(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[ToolLike] = (),
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    response_format: ResponseFormatLike | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    video: VideoSampling | JsonMapping | None = None,
    pages: PagesLike | None = None,
    cache_salt: str = "",
    request_id: str | None = None,
    extra: JsonMapping | None = None,
    chat_template_kwargs: JsonMapping | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    reasoning_effort: str | None = None,
    prompt: str | Sequence[int] | None = None,
    priority: int = 0,
    adapter: str = "",
    **sampling: object,
) -> Draft:
    """Return the draft of a request from its messages and parameters, validated; pictures are not loaded yet.

    Raises:
        ConfigError: an unknown parameter (the nearest known one is named) or a value out of range.
        RequestError: a malformed message.
    """
    if not isinstance(messages, list) and isinstance(messages, str | Mapping):
        raise RequestError("messages must be a list", hint='[{"role": "user", "content": …}]', param="messages")
    params = sampling_params(sampling)
    own = own_extra(extra)
    template_kwargs = read_template_kwargs(chat_template_kwargs, own)
    sampling_of_videos = request_sampling(video, own)
    limits = request_limits(max_pixels, min_pixels, own)
    chosen = request_pages(pages)
    turns = tuple([read_turn(item, f"messages[{number}]") for number, item in enumerate(messages)])
    if (limits, sampling_of_videos, chosen) != (NO_LIMITS, DEFAULT_SAMPLING, None):
        common = UnreadPicture("", limits, sampling_of_videos, pages=chosen)
        turns = tuple([_limited(turn, common) for turn in turns])
    pictures = tuple([part for _, parts in turns for part in parts if isinstance(part, UnreadPicture)])
    if len(pictures) > MAX_PICTURES:
        raise RequestError(f"{len(pictures)} pictures in one request", hint=f"at most {MAX_PICTURES}", param="messages")
    request = ChatRequest(
        messages=tuple([message for message, _ in turns]),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template_kwargs=template_kwargs,
        reasoning_effort=reasoning_effort,
        prompt=prompt if prompt is None or isinstance(prompt, str) else tuple(prompt),
        priority=priority,
        adapter=adapter,
        sampling=params,
        response_format=read_response_format(response_format),
        tools=tuple([read_tool(tool) for tool in tools]),
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        cache_salt=cache_salt,
        request_id=request_id or new_request_id(),
        extra=own,
    )
    return Draft(pictures, turns, request)


def read_template_kwargs(given: object, extra: JsonObject) -> JsonObject:
    """Return a copy of the `chat_template_kwargs` that are `given`, else of those that are taken out of `extra`.

    Raises:
        ConfigError: `chat_template_kwargs` is not a mapping.
    """
    if given is None and "chat_template_kwargs" in extra and isinstance(extra["chat_template_kwargs"], Mapping):
        # Where clients of endpoints put it.
        given = extra.pop("chat_template_kwargs")
    if given is not None and not isinstance(given, Mapping):
        what = f"chat_template_kwargs is {str(given)[:40]!r}, not a mapping"
        raise ConfigError(what, hint='{"enable_thinking": false}', param="chat_template_kwargs")
    return own_extra(given, "chat_template_kwargs")


def listed(pictures: Pictures) -> list[PictureLike]:
    """Return `pictures` as a list; a single picture becomes a list of one."""
    if isinstance(pictures, list | tuple):
        return [*pictures]
    return [cast("PictureLike", pictures)]


def question_messages(pictures: Pictures, question: str, system: str | None) -> list[JsonObject]:
    """Return the messages of `ask`: an optional system turn, and a user turn of pictures and question.

    Raises:
        ConfigError: the question is empty.
    """
    if not isinstance(question, str) or not question.strip():
        kind = "empty" if isinstance(question, str) else f"a {type(question).__name__}"
        raise ConfigError(f"the question is {kind}", hint="ask(pictures, question)", param="question")
    content = [picture if isinstance(picture, PARTS) else UnreadPicture(picture) for picture in listed(pictures)]
    messages: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def request_limits(max_pixels: int | None, min_pixels: int | None, extra: JsonObject) -> PixelLimits:
    """Return a request's pixel limits; those in `extra["mm_processor_kwargs"]` are removed from `extra`.

    Raises:
        ConfigError: an invalid argument.
        RequestError: an invalid value in `mm_processor_kwargs`; the error names its path.
    """
    named = read_limits({"max_pixels": max_pixels, "min_pixels": min_pixels})
    kwargs = extra.get("mm_processor_kwargs")
    if kwargs is None or not isinstance(kwargs, Mapping):
        return named
    rest = {name: value for name, value in kwargs.items() if value is not None}
    limits = {name: rest.pop(name, None) for name in ("max_pixels", "min_pixels")}
    size = rest.get("size")
    if isinstance(size, Mapping) and size.keys() <= {"longest_edge", "shortest_edge"}:
        # The names that transformers' image processors give to the same two limits.
        limits = {"max_pixels": size.get("longest_edge"), "min_pixels": size.get("shortest_edge")} | {
            name: value for name, value in limits.items() if value is not None
        }
        del rest["size"]
    if rest:
        extra["mm_processor_kwargs"] = rest
    else:
        del extra["mm_processor_kwargs"]
    return named.over(read_limits(limits, "mm_processor_kwargs"))


def request_sampling(video: VideoSampling | JsonMapping | None, extra: JsonObject) -> VideoSampling:
    """Return which frames of videos a request wants; what `mm_processor_kwargs` and `media_io_kwargs` say is removed.

    Raises:
        ConfigError: an invalid argument.
        RequestError: an invalid value in one of these two; the error names its path.
    """
    if video is None and not extra:
        return DEFAULT_SAMPLING
    if isinstance(video, Mapping):
        unknown = next((name for name in video if name not in (*VIDEO_FIELDS, "num_frames")), None)
        if unknown is not None:
            raise ConfigError(f"unknown key {unknown!r} in video", hint=nearest(unknown, VIDEO_FIELDS), param="video")
        video = read_sampling(video)
    named = (video or DEFAULT_SAMPLING).over(_media_sampling(extra))
    kwargs = extra.get("mm_processor_kwargs")
    if not isinstance(kwargs, Mapping):
        return named
    read = read_sampling(kwargs, "mm_processor_kwargs")
    # They choose frames here, before any backend; asked to choose once more it would choose among these.
    spent = (*VIDEO_FIELDS, "num_frames", "do_sample_frames")
    extra["mm_processor_kwargs"] = {name: value for name, value in kwargs.items() if name not in spent}
    return named.over(read)


def _media_sampling(extra: JsonObject) -> VideoSampling:
    """Return which frames `extra["media_io_kwargs"]` chooses, vLLM's other field for them, and remove that there."""
    kwargs = extra.get("media_io_kwargs")
    if not isinstance(kwargs, Mapping) or not isinstance(kwargs.get("video", {}), Mapping):
        return DEFAULT_SAMPLING
    rest = dict(kwargs)
    chosen: Mapping[str, object] = {name: told for name, told in rest.pop("video", {}).items() if told is not None}
    where = "media_io_kwargs.video"
    for name in chosen:
        if name not in MEDIA_FIELDS:
            hint = f"it may have {' and '.join(MEDIA_FIELDS)}; video_start and the others are fields of a part"
            raise UnsupportedInputError(f"{where}.{name} is not supported", hint=hint, param=f"{where}.{name}")
    extra["media_io_kwargs"] = rest
    if not rest:
        del extra["media_io_kwargs"]
    return read_sampling(chosen, where)


def request_pages(pages: PagesLike | None) -> PageChoice | None:
    """Return the pages of a request's documents; None if it names none.

    Raises:
        ConfigError: `pages` names no pages.
    """
    return None if pages is None else read_pages(pages)


def unread_pictures(sources: Sequence[PictureLike], common: UnreadPicture) -> list[UnreadPicture]:
    """Return `sources` (sources or parts of pictures), with the limits of `common` where they set none of their own.

    Raises:
        RequestError: a part that is not a picture.
    """
    pictures = []
    for number, source in enumerate(sources):
        where = f"pictures[{number}]"
        picture = UnreadPicture(source) if not isinstance(source, PARTS) else read_part(source, where)
        if not isinstance(picture, UnreadPicture):
            raise RequestError(f"{where} is text, not a picture", hint="pass a path, URL, bytes or image", param=where)
        pictures.append(picture.over(common))
    return pictures


def _limited(turn: Turn, common: UnreadPicture) -> Turn:
    """Return the turn with the limits, frames and pages of `common` for every picture that has none of its own."""
    message, parts = turn
    if all(isinstance(part, TextPart) for part in parts):
        return turn
    limited: list[ContentPart] = []
    for part in parts:
        if isinstance(part, ImagePart):
            part = UnreadPicture(part.picture)
        if isinstance(part, UnreadPicture):
            part = part.over(common)
        limited.append(part)
    return message, tuple(limited)


def own_extra(extra: JsonMapping | None, name: str = "extra") -> JsonObject:
    """Return a deep copy of `extra`, the parameter `name`, so that the caller's changes do not affect the request.

    Raises:
        RequestError: a value that JSON cannot represent.
    """
    if not extra:
        return {}
    try:
        return copy.deepcopy(dict(extra))
    except (TypeError, ValueError, RecursionError) as exc:
        raise RequestError(f"{name} cannot be sent: {exc}", hint="pass only JSON values", param=name) from exc


def sampling_params(values: JsonMapping) -> SamplingParams:
    """Return SamplingParams from keyword arguments that are not validated yet.

    Raises:
        ConfigError: a name that is not one of its fields (the nearest is named), or a value of the wrong type or range.
    """
    if not values:
        return GREEDY
    if not values.keys() <= SAMPLING_NAMES:
        name = next(name for name in values if name not in SAMPLING_NAMES)
        raise ConfigError(f"unknown parameter {name!r}", hint=nearest(name, SAMPLING_NAMES), param=name)
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except (TypeError, OverflowError) as exc:
        raise ConfigError(f"a sampling parameter has the wrong type: {exc}") from exc


def read_tool(tool: ToolLike) -> Tool:
    """Return `tool` as a Tool; a mapping is OpenAI's `{"type": "function", "function": {…}}`."""
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


def read_response_format(form: ResponseFormatLike | None) -> ResponseFormat:
    """Return `form` as a ResponseFormat; it may be a pydantic class or OpenAI's `response_format` dictionary."""
    if form is None:
        return FREE_TEXT
    if isinstance(form, ResponseFormat):
        return form
    if isinstance(form, type) and issubclass(form, BaseModel):
        # Who gives a class reads the answer with it, which checks what no grammar can.
        schema = without_what_is_checked_afterwards(form.model_json_schema())
        return ResponseFormat("json_schema", schema=schema, name=schema_name(form))
    if not isinstance(form, Mapping):
        raise RequestError(f"response_format takes a dict or class, not {type(form).__name__}", param="response_format")
    kind = form.get("type")
    if kind in ("text", "json_object"):
        return ResponseFormat(kind)
    if kind == "json_schema":
        inner = form.get("json_schema")
        if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
            raise RequestError("response_format.json_schema.schema is missing", param="response_format")
        return ResponseFormat(kind, schema=inner["schema"], name=str(inner.get("name") or "answer"))
    if kind in ("regex", "grammar"):
        return ResponseFormat(kind, pattern=str(form.get("pattern") or ""))
    if kind == "choice":
        return ResponseFormat(kind, choices=tuple(str(choice) for choice in form.get("choices") or ()))
    raise UnsupportedInputError(f"unknown response_format {kind!r}", param="response_format")
