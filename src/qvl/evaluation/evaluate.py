"""Accuracy of a model on labelled pictures: by field and overall, and against another model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from qvl.analysis.parse_answer import own_fields
from qvl.calibration.calibration_file import field_name
from qvl.evaluation.collect import ANSWER, Collected, Collector
from qvl.evaluation.compare import compare, label_parts, overlap, plain_text, value_at
from qvl.evaluation.measures import Interval, ece, wilson_of_lines
from qvl.types import Usage, finite_json

if TYPE_CHECKING:
    from qvl.evaluation.collect import AnsweredLine
    from qvl.evaluation.labelled import Labelled
    from qvl.types import JsonObject

SHOWN_WRONG: Final = 60
# A field with more different labels than this is no classification.
MOST_CLASSES: Final = 12
# Of two texts; a similarity takes the product of their lengths.
MOST_CHARACTERS: Final = 2000


@dataclass(frozen=True, slots=True)
class WrongPart:
    """One wrong value: the line, its pictures, the path of the value, its label, and what was answered."""

    line: str
    pictures: tuple[str, ...]
    path: str
    label: object
    value: object


@dataclass(frozen=True, slots=True)
class ListScore:
    """The items of lists, without regard to order: how many are right, of those told and of those labelled."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class FieldScore:
    """One field, question or the whole answer.

    Attributes:
        right, labels: how many values are right, of so many, which come from `lines`; `interval` is where their share
            lies with 95 % (Wilson; values of one line, such as items of a list, are not independent).
        unanswered: labels for which the answer had no value; they count as wrong.
        similarity: of texts: mean of 1 less the edit distance over the longer length; `iou`: mean overlap of boxes.
            What was not answered counts as 0.
        items: of lists of scalars, of which `right` counts those that are right as a whole.
        calibration_error: of the confidences (ECE); None where a side tells none.
        confusion: how often each (label, answer) came; empty for what is no classification.
    """

    name: str
    right: int
    labels: int
    accuracy: float
    interval: Interval
    lines: int = 0
    unanswered: int = 0
    similarity: float | None = None
    iou: float | None = None
    items: ListScore | None = None
    calibration_error: float | None = None
    confusion: Sequence[tuple[str, str, int]] = ()


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The accuracy of a model: by field, the whole answer first, and what it took.

    For comparisons, `right` tells of each labelled value, by (line, field and path), whether it is right, and `scores`
    how near it is, by (line, field, measure): the line's mean "similarity" of texts, "IoU" of boxes, "F1" of lists.
    """

    model: str
    lines: int
    failed: Mapping[str, str]
    fields: Sequence[FieldScore]
    usage: Usage
    seconds: float
    wrong: Sequence[WrongPart]
    right: Mapping[tuple[str, str], bool] = field(repr=False, default_factory=dict)
    scores: Mapping[tuple[str, str, str], float] = field(repr=False, default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the report as JSON values."""
        told = dataclasses.asdict(dataclasses.replace(self, right={}, scores={}))
        del told["right"], told["scores"]
        return {name: finite_json(value) for name, value in told.items()}


@dataclass(slots=True)
class _Sums:
    right: dict[str, list[bool]] = field(default_factory=dict)
    sure: list[float] = field(default_factory=list)
    sure_right: list[bool] = field(default_factory=list)
    unanswered: int = 0
    similarities: list[float] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    items: list[tuple[int, int, int]] = field(default_factory=list)
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)

    def score(self, name: str) -> FieldScore:
        lines = [(sum(values), len(values)) for values in self.right.values()]
        right, labels = sum(hits for hits, _ in lines), sum(count for _, count in lines)
        classes = {label for label, _ in self.confusion}
        few = 1 < len(classes) <= MOST_CLASSES and labels >= 2 * len(classes)
        sure = np.asarray(self.sure), np.asarray(self.sure_right, dtype=np.float64)
        return FieldScore(
            name, right, labels, right / labels if labels else math.nan, wilson_of_lines(lines), len(lines),
            self.unanswered,
            similarity=float(np.mean(self.similarities)) if self.similarities else None,
            iou=float(np.mean(self.overlaps)) if self.overlaps else None,
            items=_list_score(self.items) if self.items else None,
            calibration_error=ece(*sure) if self.sure else None,
            confusion=[(*pair, count) for pair, count in sorted(self.confusion.items())] if few else (),
        )  # fmt: skip


class Evaluator(Collector):
    """Asks about labelled pictures as Collector does, and measures how often the answers are right."""

    _sums: dict[str, _Sums]

    async def evaluate(self, model: str, advance: Callable[[], None] = lambda: None) -> EvalReport:
        """Return the report; `advance` is called for each line that is done.

        Raises:
            ConfigError: what would fail for every line.
        """
        self._sums = {}
        self._right: dict[tuple[str, str], bool] = {}
        self._scores: dict[tuple[str, str, str], list[float]] = {}
        self._wrong: list[WrongPart] = []
        self._usages: list[Usage] = []
        self._seconds = 0.0
        found = await self.collect(advance)
        for line in self._lines:
            if line.where in found.failed:
                # An answer that did not come is no right one.
                self._failed(line)
        order = sorted(self._sums, key=lambda name: name != ANSWER)
        return EvalReport(
            model=model,
            lines=len(self._lines),
            failed=found.failed,
            fields=[self._sums[name].score(name) for name in order],
            usage=Usage.sum(self._usages) if self._usages else Usage(),
            seconds=self._seconds,
            wrong=self._wrong[:SHOWN_WRONG],
            right=self._right,
            scores={key: float(np.mean(values)) for key, values in self._scores.items()},
        )

    def _of(self, name: str) -> _Sums:
        return self._sums.setdefault(name, _Sums())

    def _failed(self, line: Labelled) -> None:
        label = self._fields_of(line)
        for path, wanted in label_parts(label, self._rules):
            name = field_name(self.type.outer(path))
            self._count(line, name, self.type.outer(path), right=False)
            self._of(name).unanswered += 1
            self._measure(line, name, wanted, None, right=False)
        for path, items, _ in _lists(label, None):
            self._items(line, self.type.outer(path), items, None, right=False)
        for name in self.questions:
            if name in line.expected:
                self._count(line, name, name, right=False)
                self._of(name).unanswered += 1
                self._measure(line, name, line.expected[name], None, right=False)
        self._count(line, ANSWER, "", right=False)

    def _count(self, line: Labelled, name: str, path: str, *, right: bool) -> None:
        self._of(name).right.setdefault(line.id, []).append(right)
        self._right[line.id, path or name] = right

    def _add(self, found: Collected, index: int, line: Labelled, answered: AnsweredLine) -> None:
        every: list[bool] = []
        if answered.analysis is not None:
            told = self._told(own_fields(answered.analysis.value), answered.analysis.value)
            self._usages.append(answered.analysis.result.usage)
            self._seconds += answered.analysis.result.timing.total
            label = self._fields_of(line)
            parts = list(compare(label, told, self._rules))
            for part in parts:
                there, wanted = value_at(label, part.path)
                _, value = value_at(told, part.path)
                path = self.type.outer(part.path)
                name = field_name(path)
                every.append(part.right)
                self._count(line, name, path, right=part.right)
                if there:
                    self._measure(line, name, wanted, value, right=part.right)
                if not part.answered and not part.right:
                    self._of(name).unanswered += 1
                sure = answered.analysis.raw_field_confidence.get(path)
                if sure is not None:
                    self._of(name).sure.append(sure)
                    self._of(name).sure_right.append(part.right)
                self._note(line, path, wanted, value, right=part.right)
            for path, items, value in _lists(label, told):
                whole = all(part.right for part in parts if f"{part.path}.".startswith(f"{path}."))
                self._items(line, self.type.outer(path), items, value, right=whole)
        for decision in answered.decisions or ():
            name = decision.name or str(decision.question.instructions)
            right = decision.value == line.expected[name]
            every.append(right)
            self._usages.append(decision.usage)
            self._count(line, name, name, right=right)
            self._measure(line, name, line.expected[name], decision.value, right=right)
            if decision.raw_confidence is not None:
                self._of(name).sure.append(decision.raw_confidence)
                self._of(name).sure_right.append(right)
            self._note(line, name, line.expected[name], decision.value, right=right)
        if every:
            self._count(line, ANSWER, "", right=all(every))

    def _items(self, line: Labelled, path: str, items: list[object], value: object, *, right: bool) -> None:
        name, found = field_name(path), _matched(items, value)
        self._of(name).items.append(found)
        self._scores.setdefault((line.id, name, "F1"), []).append(_list_score([found]).f1)
        if (line.id, path) not in self._right:
            self._count(line, name, path, right=right)

    def _measure(self, line: Labelled, name: str, label: object, value: object, *, right: bool) -> None:
        sums = self._of(name)
        if isinstance(label, str):
            sums.similarities.append(1.0 if right else similarity(label, "" if value is None else str(value)))
            self._scores.setdefault((line.id, name, "similarity"), []).append(sums.similarities[-1])
        if overlap(label, label) is not None:
            sums.overlaps.append(overlap(label, value) or 0.0)
            self._scores.setdefault((line.id, name, "IoU"), []).append(sums.overlaps[-1])
        if label is None or isinstance(label, str | bool):
            wanted = plain_text(label) if label is not None else "null"
            told = plain_text(value) if value is not None else "null"
            sums.confusion[wanted, wanted if right else told] += 1

    def _note(self, line: Labelled, path: str, label: object, value: object, *, right: bool) -> None:
        if not right and len(self._wrong) < SHOWN_WRONG:
            self._wrong.append(WrongPart(line.id, line.pictures, path, label, value))


def _lists(label: object, told: object, path: str = "") -> Iterator[tuple[str, list[object], object]]:
    """Yield (path, items, answer) of each list of scalars in a label."""
    if isinstance(label, list):
        if not any(isinstance(item, Mapping | list) for item in label):
            yield path, label, told
    elif isinstance(label, Mapping):
        for name, inner in label.items():
            there = told.get(name) if isinstance(told, Mapping) else None
            yield from _lists(inner, there, f"{path}.{name}" if path else str(name))


def _matched(label: list[object], value: object) -> tuple[int, int, int]:
    """Return how many items are (in both, told, labelled)."""
    told = Counter(map(plain_text, value)) if isinstance(value, list) else Counter[str]()
    wanted = Counter(map(plain_text, label))
    return (told & wanted).total(), told.total(), wanted.total()


def _list_score(items: Sequence[tuple[int, int, int]]) -> ListScore:
    both, told, labelled = (sum(column) for column in zip(*items, strict=True))
    precision = both / told if told else float(not labelled)
    recall = both / labelled if labelled else float(not told)
    whole = precision + recall
    return ListScore(precision, recall, 2 * precision * recall / whole if whole else 0.0)


def similarity(one: str, other: str) -> float:
    """Return 1 less the edit distance (Levenshtein's) of two texts over the longer length; case and spaces aside.

    Longer texts than MOST_CHARACTERS are compared up to there.
    """
    a, b = plain_text(one)[:MOST_CHARACTERS], plain_text(other)[:MOST_CHARACTERS]
    if not a or not b:
        return float(a == b)
    row = list(range(len(b) + 1))
    for number, char in enumerate(a, start=1):
        before, row[0] = row[0], number
        for place, match in enumerate(b, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (char != match))
    return 1.0 - row[-1] / max(len(a), len(b))
