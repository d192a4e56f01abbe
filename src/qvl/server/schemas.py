"""The schema of every request. Unknown fields are not ignored: the backend supports them or the request is refused.

The pipeline's own parsers read messages and their parts, so that there is one parser for all input.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Final, Literal, NotRequired, TypeAlias, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, with_config
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict

from qvl.media.smart_resize import LIMIT_NAMES
from qvl.pipeline.parse_parts import DETAILS, KINDS
from qvl.sampling import PARAMETERS, Parameter
from qvl.server.format_schemas import STRICT as STRICT
from qvl.server.format_schemas import JsonSchema as JsonSchema
from qvl.server.format_schemas import PlainFormat as PlainFormat
from qvl.server.format_schemas import ResponseFormat
from qvl.server.format_schemas import Structured as Structured
from qvl.server.format_schemas import Texts as Texts
from qvl.server.neutral_fields import as_called_directly
from qvl.server.readiness import tiny_png
from qvl.types import JsonObject

if TYPE_CHECKING:
    from qvl.pipeline.parse_request import RequestParams

OPEN: Final = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
MAX_MESSAGES: Final = 4_096
MAX_ITEMS: Final = 4_096
MAX_TOOLS: Final = 1_024
MAX_TOKENS: Final = 100_000
MAX_IMAGES: Final = 256
MAX_PROMPT_IDS: Final = 1 << 20
TokenIds: TypeAlias = Annotated[list[int], Field(max_length=MAX_PROMPT_IDS, fail_fast=True)]
# OpenAI's bounds.
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
PIXEL: Final = "data:image/png;base64," + base64.b64encode(tiny_png()).decode("ascii")


TEXT: Final = {"type": "string"}
_PART: Final = {
    "type": "object",
    "properties": {
        "type": {"enum": list(KINDS)},
        "text": TEXT,
        "image_url": {
            "anyOf": [
                TEXT,
                {"type": "object", "properties": {"url": TEXT, "detail": {"enum": list(DETAILS)}}, "required": ["url"]},
            ],
            "description": "An http(s) or data: URL.",
        },
        "video_url": {
            "anyOf": [TEXT, {"type": "object", "properties": {"url": TEXT}, "required": ["url"]}],
            "description": "An http(s) or data: URL.",
        },
        "file": {
            "type": "object",
            "properties": {"file_data": TEXT, "filename": TEXT},
            "description": "A PDF as a data: URL in file_data.",
        },
        "file_data": TEXT,
        "file_url": TEXT,
        "pages": {"anyOf": [TEXT, {"type": "integer", "minimum": 1}], "description": "Of a PDF, as 1-3,7."},
        "fps": {"type": "number", "exclusiveMinimum": 0},
        "nframes": {"type": "integer", "minimum": 1},
        "timestamps": {"type": "array", "items": {"type": "number", "minimum": 0}},
        **{name: {"type": "number", "minimum": 0} for name in ("video_start", "video_end")},
        **{name: {"type": "integer", "minimum": 1} for name in LIMIT_NAMES},
    },
    "required": ["type"],
}
CONTENT: Final = {"anyOf": [TEXT, {"type": "array", "items": _PART}, {"type": "null"}]}


def read_by_hand(**properties: object) -> WithJsonSchema:
    """Return the JSON schema of an object that the pipeline's parsers validate, not pydantic."""
    return WithJsonSchema({"type": "object", "properties": properties})


ChatMessages: TypeAlias = Annotated[
    list[
        Annotated[
            JsonObject,
            read_by_hand(
                role={"enum": ["system", "developer", "user", "assistant", "tool"]},
                content=CONTENT,
                name=TEXT,
                tool_calls={"type": "array", "items": {"type": "object"}},
                tool_call_id=TEXT,
            ),
        ]
    ],
    Field(fail_fast=True),
]


# For the books of whoever is between; it says nothing to a model.
Label: TypeAlias = JsonObject | None


@with_config(STRICT)
class FunctionDefinition(TypedDict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: NotRequired[str | None]
    parameters: NotRequired[JsonObject | None]
    strict: NotRequired[bool | None]
    cache_control: NotRequired[Label]


@with_config(STRICT)
class FunctionTool(TypedDict):
    type: Literal["function"]
    function: FunctionDefinition
    cache_control: NotRequired[Label]


Tools: TypeAlias = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
T = TypeVar("T")
# Of the APIs whose clients say who may call a tool.
CalledTools: TypeAlias = Annotated[
    list[Annotated[T, BeforeValidator(as_called_directly)]], Field(max_length=MAX_TOOLS, fail_fast=True)
]


@with_config(STRICT)
class FunctionName(TypedDict):
    name: str


@with_config(STRICT)
class NamedToolChoice(TypedDict):
    type: Literal["function"]
    function: FunctionName


@with_config(STRICT)
class AllowedTools(TypedDict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


@with_config(STRICT)
class AllowedToolsChoice(TypedDict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


OverlayForm: TypeAlias = Literal["png", "svg"]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


CacheSalt = Annotated[
    str | None,
    Field(
        min_length=1, max_length=256, description="Requests of one key with the same salt share answers and prefixes."
    ),
]
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
IncludeReasoning = Annotated[
    bool | None, Field(description="false: the reasoning is left out of the answer, not out of the count of tokens.")
]
Priority = Annotated[int | None, Field(ge=-(2**31), le=2**31, description="Of waiting requests the least comes first.")]


class QuestionFields(BaseModel):
    """The fields of every generation request besides its sampling parameters."""

    model_config = OPEN

    model: str | None = None
    stream: bool | None = None
    # These change nothing in an answer: labels for the caller's own books.
    user: str | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    max_pixels: int | None = Field(None, ge=1024, description="The most pixels of each picture.")
    min_pixels: int | None = Field(None, ge=1, description="Pictures with fewer pixels are upscaled.")
    cache_salt: CacheSalt = None
    priority: Priority = None
    request_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:+/=@-]{1,128}$", description="Part of the answer's id, and its X-Request-Id."
    )

    def sampling(self) -> RequestParams:
        """Return the request's parameters that have the same names in the pipeline."""
        # Fields alone are looked for: what else a body has is in `model_extra`.
        fields = self.__dict__
        given = self.__pydantic_fields_set__ & SAMPLING_FIELDS
        return cast("RequestParams", {name: value for name in given if (value := fields.get(name)) is not None})


def parameter_field(name: str) -> FieldInfo:
    """Return the pydantic field of a sampling parameter, with its bounds."""
    known = PARAMETERS[name]
    if isinstance(known.example, tuple | dict):
        # Their bounds are of each item, and the pipeline's.
        return cast("FieldInfo", Field(description=known.about))
    low = known.low if known.off is None else known.off
    field: FieldInfo = Field(
        gt=low if known.above else None,
        ge=None if known.above else low,
        le=known.high if known.http_high is None else known.http_high,
        description=known.about,
    )
    return field


def _parameter_type(known: Parameter) -> object:
    # Some more than there may be, so that the error is mostly the pipeline's, which says how many.
    several = Field(max_length=4 * known.most, fail_fast=True)
    if isinstance(known.example, dict):
        return Annotated[dict[str, float], Field(max_length=known.most, fail_fast=True)] | None
    if isinstance(known.example, tuple):
        texts = isinstance(known.example[0], str)
        return str | Annotated[list[str], several] | None if texts else Annotated[list[int], several] | None
    return known.kind | None


# The length of an answer and its logprobs have names of their own on each route.
_NAMED_BY_ROUTES: Final = frozenset({"max_tokens", "logprobs"})
if TYPE_CHECKING:

    class Sampling(QuestionFields):
        """Those of the fields made below that routes read by their names."""

        n: int | None = None
        prompt_logprobs: int | None = None
        logprob_token_ids: list[int] | None = None
        return_token_ids: bool | None = None
else:
    Sampling = create_model(
        "Sampling",
        __base__=QuestionFields,
        **{
            name: (Annotated[_parameter_type(known), parameter_field(name)], None)
            for name, known in PARAMETERS.items()
            if name not in _NAMED_BY_ROUTES
        },
    )
SAMPLING_FIELDS: Final = PARAMETERS.keys() - _NAMED_BY_ROUTES | {"max_pixels", "min_pixels", "cache_salt", "priority"}


class ChatCompletionRequest(Sampling):
    """`POST /v1/chat/completions`, with vLLM's extra sampling fields and `max_pixels`."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={
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
        }
    )

    messages: ChatMessages = Field(min_length=1, max_length=MAX_MESSAGES)
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, parameter_field("max_tokens")] = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    structured_outputs: Structured = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Variables of the model's chat template.")
    add_generation_prompt: bool | None = Field(None, description="false: the prompt ends with the last message.")
    continue_final_message: bool | None = Field(None, description="The answer goes on where the last message ends.")
    reasoning_effort: Effort | None = None
    include_reasoning: IncludeReasoning = None
    echo: bool | None = Field(None, description="The answer begins with the last message, if that is an assistant's.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`: text becomes a user message; token ids, and text with `echo`, are continued."""

    model_config = OPEN | ConfigDict(
        json_schema_extra={"examples": [{"prompt": "What is shown on the picture?", "max_tokens": 16}]}
    )

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(max_length=MAX_ITEMS, fail_fast=True)]
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="The answer begins with the prompt, which is continued as it stands.")
    response_format: ResponseFormat | None = None
    structured_outputs: Structured = None
    best_of: int | None = Field(None, description="As `n`: nothing else can be chosen from.")
    suffix: str | None = None
    # The prompt becomes a message, which the model's template sets up either way.
    add_special_tokens: bool | None = None


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: the tokens of `messages` (with `tools`), or of a `prompt`."""

    model_config = OPEN | ConfigDict(json_schema_extra={"examples": [{"prompt": "What is shown?"}]})

    model: str | None = None
    prompt: str | None = None
    messages: ChatMessages | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Tools | None = None
    return_token_strs: bool | None = None
    # A text begins with no special token for a model of this family, so both are the same.
    add_special_tokens: bool | None = None


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`: the text of `tokens`."""

    model_config = STRICT | ConfigDict(json_schema_extra={"examples": [{"tokens": [64, 65]}]})

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS, fail_fast=True)]


class TaskFields(BaseModel):
    """The fields that all requests have whose question the pipeline writes."""

    model: str | None = None
    pages: str | int | None = Field(None, description="Pages of PDFs, as 1-3,7.")
    max_pixels: int | None = Field(None, ge=1024)
    min_pixels: int | None = Field(None, ge=1)
    max_tokens: Annotated[int | None, parameter_field("max_tokens")] = None
    seed: Annotated[int | None, parameter_field("seed")] = None
    chat_template_kwargs: JsonObject | None = Field(None, description="Variables of the model's chat template.")
    cache_salt: CacheSalt = None
    priority: Priority = None


class LocateRequest(TaskFields):
    """`POST /v1/locate`: where on a picture something is."""

    model_config = STRICT | ConfigDict(json_schema_extra={"examples": [{"image": PIXEL, "targets": ["the brand"]}]})

    image: str = Field(description="An http(s) or data: URL, of a picture or a PDF page.")
    targets: str | list[str] = Field(description="What to locate: one text, or up to 100, in one request.")
    points: bool = Field(False, description="A point on each instead of a box around it.")
    overlay: OverlayForm | None = Field(None, description="The picture with everything drawn on it, as a data: URL.")


class AnalyzeRequest(TaskFields):
    """`POST /v1/analyze`: one product, shown on one or several pictures."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        json_schema_extra={"examples": [{"image": PIXEL, "language": "en"}]},
    )

    image: str | None = Field(None, description="An http(s) or data: URL, of a picture or a PDF.")
    images: Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = Field(
        None, min_length=1, description="Several pictures of the same product."
    )
    language: str | None = Field(None, description="en, zh, pt or es.")
    evidence: bool = Field(False, description="Also the box where each field is seen, or null.")
    overlay: OverlayForm | None = Field(None, description="The first picture with these boxes drawn, as a data: URL.")
    schema_: JsonObject | None = Field(
        None, alias="schema", description="A JSON schema of type object; left out: brand, category, attributes."
    )
    abstain: Annotated[float, Field(ge=0, le=1)] | dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, description="The least calibrated confidence at which a field is told, of all or by name."
    )
    temperature: Annotated[float | None, parameter_field("temperature")] = None
