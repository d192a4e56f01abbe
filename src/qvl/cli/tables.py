"""Answers as tables: in full for one picture, a row each for many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from qvl.analysis.parse_answer import own_fields
from qvl.analysis.product import ProductAnalysis
from qvl.cli.console import stdout
from qvl.html.overlays import place_of
from qvl.html.report import SHOWN_LOADING

if TYPE_CHECKING:
    from qvl.analysis.product import AnalysisResult
    from qvl.cli.records import PictureRecord
    from qvl.evidence.located import Locations
    from qvl.types import Result

_NARROW: Final = 100


def took(record: PictureRecord) -> str:
    assert record.result is not None
    subject = "answer" if record.located is None else "locating"
    if record.analysis is not None:
        kind = "video" if record.result.videos else "document" if record.analysis.pages else "image"
        subject = f"{kind} analysis"
    return f"{subject} took {record.result.timing.total:.2f} s (cache {record.result.cache})"


def seconds(value: float) -> str:
    """Return a time in seconds as text with unit and three significant digits."""
    return f"{value * 1000:.2f} ms" if value < 0.01 else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def percent(confidence: float | None) -> str:
    return "" if confidence is None else f"{confidence:.1%}"


def fields(analysis: AnalysisResult[object]) -> list[tuple[str, str, float | None]]:
    """Return (label, value, confidence) of every field of an analysis."""
    sure = analysis.field_confidence
    if isinstance(analysis.value, ProductAnalysis):
        return [(label, value, sure.get(path)) for label, path, value in analysis.value.rows()]
    return [(name, _plain(value), sure.get(name)) for name, value in own_fields(analysis.value).items()]


def show_one(record: PictureRecord) -> None:
    """Print answer, confidences and timing of one picture."""
    assert record.result is not None
    console = stdout()
    if record.located is not None:
        console.print(Text(f"{record.picture} · {record.result.backend}:{record.result.model}", style="italic"))
        console.print(_located(record.located))
        stages(record)
    elif record.analysis is not None:
        # Not the table's title, which would be folded to the table's width.
        console.print(Text(f"{record.picture} · {record.result.backend}:{record.result.model}", style="italic"))
        console.print(_analysis(record))
    else:
        for choice in record.result.choices:
            console.print(Text(choice.text))
        stages(record)
    notes(record.result)
    console.print(Text(took(record)))


def _located(located: Locations) -> Table:
    table = Table()
    table.add_column("target", overflow="fold")
    table.add_column("pixels", overflow="fold")
    table.add_column("of width and height", overflow="fold")
    table.add_column("confidence", justify="right")
    for item in located:
        shares = ", ".join(f"{share:.1%}" for share in item.shape.relative)
        place = place_of(item) + (" (cut at the edge)" if item.shape.clipped else "")
        table.add_row(Text(item.label), Text(place), Text(shares), percent(item.confidence) or "unknown")
    if not located:
        table.add_row("nothing located", "", "", "")
    return table


def stages(record: PictureRecord) -> None:
    """Print a table with the time of each stage."""
    table = Table()
    times = timed(record)
    for label, _ in times:
        table.add_column(label, justify="right")
    table.add_row(*(seconds(spent) for _, spent in times))
    stdout().print(table)


def timed(record: PictureRecord) -> list[tuple[str, float]]:
    """Return (stage, seconds) of the stages that ran, in order; the last one is the total."""
    assert record.result is not None
    timing = record.result.timing
    loading = timing.loading if timing.loading >= SHOWN_LOADING else 0.0
    # A hit's rest is this program's start; a backend that does not tell its first token's time gets one row.
    rest = "decode" if timing.first_token else "start" if record.result.cache == "hit" else "model"
    known = timing.media + timing.cache + loading + timing.first_token
    stages = (
        ("media", timing.media),
        ("cache", timing.cache),
        ("model load", loading),
        ("queue", timing.queue),
        ("first token", timing.first_token - timing.queue),
        (rest, timing.total - known),
    )
    return [*((label, spent) for label, spent in stages if spent > 0), ("total", timing.total)]


def notes(result: Result) -> None:
    for note in result.notes:
        stdout().print(Text(f"note: {note}", style="yellow"))


def _analysis(record: PictureRecord) -> Table:
    assert record.result is not None
    assert record.analysis is not None
    result = record.result
    table = Table()
    table.add_column("field")
    table.add_column("value", overflow="fold")
    table.add_column("confidence", justify="right")
    evidence = record.analysis.evidence
    if evidence:
        table.add_column("seen at", overflow="fold")
    for label, value, confidence in fields(record.analysis):
        place = [] if not evidence else [place_of(seen) if (seen := evidence.get(label)) is not None else ""]
        table.add_row(Text(label), Text(value), percent(confidence), *place)
    if (seen := evidence.get("attributes")) is not None:
        table.add_row("attributes", "", "", place_of(seen))
    table.add_row("all fields", "", percent(record.analysis.confidence) or "unknown", style="bold")
    table.add_section()
    for label, spent in timed(record):
        table.add_row(Text(f"time: {label}"), "", seconds(spent), style="dim")
    table.add_section()
    style = "green" if result.cache == "hit" else ""
    table.add_row("cache", "", Text(result.cache, style=style))
    return table


def show_many(records: Sequence[PictureRecord]) -> None:
    """Print a row per picture, and a summary line with counts and mean time."""
    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("confidence", justify="right")
    table.add_column("cache")
    table.add_column("total", justify="right")
    for record in records:
        if record.result is None:
            table.add_row(Text(record.picture), Text(str(record.error), style="red"), "", "", "")
            continue
        sure = record.analysis.confidence if record.analysis is not None else None
        table.add_row(
            Text(record.picture),
            Text(_short(record)),
            percent(sure),
            record.result.cache,
            seconds(record.result.timing.answering),
        )
    console = stdout()
    console.print(table)
    console.print(Text(counted(records)))


def counted(records: Sequence[PictureRecord]) -> str:
    done = [record.result for record in records if record.result is not None]
    hits = sum(result.cache == "hit" for result in done)
    loading = sum(result.timing.loading for result in done)
    spent = sum(result.timing.answering for result in done)
    failed = len(records) - len(done)
    mean = f", {spent / len(done):.2f} s each" if done else ""
    loaded = f", model load {loading:.2f} s" if loading >= SHOWN_LOADING else ""
    return f"{len(records)} pictures: {len(done)} done ({hits} cache hits), {failed} failed{mean}{loaded}"


def _short(record: PictureRecord) -> str:
    if record.analysis is not None:
        return ", ".join(f"{label}: {value}" for label, value, _ in fields(record.analysis))
    if record.located is not None:
        return "; ".join(f"{item.label} {place_of(item)}" for item in record.located) or "nothing located"
    assert record.result is not None
    text = " ".join(record.result.text.split())
    return text if len(text) <= _NARROW else f"{text[: _NARROW - 1]}…"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
