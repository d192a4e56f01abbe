"""The schema of a request to the Messages API, in Anthropic's form."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, with_config
from typing_extensions import TypedDict

from qvl.server.schemas import (
    CONTENT,
    MAX_MESSAGES,
    OPEN,
    STRICT,
    CalledTools,
    IncludeReasoning,
    Label,
    Sampling,
    Texts,
    read_by_hand,
)
from qvl.types import JsonObject


@with_config(STRICT)
class MessagesTool(TypedDict):
    """A tool that the client runs. Those that Anthropic runs have another `type`, and are refused by it."""

    # The first of them, so that an error names it before what such a tool lacks.
    type: NotRequired[Literal["custom"] | None]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    input_schema: JsonObject
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]
    cache_control: NotRequired[Label]
    # Arguments are streamed as they are written, whether or not a client asks for that.
    eager_input_streaming: NotRequired[bool | None]


@with_config(STRICT)
class MessagesToolChoice(TypedDict):
    type: Literal["auto", "any", "tool", "none"]
    name: NotRequired[str]
    disable_parallel_tool_use: NotRequired[bool | None]


@with_config(STRICT)
class ThinkingOptions(TypedDict):
    """The switch of reasoning: "adaptive" leaves it to the model."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NotRequired[Annotated[int, Field(ge=1)]]
    display: NotRequired[Literal["summarized", "omitted"] | None]


@with_config(STRICT)
class OutputSchema(TypedDict):
    type: Literal["json_schema"]
    schema: JsonObject


class OutputOptions(BaseModel):
    model_config = STRICT
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputSchema | None = None


MessageItems: TypeAlias = Annotated[
    list[Annotated[JsonObject, read_by_hand(role={"enum": ["user", "assistant", "system"]}, content=CONTENT)],],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
]


class CountTokensRequest(Sampling):
    """`POST /v1/messages/count_tokens`: a request to `/v1/messages`, of which only the prompt is read."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "What is shown?"}]}]}
    )

    messages: MessageItems
    system: Annotated[str | list[JsonObject] | None, WithJsonSchema(CONTENT)] = None
    tools: CalledTools[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingOptions | None = None
    include_reasoning: IncludeReasoning = None
    output_config: OutputOptions | None = None
    # These change nothing in an answer.
    cache_control: Label = None
    metadata: JsonObject | None = None
    service_tier: Literal["auto", "standard_only"] | None = None  # type: ignore[assignment]


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`, with vLLM's extra sampling fields and `max_pixels`."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={
            "examples": [{"max_tokens": 32, "messages": [{"role": "user", "content": "What is shown?"}]}]
        }
    )

    max_tokens: int = Field(ge=1)
    stop_sequences: Texts | None = None
    n: Literal[1] | None = None
