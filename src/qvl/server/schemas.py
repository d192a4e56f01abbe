"""What requests look like. Unknown fields are not dropped: the backend honours them or the request is refused.

Message parts are TypedDicts, so that a validated message is the plain dictionary that the pipeline reads.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from qvl.server.readiness import tiny_png

STRICT: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
OPEN: Final = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
Detail: TypeAlias = Literal["auto", "low", "high", "original"]
PIXEL: Final = "data:image/png;base64," + base64.b64encode(tiny_png()).decode("ascii")


@with_config(STRICT)
class TextPart(TypedDict):
    type: Literal["text"]
    text: str


@with_config(STRICT)
class ImageUrl(TypedDict):
    url: Annotated[str, Field(description="An http(s) or data: URL.")]
    detail: NotRequired[Detail]


@with_config(STRICT)
class ImagePart(TypedDict):
    type: Literal["image_url"]
    image_url: ImageUrl


@with_config(STRICT)
class RefusalPart(TypedDict):
    type: Literal["refusal"]
    refusal: str


Content: TypeAlias = str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
TextContent: TypeAlias = str | list[TextPart]


@with_config(STRICT)
class FunctionCall(TypedDict):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


@with_config(STRICT)
class CallOfTool(TypedDict):
    id: str
    type: NotRequired[Literal["function"]]
    function: FunctionCall
    index: NotRequired[int]


@with_config(STRICT)
class SystemMessage(TypedDict):
    role: Literal["system", "developer"]
    content: TextContent
    name: NotRequired[str | None]


@with_config(STRICT)
class UserMessage(TypedDict):
    role: Literal["user"]
    content: Content
    name: NotRequired[str | None]


@with_config(STRICT)
class AssistantMessage(TypedDict):
    """What clients send back of an earlier answer; fields that say nothing here may only be empty."""

    role: Literal["assistant"]
    content: NotRequired[TextContent | None]
    tool_calls: NotRequired[list[CallOfTool] | None]
    name: NotRequired[str | None]
    refusal: NotRequired[str | None]
    reasoning: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    annotations: NotRequired[list[Any] | None]
    audio: NotRequired[None]
    function_call: NotRequired[None]


@with_config(STRICT)
class ToolMessage(TypedDict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: NotRequired[str | None]


ChatMessage: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


@with_config(STRICT)
class FunctionDefinition(TypedDict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@with_config(STRICT)
class FunctionTool(TypedDict):
    type: Literal["function"]
    function: FunctionDefinition


@with_config(STRICT)
class FunctionName(TypedDict):
    name: str


@with_config(STRICT)
class NamedToolChoice(TypedDict):
    type: Literal["function"]
    function: FunctionName


@with_config(STRICT)
class JsonSchema(TypedDict):
    name: str
    schema: dict[str, Any]
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
    choices: list[str]


ResponseFormat: TypeAlias = Annotated[
    PlainFormat | SchemaFormat | RegexFormat | ChoiceFormat, Field(discriminator="type")
]


@with_config(STRICT)
class StructuredOutputs(TypedDict):
    """vLLM's way to say what `response_format` says; exactly one of them."""

    json: NotRequired[dict[str, Any]]
    json_object: NotRequired[Literal[True]]
    regex: NotRequired[str]
    choice: NotRequired[list[str]]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(BaseModel):
    """How to choose tokens. What is left out has the pipeline's default; temperature 0 (greedy) is one of them."""

    model_config = OPEN

    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy, and the default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=128)
    max_pixels: int | None = Field(None, ge=1024, description="Budget of every picture, in pixels.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Who sends the same shares computed prefixes; else each key."
    )

    def sampling(self) -> dict[str, Any]:
        """The given fields by the pipeline's names."""
        return {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}


SAMPLING_FIELDS: Final = tuple(Sampling.model_fields)


class ChatCompletionRequest(Sampling):
    """`POST /v1/chat/completions`, with vLLM's extra sampling fields and `max_pixels`."""

    model_config = {
        **OPEN,
        "json_schema_extra": {
            "examples": [
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "What colour is it?"},
                                {"type": "image_url", "image_url": {"url": PIXEL}},
                            ],
                        }
                    ],
                    "max_tokens": 32,
                }
            ]
        },
    }

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    # These change nothing in an answer: labels for the caller's own books.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`: the prompt becomes a user's message."""

    model_config = {
        **OPEN,
        "json_schema_extra": {"examples": [{"prompt": "What is shown on the picture?", "max_tokens": 16}]},
    }

    model: str | None = None
    prompt: str | list[str]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    user: str | None = None


@with_config(STRICT)
class InputText(TypedDict):
    type: Literal["input_text"]
    text: str


@with_config(STRICT)
class InputImage(TypedDict):
    type: Literal["input_image"]
    image_url: str
    detail: NotRequired[Detail | None]


@with_config(STRICT)
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[Any] | None]


ItemPart: TypeAlias = Annotated[InputText | InputImage | OutputText | RefusalPart, Field(discriminator="type")]


@with_config(STRICT)
class InputMessage(TypedDict):
    type: NotRequired[Literal["message"]]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ItemPart]
    id: NotRequired[str | None]
    status: NotRequired[str | None]
    phase: NotRequired[str | None]


@with_config(STRICT)
class FunctionCallItem(TypedDict):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    id: NotRequired[str | None]
    status: NotRequired[str | None]


@with_config(STRICT)
class FunctionCallOutput(TypedDict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]
    id: NotRequired[str | None]
    status: NotRequired[str | None]


@with_config(STRICT)
class ResponsesTool(TypedDict):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@with_config(STRICT)
class ResponsesToolChoice(TypedDict):
    type: Literal["function"]
    name: str


@with_config(STRICT)
class ResponsesSchemaFormat(TypedDict):
    type: Literal["json_schema"]
    name: str
    schema: dict[str, Any]
    description: NotRequired[str | None]
    strict: NotRequired[bool | None]


class TextOptions(BaseModel):
    model_config = STRICT
    format: Annotated[PlainFormat | ResponsesSchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(BaseModel):
    """`POST /v1/responses`. Nothing is kept: `store` may only be false and `previous_response_id` only null."""

    model_config = {
        **OPEN,
        "json_schema_extra": {"examples": [{"input": "What can you see?", "max_output_tokens": 32}]},
    }

    model: str | None = None
    input: str | list[InputMessage | FunctionCallItem | FunctionCallOutput]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_pixels: int | None = Field(None, ge=1024)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    previous_response_id: None = None
    background: Literal[False] | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class AnalyzeRequest(BaseModel):
    """`POST /v1/analyze`: one product, shown on one or several pictures."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        json_schema_extra={"examples": [{"image": PIXEL, "language": "en"}]},
    )

    model: str | None = None
    image: str | None = Field(None, description="An http(s) or data: URL.")
    images: list[str] | None = Field(None, min_length=1, description="Several pictures of the same product.")
    language: str | None = Field(None, description="en, zh, pt or es.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="A JSON schema of type object; left out: brand, category, attributes."
    )
    max_tokens: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=100)
