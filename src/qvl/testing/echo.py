"""A transparent test model: it names the pictures of a request and repeats the question.

Everything a test wants to see honoured is honoured: stop, max_tokens, n, seed, logprobs, schemas, choices, tools. The
answer of a picture is its mean colour and size, so that a test sees whether the *pixels* arrived, and in which order.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qvl.types import FinishReason, JsonMapping, TokenLogprob

if TYPE_CHECKING:
    from PIL import Image

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
}
WITHOUT_MAX: Final = 512


def colour_name(image: Image.Image) -> str:
    """Return the name in COLOURS that is nearest to the mean of an RGB image."""
    mean = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert isinstance(mean, tuple)
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], mean, strict=True)))


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """The properties of a picture in a request."""

    colour: str
    width: int
    height: int

    @property
    def tokens(self) -> int:
        return -(-self.width // 32) * -(-self.height // 32) + 2


@dataclass(frozen=True, slots=True)
class EchoRequest:
    """The fields of a request that the echo model uses."""

    question: str
    history: str = ""
    pictures: tuple[PictureFacts, ...] = ()
    temperature: float = 0.0
    narrow: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1
    schema: JsonMapping | None = None
    json_object: bool = False
    choices: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    tool_schemas: Mapping[str, JsonMapping] = field(default_factory=dict)
    tool_choice: str = "auto"

    @property
    def prompt_tokens(self) -> int:
        return len(self.history.split()) + len(self.question.split()) + self.image_tokens + 4

    @property
    def image_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)


@dataclass(frozen=True, slots=True)
class EchoChoice:
    """One choice of an answer: its tokens in order, or a tool call as (name, arguments)."""

    tokens: tuple[str, ...]
    finish: FinishReason
    call: tuple[str, str] | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) if self.call is None else len(self.call[1].split()) + 1


def answer(request: EchoRequest) -> list[EchoChoice]:
    """Return the choices of an answer. Equal requests get equal answers, unless they sample without a seed."""
    called = _called(request)
    if called is not None:
        arguments = json.dumps(example(request.tool_schemas.get(called, {})))
        return [EchoChoice((), "tool_calls", (called, arguments)) for _ in range(request.n)]
    return [_choice(request, index) for index in range(request.n)]


def _called(request: EchoRequest) -> str | None:
    if not request.tools or request.tool_choice == "none":
        return None
    if request.tool_choice in request.tools:
        return request.tool_choice
    named = [name for name in request.tools if name in request.question]
    return named[0] if named else request.tools[0] if request.tool_choice == "required" else None


def _choice(request: EchoRequest, index: int) -> EchoChoice:
    text = _text(request, index)
    finish: FinishReason = "stop"
    cuts = [position for stop in request.stop if (position := text.find(stop)) >= 0]
    if cuts:
        text = text[: min(cuts)]
    tokens = re.findall(r"\s*\S{1,6}|\s+$", text)
    limit = WITHOUT_MAX if request.max_tokens is None else request.max_tokens
    if request.ignore_eos and tokens and not cuts:
        tokens = (tokens * (limit // len(tokens) + 1))[:limit]
        finish = "length"
    if len(tokens) > limit:
        tokens, finish = tokens[:limit], "length"
    return EchoChoice(tuple(tokens), finish)


def _text(request: EchoRequest, index: int) -> str:
    if request.choices:
        return request.choices[0]
    if request.schema is not None:
        return json.dumps(example(request.schema))
    if request.json_object:
        return json.dumps({"question": request.question})
    words = [f"{picture.colour} {picture.width}x{picture.height}" for picture in request.pictures]
    words.append(request.question)
    if index:
        words.insert(0, f"({index})")
    text = ", ".join(words) or "nothing"
    if request.temperature > 0 and not request.narrow:
        shuffled = text.split()
        random.Random(None if request.seed is None else f"{request.seed}/{index}").shuffle(shuffled)
        text = " ".join(shuffled)
    return text


def example(schema: JsonMapping, root: JsonMapping | None = None) -> object:
    """Return a small value that matches a JSON schema (references, enums, objects, arrays, unions)."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target[step]
        return example(target, root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            return example(schema[union][0], root)
    kind = schema.get("type")
    kind = next(iter(kind), None) if isinstance(kind, list) else kind
    if kind == "object" or (kind is None and "properties" in schema):
        properties: JsonMapping = schema.get("properties", {})
        return {name: example(properties.get(name, {}), root) for name in schema.get("required", properties)}
    if kind == "array":
        return [example(schema.get("items", {}), root) for _ in range(int(schema.get("minItems", 0)))]
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1 if "exclusiveMinimum" in schema else 0)
    return {"boolean": True, "null": None}.get(str(kind), "x" * max(1, int(schema.get("minLength", 1))))


def logprobs_of(tokens: Sequence[str], alternatives: int) -> list[TokenLogprob]:
    """Return the log-probabilities at each position: of the chosen token, with its `alternatives` in `top`."""
    notes = []
    for position, token in enumerate(tokens, 1):
        logprob = -0.01 * position
        names = [token, *(f"~{rank}" for rank in range(1, alternatives))][:alternatives]
        top = tuple(TokenLogprob(name, logprob - rank, name.encode()) for rank, name in enumerate(names))
        notes.append(TokenLogprob(token, logprob, token.encode(), top))
    return notes
