"""Decisions as HTML: a bar for every possible answer, beside the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from qvl.html.cards import thumbnail_html

if TYPE_CHECKING:
    from qvl.html.cards import ShownPicture
    from qvl.types import JsonMapping

_BAR: Final = "display:inline-block;height:.8em;background:#48c;vertical-align:middle"


def decisions_html(pictures: Sequence[ShownPicture], answers: Sequence[JsonMapping]) -> str:
    """Return the answers (as `Decision.to_json` gives them) with their bars, beside the pictures."""
    images = "".join(map(thumbnail_html, pictures))
    body = "".join(map(_answer, answers))
    return f'<article><div class="pictures">{images}</div><div class="answer">{body}</div></article>'


def _answer(answer: JsonMapping) -> str:
    asked = str(answer["instructions"])
    title = asked if answer["name"] in (None, asked) else f"{answer['name']}: {asked}"
    rows = "".join(
        f"<tr><th>{escape(_shown(item['value']))}</th>"
        f'<td><span style="{_BAR};width:{12 * item["probability"]:.2f}em"></span></td>'
        f'<td class="number">{item["probability"]:.1%}</td></tr>'
        for item in answer["probabilities"] or ()
    )
    mass = answer["label_mass"]
    facts = [f"method {answer['method']}", f"cache {answer['cache']}"]
    if mass is not None:
        facts.append(f"label mass {mass:.3g}")
    facts += answer["notes"]
    if "confidence_method" in answer:
        facts.insert(0, f"{answer['confidence']:.1%} of such answers are right ({answer['confidence_method']})")
    said = "declined" if answer.get("refused") else _shown(answer["value"])
    if "abstained" in answer:
        said = f"cannot tell: {answer['abstained']}"
    return (
        f"<h2>{escape(title)}</h2><p>{escape(said)}</p><table>{rows}</table>"
        f'<p class="facts">{escape(" · ".join(facts))}</p>'
    )


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
