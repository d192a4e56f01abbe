"""The schema of a request to the Responses API."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from qvl.server.neutral_fields import without_null_fields
from qvl.server.schemas import (
    CONTENT,
    MAX_ITEMS,
    MAX_MESSAGES,
    MAX_TOOLS,
    OPEN,
    STRICT,
    TEXT,
    CalledTools,
    Effort,
    FunctionDefinition,
    FunctionName,
    IncludeReasoning,
    JsonSchema,
    PlainFormat,
    Sampling,
    Structured,
    read_by_hand,
)
from qvl.types import JsonObject

InputItems: TypeAlias = Annotated[
    list[
        Annotated[
            JsonObject,
            read_by_hand(
                type={"enum": ["message", "function_call", "function_call_output", "reasoning", "item_reference"]},
                role={"enum": ["system", "developer", "user", "assistant"]},
                content=CONTENT,
                call_id=TEXT,
                name=TEXT,
                arguments=TEXT,
                output=CONTENT,
                id=TEXT,
                encrypted_content=TEXT,
            ),
        ]
    ],
    Field(max_length=4 * MAX_MESSAGES, fail_fast=True),
]
# What is included only where a tool of OpenAI's own was called has nothing to be included in here.
Included: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
]
LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"


@with_config(STRICT)
class ResponsesTool(FunctionDefinition):
    type: Literal["function"]


@with_config(STRICT)
class ResponsesToolChoice(FunctionName):
    type: Literal["function"]


@with_config(STRICT)
class ResponsesAllowedTools(TypedDict):
    """The tools that may be called, of those that the request describes."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponsesToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


@with_config(STRICT)
class ResponsesSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(BaseModel):
    """`verbosity` goes on to endpoints; it asks a model here for nothing, whose template does not know it."""

    model_config = STRICT
    verbosity: Literal["low", "medium", "high"] | None = None
    format: (
        Annotated[
            PlainFormat | ResponsesSchemaFormat, Field(discriminator="type"), BeforeValidator(without_null_fields)
        ]
        | None
    ) = None


class ReasoningOptions(BaseModel):
    """`effort` is the model's; with a `summary`, the reasoning itself stands in the place of one.

    Which reasoning of earlier turns is shown (`context`) is left to the model's template.
    """

    model_config = STRICT
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponsesStreamOptions(BaseModel):
    model_config = STRICT
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Sampling):
    """`POST /v1/responses`, with vLLM's extra sampling fields."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={"examples": [{"input": "What can you see?", "max_output_tokens": 32}]}
    )

    input: str | InputItems
    instructions: str | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1, description="Counts calls of tools of OpenAI's own: none are here.")
    n: Literal[1] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Annotated[list[Included], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    reasoning: ReasoningOptions | None = None
    include_reasoning: IncludeReasoning = None
    text: TextOptions | None = None
    structured_outputs: Structured = None
    tools: CalledTools[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | ResponsesAllowedTools | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None  # type: ignore[assignment]
    previous_response_id: str | None = Field(None, min_length=1, max_length=200)
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
