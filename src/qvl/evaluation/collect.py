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
from qvl.calibration.calibration_file import evidence_name, field_name, product
from qvl.errors import ConfigError, QvlError
from qvl.evaluation.compare import LEAST_IOU, Compared, Rule, compare, corners, label_parts, right_boxes
from qvl.evidence.answer_form import EVIDENCE, evidence_fields, has_shapes
from qvl.evidence.locate import read_targets
from qvl.pipeline.locate_call import LocateCall
from qvl.pipeline.map_in_order import map_in_order
from qvl.suggest import nearest

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.analysis.product import AnalysisResult
    from qvl.caches.policy import CacheMode
    from qvl.decisions.answers import Decisions
    from qvl.decisions.questions import Question
    from qvl.evaluation.labelled import Labelled
    from qvl.evidence.located import Locations
    from qvl.evidence.shapes import Located
    from qvl.media.picture import Picture
    from qvl.pipeline.async_pipeline import AsyncPipeline
    from qvl.pipeline.locate_call import LocateParams
    from qvl.pipeline.parse_request import AnalyzeParams
    from qvl.types import JsonMapping, JsonObject, Result

BOX_FORM: Final = '{"x1": 10, "y1": 20, "x2": 110, "y2": 90}'
# Parameters of a request that decisions have too: they do not sample.
OF_DECISIONS: Final = ("cache", "max_pixels", "min_pixels", "extra")
MANY: Final = 16
"""So many lines without a single probability are no accident."""
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
    """The samples that were asked, by field, by question and by located target, and what could not be compared.

    `evidence` is of the boxes beside fields, by the name of the field; `methods` are those of the questions' answers.
    """

    fields: dict[str, list[Judged]] = field(default_factory=dict)
    evidence: dict[str, list[Judged]] = field(default_factory=dict)
    targets: dict[str, list[Judged]] = field(default_factory=dict)
    questions: dict[str, list[Judged]] = field(default_factory=dict)
    answers: list[Judged] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    asked: int = 0

    def groups(self) -> dict[str, list[Judged]]:
        """Return all samples by name, the whole answer first."""
        boxes = {evidence_name(name): samples for name, samples in self.evidence.items()} | self.targets
        return {**({ANSWER: self.answers} if self.answers else {}), **self.fields, **boxes, **self.questions}


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """The answers to one line: its analysis, its decisions, its located boxes, or several of them."""

    analysis: AnalysisResult[object] | None
    decisions: Decisions | None
    located: Mapping[str, Locations]


class Collector:
    """Asks about `lines`.

    Args:
        schema: of the analyses, None for ProductAnalysis; `language` is theirs.
        questions: those that `expected` may name.
        targets: what `expected` may name to be located; its label is a box, a list of them, or null where there is
            none. With `evidence` among `request`, `expected` may have the boxes of fields in `evidence`.
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
        targets: Sequence[str] = (),
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
        self.targets = read_targets(targets) if targets else ()
        self._request = dict(request or {})
        self._generated = analysis.generation_schema(self.type.model)
        self._placed = has_shapes(self._generated)
        self._boxed = evidence_fields(self._generated) if self._request.get(EVIDENCE) else ()
        boxes = {*self.targets, *map(evidence_name, self._boxed)}
        self._of_boxes = {name: rule for name, rule in (rules or {}).items() if name in boxes}
        self._rules = {self.type.inner(name): rule for name, rule in (rules or {}).items() if name not in boxes}
        self._only = tuple(only)
        self.prompt_version = self.locate_version = ""
        self._check()

    @property
    def asks_analyses(self) -> bool:
        """True if a line has labels beside those of questions."""
        return any(self._fields_of(line) for line in self._lines)

    def _fields_of(self, line: Labelled) -> JsonObject:
        others = {*self.questions, *self.targets, *((EVIDENCE,) if self._boxed else ())}
        return {name: label for name, label in line.expected.items() if name not in others}

    def _boxes_of(self, line: Labelled) -> JsonObject:
        """Return the labels of the boxes beside fields, by field."""
        labels = line.expected.get(EVIDENCE) if self._boxed else None
        return labels if isinstance(labels, dict) else {}

    def _check(self) -> None:
        known = self._generated.get("properties", {}) if not self.type.boxed else {}
        labelled: set[str] = set()
        for line in self._lines:
            fields = self._fields_of(line)
            labelled |= fields.keys()
            for path, label in label_parts(fields, self._rules):
                if self._is_place(label):
                    _check_box(line, self.type.outer(path), label)
                if not has_field(self._generated, field_name(path)):
                    what = f"{line.where}: {path!r} is not a field of {self._generated.get('title', 'the schema')}"
                    hint = nearest(path, [*known, *self.questions]) if known else "see --schema and -q"
                    raise ConfigError(what, hint=hint)
            for name, question in self.questions.items():
                if name in line.expected and line.expected[name] not in [label.value for label in question.labels]:
                    what = f"{line.where}: {line.expected[name]!r} is not an answer to {name!r}"
                    values = ", ".join(str(label.value) for label in question.labels[:12])
                    raise ConfigError(what, hint=f"one of {values}")
            self._check_boxes(line)
        for name in self.targets:
            if not any(name in line.expected for line in self._lines):
                raise ConfigError(f"no line labels the target {name!r}", hint="put its box into `expected`")
        for name in self.questions:
            if not any(name in line.expected for line in self._lines):
                raise ConfigError(f"no line labels the question {name!r}", hint="put its right value into `expected`")
        for name in self._rules:
            if not has_field(self._generated, name):
                what = f"--compare: the schema has no field {self.type.outer(name)!r}"
                raise ConfigError(what, hint=nearest(name, known) if known else "see --schema")
        for name in self._only:
            if not any(_within(path, self._only) for line in self._lines for path in self._paths(line)):
                raise ConfigError(f"no line labels the field {name!r}", hint="put its right value into `expected`")
        for name in known if labelled and not self._only else ():
            if name not in labelled:
                others = " ".join(f"--field {one}" for one in sorted(labelled))
                hint = f"label it, or calibrate the others alone: {others}"
                raise ConfigError(f"no line labels the field {name!r}", hint=hint)

    def _check_boxes(self, line: Labelled) -> None:
        labels = line.expected.get(EVIDENCE, {}) if self._boxed else {}
        if not isinstance(labels, dict):
            raise ConfigError(f"{line.where}: `evidence` must be an object", hint=f'{{"{self._boxed[0]}": {BOX_FORM}}}')
        for name in labels:
            if name not in self._boxed:
                raise ConfigError(f"{line.where}: evidence of {name!r}, no field", hint=nearest(name, self._boxed))
        named = {evidence_name(name): [label] for name, label in labels.items() if label is not None}
        for name in (name for name in self.targets if line.expected.get(name) is not None):
            label = line.expected[name]
            named[name] = label if isinstance(label, list) else [label]
        for name, boxes in named.items():
            for box in boxes:
                _check_box(line, name, box)

    def _is_place(self, label: object) -> bool:
        """Return whether the label of a field is a box on the picture."""
        return self._placed and corners(label) is not None

    def _paths(self, line: Labelled) -> list[str]:
        fields = [self.type.outer(path) for path, _ in label_parts(self._fields_of(line), self._rules)]
        return [*fields, *map(evidence_name, self._boxes_of(line))]

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
                self._check_edges(line, item.value)
                self._add(found, item.index, line, item.value)
        return found

    async def _ask(self, line: Labelled) -> AnsweredLine:
        answer = decisions = None
        located: dict[str, Locations] = {}
        if self._fields_of(line) or self._boxes_of(line):
            params = cast("AnalyzeParams", {**self._request, "language": self.language})
            call = self._pipeline.analyze_call(list(line.pictures), self._schema, params)
            answer = await self._pipeline.executor.execute(call)
            # Known once the call has been made: it names the form in which evidence is asked for.
            if self.prompt_version not in ("", call.prompt_version):
                what = f"{line.where}: a document of several pages among single pictures, or the other way round"
                raise ConfigError(what, hint="calibrate each for itself: they are asked by different prompts")
            self.prompt_version = call.prompt_version
        asked = [question for name, question in self.questions.items() if name in line.expected]
        if asked:
            limits = {name: self._request[name] for name in OF_DECISIONS if name in self._request}
            decisions = await self._pipeline.decide(list(line.pictures), asked, **limits)
        targets = [name for name in self.targets if name in line.expected]
        if targets:
            if len(line.pictures) > 1:
                what = f"{line.where}: boxes of {targets[0]!r} on {len(line.pictures)} pictures"
                raise ConfigError(what, hint="a line with one picture")
            located = {target: await self._locate(line.pictures[0], target) for target in targets}
        return AnsweredLine(answer, decisions, located)

    async def _locate(self, picture: str, target: str) -> Locations:
        """Return the boxes of one target, asked for alone: what else is looked for changes an answer."""
        limits = {name: self._request[name] for name in OF_DECISIONS if name in self._request}
        cache = cast("CacheMode | None", limits.pop("cache", None))
        call = LocateCall(picture, target, self._pipeline.executor, cache, cast("LocateParams", limits))
        found = await self._pipeline.executor.execute(call)
        # Known once the call has been made: it names the convention of the coordinates.
        self.locate_version = call.prompt_version
        return found

    def _check_edges(self, line: Labelled, answered: AnsweredLine) -> None:
        """Check that the labelled boxes lie on their pictures, whose sizes are known by now.

        Raises:
            ConfigError: one reaches beyond them.
        """
        if answered.analysis is not None:
            fields = label_parts(self._fields_of(line), self._rules)
            labels = [(self.type.outer(path), label) for path, label in fields if self._is_place(label)]
            labels += [(evidence_name(name), label) for name, label in self._boxes_of(line).items()]
            for name, label in labels:
                _check_edges(line, name, label, answered.analysis.result.pictures)
        for target, boxes in answered.located.items():
            label = line.expected[target]
            for one in label if isinstance(label, list) else [label]:
                _check_edges(line, target, one, boxes.pictures)

    def _add(self, found: Collected, index: int, line: Labelled, answered: AnsweredLine) -> None:
        if answered.analysis is not None:
            self._add_fields(found, index, line, answered.analysis)
            self._add_evidence(found, index, line, answered.analysis)
        for target, boxes in answered.located.items():
            label = line.expected[target]
            labels = label if isinstance(label, list) else [] if label is None else [label]
            self._add_boxes(found, found.targets.setdefault(target, []), target, index, labels, boxes)
        for decision in answered.decisions or ():
            name = decision.name or str(decision.question.instructions)
            if decision.raw_confidence is None:
                self._without(found, name)
                continue
            if (method := found.methods.setdefault(name, decision.method)) != decision.method:
                what = f"{line.where}: {name!r} was answered by {decision.method!r}, before by {method!r}"
                raise ConfigError(what, hint="--cache-mode refresh, once the endpoint answers all one way")
            right = decision.value == line.expected[name]
            sure = decision.confidence if decision.confidence_method == CALIBRATED else None
            found.questions.setdefault(name, []).append(Judged(index, decision.raw_confidence, right, sure))

    def _add_evidence(self, found: Collected, index: int, line: Labelled, answer: AnalysisResult[object]) -> None:
        for name, label in self._boxes_of(line).items():
            told, item = evidence_name(name), answer.evidence.get(name)
            if _within(told, self._only):
                samples = found.evidence.setdefault(name, [])
                labels = [] if label is None else [label]
                self._add_boxes(found, samples, told, index, labels, [] if item is None else [item])

    def _add_boxes(
        self,
        found: Collected,
        samples: list[Judged],
        name: str,
        index: int,
        labels: Sequence[object],
        boxes: Sequence[Located],
    ) -> None:
        rule = self._of_boxes.get(name, Rule("iou", LEAST_IOU))
        boxes = sorted(boxes, key=lambda item: -(item.confidence or 0.0))
        marks = right_boxes(labels, [item.shape.to_json() for item in boxes], rule)
        missed = len(labels) - sum(marks)
        for item, right in zip(boxes, marks, strict=True):
            calibrated = item.confidence_method == CALIBRATED
            raw = item.raw_confidence if calibrated else item.confidence
            if raw is None:
                self._without(found, name)
                continue
            samples.append(Judged(index, raw, right, item.confidence if calibrated else None))
        if missed > 0 and not boxes:
            found.unanswered[name] = found.unanswered.get(name, 0) + missed

    def _without(self, found: Collected, name: str) -> None:
        """Count an answer that came without a probability, such as one that had to be mended to be read, or a refusal.

        Raises:
            ConfigError: it seems that the backend tells none at all.
        """
        backend = self._pipeline.backend
        have = backend.peek_capabilities() or backend.capabilities
        if not have.logprobs or (found.asked >= MANY and not any(found.groups().values())):
            what = "this backend tells no probabilities, so there is nothing to calibrate"
            raise ConfigError(what, hint="a local model, vLLM, or an endpoint with logprobs")
        found.unanswered[name] = found.unanswered.get(name, 0) + 1

    def _told(self, told: JsonObject, value: object) -> JsonObject:
        """Return what a model told: of a ProductAnalysis, without what qvl adds."""
        return {name: told[name] for name in ProductFields.model_fields} if isinstance(value, ProductAnalysis) else told

    def _add_fields(self, found: Collected, index: int, line: Labelled, answer: AnalysisResult[object]) -> None:
        told = self._told(own_fields(answer.value), answer.value)
        parts = [
            replace(part, path=self.type.outer(part.path)) for part in compare(self._fields_of(line), told, self._rules)
        ]
        parts = [part for part in parts if _within(part.path, self._only)]
        for part in parts:
            name = field_name(part.path)
            raw = _raw_of(answer.raw_field_confidence, part)
            if answer.raw_confidence is None:
                self._without(found, name)
                continue
            if raw is None or not part.answered:
                if not part.right:
                    found.unanswered[name] = found.unanswered.get(name, 0) + 1
                continue
            sure = answer.field_confidence.get(part.path) if answer.confidence_method == CALIBRATED else None
            found.fields.setdefault(name, []).append(Judged(index, raw, part.right, sure))
        if parts and answer.raw_confidence is not None:
            sure = answer.confidence if answer.confidence_method == CALIBRATED else None
            right = all(part.right for part in parts)
            found.answers.append(Judged(index, answer.raw_confidence, right, sure))


def _check_box(line: Labelled, name: str, label: object) -> None:
    """Raise ConfigError for a label that is not a box, or one with a corner left of or above the picture."""
    found = corners(label)
    if found is None or min(found) < 0 or found[0] >= found[2] or found[1] >= found[3]:
        what = f"{line.where}: the label {str(label)[:60]} of {name!r} is not a box"
        raise ConfigError(what, hint=f"{BOX_FORM} in pixels of the picture, or null where there is none")


def _check_edges(line: Labelled, name: str, label: object, pictures: Sequence[Picture]) -> None:
    """Raise ConfigError for a labelled box that reaches beyond each of the pictures."""
    edges = corners(label)
    if edges is None or not pictures:
        return
    width, height = (max(picture.original[side] for picture in pictures) for side in (0, 1))
    # A label may be rounded up to a whole pixel.
    if edges[2] >= width + 1 or edges[3] >= height + 1:
        what = f"{line.where}: the label {str(label)[:60]} of {name!r} reaches beyond the picture of {width} x {height}"
        raise ConfigError(what, hint="in pixels of the original, EXIF applied")


def _raw_of(raw: Mapping[str, float], part: Compared) -> float | None:
    """Return the raw confidence of a part: of its value, or of all values in it together."""
    inner = {path: share for path, share in raw.items() if path == part.path or path.startswith(f"{part.path}.")}
    return product(inner) if inner else None


def _within(path: str, only: Sequence[str]) -> bool:
    name = field_name(path)
    return not only or any(name == wanted or name.startswith(f"{wanted}.") for wanted in only)
