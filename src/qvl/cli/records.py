"""The outcome of one picture, and its line of JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic_core import to_jsonable_python

from qvl.analysis.product import ProductAnalysis
from qvl.cli import failure
from qvl.cli.terminal import json_line
from qvl.evidence.located import Locations, size_of

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult
    from qvl.errors import QvlError
    from qvl.types import Result


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """The outcome of one picture in one iteration: an answer, alone or with an analysis or locations, or an error."""

    index: int
    iteration: int
    picture: str
    request_id: str
    result: Result | None = None
    analysis: AnalysisResult[object] | None = None
    located: Locations | None = None
    error: QvlError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def without_pictures(self) -> PictureRecord:
        """Return a copy without the pictures, whose bytes would use much memory over a long run."""
        if self.result is None:
            return self
        result = dataclasses.replace(self.result, pictures=())
        if self.located is not None:
            return dataclasses.replace(self, result=result, located=Locations(self.located, result))
        if self.analysis is None:
            return dataclasses.replace(self, result=result)
        if isinstance(self.analysis.value, ProductAnalysis):
            self.analysis.value.came_from(result)
        analysis = dataclasses.replace(self.analysis, result=result)
        return dataclasses.replace(self, result=result, analysis=analysis)

    def to_json(self) -> str:
        """Return one line of JSON, without a line break."""
        return json_line(self._fields())

    def _fields(self) -> dict[str, object]:
        head = {name: getattr(self, name) for name in ("picture", "index", "iteration", "ok", "request_id")}
        if self.error is not None:
            return {**head, "error": failure.as_json(self.error)}
        assert self.result is not None
        answer = _answer(self.result, self.analysis) if self.located is None else self.located.to_json()
        return {**head, **answer, **_facts(self.result)}


def _answer(result: Result, analysis: AnalysisResult[object] | None) -> dict[str, object]:
    if analysis is None:
        texts = [choice.text for choice in result.choices]
        return {"text": result.text, **({"texts": texts} if len(texts) > 1 else {})}
    return {
        "analysis": to_jsonable_python(analysis.value, exclude={"evidence"} if analysis.evidence else None),
        **analysis.sureness(),
        **({"pages": analysis.pages} if analysis.pages else {}),
        **_places(analysis),
    }


def _places(analysis: AnalysisResult[object]) -> dict[str, object]:
    if not analysis.evidence:
        return {}
    evidence = {name: item and item.to_json() for name, item in analysis.evidence.items()}
    return {"evidence": evidence, **size_of(analysis.result.pictures)}


def _facts(result: Result) -> dict[str, object]:
    return {
        **{name: getattr(result, name) for name in ("model", "backend", "cache", "key", "finish_reason")},
        "usage": dataclasses.asdict(result.usage),
        "timing": dataclasses.asdict(result.timing),
        "notes": list(result.notes),
        **({"videos": [video.to_json() for video in result.videos]} if result.videos else {}),
    }
