"""The HTML report: thumbnails beside answers, in one self-contained file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qvl.analysis.parse_answer import own_fields
from qvl.analysis.product import ProductAnalysis
from qvl.html.cards import media_html
from qvl.html.overlays import pictures_html, places_html
from qvl.html.page import page_html

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qvl.analysis.product import AnalysisResult
    from qvl.errors import QvlError
    from qvl.evidence.located import Locations
    from qvl.types import Result


class ReportRow(Protocol):
    """One row of the report: a picture with its answer."""

    @property
    def picture(self) -> str: ...
    @property
    def iteration(self) -> int: ...
    @property
    def request_id(self) -> str: ...
    @property
    def result(self) -> Result | None: ...
    @property
    def analysis(self) -> AnalysisResult[object] | None: ...
    @property
    def located(self) -> Locations | None: ...
    @property
    def error(self) -> QvlError | None: ...


class HtmlReport:
    """Collects rows as HTML, so that pictures can be freed; `write` makes the page."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._articles: list[str] = []
        self._done = 0
        self._hits = 0
        self._failed = 0

    def add(self, row: ReportRow) -> None:
        """Append a row."""
        if row.result is None:
            self._failed += 1
            pictures, answer = "", f'<p class="failed">{escape(str(row.error))}</p>'
        else:
            self._done += 1
            self._hits += row.result.cache == "hit"
            located = row.located or ([] if row.analysis is None else row.analysis.located)
            if row.result.videos:
                pictures = media_html(row.result.pictures, row.result.videos)
            else:
                pictures = pictures_html(row.result.pictures, located)
            texts = "".join(f"<p>{escape(_printable(choice.text))}</p>" for choice in row.result.choices)
            facts = [f"{row.result.facts} · {row.result.request_id}", *(f"note: {note}" for note in row.result.notes)]
            answer = texts if row.analysis is None else _analysis(row.analysis)
            answer = answer if row.located is None else places_html(row.located)
            answer += "".join(f'<p class="facts">{escape(fact)}</p>' for fact in facts)
        name = f'<span class="name">{escape(_printable(row.picture))}</span>'
        self._articles.append(
            f'<article id="{escape(row.request_id)}"><div class="pictures">{pictures}{name}</div>'
            f'<div class="answer">{answer}</div></article>'
        )

    def write(self, path: Path) -> None:
        """Write the page to `path` atomically.

        Raises:
            OSError: it cannot be written.
        """
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            draft.write_text(self.html(), encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def html(self) -> str:
        """Return the whole page."""
        title = _printable(self.title)
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        counts = f"{self._done} answered ({self._hits} from the cache), {self._failed} failed · {at}"
        head = f'<h1>{escape(title)}</h1><p class="facts">{counts}</p>'
        return page_html(title, "\n".join([head, *self._articles]))


def _analysis(analysis: AnalysisResult[object]) -> str:
    sure: Mapping[str, float] = analysis.field_confidence
    if isinstance(analysis.value, ProductAnalysis):
        rows = [(label, value, sure.get(path)) for label, path, value in analysis.value.rows()]
    else:
        rows = [(name, str(value), sure.get(name)) for name, value in own_fields(analysis.value).items()]
    if analysis.confidence is not None:
        rows.append(("all fields", "", analysis.confidence))
    cells = "".join(
        f'<tr><th>{escape(label)}</th><td>{escape(value)}</td><td class="number">{_percent(confidence)}</td></tr>'
        for label, value, confidence in rows
    )
    return f"<table>{cells}</table>"


def _percent(confidence: float | None) -> str:
    return "" if confidence is None else f"{confidence:.1%}"


def _printable(text: str) -> str:
    """Return `text` as valid UTF-8, since file names may contain other bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")
