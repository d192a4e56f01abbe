"""The default schema of an analysis, and the result of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from pydantic_core import to_jsonable_python

from qvl.analysis.confidence import CALIBRATED
from qvl.analysis.prompts import PROMPT_VERSION
from qvl.evidence.overlay import Overlaid
from qvl.evidence.shapes import Located
from qvl.types import JsonObject, Result

if TYPE_CHECKING:
    from qvl.media.picture import Picture

UNTOLD: Final = "cannot tell"
"""What a person reads where a field is too unsure to be told."""
V_co = TypeVar("V_co", covariant=True)


class _Origin:
    """The Result that an analysis came from; all compare equal, since it is not part of the analysis's value."""

    __slots__ = ("result",)

    def __init__(self, result: Result | None = None) -> None:
        self.result = result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin)

    __hash__ = None  # type: ignore[assignment]


_DESCRIPTION: Final = "What the model itself fills in; `ProductAnalysis` adds where it came from and how sure it is."


class ProductFields(BaseModel):
    """The fields that the model fills in; `ProductAnalysis` adds where they came from and how sure it is."""

    # Not the docstring: this text is in the key of every answer that is kept.
    model_config = ConfigDict(extra="forbid", json_schema_extra={"description": _DESCRIPTION})

    brand: str | None
    category: str | None
    attributes: dict[str, str] = Field(default_factory=dict)


class ProductAnalysis(Overlaid, ProductFields):
    """The default analysis of a product picture.

    `confidence` is of the whole answer, `field_confidence` per field ("brand", "attributes.color"), both from 0 to 1
    and by `confidence_method`; all three are empty or None where the backend gives no probabilities. With a calibration
    they say how often such answers are right, and the model's own stand in `raw_confidence` and `raw_field_confidence`.
    `abstained` has the reason for each field that was too unsure to be told: it is None, or a left out attribute.
    `evidence`, if it was asked for, has the box where each of brand, category and attributes is seen, or None.
    """

    confidence: float | None = None
    field_confidence: dict[str, float] = Field(default_factory=dict)
    confidence_method: str | None = None
    raw_confidence: float | None = None
    raw_field_confidence: dict[str, float] = Field(default_factory=dict)
    abstained: dict[str, str] = Field(default_factory=dict)
    language: str = "en"
    model: str = ""
    prompt_version: str = PROMPT_VERSION
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    evidence: dict[str, Located | None] | None = Field(default=None, exclude_if=lambda value: value is None)

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def _repr_html_(self) -> str:
        from qvl.html.overlays import fields_html

        rows = [(label, value, self.field_confidence.get(path)) for label, path, value in self.rows()]
        result = self._origin.result
        pictures, located = self._places()
        return fields_html(pictures, rows, result.facts if result else "", located)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (label, path in `field_confidence`, value) for each field, with one row per attribute."""
        rows = [(name, name, getattr(self, name) or "–") for name in ("brand", "category")]
        rows += [(name, f"attributes.{name}", value) for name, value in self.attributes.items()]
        told = {path: (label, path, value) for label, path, value in rows}
        told |= {path: (path.removeprefix("attributes."), path, UNTOLD) for path in self.abstained}
        return list(told.values())

    def _places(self) -> tuple[Sequence[Picture], Sequence[Located]]:
        result = self._origin.result
        located = [item for item in (self.evidence or {}).values() if item is not None]
        return result.pictures if result else (), located

    def came_from(self, result: Result) -> None:
        """Remember the Result, so that a notebook can show the picture beside the fields."""
        self._origin.result = result


@dataclass(frozen=True, slots=True)
class AnalysisResult(Overlaid, Generic[V_co]):
    """The value that `analyze()` returns, with its Result, timing and confidences, as of ProductAnalysis.

    `evidence` has the box where each field is seen, or None where it is not visible; empty unless it was asked for.
    `shapes` are the boxes and points that are fields of the value, their paths as labels. `pages` has the page that
    tells each field, from 1, where several pages of a document were shown; a field that no page tells is left out.
    """

    value: V_co
    result: Result
    confidence: float | None = None
    field_confidence: dict[str, float] = field(default_factory=dict)
    confidence_method: str | None = None
    raw_confidence: float | None = None
    raw_field_confidence: dict[str, float] = field(default_factory=dict)
    abstained: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Located | None] = field(default_factory=dict)
    shapes: tuple[Located, ...] = ()
    pages: dict[str, int] = field(default_factory=dict)

    @property
    def located(self) -> list[Located]:
        """Everything that has a place: the evidence that there is, and the boxes and points of the value."""
        return [*(item for item in self.evidence.values() if item is not None), *self.shapes]

    def sureness(self) -> JsonObject:
        """Return the confidences as JSON; the raw ones and abstentions only where there is a calibration."""
        told: JsonObject = {
            "confidence": self.confidence,
            "field_confidence": self.field_confidence,
            "confidence_method": self.confidence_method,
        }
        if self.confidence_method == CALIBRATED or self.abstained:
            told |= {
                "raw_confidence": self.raw_confidence,
                "raw_field_confidence": self.raw_field_confidence,
                "abstained": self.abstained,
            }
        return told

    def _places(self) -> tuple[Sequence[Picture], Sequence[Located]]:
        return self.result.pictures, self.located

    def _repr_html_(self) -> str:
        from qvl.html.overlays import fields_html

        if isinstance(self.value, ProductAnalysis):
            rows = self.value.rows()
        else:
            told = to_jsonable_python(self.value)
            fields = told.items() if isinstance(told, dict) else [("answer", told)]
            rows = [(str(name), str(name), str(value)) for name, value in fields]
        shown = [(label, value, self.field_confidence.get(path)) for label, path, value in rows]
        return fields_html(self.result.pictures, shown, self.result.facts, self.located)
