"""Two models on the same labels: which is right where the other is wrong, and whether the loss is allowed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qvl.calibration.calibration_file import field_name, prefixes
from qvl.evaluation.agreement import LEAST_VALUES, Paired, cases_to_tell, mcnemar, paired_bootstrap
from qvl.evaluation.collect import ANSWER

if TYPE_CHECKING:
    from qvl.evaluation.evaluate import EvalReport
    from qvl.evaluation.measures import Interval
    from qvl.types import JsonObject


@dataclass(frozen=True, slots=True)
class PairedScore:
    """A measure of a field that is no mere right or wrong: the means of both over the same lines, and what B gains.

    `measure` is "similarity" of texts, "IoU" of boxes or "F1" of lists; `interval` is where the gain lies with 95 %
    (paired bootstrap over lines), None where so few lines, or gains that are all the same, do not tell.
    """

    field: str
    measure: str
    count: int
    a: float
    b: float
    difference: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Against:
    """A model against another, by field: A is the other, B the model; `difference` is what the model gains.

    `standing` is of the whole answer: "within" if its accuracy has sunk by no more than `allow`, "beyond" if by more,
    "undecided" if so many lines cannot tell; "told" where nothing was allowed. `lines_needed` would tell a change of
    `allow`, or of 1 %, with a power of 80 %.
    """

    other: EvalReport
    fields: Mapping[str, Paired]
    allow: float | None
    standing: Literal["within", "beyond", "undecided", "told"]
    lines_needed: int
    scores: Sequence[PairedScore] = ()

    def to_json(self) -> JsonObject:
        """Return the comparison as JSON values."""
        return {
            "model": self.other.model,
            "report": self.other.to_json(),
            "fields": {name: dataclasses.asdict(paired) for name, paired in self.fields.items()},
            "scores": [dataclasses.asdict(score) for score in self.scores],
            "allow": self.allow,
            "standing": self.standing,
            "lines_needed": self.lines_needed,
        }


def against(model: EvalReport, other: EvalReport, allow: float | None) -> Against:
    """Return the comparison of `model` with `other`, both asked about the same lines."""
    fields = {
        name: mcnemar(*zip(*lines.values(), strict=True))
        for name, lines in sorted(_by_line(other, model).items(), key=lambda item: item[0] != ANSWER)
    }
    whole = fields[ANSWER]
    standing: Literal["within", "beyond", "undecided", "told"] = "told"
    if allow is not None:
        low, high = whole.interval
        standing = "within" if low >= -allow else "beyond" if high < -allow else "undecided"
    parting = (whole.only_a + whole.only_b) / whole.count
    needed = cases_to_tell(allow or 0.01, parting)
    return Against(other, fields, allow, standing, needed, _scores(other, model))


def _scores(other: EvalReport, model: EvalReport) -> list[PairedScore]:
    """Return the comparison of each measure of each field, over the lines that both were asked about."""
    paired: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (line, name, measure), score in other.scores.items():
        if (line, name, measure) in model.scores:
            paired.setdefault((name, measure), []).append((score, model.scores[line, name, measure]))
    found = []
    for (name, measure), scores in sorted(paired.items()):
        a, b = ([*side] for side in zip(*scores, strict=True))
        mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
        # Of gains that are all the same, drawing them again tells nothing of others.
        alike = len({y - x for x, y in scores}) == 1
        interval = None if alike or len(a) < LEAST_VALUES else paired_bootstrap(a, b)
        found.append(PairedScore(name, measure, len(a), mean_a, mean_b, mean_b - mean_a, interval))
    return found


def _by_line(other: EvalReport, model: EvalReport) -> dict[str, dict[str, tuple[bool, bool]]]:
    """Return by field and line whether (`other`, `model`) has all of the field right.

    Items of one list are not independent of each other, and a list may have more of them than its label, so a line
    counts once for a field.
    """
    asked: dict[str, set[str]] = {}
    sides = []
    for report in (other, model):
        questions = {score.name for score in report.fields}
        told, wrong = set[tuple[str, str]](), set[tuple[str, str]]()
        for (line, path), right in report.right.items():
            name = path if path in questions else field_name(path)
            asked.setdefault(name, set()).add(line)
            told.add((line, name))
            if not right:
                wrong.add((line, name))
        within = {(line, above) for line, name in wrong for above in prefixes(name)} - told
        sides.append(wrong | within)
    # A list of objects that is too long is wrong as a whole, and is labelled wherever one of its fields is.
    for name in asked:
        asked[name] |= {line for below, lines in asked.items() if below.startswith(f"{name}.") for line in lines}
    return {
        name: {line: ((line, name) not in sides[0], (line, name) not in sides[1]) for line in sorted(lines)}
        for name, lines in asked.items()
    }
