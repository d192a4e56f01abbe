"""What one side shows of one case, layer by layer, as far as its backend tells it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qvl.types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One token of an answer: its name, its log-probability, and the likeliest tokens at its place, the best first."""

    token: str
    logprob: float
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """The layers of one case on one side. None, or empty, is what its backend does not tell.

    Attributes:
        case: its id.
        error: why there is no answer; the layers before are told even so, where they were reached.
        retryable: whether the same question may be answered later: the endpoint was away, or too slow.
        sizes: (width, height) of each canonical picture in pixels.
        pixels: the sha256 of each canonical picture's pixels as RGB.
        picture_tokens: how many tokens of the prompt each picture takes.
        prompt_tokens: of the whole prompt.
        prompt_ids: the prompt's token ids.
        template: the prompt as text, the run of a picture's placeholders written once.
        steps: the tokens of the answer.
        fields: the analysis by path of each value; `sure` is the raw confidence of those that have one.
        decisions: by question: the probability of each possible answer, as text.
        choices: by question: the answer.
        seconds, first_token: of the whole request, and to its first token.
    """

    case: str
    error: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    pixels: tuple[str, ...] = ()
    picture_tokens: tuple[int, ...] | None = None
    prompt_tokens: int = 0
    prompt_ids: tuple[int, ...] | None = None
    template: str | None = None
    steps: tuple[TokenStep, ...] = ()
    text: str = ""
    finish_reason: str = ""
    fields: JsonMapping | None = None
    sure: Mapping[str, float] = field(default_factory=dict)
    decisions: Mapping[str, Mapping[str, float]] | None = None
    choices: JsonMapping | None = None
    completion_tokens: int = 0
    seconds: float = 0.0
    first_token: float = 0.0
    retryable: bool = False

    def to_json(self) -> JsonObject:
        """Return the observation as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, data: JsonMapping) -> Observation:
        """Return the observation that `to_json` gave.

        Raises:
            ValueError: it is not the JSON of an observation.
        """
        return _reader().validate_python(data)


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """A asked twice: how many cases, in how many the answers are the same, and how far log-probabilities lie apart.

    `ties` are the cases in which only a near tie fell the other way; `deviation` is in nats.
    """

    cases: int
    same: int
    ties: int
    deviation: float

    @classmethod
    def read(cls, data: JsonMapping) -> SelfCheck:
        """Return the self-check of its fields.

        Raises:
            ValueError: they are none of one.
        """
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(data)


@functools.cache
def _reader() -> TypeAdapter[Observation]:
    from pydantic import TypeAdapter

    return TypeAdapter(Observation)
