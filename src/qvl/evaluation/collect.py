"""Asks about labelled pictures and compares: what was answered, how sure the model was, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, cast

from qvl import analysis
from qvl.analysis.confidence import CALIBRATED
from qvl.analysis.parse_answer import own_fields
from qvl.analysis.product import ProductAnalysis, ProductFields
from qvl.analysis.schema_types import schema_type
from qvl.calibration.abstain import has_field
from qvl.calibration.calibration_file import field_name
from qvl.errors import ConfigError, QvlError
from qvl.evaluation.compare import Compared, Rule, compare, label_parts
from qvl.pipeline.map_in_order import map_in_order
from qvl.suggest import nearest

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.analysis.product import AnalysisResult
    from qvl.decisions.answers import Decisions
    from qvl.decisions.questions import Question
    from qvl.evaluation.labelled import Labelled
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.parse_request import AnalyzeParams
    from qvl.types import JsonMapping, JsonObject, Result

_BOX: Final = "answer."
# Parameters of a request that decisions have too: they do not sample.
OF_DECISIONS: Final = ("cache", "max_pixels", "min_pixels", "extra")
ANSWER: Final = "(whole answer)"
"""The name under which all labelled fields of an answer together are measured."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer to one field or question: its confidence, raw and calibrated, and whether it is right."""

    line: int
    raw: float
    right: bool
    sure: float | None = None


@dataclass(slots=True)
class Collected:
    """The samples that were asked, by field and by question, and what could not be compared."""

    fields: dict[str, list[Judged]] = field(default_factory=dict)
    questions: dict[str, list[Judged]] = field(default_factory=dict)
    answers: list[Judged] = field(default_factory=list)
    unanswered: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    asked: int = 0

    def groups(self) -> dict[str, list[Judged]]:
        """Return all samples by name, the whole answer first."""
        return {**({ANSWER: self.answers} if self.answers else {}), **self.fields, **self.questions}


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """The answers to one line: its analysis, its decisions, or both."""

    analysis: AnalysisResult[object] | None
    decisions: Decisions | None


class Collector:
    """Asks about `lines`.

    Args:
        schema: of the analyses, None for ProductAnalysis; `language` is theirs.
        questions: those that `expected` may name.
        rules: how fields are compared, where not by their labels' kind.
        only: the fields to compare; empty for all of the schema, of which each must be labelled then.
        request: parameters of every request.

    Raises:
        ConfigError: a label that is neither a field's nor a question's, or a field without any label.
    """

    def __init__(
        self,
        pipeline: AsyncPipeline,
        lines: Sequence[Labelled],
        *,
        schema: SchemaLike | None = None,
        language: str | None = None,
        questions: Sequence[Question] = (),
        rules: Mapping[str, Rule] | None = None,
        only: Sequence[str] = (),
        request: JsonMapping | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._lines = lines
        self._schema = schema
        self.type = schema_type(ProductAnalysis if schema is None else schema)
        self.language = language or pipeline.language
        self.questions = {question.name or str(question.instructions): question for question in questions}
        self._rules = {self._inner(name): rule for name, rule in (rules or {}).items()}
        self._only = tuple(only)
        self._request = dict(request or {})
        self._generated = analysis.generation_schema(self.type.model)
        self.prompt_version = ""
        self._check()

    @property
    def asks_analyses(self) -> bool:
        """True if a line has labels beside those of questions."""
        return any(self._fields_of(line) for line in self._lines)

    def _fields_of(self, line: Labelled) -> JsonObject:
        return {name: label for name, label in line.expected.items() if name not in self.questions}

    def _check(self) -> None:
        known = self._generated.get("properties", {}) if not self.type.boxed else {}
        labelled: set[str] = set()
        for line in self._lines:
            fields = self._fields_of(line)
            labelled |= fields.keys()
            for path, _ in label_parts(fields, self._rules):
                if not has_field(self._generated, field_name(path)):
                    what = f"{line.where}: {path!r} is no field of {self._generated.get('title', 'the schema')}"
                    hint = nearest(path, [*known, *self.questions]) if known else "see --schema and -q"
                    raise ConfigError(what, hint=hint)
            for name, question in self.questions.items():
                if name in line.expected and line.expected[name] not in [label.value for label in question.labels]:
                    what = f"{line.where}: {line.expected[name]!r} is no answer to {name!r}"
                    values = ", ".join(str(label.value) for label in question.labels[:12])
                    raise ConfigError(what, hint=f"one of {values}")
        for name in self.questions:
            if not any(name in line.expected for line in self._lines):
                raise ConfigError(f"no line labels the question {name!r}", hint="put its right value into `expected`")
        for name in self._rules:
            if not has_field(self._generated, name):
                what = f"--compare: the schema has no field {self._outer(name)!r}"
                raise ConfigError(what, hint=nearest(name, known) if known else "see --schema")
        for name in self._only:
            if not any(_within(path, self._only) for line in self._lines for path in self._paths(line)):
                raise ConfigError(f"no line labels the field {name!r}", hint="put its right value into `expected`")
        for name in known if labelled and not self._only else ():
            if name not in labelled:
                others = " ".join(f"--field {one}" for one in sorted(labelled))
                hint = f"label it, or calibrate the others alone: {others}"
                raise ConfigError(f"no line labels the field {name!r}", hint=hint)

    def _paths(self, line: Labelled) -> list[str]:
        return [self._outer(path) for path, _ in label_parts(self._fields_of(line), self._rules)]

    def _inner(self, name: str) -> str:
        """Return the name of a field as in the model's answer, where a list or scalar is in the field `answer`."""
        return f"{_BOX}{name}" if self.type.boxed and name != "answer" else name

    def _outer(self, path: str) -> str:
        return path.removeprefix(_BOX) if self.type.boxed else path

    async def collect(self, advance: Callable[[], None] = lambda: None) -> Collected:
        """Return the samples; `advance` is called for each line that is done.

        Raises:
            ConfigError: what would fail for every line.
        """
        found = Collected()

        async def one(line: Labelled) -> tuple[AnsweredLine, Result | None]:
            try:
                return await self._ask(line), None
            finally:
                advance()

        async with aclosing(map_in_order(self._lines, one, self._pipeline.concurrency, False)) as items:
            async for item in items:
                line = self._lines[item.index]
                if isinstance(item.error, ConfigError):
                    raise item.error
                if isinstance(item.error, QvlError) or item.value is None:
                    found.failed[line.where] = str(item.error)
                    continue
                found.asked += 1
                self._add(found, item.index, line, item.value)
        return found

    async def _ask(self, line: Labelled) -> AnsweredLine:
        answer = decisions = None
        if self._fields_of(line):
            params = cast("AnalyzeParams", {**self._request, "language": self.language})
            call = self._pipeline.analyze_call(list(line.pictures), self._schema, params)
            answer = await self._pipeline.executor.execute(call)
            # Known once the call has been made: it names the form in which evidence is asked for.
            self.prompt_version = call.prompt_version
        asked = [question for name, question in self.questions.items() if name in line.expected]
        if asked:
            limits = {name: self._request[name] for name in OF_DECISIONS if name in self._request}
            decisions = await self._pipeline.decide(list(line.pictures), asked, **limits)
        return AnsweredLine(answer, decisions)

    def _add(self, found: Collected, index: int, line: Labelled, answered: AnsweredLine) -> None:
        if answered.analysis is not None:
            self._add_fields(found, index, line, answered.analysis)
        for decision in answered.decisions or ():
            name = decision.name or str(decision.question.instructions)
            if decision.raw_confidence is None:
                raise _no_confidence()
            right = decision.value == line.expected[name]
            sure = decision.confidence if decision.confidence_method == CALIBRATED else None
            found.questions.setdefault(name, []).append(Judged(index, decision.raw_confidence, right, sure))

    def _told(self, told: JsonObject, value: object) -> JsonObject:
        """Return what a model told: of a ProductAnalysis, without what qvl adds."""
        return {name: told[name] for name in ProductFields.model_fields} if isinstance(value, ProductAnalysis) else told

    def _add_fields(self, found: Collected, index: int, line: Labelled, answer: AnalysisResult[object]) -> None:
        if answer.raw_confidence is None:
            raise _no_confidence()
        told = self._told(own_fields(answer.value), answer.value)
        parts = [
            replace(part, path=self._outer(part.path)) for part in compare(self._fields_of(line), told, self._rules)
        ]
        parts = [part for part in parts if _within(part.path, self._only)]
        for part in parts:
            name = field_name(part.path)
            raw = _raw_of(answer.raw_field_confidence, part)
            if raw is None or not part.answered:
                if not part.right:
                    found.unanswered[name] = found.unanswered.get(name, 0) + 1
                continue
            sure = answer.field_confidence.get(part.path) if answer.confidence_method == CALIBRATED else None
            found.fields.setdefault(name, []).append(Judged(index, raw, part.right, sure))
        if parts:
            sure = answer.confidence if answer.confidence_method == CALIBRATED else None
            right = all(part.right for part in parts)
            found.answers.append(Judged(index, answer.raw_confidence, right, sure))


def _raw_of(raw: Mapping[str, float], part: Compared) -> float | None:
    """Return the raw confidence of a part: of its value, or of all values in it together."""
    inner = [share for path, share in raw.items() if path == part.path or path.startswith(f"{part.path}.")]
    whole = 1.0
    for share in inner:
        whole *= share
    return whole if inner else None


def _within(path: str, only: Sequence[str]) -> bool:
    name = field_name(path)
    return not only or any(name == wanted or name.startswith(f"{wanted}.") for wanted in only)


def _no_confidence() -> ConfigError:
    return ConfigError(
        "this backend tells no probabilities, so there is nothing to calibrate",
        hint="a local model, vLLM, or an endpoint with logprobs",
    )
