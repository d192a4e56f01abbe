"""The page of `qvl parity`: where two deployments part, why, and the worst cases side by side."""

from __future__ import annotations

import json
import math
from html import escape
from typing import TYPE_CHECKING, Final

from qvl.html.cards import thumbnail_html
from qvl.html.page import page_html

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qvl.html.cards import ShownPicture
    from qvl.types import JsonMapping

_BAR: Final = "display:inline-block;height:.7em;vertical-align:middle"
# Checksums and names of fields may be wider than a phone.
_WRAPPED: Final = "overflow-wrap:anywhere"
_COLOURS: Final = {"a": "#48c", "b": "#c73"}
_BARS: Final = 6
_REASONS: Final = 20
_ERROR: Final = 300
_STANDING: Final = {
    "within": "within all budgets",
    "beyond": "beyond a budget",
    "undecided": "undecided: too few cases, or too much noise",
    "told": "no budget: told, not judged",
}


def parity_html(report: JsonMapping, pictures: Mapping[str, Sequence[ShownPicture]]) -> str:
    """Return the page of a report as `ParityReport.to_json` gives it; `pictures` are by case, of the worst ones."""
    a, b = (str(report[side]["model"]) for side in ("a", "b"))
    layer = report["first_layer"]
    first = "no layer that both sides show parts" if layer is None else f"first layer that parts: {layer}"
    parts = [
        "<h1>qvl parity</h1>",
        f"<p><b style='color:{_COLOURS['a']}'>A</b> {escape(a)}<br><b style='color:{_COLOURS['b']}'>B</b> "
        f"{escape(b)}</p>",
        f'<p class="warning">{escape(_STANDING[report["standing"]])} · {escape(first)} · {report["cases"]} cases</p>',
        *(f'<p class="facts">{escape(line)}</p>' for line in _facts(report)),
        *(["<h2>Why</h2>"] + [_cause(one) for one in report["causes"]] if report["causes"] else []),
        *_budgets(report["budgets"]),
        "<h2>Layers, in the order of the way from picture to answer</h2>",
        _table(("layer", "compared", "part first here"), map(_layer, report["layers"])),
        "<h2>Agreement</h2>",
        _table(("", "same", "share", "95 % (Wilson)"), map(_agreement, report["agreement"].items())),
    ]
    if report["worst"]:
        parts.append("<h2>The cases that part the most</h2>")
    parts += [_case(one, pictures.get(one["case"], ())) for one in report["worst"]]
    return page_html(f"qvl parity: {a} and {b}", "\n".join(parts))


def _facts(report: JsonMapping) -> list[str]:
    told = []
    if any(report["failed"].values()):
        failed = report["failed"]
        told.append(f"failed: {failed['both']} cases on both sides, {failed['one']} on one side alone")
        for one in report["reasons"][:_REASONS]:
            told.append(f"{one['side']}, {one['count']} failed: {one['error'][:_ERROR]}")
    if report["kl"] is not None:
        interval = _interval(report["kl"]["interval"])
        told.append(f"KL of the first free token: {report['kl']['mean']:.3g} nats, 95 % {interval}")
    if report["largest_deviation"] is not None:
        told.append(
            f"log-probabilities at most {report['largest_deviation']:.3g} nats apart; up to {report['tolerance']:.3g} "
            "count as the same"
        )
    if report["self_check"] is not None:
        checked = report["self_check"]
        told.append(f"A against itself: {checked['same']} of {checked['cases']} the same")
    told.append(f"near ties among the cases that part: {report['near_ties']}")
    for side in ("a", "b"):
        one = report[side]
        tokens = f"{one['median_completion_tokens']:g} tokens an answer"
        told.append(f"medians of {side.upper()}: {one['median_seconds']:.3g} s, {tokens}")
    return told


def _cause(one: JsonMapping) -> str:
    sure = "" if one["certain"] else " (likely)"
    where = f"<span class='note'>{escape(one['layer'])}, {one['cases']} cases</span>"
    return (
        f"<p style='{_WRAPPED}'><b>{escape(one['title'])}</b>{sure} {where}"
        f"<br>{escape(one['evidence'])}<br>Remedy: {escape(one['remedy'])}</p>"
    )


def _budgets(budgets: Sequence[JsonMapping]) -> list[str]:
    if not budgets:
        return []
    rows = [
        (
            one["name"],
            f"{one['budget']:g}",
            "" if one["measured"] is None else f"{one['measured']:.4g}",
            _interval(one["interval"]),
            f"{one['standing']}{': ' if one['why'] else ''}{one['why']}",
        )
        for one in budgets
    ]
    return ["<h2>Budgets</h2>", _table(("", "budget", "measured", "95 %", "verdict"), rows)]


def _interval(ends: Sequence[float | None]) -> str:
    return "–".join("?" if end is None else f"{end:.4g}" for end in ends)


def _layer(one: JsonMapping) -> tuple[str, str, str]:
    return one["layer"], f"{one['compared']}", f"{one['part_first_here']}"


def _agreement(pair: tuple[str, JsonMapping]) -> tuple[str, str, str, str]:
    name, counted = pair
    low, high = counted["interval"]
    share = f"{counted['share']:.1%}" if counted["count"] else ""
    return name, f"{counted['agree']} of {counted['count']}", share, f"{low:.1%}–{high:.1%}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _case(one: JsonMapping, pictures: Sequence[ShownPicture]) -> str:
    answers, parting = one["answers"], one["parting"]
    sides = "".join(
        f"<div style='flex:1 1 16rem;min-width:0'><b style='color:{_COLOURS[side]}'>{side.upper()}</b> "
        f"{_answer(answers[side], answers['b' if side == 'a' else 'a'])}{_bars(answers[side], side)}</div>"
        for side in ("a", "b")
    )
    asked = one["asked"].get("question") or ("decisions" if "questions" in one["asked"] else "analysis")
    kind = " · a near tie" if one["near_tie"] else ""
    where = f"{one['layer']}: {one['detail']}{kind}"
    token = "" if parting is None else f"<p class='note'>token {parting['index']} is the first other one</p>"
    images = f"{''.join(map(thumbnail_html, pictures))}<span class=name>{escape(one['case'])}</span>"
    head = f"<p class=facts>{escape(str(asked))}</p><p class=failed>{escape(where)}</p>{token}"
    both = f"<div style='display:flex;flex-wrap:wrap;gap:1rem'>{sides}</div>"
    return f"<article><div class=pictures>{images}</div><div class=answer>{head}{both}</div></article>"


def _answer(mine: JsonMapping, other: JsonMapping) -> str:
    """Return an answer; marked is where its tokens, or its values, are no longer the other's."""
    if mine["error"]:
        return f'<p class="failed">{escape(mine["error"])}</p>'
    if other["error"]:
        # An answer that stands alone parts from none.
        other = mine
    count = f"{mine['prompt_tokens']} prompt tokens, " if mine["prompt_tokens"] else ""
    facts = f"{count}pictures {_sizes(mine)}"
    told = f'<p class="note">{escape(facts)}</p>'
    if mine["fields"] is not None:
        rows = ""
        for path, value in mine["fields"].items():
            text = escape(json.dumps(value, ensure_ascii=False))
            same = (other["fields"] or {}).get(path, ...) == value
            shown = text if same else f"<mark>{text}</mark>"
            rows += f"<tr><th style='{_WRAPPED}'>{escape(path)}</th><td>{shown}</td></tr>"
        return f"{told}<table>{rows}</table>"
    if mine["choices"] is not None:
        shown = ", ".join(f"{name}: {value}" for name, value in mine["choices"].items())
        return f"{told}<p>{escape(shown)}</p>"
    text = mine["text"]
    if text == other["text"]:
        return f"{told}<p>{escape(text)}</p>"
    begin, end = mine["parts_at"] or _parting(text, other["text"])
    marked = f"<mark>{escape(text[begin:end]) or '(end)'}</mark>"
    return f"{told}<p>{escape(text[:begin])}{marked}{escape(text[end:])}</p>"


def _parting(text: str, other: str) -> tuple[int, int]:
    """Return where the first character that is not the other's begins and ends."""
    place = 0
    while place < min(len(text), len(other)) and text[place] == other[place]:
        place += 1
    return place, place + 1


def _sizes(mine: JsonMapping) -> str:
    return ", ".join(f"{width}x{height}" for width, height in mine["sizes"]) or "none"


def _bars(mine: JsonMapping, side: str) -> str:
    """Return the likeliest first tokens, or the possible answers of each decision, as bars."""
    if mine["decisions"]:
        return "".join(
            f"<p class='note'>{escape(name)}</p>{_rows(shares, side)}" for name, shares in mine["decisions"].items()
        )
    told = {token: logprob for token, logprob in mine["first_token"].items() if logprob is not None}
    shares = {token: math.exp(min(0.0, logprob)) for token, logprob in told.items()}
    best = dict(sorted(shares.items(), key=lambda pair: -pair[1])[:_BARS])
    return _rows(best, side) if best else ""


def _rows(shares: Mapping[str, float], side: str) -> str:
    rows = "".join(
        f"<tr><td>{escape(repr(name)[1:-1])}</td><td><span style='{_BAR};background:{_COLOURS[side]};width:"
        f"{8 * share:.2f}em'></span></td><td class='number'>{share:.1%}</td></tr>"
        for name, share in shares.items()
    )
    return f"<table>{rows}</table>"
