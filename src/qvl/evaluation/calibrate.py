"""Calibrations out of collected samples, and the report of how far confidences can be believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from qvl import analysis
from qvl._version import __version__
from qvl.calibration.abstain import Thresholds
from qvl.calibration.calibration_file import (
    AnalysisCalibration,
    Calibration,
    DecisionsCalibration,
    FieldCalibration,
    LocationsCalibration,
    QuestionCalibration,
    asked_json,
    evidence_name,
    question_key,
)
from qvl.errors import ConfigError
from qvl.evaluation import measures
from qvl.evaluation.collect import ANSWER, Collected, Collector, Judged
from qvl.evaluation.fit import LEAST_LABELS, Fitted, applied, fit
from qvl.evaluation.measures import Bin, Interval, Kept, Numbers
from qvl.pipeline.decide_call import PROMPT_VERSION
from qvl.types import JsonMapping, JsonObject, canonical_json

if TYPE_CHECKING:
    from qvl.decisions.questions import Question

_POINTS: Final = 200
_SHOWN_SHORT: Final = 8


@dataclass(frozen=True, slots=True)
class Believed:
    """The worth of a confidence: calibration error and Brier score with 95 % intervals (bootstrap), bins."""

    ece: float
    ece_interval: Interval
    brier: float
    brier_interval: Interval
    bins: list[Bin]


@dataclass(frozen=True, slots=True)
class FieldReport:
    """The report of one field, box, question or whole answer.

    Attributes:
        kind: "field", "box", "question" or "answer".
        labels, right: how many were compared, and how many of them were right; `accuracy` with its 95 % interval.
        unanswered: labels for which the answer had no value, or no probability; they are not among `labels`.
        method, log_loss: the chosen curve and the held-out loss of each; None and empty where a calibration is checked.
        raw, calibrated: of the model's own confidence, and of the calibrated one.
        coverage: what is told at falling thresholds.
        at_precision: the lowest threshold that reaches the asked precision; None if none does, or none was asked.
        at_threshold: what is told at the threshold that was asked; None if none was.
    """

    name: str
    kind: str
    labels: int
    right: int
    accuracy: float
    accuracy_interval: Interval
    unanswered: int
    method: str | None
    log_loss: Mapping[str, float]
    raw: Believed
    calibrated: Believed
    coverage: list[Kept]
    at_precision: Kept | None = None
    at_threshold: Kept | None = None


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """All measures of one run; `held_out` says how the calibrated confidences came about."""

    model: str
    files: list[str]
    lines: int
    answered: int
    held_out: str
    precision: float | None
    fields: list[FieldReport]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the report as JSON values."""
        return {"format": "qvl-calibration-report", "version": 1, **dataclasses.asdict(self)}


def too_few(collected: Collected) -> ConfigError | None:
    """Return the error for fields that have too few labels to calibrate; None if all have enough."""
    short = {
        name: LEAST_LABELS - len(samples)
        for name, samples in collected.groups().items()
        if name != ANSWER and len(samples) < LEAST_LABELS
    }
    if not short and collected.groups():
        return None
    told = [f"{name} has {LEAST_LABELS - more}, {more} more are needed" for name, more in short.items()]
    if len(told) > _SHOWN_SHORT:
        told = [*told[:_SHOWN_SHORT], f"and {len(told) - _SHOWN_SHORT} other fields"]
    what = "; ".join(told) or f"no answer could be compared, and {LEAST_LABELS} are needed"
    hint = f"label {LEAST_LABELS} answers of each, or name those to calibrate with --field"
    return ConfigError(f"too few labels: {what}", hint=hint)


def calibrate(
    collector: Collector, collected: Collected, identity: JsonMapping
) -> tuple[Calibration, dict[str, Fitted]]:
    """Return the calibration of what was collected from the backend of `identity`, and the fit of each field.

    Raises:
        ConfigError: too few labels.
    """
    if error := too_few(collected):
        raise error
    fits = {name: fit(*_arrays(samples)) for name, samples in collected.groups().items()}

    def entry(name: str, samples: Sequence[Judged]) -> JsonObject:
        right = sum(sample.right for sample in samples)
        return {"curve": fits[name].curve, "labels": len(samples), "right": right, "log_loss": fits[name].log_loss}

    analysed = decided = located = None
    if collected.fields or collected.evidence:
        analysed = AnalysisCalibration(
            prompt_version=collector.prompt_version,
            language=collector.language,
            schema=analysis.generation_schema(collector.type.model),
            raw_method=analysis.CONFIDENCE_METHOD,
            answer=FieldCalibration(**entry(ANSWER, collected.answers)) if collected.answers else None,
            fields={name: FieldCalibration(**entry(name, samples)) for name, samples in collected.fields.items()},
            evidence={
                name: FieldCalibration(**entry(evidence_name(name), samples))
                for name, samples in collected.evidence.items()
            },
        )
    if collected.targets:
        targets = {name: FieldCalibration(**entry(name, samples)) for name, samples in collected.targets.items()}
        located = LocationsCalibration(prompt_version=collector.locate_version, targets=targets)
    if collected.questions:
        made: dict[str, QuestionCalibration] = {}
        for name, samples in collected.questions.items():
            question: Question = collector.questions[name]
            made[question_key(question)] = QuestionCalibration(
                **entry(name, samples), name=name, question=asked_json(question), method=collected.methods[name]
            )
        decided = DecisionsCalibration(prompt_version=PROMPT_VERSION, questions=made)
    # Through JSON, as it will be read again.
    told = Calibration.model_validate_json(canonical_json({"backend": dict(identity)}))
    made_of = {"analysis": analysed, "decisions": decided, "locations": located}
    return told.model_copy(update={"made_by": f"qvl {__version__}", **made_of}), fits


def report(
    collected: Collected,
    *,
    model: str,
    files: Sequence[str],
    lines: int,
    fits: Mapping[str, Fitted] | None = None,
    precision: float | None = None,
    thresholds: Thresholds | None = None,
) -> CalibrationReport:
    """Return the measures: of held-out confidences (`fits`), or of those that a calibration in use gave (None).

    Raises:
        ConfigError: no field has a calibrated confidence.
    """
    found = []
    kinds = {ANSWER: "answer", **dict.fromkeys(collected.questions, "question")}
    kinds |= dict.fromkeys([*map(evidence_name, collected.evidence), *collected.targets], "box")
    for name, samples in collected.groups().items():
        kind = kinds.get(name, "field")
        raw, right, groups = _arrays(samples)
        if fits is not None:
            sure = fits[name].held_out
            # A threshold is used with the curve of all labels. The order of answers is the raw one's, which nothing was
            # fitted to, so these labels can tell what it leaves.
            told = applied(fits[name].curve, raw)
        elif all(sample.sure is not None for sample in samples):
            told = sure = np.array([sample.sure for sample in samples], dtype=np.float64)
        else:
            continue
        hits = int(right.sum())
        least = None if thresholds is None or kind == "answer" else thresholds.of(name)
        found.append(
            FieldReport(
                name=name,
                kind=kind,
                labels=len(samples),
                right=hits,
                accuracy=hits / len(samples),
                accuracy_interval=measures.wilson(hits, len(samples)),
                unanswered=collected.unanswered.get(name, 0),
                method=None if fits is None else fits[name].curve.method,
                log_loss={} if fits is None else fits[name].log_loss,
                raw=_believed(raw, right, groups),
                calibrated=_believed(sure, right, groups),
                coverage=_thinned(measures.coverage_curve(told, right)),
                at_precision=None if precision is None else measures.threshold_at(told, right, precision),
                at_threshold=None if least is None else measures.kept_at(told, right, least),
            )
        )
    if not found:
        what = "the calibration has none of the labelled fields and questions"
        raise ConfigError(what, hint="label what it is of, or make one with these labels")
    held_out = "cross-validated" if fits is not None else "the calibration in use"
    return CalibrationReport(
        model, list(files), lines, collected.asked, held_out, precision, found, dict(collected.failed)
    )


def _arrays(samples: Sequence[Judged]) -> tuple[Numbers, Numbers, list[int]]:
    raw = np.array([sample.raw for sample in samples], dtype=np.float64)
    right = np.array([sample.right for sample in samples], dtype=np.float64)
    return raw, right, [sample.line for sample in samples]


def _believed(sure: Numbers, right: Numbers, groups: Sequence[int]) -> Believed:
    return Believed(
        measures.ece(sure, right),
        measures.bootstrap(measures.ece, sure, right, groups),
        measures.brier(sure, right),
        measures.bootstrap(measures.brier, sure, right, groups),
        measures.reliability(sure, right),
    )


def _thinned(curve: list[Kept]) -> list[Kept]:
    if len(curve) <= _POINTS:
        return curve
    places = np.unique(np.linspace(0, len(curve) - 1, _POINTS).round().astype(int))
    return [curve[place] for place in places]
