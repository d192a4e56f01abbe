"""The HTML report: thumbnails beside answers, in one self-contained file."""

from __future__ import annotations

import os
from collections import Counter
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, Protocol

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


SHOWN_LOADING: Final = 0.05
"""Fewest seconds of loading a model that are shown."""
_COMMONEST: Final = 6
_CONTROLS: Final = """<div class="controls" id="controls" hidden>
<label>Find<input id="find" type="search"></label>
<label>Show<select id="state"><option value="">all<option value="answered">answered
<option value="asked">not from the cache<option value="hit">from the cache<option value="failed">failed</select></label>
<label>Sort by<select id="sort"><option value="order">order of the run<option value="name">name
<option value="sure">least sure first<option value="slow">slowest first</select></label>
<button id="sheet" type="button" aria-pressed="false">Contact sheet</button>
<span class="facts" id="shown" role="status"></span></div>"""


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
        self._began = datetime.now().astimezone()
        self._seconds: list[float] = []
        self._loading = 0.0
        self._tokens = 0
        self._models: Counter[str] = Counter()
        self._values: dict[str, Counter[str]] = {}

    def add(self, row: ReportRow) -> None:
        """Append a row."""
        state, seconds, sure = "failed", "", ""
        if row.result is None:
            self._failed += 1
            pictures, answer = "", f'<p class="failed">{escape(str(row.error))}</p>'
        else:
            self._done += 1
            self._count(row.result, row.analysis)
            state = f"answered {'hit' if row.result.cache == 'hit' else 'asked'}"
            seconds = f"{row.result.timing.answering:.6f}"
            if row.analysis is not None and row.analysis.confidence is not None:
                sure = f"{row.analysis.confidence:.6f}"
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
        data = {"order": len(self._articles), "name": _printable(row.picture), "state": state, "seconds": seconds}
        told = "".join(f' data-{key}="{escape(str(value))}"' for key, value in (*data.items(), ("sure", sure)))
        self._articles.append(
            f'<article id="{escape(row.request_id)}"{told}><div class="pictures">{pictures}{name}</div>'
            f'<div class="answer">{answer}</div></article>'
        )

    def write(self, path: Path) -> None:
        """Write the page to `path` atomically.

        Raises:
            OSError: it cannot be written.
        """
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            draft.write_text(self.html(), encoding="utf-8", errors="backslashreplace")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def html(self) -> str:
        """Return the whole page."""
        title = _printable(self.title)
        rows = f'<main id="rows">{"".join(self._articles)}</main>'
        script = (files("qvl.html") / "report.js").read_text(encoding="utf-8")
        return page_html(title, "\n".join([f"<h1>{escape(title)}</h1>", self._summary(), _CONTROLS, rows]), script)

    def _count(self, result: Result, analysis: AnalysisResult[object] | None) -> None:
        if result.cache == "hit":
            self._hits += 1
        else:
            self._tokens += result.usage.total_tokens
        self._seconds.append(result.timing.answering)
        self._loading += result.timing.loading
        self._models[f"{result.backend}:{result.model}"] += 1
        if analysis is not None and isinstance(analysis.value, ProductAnalysis):
            for name, value in (("brand", analysis.value.brand), ("category", analysis.value.category)):
                self._values.setdefault(name, Counter())[value or "none"] += 1

    def _summary(self) -> str:
        """Return counts, times and the commonest values; times are those of this machine, with their offset."""
        ended = datetime.now().astimezone()
        tiles = [(str(len(self._articles)), "pictures"), (str(self._done), "answered")]
        tiles += [(str(self._hits), "from the cache"), (str(self._failed), "failed")]
        if self._seconds:
            tiles += [(f"{median(self._seconds):.2f} s", "median time"), (f"{max(self._seconds):.2f} s", "longest")]
            tiles.append((f"{self._tokens:,}", "tokens asked for"))
        boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in tiles)
        spent = (ended - self._began).total_seconds()
        began = f'<time datetime="{self._began.isoformat()}">{self._began:%Y-%m-%d %H:%M:%S}</time>'
        models = ", ".join(escape(_printable(model)) for model in self._models)
        loaded = f", model load {self._loading:.2f} s" if self._loading >= SHOWN_LOADING else ""
        facts = [f"{began} to {ended:%H:%M:%S %z}, {spent:,.1f} s{loaded}", *([models] if models else [])]
        for name, counts in self._values.items():
            common = ", ".join(
                f"{escape(_printable(value))} {count}" for value, count in counts.most_common(_COMMONEST)
            )
            more = len(counts) - _COMMONEST
            facts.append(f"{name}: {common}" + (f" and {more} more" if more > 0 else ""))
        lines = "".join(f'<p class="facts">{fact}</p>' for fact in facts)
        return f'<div class="tiles">{boxes}</div>{lines}'


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
