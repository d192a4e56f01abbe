"""Every JSON object that the server answers with. Routes build these types, and the OpenAPI document is made from them.

Names and fields are OpenAI's; a count beside them, such as `image_tokens`, is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Final, Literal, NotRequired, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from qvl.types import JsonMapping, JsonObject

try:
    import orjson
except ImportError:  # `qvl mcp` over http answers through this module too, and needs no package of the server's own
    orjson = None  # type: ignore[assignment]

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
Count: TypeAlias = Annotated[int, Field(ge=0)]
FinishWord: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


def dumps(value: object) -> bytes:
    """Return `value` as JSON in UTF-8; lone surrogates, which UTF-8 cannot encode, become `?`."""
    try:
        if orjson is not None:
            return orjson.dumps(value)
    except TypeError:
        pass
    return _encode(value).encode("utf-8", "replace")


def data_event(value: Mapping[str, object]) -> bytes:
    """Return `value` as a server-sent event with only a `data` line."""
    return b"data: " + dumps(value) + b"\n\n"


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorFields


class PromptDetails(TypedDict):
    cached_tokens: Count
    image_tokens: Count
    video_tokens: NotRequired[Count]
    video_frames: NotRequired[Count]


class OutputDetails(TypedDict):
    reasoning_tokens: Count


class TokenUsage(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails


class Alternative(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(TypedDict):
    content: list[ChosenToken]
    refusal: None


class CalledFunction(TypedDict):
    name: NotRequired[str]
    arguments: str


class FunctionCall(TypedDict):
    """A function call; in a stream event a fragment of the call number `index`."""

    index: NotRequired[Count]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunction


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[JsonObject]
    tool_calls: NotRequired[list[FunctionCall]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class PromptLogprob(TypedDict):
    """A token at one place of a prompt; `rank` 1 is the likeliest of all."""

    logprob: float
    rank: Count
    decoded_token: str


class ChatChoice(TypedDict):
    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord
    stop_reason: NotRequired[str]
    token_ids: NotRequired[list[Count]]


class Notes(TypedDict, total=False):
    """The notes of an answer: deviations from the request, as a video shown as pictures; absent if there are none."""

    notes: list[str]


class AnswerHead(Notes):
    id: str
    created: Count
    model: str
    system_fingerprint: str
    prompt_token_ids: NotRequired[list[Count]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    usage: TokenUsage
    service_tier: Literal["default"]


class MessageDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str
    reasoning: str
    tool_calls: list[FunctionCall]


class ChunkChoice(TypedDict):
    index: Count
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord | None
    stop_reason: NotRequired[str]
    token_ids: NotRequired[list[Count]]


class ChatCompletionChunk(AnswerHead):
    """An event of a stream; a `usage` is added where `stream_options` ask for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]


class TextLogprobs(TypedDict):
    """The older logprobs object: parallel lists, with each token's offset in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class TextChoice(TypedDict):
    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishWord
    token_ids: NotRequired[list[Count]]
    prompt_token_ids: NotRequired[list[Count]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class TextPiece(TypedDict):
    index: Count
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishWord | None
    token_ids: NotRequired[list[Count]]
    prompt_token_ids: NotRequired[list[Count]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


class Completion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: TokenUsage


class CompletionChunk(AnswerHead):
    """An event of a stream; a `usage` is added where `stream_options` ask for it."""

    object: Literal["text_completion"]
    choices: list[TextPiece]


class EventAlternative(TypedDict):
    token: str
    logprob: float


class EventToken(EventAlternative):
    top_logprobs: list[EventAlternative]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[JsonObject]
    logprobs: list[ChosenToken]


class MessageItem(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class CallItem(TypedDict):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(TypedDict):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(TypedDict):
    """The model's reasoning: as `content`, or as the `summary` that a request asked for."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: str | None


OutputItem: TypeAlias = MessageItem | CallItem | ReasoningItem


class InputDetails(PromptDetails):
    cache_write_tokens: Count


class ResponseUsage(TypedDict):
    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class ResponseText(TypedDict):
    format: JsonMapping
    verbosity: Literal["low", "medium", "high"]


class Response(Notes):
    """A response of the Responses API; most fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: Count
    completed_at: Count | None
    status: ItemStatus
    background: Literal[False]
    error: None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[Literal["effort", "summary"], str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | JsonMapping
    tools: list[JsonObject]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(TypedDict, total=False):
    """The fields of a streamed event besides `type` and `sequence_number`."""

    response: Response
    output_index: int
    item_id: str
    content_index: int
    summary_index: int
    item: OutputItem
    part: OutputText | ReasoningText | SummaryText
    delta: str
    text: str
    logprobs: list[EventToken]
    name: str
    arguments: str
    code: str
    message: str
    param: str | None


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: Count


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class InputItemList(TypedDict):
    """A page of the items that a response answers."""

    object: Literal["list"]
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Analysis(TypedDict):
    id: str
    object: Literal["analysis"]
    created: Count
    model: str
    language: str
    analysis: JsonObject
    confidence: float | None
    field_confidence: dict[str, float]
    confidence_method: str | None
    raw_confidence: NotRequired[float | None]
    raw_field_confidence: NotRequired[dict[str, float]]
    abstained: NotRequired[dict[str, str]]
    notes: list[str]
    usage: TokenUsage
    evidence: NotRequired[dict[str, JsonObject | None]]
    pages: NotRequired[dict[str, Count]]
    overlay: NotRequired[str]


class ModelCapabilities(TypedDict):
    """The features that requests to a model may use: pictures, tools, logprobs, kinds of `response_format`."""

    vision: bool
    tools: bool
    logprobs: bool
    response_formats: list[str]
    max_images: Count


class ModelProcessor(TypedDict):
    """The way from a picture to tokens: sides of a patch (pixels) and token (patches), pixels that it is shown in."""

    patch_size: Count
    merge_size: Count
    min_pixels: Count
    max_pixels: Count


class Model(TypedDict):
    """A model that requests may name; its limits are present once it is loaded. `root` is the backend's own name.

    An adapter's `parent` is the name of the model that it changes.
    """

    id: str
    object: Literal["model"]
    created: Count
    owned_by: Literal["qvl"]
    root: str
    parent: str | None
    max_model_len: NotRequired[int | None]
    max_images: NotRequired[Count]
    max_videos: NotRequired[Count]
    max_body_bytes: NotRequired[Count]
    processor: NotRequired[ModelProcessor]
    capabilities: NotRequired[ModelCapabilities]


class TokenList(TypedDict):
    """The tokens of a prompt, as vLLM tells them; `token_strs` where they were asked for."""

    count: Count
    max_model_len: int | None
    tokens: list[Count]
    token_strs: list[str] | None


class DetokenizedText(TypedDict):
    prompt: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    status: Literal["ok"]


class Ready(TypedDict):
    status: Literal["ready"]


class Unready(Error):
    status: Literal["unavailable"]
    reason: str


class Version(TypedDict):
    version: str
    backend: str
    models: list[str]
    uptime: Count
