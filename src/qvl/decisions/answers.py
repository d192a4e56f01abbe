"""The answers to questions with a fixed set of answers: how probable each is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

from qvl.analysis.confidence import CALIBRATED
from qvl.decisions.questions import asked_text
from qvl.types import CacheState, JsonObject, Usage

if TYPE_CHECKING:
    from qvl.decisions.questions import Question, Value
    from qvl.media.picture import Picture


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one question.

    Attributes:
        question: what was asked.
        probabilities: of every value in the caller's order: True and False of a Predicate, the values of a Choice, the
            labels of a Score; they add up to 1. None if the backend tells no probabilities.
        value: the likeliest of them; None if the question was refused.
        confidence: the probability of `value`; None if the backend tells none. With a calibration, how often such
            answers are right.
        label_mass: how much probability what begins one of the possible answers had, before it was made to add up to
            1; a model that would rather say something else has little. None if that is unknown.
        method: "logits" (of every token that can begin an answer), "top_logprobs" (of the likeliest tokens that a
            backend lists), "decisions" (what an endpoint's own `/v1/decisions` says), or "choice" (the answer alone).
        notes: what was done otherwise than asked.
        refused: True if the model declined to answer, or would say none of the possible answers; `notes` say which.
        raw_confidence: the probability of the likeliest value, in any case.
        confidence_method: "label_probability" or "calibrated".
        abstained: why the answer is not told, so that `value` is None: "below_threshold", or "not_calibrated" where
            it came without a probability, or by another method than those that were calibrated.
    """

    question: Question
    probabilities: Mapping[Value, float] | None
    value: Value | None
    confidence: float | None
    label_mass: float | None
    method: str
    cache: CacheState = "bypass"
    usage: Usage = field(default_factory=Usage)
    notes: tuple[str, ...] = ()
    refused: bool = False
    raw_confidence: float | None = None
    confidence_method: str | None = None
    abstained: str | None = None

    @property
    def name(self) -> str | None:
        return self.question.name

    @property
    def type(self) -> str:
        return self.question.type

    @property
    def probability(self) -> float | None:
        """Of a Predicate, the probability that it is true; else that of `value`."""
        if self.type == "predicate" and self.probabilities is not None:
            return self.probabilities[True]
        return self.confidence

    @property
    def score(self) -> float | None:
        """Of a Score, the mean level, 0 being the lowest; None for other questions."""
        if self.type != "score" or self.probabilities is None:
            return None
        return sum(level * share for level, share in enumerate(self.probabilities.values()))

    def to_json(self) -> JsonObject:
        """Return the answer as JSON values."""
        shares = None
        if self.probabilities is not None:
            shares = [{"value": value, "probability": share} for value, share in self.probabilities.items()]
        return {
            "name": self.name,
            "type": self.type,
            "instructions": self.asked,
            "value": self.value,
            **({"score": self.score} if self.type == "score" else {}),
            **self.sureness(),
            "probabilities": shares,
            "label_mass": self.label_mass,
            "method": self.method,
            "cache": self.cache,
            **({"refused": True} if self.refused else {}),
            "notes": list(self.notes),
        }

    @property
    def calibrated(self) -> bool:
        """True if `confidence` says how often such answers are right."""
        return self.confidence_method == CALIBRATED

    def sureness(self) -> JsonObject:
        """Return the confidence as JSON; the raw one and an abstention only where there is a calibration."""
        told: JsonObject = {"confidence": self.confidence}
        if self.calibrated:
            told |= {"raw_confidence": self.raw_confidence, "confidence_method": self.confidence_method}
        return told | ({} if self.abstained is None else {"abstained": self.abstained})

    @property
    def asked(self) -> str:
        """The text of the instructions, with "[picture]" for each picture."""
        return asked_text(self.question.instructions)


@dataclass(frozen=True, slots=True)
class Decisions:
    """The answers to questions about the same pictures, in the order of the questions; also by name: `d["colour"]`."""

    answers: tuple[Decision, ...]
    model: str = ""
    backend: str = ""
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)

    @property
    def usage(self) -> Usage:
        """The tokens of all questions; what was asked earlier and kept counts as when it was asked."""
        return Usage.sum(answer.usage for answer in self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.answers)

    @overload
    def __getitem__(self, key: int) -> Decision: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Decision, ...]: ...
    @overload
    def __getitem__(self, key: str) -> Decision: ...
    def __getitem__(self, key: int | slice | str) -> Decision | tuple[Decision, ...]:
        if isinstance(key, int | slice):
            return self.answers[key]
        for answer in self.answers:
            if answer.name == key:
                return answer
        raise KeyError(key)

    def to_json(self) -> JsonObject:
        """Return the answers as JSON values."""
        usage = self.usage
        return {
            "model": self.model,
            "backend": self.backend,
            "answers": [answer.to_json() for answer in self.answers],
            "usage": {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens},
        }

    def _repr_html_(self) -> str:
        from qvl.html.decisions import decisions_html

        return decisions_html(self.pictures, [answer.to_json() for answer in self.answers])
