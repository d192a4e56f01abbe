"""The report of a comparison, as JSON, as JUnit's XML, and as the exit code of a gate."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal
from xml.etree import ElementTree

from qvl.evaluation.agreement import Counted, cases_to_meet, mean_interval
from qvl.parity.budgets import Verdict, ends_told
from qvl.parity.causes import Cause
from qvl.parity.differences import LAYERS, Difference, Layer
from qvl.parity.observation import Observation, SelfCheck
from qvl.types import finite_json

if TYPE_CHECKING:
    from qvl.evaluation.measures import Interval
    from qvl.media.picture import Picture
    from qvl.parity.tally import ParityTally, Reason
    from qvl.types import JsonMapping, JsonObject

WITHIN: Final = 0
BEYOND: Final = 1
UNDECIDED: Final = 2
CHANGE: Final = 0.01
# More text of an answer than this is no longer read side by side.
_SHOWN: Final = 2000
_REASONS: Final = 5
_REASON_SHOWN: Final = 300


@dataclass(frozen=True, slots=True)
class WorstCase:
    """A case that parts, with what both sides showed of it."""

    difference: Difference
    a: Observation
    b: Observation
    facts: JsonMapping = field(default_factory=dict)
    pictures: Sequence[Picture] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The comparison of A and B.

    Attributes:
        a, b: backend and model of each; `identities` what else each tells of itself.
        cases: how many were compared; `failed`: (both sides, one side alone) without an answer, for these `reasons`.
        layer: the first at which any case parts, None if none does; `layers` counts the cases that part first there,
            `shown` those of which both sides show a layer.
        ties: of the cases that part, those in which only a near tie fell the other way.
        agreement: by measure ("text", "token", "fields", "field.NAME", "decisions", "decision.NAME", "answered").
        kl: mean divergence of the first token in nats, its 95 % interval, and of how many cases; None if not told.
        causes: what was recognised, the most certain first.
        verdicts: on the budgets.
        seconds, tokens: the medians of a request's seconds and of an answer's tokens, of A and of B.
        retryable: failed answers that may yet come, since an endpoint was away; the same run asks only those again.
    """

    a: str
    b: str
    identities: tuple[JsonMapping, JsonMapping]
    cases: int
    failed: tuple[int, int]
    layer: Layer | None
    layers: Mapping[Layer, int]
    shown: Mapping[Layer, int]
    ties: int
    agreement: Mapping[str, Counted]
    kl: tuple[float, Interval, int] | None
    deviation: float | None
    tolerance: float
    causes: Sequence[Cause] = ()
    verdicts: Sequence[Verdict] = ()
    self_check: SelfCheck | None = None
    worst: Sequence[WorstCase] = ()
    distances: Mapping[str, float] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)
    tokens: tuple[float, float] = (0.0, 0.0)
    reasons: Sequence[Reason] = ()
    retryable: int = 0

    @property
    def standing(self) -> Literal["within", "beyond", "undecided", "told"]:
        """The verdict on all budgets together; "told" where there is none."""
        found = {verdict.standing for verdict in self.verdicts}
        if not found:
            return "told"
        return "beyond" if "beyond" in found else "undecided" if "undecided" in found else "within"

    @property
    def exit_code(self) -> int:
        """0 within the budgets, 1 beyond one, 2 undecided; without budgets 1 if the answers are `unanswered`."""
        if self.standing == "told":
            return BEYOND if self.unanswered else WITHIN
        return {"within": WITHIN, "beyond": BEYOND, "undecided": UNDECIDED}[self.standing]

    @property
    def unanswered(self) -> bool:
        """True if a case has an answer of one side alone, or no case has any."""
        return self.failed[1] > 0 or self.failed[0] == self.cases

    def to_json(self) -> JsonObject:
        """Return the report as JSON values."""
        told: JsonObject = {
            "format": "qvl-parity-report",
            "version": 1,
            "standing": self.standing,
            "a": self._side(0),
            "b": self._side(1),
            "cases": self.cases,
            "failed": {"both": self.failed[0], "one": self.failed[1]},
            "reasons": [dataclasses.asdict(reason) for reason in self.reasons],
            "retryable": self.retryable,
            "first_layer": self.layer,
            "layers": [
                {"layer": name, "compared": self.shown[name], "part_first_here": self.layers.get(name, 0)}
                for name in LAYERS
                if name in self.shown
            ],
            "near_ties": self.ties,
            "agreement": {name: dataclasses.asdict(counted) for name, counted in self.agreement.items()},
            "kl": None if self.kl is None else {"mean": self.kl[0], "interval": self.kl[1], "cases": self.kl[2]},
            "largest_deviation": self.deviation,
            "tolerance": self.tolerance,
            "decision_distance": dict(self.distances),
            "cases_to_meet_1_percent": cases_to_meet(CHANGE),
            "self_check": None if self.self_check is None else dataclasses.asdict(self.self_check),
            "causes": [dataclasses.asdict(cause) for cause in self.causes],
            "budgets": [dataclasses.asdict(verdict) for verdict in self.verdicts],
            "worst": [
                {
                    **dataclasses.asdict(one.difference),
                    "near_tie": one.difference.near_tie,
                    "asked": dict(one.facts),
                    "answers": {"a": _answer(one.a, one.difference), "b": _answer(one.b, one.difference)},
                }
                for one in self.worst
            ],
        }
        return {name: finite_json(value) for name, value in told.items()}

    def _side(self, place: int) -> JsonObject:
        return {
            "model": (self.a, self.b)[place],
            "identity": self.identities[place],
            "median_seconds": self.seconds[place],
            "median_completion_tokens": self.tokens[place],
        }

    def failures(self) -> list[str]:
        """Return how many cases failed, and why, the most frequent reasons first."""
        if not any(self.failed):
            return []
        both, one = self.failed
        told = [f"failed: {both + one} of {self.cases} cases, {both} on both sides, {one} on one side alone"]
        for reason in self.reasons[:_REASONS]:
            count = f"{reason.count} case{'s' * (reason.count > 1)}"
            told.append(f"  {reason.side}, {count}: {reason.error[:_REASON_SHOWN]}")
        if len(self.reasons) > _REASONS:
            told.append(f"  and {len(self.reasons) - _REASONS} other reasons")
        return told

    def lines(self) -> list[str]:
        """Return what the report says in words: where and why the sides part, and the verdict on each budget."""
        told = self.failures()
        if self.layer is None:
            told.append("no difference found at any layer that both sides show")
        else:
            count = self.layers[self.layer]
            told.append(f"first layer that parts: {self.layer}, in {count} of {self.shown[self.layer]} cases")
        if self.ties:
            told.append(f"near ties: {self.ties} of the {sum(self.layers.values())} cases that part")
        if self.kl is not None:
            told.append(f"KL of the first token: {self.kl[0]:.3g} nats, {ends_told(self.kl[1])}")
        if self.self_check is not None:
            checked = self.self_check
            text = f"A against itself: {checked.same} of {checked.cases} the same, {checked.deviation:.3g} nats apart"
            told.append(f"{text}; up to {self.tolerance:.3g} nats count as the same")
        told.append(
            f"medians: A {self.seconds[0]:.3g} s and {self.tokens[0]:g} tokens an answer, "
            f"B {self.seconds[1]:.3g} s and {self.tokens[1]:g}"
        )
        if self.cases < cases_to_meet(CHANGE):
            told.append(f"a difference in 1 % of all cases is met with 95 % only in {cases_to_meet(CHANGE)} cases")
        for one in self.causes:
            sure = "" if one.certain else " (likely)"
            told += [f"cause{sure}: {one.title} [{one.layer}]", f"  seen: {one.evidence}", f"  remedy: {one.remedy}"]
        for verdict in self.verdicts:
            why = f": {verdict.why}" if verdict.why else ""
            told.append(f"budget {verdict.name}={verdict.budget:g}: {verdict.standing}, {verdict.told()}{why}")
        return told

    def to_html(self) -> str:
        """Return the report as a page, with the pictures of its worst cases."""
        from qvl.html.parity import parity_html

        return parity_html(self.to_json(), {one.difference.case: one.pictures for one in self.worst})

    def to_junit(self) -> str:
        """Return the report as JUnit's XML: a test for each budget, or, without any, for each layer.

        Tests fail if, and only if, the exit code is not 0: where no budget judges, layers that part are skipped.
        """
        suite = ElementTree.Element("testsuite", name=f"qvl parity {printable(self.a)} {printable(self.b)}")
        counts = Counter(tests=0, failures=0, skipped=0)

        def add(name: str, outcome: str | None, message: str = "", text: str = "") -> None:
            counts["tests"] += 1
            test = ElementTree.SubElement(suite, "testcase", classname="qvl.parity", name=printable(name))
            if outcome is not None:
                counts["failures" if outcome == "failure" else outcome] += 1
                ElementTree.SubElement(test, outcome, message=printable(message)).text = printable(text)

        for verdict in self.verdicts:
            told = f"{verdict.told()}, budget {verdict.budget:g}"
            why = f": {verdict.why}" if verdict.why else ""
            # CI must not read what is undecided as passed.
            undecided = "undecided: " * (verdict.standing == "undecided")
            add(verdict.name, None if verdict.standing == "within" else "failure", f"{undecided}{told}{why}")
        for name in LAYERS if not self.verdicts else ():
            if name == "answered" and self.unanswered:
                failures = self.failures()
                add(name, "failure", failures[0], "\n".join(failures[1:]))
            elif name in self.shown:
                parting = self.layers.get(name, 0)
                text = f"{parting} of {self.shown[name]} cases part here; no budget says how many may"
                why = "\n".join(f"{cause.title}: {cause.remedy}" for cause in self.causes if cause.layer == name)
                add(name, "skipped" if parting else None, text, why)
        for key, value in counts.items():
            suite.set(key, str(value))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def printable(text: str) -> str:
    """Return the text with only what XML may hold."""
    return "".join(char if char in "\t\n" or (char >= " " and char.isprintable()) else "?" for char in text)


def _answer(one: Observation, difference: Difference) -> JsonObject:
    return {
        "text": one.text[:_SHOWN],
        "parts_at": _parts_at(one, difference),
        "error": one.error,
        "fields": one.fields,
        "choices": one.choices,
        "decisions": one.decisions,
        "first_token": dict(one.steps[0].top) if one.steps else {},
        "sizes": one.sizes,
        "picture_tokens": one.picture_tokens,
        "prompt_tokens": one.prompt_tokens,
        "finish_reason": one.finish_reason,
    }


def _parts_at(one: Observation, difference: Difference) -> tuple[int, int] | None:
    """Return where in the text the first other token begins and ends; None where its tokens do not make up the text."""
    parting = difference.parting
    tokens = [step.token for step in one.steps]
    if parting is None or not one.text.startswith("".join(tokens[: parting.index + 1])):
        return None
    begin = len("".join(tokens[: parting.index]))
    return begin, begin + len("".join(tokens[parting.index : parting.index + 1]))


def kl_of(tally: ParityTally) -> tuple[float, Interval, int] | None:
    """Return the mean divergence of the first token with its interval; None where no case tells it."""
    values = tally.divergences
    return (statistics.fmean(values), mean_interval(values), len(values)) if values else None


def medians(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the median of each side's values; 0 where there is none."""
    a, b = (statistics.median(own) if own else 0.0 for own in values)
    return a, b
