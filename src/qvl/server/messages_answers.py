"""Every JSON object of the Messages API, with Anthropic's names and fields."""

from __future__ import annotations

from typing import Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict

from qvl.server.answers import Count, Notes
from qvl.types import JsonObject

StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    """The model's reasoning; `signature` shows that this server wrote it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject


AnswerBlock: TypeAlias = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingTokens(TypedDict):
    thinking_tokens: Count


class MessageUsage(TypedDict):
    """Token counts; `input_tokens` are those that were not read from a prefix cache."""

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    output_tokens: Count
    output_tokens_details: ThinkingTokens


class AnsweredMessage(Notes):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: Count


class MessageErrorDetails(TypedDict):
    error_code: str
    unsupported: list[str]


class MessageErrorFields(TypedDict):
    """The fields of an error; `details` are for clients that know a way around it."""

    type: str
    message: str
    details: NotRequired[MessageErrorDetails]


class MessageError(TypedDict):
    type: Literal["error"]
    error: MessageErrorFields
    request_id: str


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


class StopDelta(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


BlockDelta: TypeAlias = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class MessageEvent(Notes, total=False):
    """The fields of a streamed event besides `type`."""

    message: AnsweredMessage
    index: int
    content_block: AnswerBlock
    delta: BlockDelta | StopDelta
    usage: MessageUsage


class AnthropicModel(TypedDict):
    """A model as Anthropic's client reads it; sent to those who name an `anthropic-version`."""

    type: Literal["model"]
    id: str
    display_name: str
    lifecycle: Literal["active"]
    created_at: str
    max_input_tokens: int | None


class AnthropicModelList(TypedDict):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None
