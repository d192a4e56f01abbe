"""`Calibrator`: a calibration and thresholds in use with one backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from qvl.analysis.confidence import CALIBRATED
from qvl.analysis.parse_answer import generation_schema
from qvl.calibration.abstain import (
    AbstainLike,
    Emptied,
    Thresholds,
    how_emptied,
    leaf_names,
    read_abstain,
    reason_for,
    without,
)
from qvl.calibration.calibration_file import (
    AnalysisCalibration,
    Calibration,
    FieldCalibration,
    QuestionCalibration,
    evidence_name,
    field_name,
    prefixes,
    product,
)
from qvl.decisions.questions import asked_text
from qvl.errors import ConfigError
from qvl.evidence.answer_form import shapes_in
from qvl.types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from pydantic import BaseModel

    from qvl.analysis.schema_types import SchemaType
    from qvl.decisions.answers import Decision
    from qvl.decisions.questions import Question
    from qvl.evidence.shapes import Located


@dataclass(frozen=True, slots=True)
class Sureness:
    """The confidence of an analysis, of the whole and of each field: calibrated, and the model's own beside.

    `abstained` has the reason for each field that is not told. Without a calibration the confidences are the raw ones.
    """

    confidence: float | None = None
    field_confidence: dict[str, float] = field(default_factory=dict)
    confidence_method: str | None = None
    raw_confidence: float | None = None
    raw_field_confidence: dict[str, float] = field(default_factory=dict)
    abstained: dict[str, str] = field(default_factory=dict)


class Calibrator:
    """Applies `calibration` to answers of the backend whose `identity` is asked for (None as long as it is unknown).

    `abstain` holds where a call names none.

    Raises:
        ConfigError: `abstain` names a field or question that the calibration does not have.
    """

    def __init__(
        self, calibration: Calibration, abstain: AbstainLike | None, identity: Callable[[], JsonObject | None]
    ) -> None:
        self.calibration = calibration
        self.abstain = read_abstain(abstain, calibration.names)
        self.identity = identity
        # Of classes that are the calibration's: to make and compare a schema takes longer than a hit of the cache.
        self.schemas: WeakKeyDictionary[type[BaseModel], JsonObject] = WeakKeyDictionary()
        self._checked = False

    def check(self) -> None:
        """Check that the backend is that of the calibration, as soon as it is known.

        Raises:
            ConfigError: it is another; the difference is named.
        """
        if not self._checked and (identity := self.identity()) is not None:
            self.calibration.check_backend(identity)
            self._checked = True

    def covers(self, prompt_version: str, language: str, schema: JsonMapping) -> bool:
        """Return whether analyses of this prompt, language and schema are calibrated."""
        try:
            self.calibration.check_analysis(prompt_version, language, schema)
        except ConfigError:
            return False
        return True

    def thresholds(self, abstain: AbstainLike | None) -> Thresholds | None:
        """Return the thresholds of a call that says `abstain`.

        Raises:
            ConfigError: it is not a confidence, or names what the calibration does not have.
        """
        return self.abstain if abstain is None else read_abstain(abstain, self.calibration.names)

    def check_question(self, question: Question, prompt_version: str, abstain: AbstainLike | None) -> None:
        """Check that `question` can be answered as a call with `abstain` wants it.

        Raises:
            ConfigError: another backend or prompt, or a question without a calibration that would have to abstain.
        """
        self.check()
        made = self.calibration.question(question, prompt_version)
        if made is None and self._least(question, made, abstain) is not None:
            what = f"no calibration of the question {_name_of(question)[:80]!r}, so it cannot abstain"
            hint = "calibrate it with `qvl calibrate`, or name others in abstain"
            raise ConfigError(what, hint=hint, param="abstain")

    def decided(self, decision: Decision, prompt_version: str, abstain: AbstainLike | None) -> Decision:
        """Return `decision` with its calibrated confidence, if there is a calibration; too unsure, it has no value."""
        self.check_question(decision.question, prompt_version, abstain)
        made = self.calibration.question(decision.question, prompt_version)
        if made is None or decision.refused:
            return decision
        raw, sure = decision.confidence, None
        if raw is not None and made.is_of(decision.method):
            sure = made.curve.apply(raw)
            decision = replace(decision, confidence=sure, confidence_method=CALIBRATED)
        least = self._least(decision.question, made, abstain)
        reason = None if least is None else reason_for(sure, least)
        return decision if reason is None else replace(decision, value=None, abstained=reason)

    def _least(self, question: Question, made: QuestionCalibration | None, abstain: AbstainLike | None) -> float | None:
        # What all of a pipeline's answers must reach is said of the kinds of answers that the calibration is of.
        thresholds = None if abstain is None and self.calibration.decisions is None else self.thresholds(abstain)
        return None if thresholds is None else thresholds.of(_name_of(question) if made is None else made.name)

    def check_targets(self, targets: Iterable[str], prompt_version: str) -> None:
        """Check that boxes of `targets` can be told as the pipeline's `abstain` wants it.

        Raises:
            ConfigError: another backend, prompt or coordinates, or a target without a calibration that would have to
                abstain.
        """
        self.check()
        for target in targets:
            made = self.calibration.target(target, prompt_version)
            if self.calibration.locations is not None and made is None and self._least_of(target) is not None:
                what = f"no calibration of the boxes of {target[:80]!r}, so they cannot be left out where unsure"
                hint = "calibrate them with `qvl calibrate --locate`, or name others in abstain"
                raise ConfigError(what, hint=hint, param="abstain")

    def located(self, item: Located, prompt_version: str) -> tuple[Located, str | None]:
        """Return (`item` with its calibrated confidence, if there is a calibration; why it is not told, or None)."""
        made = self.calibration.target(item.label, prompt_version) if item.box is not None else None
        if made is None:
            return item, None
        item, least = sure_of(item, made), self._least_of(item.label)
        return item, None if least is None else reason_for(item.confidence, least)

    def _least_of(self, target: str) -> float | None:
        return None if self.abstain is None else self.abstain.of(target)


def sure_of(item: Located, made: FieldCalibration) -> Located:
    """Return a box with its calibrated confidence, its own beside; `item` itself if it has none."""
    raw = item.confidence
    if raw is None:
        return item
    return replace(item, confidence=made.curve.apply(raw), raw_confidence=raw, confidence_method=CALIBRATED)


def _name_of(question: Question) -> str:
    return question.name or asked_text(question.instructions)


def check_adapter(adapter: str, calibrator: Calibrator | None) -> None:
    """Check that a call which names an `adapter` wants no calibration, which is the model's own.

    Raises:
        ConfigError: it does.
    """
    if adapter and calibrator is not None:
        what = f"the calibration is of the model, not of its adapter {adapter!r}"
        hint = f"calibrate with the option adapter=PATH of {adapter!r}, and serve it so"
        raise ConfigError(what, hint=hint, param="adapter")


def check_abstain(abstain: AbstainLike | None, calibration: object | None) -> None:
    """Check that a call may say `abstain`.

    Raises:
        ConfigError: it does, without a calibration.
    """
    if abstain is not None and calibration is None:
        raise ConfigError(
            "abstain needs a calibration: a raw confidence is the likelihood of a text, not of being right",
            hint="Pipeline(calibration=FILE), --calibration FILE; `qvl calibrate` makes one",
            param="abstain",
        )


def open_calibrator(
    calibration: str | os.PathLike[str] | Calibration | None,
    abstain: AbstainLike | None,
    identity: Callable[[], JsonObject | None],
) -> Calibrator | None:
    """Return the Calibrator of a pipeline's arguments, checked as far as its backend is known; None without one.

    Raises:
        ConfigError: the file cannot be read, is of another backend, or `abstain` cannot be used.
    """
    check_abstain(abstain, calibration)
    if calibration is None:
        return None
    made = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    calibrator = Calibrator(made, abstain, identity)
    calibrator.check()
    return calibrator


class AnalysisJudge:
    """Judges the analyses of one call: of a schema, in a language, with thresholds.

    Args:
        schema: of the analyses.

    Raises:
        ConfigError: the calibration is of another schema, language or prompt, or a field that may have to be without
            a value takes none.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        *,
        prompt_version: str,
        language: str,
        schema: SchemaType,
        abstain: AbstainLike | None,
    ) -> None:
        self.calibrator = calibrator
        known = calibrator.schemas.get(schema.model)
        generated = generation_schema(schema.model) if known is None else known
        self._made: AnalysisCalibration = calibrator.calibration.check_analysis(
            prompt_version, language, generated if known is None else None
        )
        calibrator.schemas[schema.model] = self._generated = generated
        self._schema = schema
        self._thresholds = calibrator.thresholds(abstain)
        if self._thresholds is not None:
            for name in self._made.fields:
                if self._thresholds.of(name) is not None:
                    self._emptied(name)
            for name in map(schema.outer, () if self._thresholds.every is None else leaf_names(self._generated)):
                if not any(above in self._made.fields for above in prefixes(name)):
                    self._emptied(name)

    def judge(self, sure: Sureness, data: JsonMapping) -> tuple[Sureness, JsonObject]:
        """Return the calibrated Sureness of the answer `data`, and the answer without what is too unsure.

        `sure` has the raw confidences, its paths as the user sees them.

        Raises:
            ConfigError: the backend is another than the calibration's.
        """
        self.calibrator.check()
        fields = self._calibrated(sure.raw_field_confidence)
        whole, made = sure.raw_confidence, self._made.answer
        abstained: dict[str, str] = {}
        emptied: dict[str, Emptied] = {}
        for path in self._units(data):
            reason = self._thresholds and self._thresholds.reason(field_name(path), fields.get(path))
            if reason:
                abstained[path] = reason
                emptied[self._schema.inner(path)] = self._emptied(field_name(path))
        told = Sureness(
            confidence=None if made is None or whole is None else made.curve.apply(whole),
            field_confidence=fields,
            confidence_method=None if whole is None else CALIBRATED,
            raw_confidence=whole,
            raw_field_confidence=sure.raw_field_confidence,
            abstained=abstained,
        )
        return told, without(data, emptied) if emptied else dict(data)

    def judge_evidence(
        self, evidence: Mapping[str, Located | None]
    ) -> tuple[dict[str, Located | None], dict[str, str]]:
        """Return (the boxes beside the fields with calibrated confidences, None where too unsure; why, by name)."""
        told: dict[str, Located | None] = dict(evidence)
        abstained: dict[str, str] = {}
        for field_of, item in evidence.items():
            if item is None or not self._made.evidence:
                continue
            made, name = self._made.evidence.get(field_of), evidence_name(field_of)
            sure = item if made is None else sure_of(item, made)
            calibrated = sure.confidence if sure.confidence_method == CALIBRATED else None
            reason = self._thresholds and self._thresholds.reason(name, calibrated)
            told[field_of] = None if reason else sure
            if reason:
                abstained[name] = reason
        return told, abstained

    def _calibrated(self, raw: Mapping[str, float]) -> dict[str, float]:
        groups: dict[str, dict[str, float]] = {}
        for path, share in raw.items():
            if (unit := self._unit(path)) is not None:
                groups.setdefault(unit, {})[path] = share
        curves: Mapping[str, FieldCalibration] = self._made.fields
        return {unit: curves[field_name(unit)].curve.apply(product(group)) for unit, group in groups.items()}

    def _unit(self, path: str) -> str | None:
        """Return what has a calibration: `path`, or what it lies in; None if there is none."""
        return next((unit for unit in prefixes(path) if field_name(unit) in self._made.fields), None)

    def _units(self, data: JsonMapping) -> list[str]:
        """Return every part of an answer that is sure or unsure as a whole; a box or point is one."""
        places = {path for path, _ in shapes_in(data, self._generated)}
        whole = [next((place for place in prefixes(path) if place in places), path) for path in leaf_paths(data)]
        return list(dict.fromkeys(self._unit(path) or path for path in map(self._schema.outer, whole)))

    def _emptied(self, name: str) -> Emptied:
        how = how_emptied(self._generated, self._schema.inner(name))
        if how is None:
            raise ConfigError(
                f"abstain: the field {name!r} of {self._generated.get('title', 'the schema')} cannot be null",
                hint="let it be None too (`str | None`), or name other fields in abstain",
                param="abstain",
            )
        return how


def leaf_paths(data: object, path: str = "") -> Iterator[str]:
    """Yield the path of every scalar in `data`: `items.0.price`."""
    if isinstance(data, Mapping):
        inner = [(str(name), value) for name, value in data.items()]
    elif isinstance(data, list | tuple):
        inner = [(str(place), value) for place, value in enumerate(data)]
    else:
        yield path
        return
    for name, value in inner:
        yield from leaf_paths(value, f"{path}.{name}" if path else name)
