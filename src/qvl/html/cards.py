"""What a Result or an analysis looks like in a notebook, and in the HTML report: the picture beside the answer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from qvl.errors import QvlError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qvl.analysis.product import ProductAnalysis
    from qvl.media.picture import Picture
    from qvl.types import Result

_CARD = "display:flex;gap:1em;align-items:flex-start;font-family:sans-serif"


def thumbnail_html(picture: Picture, edge: int = 192) -> str:
    """An `<img>` with the picture inside, so that the page needs no other file."""
    try:
        small = picture.thumbnail(edge)
        return f'<img src="{small.data_url()}" alt="{escape(picture.source)}" style="max-width:{edge}px">'
    except QvlError as exc:
        return f"<span>{escape(exc.message)}</span>"


def table_html(rows: Iterable[tuple[str, Any]]) -> str:
    """Two columns; names and values are escaped."""
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def result_html(result: Result) -> str:
    """Pictures, answer, and one line of facts."""
    pictures = "".join(thumbnail_html(picture) for picture in result.pictures)
    answer = "".join(f'<p style="white-space:pre-wrap">{escape(choice.text)}</p>' for choice in result.choices)
    return f'<div style="{_CARD}"><div>{pictures}</div><div>{answer}{_facts(result)}</div></div>'


def analysis_html(value: ProductAnalysis, result: Result | None) -> str:
    """Pictures and a table of the fields with their confidences."""
    pictures = "".join(thumbnail_html(picture) for picture in result.pictures) if result else ""
    rows = [(name, f"{found}  {_percent(value.field_confidence.get(path))}") for name, path, found in fields_of(value)]
    facts = _facts(result) if result else ""
    return f'<div style="{_CARD}"><div>{pictures}</div><div>{table_html(rows)}{facts}</div></div>'


def fields_of(value: ProductAnalysis) -> list[tuple[str, str, str]]:
    """(label, path in `field_confidence`, value) of every field that the model filled in."""
    rows = [
        ("brand", "brand", value.brand if value.brand is not None else "–"),
        ("category", "category", value.category if value.category is not None else "–"),
    ]
    return rows + [(name, f"attributes.{name}", found) for name, found in value.attributes.items()]


def _percent(confidence: float | None) -> str:
    return "" if confidence is None else f"({confidence:.0%})"


def _facts(result: Result) -> str:
    usage = result.usage
    text = (
        f"{result.backend}:{result.model} · cache {result.cache} · {result.timing.total:.2f} s · "
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    )
    return f'<p style="color:gray;font-size:smaller">{escape(text)}</p>'
