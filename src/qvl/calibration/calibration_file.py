"""`Calibration`: the file that `qvl calibrate` writes, and the check that it is used where it was made."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, Field, ValidationError

from qvl.caches.key import explain
from qvl.calibration.curve import STRICT, Curve
from qvl.decisions.questions import asked_text, question_json
from qvl.errors import ConfigError
from qvl.types import JsonMapping, JsonObject, canonical_json

if TYPE_CHECKING:
    from qvl.decisions.questions import Question

MOST_BYTES: Final = 64 * 1024 * 1024
PLACES: Final = "-places-"
"""What the version of a prompt goes on with where its answer has boxes or points."""
PAGES: Final = "-pages-"
"""And where it has the page of each field, since several pages of a document are shown."""


class FieldCalibration(BaseModel):
    """The curve of one field, question or whole answer, and how many labels it comes from."""

    model_config = STRICT

    curve: Curve
    labels: int = Field(ge=1)
    right: int = Field(ge=0)
    log_loss: dict[str, float] = Field(default_factory=dict, description="Held out, of each method that was tried.")


class QuestionCalibration(FieldCalibration):
    """The calibration of one question of `decide()`; `method` is how its probabilities were read ("": any way)."""

    name: str
    question: JsonObject
    method: str = ""

    def is_of(self, method: str) -> bool:
        """Return whether it holds for probabilities that were read by `method`: others are distributed otherwise."""
        return self.method in ("", method)


class AnalysisCalibration(BaseModel):
    """The calibration of the analyses of one schema in one language; `answer` is of all its labelled fields together.

    A field is named by its path with `*` for each place in a list: `brand`, `attributes.color`, `items.*.price`.
    `evidence` is of the boxes beside the fields, by their fields.
    """

    model_config = STRICT | {"populate_by_name": True}

    prompt_version: str
    language: str
    schema_: JsonObject = Field(alias="schema")
    raw_method: str
    answer: FieldCalibration | None = None
    fields: dict[str, FieldCalibration]
    evidence: dict[str, FieldCalibration] = Field(default_factory=dict)


class LocationsCalibration(BaseModel):
    """The calibration of boxes of `locate()`, by target."""

    model_config = STRICT

    prompt_version: str
    targets: dict[str, FieldCalibration] = Field(min_length=1)


class DecisionsCalibration(BaseModel):
    """The calibration of questions of `decide()`, by `question_key`."""

    model_config = STRICT

    prompt_version: str
    questions: dict[str, QuestionCalibration] = Field(min_length=1)


class Calibration(BaseModel):
    """The share of one model's answers that are right, by its own confidence: of analyses, decisions, or located boxes.

    `backend` names everything about the model that changes its answers: backend, model, revision, dtype and others.
    """

    model_config = STRICT

    format: Literal["qvl-calibration"] = "qvl-calibration"
    version: Literal[1] = 1
    made_by: str = ""
    backend: JsonObject
    analysis: AnalysisCalibration | None = None
    decisions: DecisionsCalibration | None = None
    locations: LocationsCalibration | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Return the calibration in the file `path`.

        Raises:
            ConfigError: the file cannot be read, or is not such a file.
        """
        file = Path(os.path.expanduser(path))
        hint = "name a file that `qvl calibrate` wrote"
        try:
            with file.open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except OSError as exc:
            what = f"calibration {file} cannot be read: {exc.strerror}"
            raise ConfigError(what, hint=hint, param="calibration") from exc
        if len(data) > MOST_BYTES:
            raise ConfigError(f"{file} is not a calibration: more than {MOST_BYTES >> 20} MiB", hint=hint)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as exc:
            what = f"{file} is not a calibration: invalid JSON: {str(exc)[:100]}"
            raise ConfigError(what, hint=hint, param="calibration") from exc
        if not isinstance(found, dict) or found.get("format") != "qvl-calibration":
            raise ConfigError(f"{file} is not a calibration", hint=hint, param="calibration")
        if found.get("version") != 1:
            what = f"{file} is a calibration of version {str(found.get('version'))[:20]}, and this qvl reads version 1"
            raise ConfigError(what, hint="make it again with `qvl calibrate`", param="calibration")
        try:
            return cls.model_validate(found)
        except ValidationError as exc:
            first = exc.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            what = f"{file} is not a valid calibration: {where}: {first['msg']}"
            raise ConfigError(what, hint=hint, param="calibration") from exc

    def to_text(self) -> str:
        """Return the file's text: indented JSON."""
        return json.dumps(self.model_dump(by_alias=True), ensure_ascii=False, indent=1) + "\n"

    @property
    def names(self) -> list[str]:
        """The fields, the boxes beside them (`evidence.brand`), the names of questions, and the located targets."""
        made = self.analysis
        fields = [] if made is None else [*made.fields, *map(evidence_name, made.evidence)]
        questions = [] if self.decisions is None else [entry.name for entry in self.decisions.questions.values()]
        return [*fields, *questions, *(() if self.locations is None else self.locations.targets)]

    def check_backend(self, identity: JsonMapping) -> None:
        """Check that it was made with the backend of `identity`.

        Raises:
            ConfigError: it was made with another; the first fact that differs is named.
        """
        # Through JSON, as the file has it.
        differences = explain(self.backend, json.loads(canonical_json(identity)))
        if differences:
            # What a person knows by name comes first.
            known = ("backend", "model", "revision", "dtype")
            path, made, here = min(differences, key=lambda item: known.index(item[0]) if item[0] in known else 9)
            raise _made_for(path, made, here)

    def check_analysis(self, prompt_version: str, language: str, schema: JsonMapping | None) -> AnalysisCalibration:
        """Return the calibration of analyses, made with this prompt, language and schema (None: known to be its own).

        Raises:
            ConfigError: it was made with others, or not of analyses; the difference is named.
        """
        made = self.analysis
        if made is None:
            what = "the calibration is not of analyses"
            raise ConfigError(what, hint="calibrate with labels of the fields", param="calibration")
        if schema is not None and canonical_json(made.schema_) != canonical_json(schema):
            titles = [one.get("title", "one without a title") for one in (made.schema_, schema)]
            if titles[0] != titles[1]:
                raise _made_for("schema", *titles)
            path, there, here = explain(made.schema_, schema)[0]
            raise _made_for(f"schema.{path}", there, here)
        (plain, places), (asked, asked_places) = (
            version.partition(PLACES)[::2] for version in (made.prompt_version, prompt_version)
        )
        if plain == asked and places and not asked_places:
            what = "the calibration is of analyses with evidence, and this one is without"
            raise ConfigError(what, hint="evidence=True, --evidence, or calibrate without", param="calibration")
        if prompt_version.partition(PAGES)[0] == made.prompt_version != prompt_version:
            what = "the calibration is of single pictures, and this is a document of several pages"
            raise ConfigError(what, hint="name one page, or calibrate with such", param="calibration")
        for name, there, here in (
            ("prompt version", made.prompt_version, prompt_version),
            ("language", made.language, language),
        ):
            if there != here:
                raise _made_for(name, there, here)
        return made

    def question(self, question: Question, prompt_version: str) -> QuestionCalibration | None:
        """Return the calibration of `question`; None if it was not calibrated.

        Raises:
            ConfigError: it was made with another prompt version.
        """
        if self.decisions is None:
            return None
        if self.decisions.prompt_version != prompt_version:
            raise _made_for("prompt version of decisions", self.decisions.prompt_version, prompt_version)
        return self.decisions.questions.get(question_key(question))

    def target(self, target: str, prompt_version: str) -> FieldCalibration | None:
        """Return the calibration of the boxes of a target of `locate()`; None if it was not calibrated.

        Raises:
            ConfigError: it was made with another prompt version, or other coordinates.
        """
        if self.locations is None:
            return None
        if self.locations.prompt_version != prompt_version:
            raise _made_for("prompt version of locate", self.locations.prompt_version, prompt_version)
        return self.locations.targets.get(target)


def question_key(question: Question) -> str:
    """Return the key of a question: it is the same for questions with equal instructions and the same options."""
    return hashlib.sha256(canonical_json(asked_json(question)).encode()).hexdigest()[:32]


def asked_json(question: Question) -> JsonObject:
    """Return what is asked and what can be answered, as JSON."""
    return {"instructions": asked_text(question.instructions).strip(), **question_json(question)}


def evidence_name(field: str) -> str:
    """Return the name under which the box beside a field is calibrated."""
    return f"evidence.{field}"


def field_name(path: str) -> str:
    """Return the name of the field at `path` (`items.0.price`): places in lists become `*`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def prefixes(path: str) -> Iterator[str]:
    """Yield `path` and what it lies in, the longest first: `where.x1`, `where`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def product(shares: Mapping[str, float]) -> float:
    """Return the product of the values."""
    return math.prod(shares.values())


def _made_for(what: str, made: object, here: object) -> ConfigError:
    def told(value: object) -> str:
        text = (
            "none"
            if value is None
            else value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, default=str)
        )
        return text if len(text) <= 100 else f"{text[:99]}…"

    return ConfigError(
        f"the calibration is of another {what}: made with {told(made)}, used with {told(here)}",
        hint="make one for this with `qvl calibrate`",
        param="calibration",
    )
