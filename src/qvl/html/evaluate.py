"""The page of `qvl eval`: accuracy by field, confusion matrices, and the wrong answers as a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from qvl.html.cards import thumbnail_html
from qvl.html.page import page_html

if TYPE_CHECKING:
    from qvl.html.cards import ShownPicture
    from qvl.types import JsonMapping

_MEASURES = ("similarity", "iou", "calibration_error")
_SHEET = "display:inline-block;width:12rem;margin:.4rem;vertical-align:top;overflow-wrap:anywhere"


def eval_html(report: JsonMapping, other: JsonMapping | None, pictures: Mapping[str, Sequence[ShownPicture]]) -> str:
    """Return the page of a report as JSON values, beside `other`, what Against.to_json gives; `pictures` by line."""
    usage = report["usage"]
    facts = (
        f"{report['model']} · {report['lines']} lines, {len(report['failed'])} failed · {usage['prompt_tokens']} + "
        f"{usage['completion_tokens']} tokens · {report['seconds']:.1f} s"
    )
    parts = ["<h1>qvl eval</h1>", f"<p class=facts>{escape(facts)}</p>"]
    parts += [f"<p class=warning>{escape(where)}: {escape(why)}</p>" for where, why in [*report["failed"].items()][:20]]
    parts.append(_fields(report["fields"]))
    if other is not None:
        parts.append(_other(other))
    parts += [_confusion(one) for one in report["fields"] if one["confusion"]]
    if report["wrong"]:
        parts.append(f"<h2>Wrong answers{' (the first of them)' if len(report['wrong']) >= 60 else ''}</h2>")
        parts += [_wrong(one, pictures.get(one["line"], ())) for one in report["wrong"]]
    return page_html("qvl eval", "\n".join(parts))


def _fields(fields: Sequence[JsonMapping]) -> str:
    titles = ("", "right", "accuracy", "95 % (Wilson)", "F1 of items", "similarity", "IoU", "ECE", "unanswered")
    rows = []
    for one in fields:
        low, high = one["interval"]
        rows.append(
            (
                one["name"],
                f"{one['right']} of {one['labels']}",
                "" if one["accuracy"] is None else f"{one['accuracy']:.1%}",
                f"{low:.1%}–{high:.1%}",
                "" if one["items"] is None else f"{one['items']['f1']:.3f}",
                *(
                    "" if one[name] is None else f"{one[name]:.3f}"
                    for name in ("similarity", "iou", "calibration_error")
                ),
                f"{one['unanswered'] or ''}",
            )
        )
    return _table(titles, rows)


def _other(other: JsonMapping) -> str:
    rows = []
    for name, one in other["fields"].items():
        low, high = one["interval"]
        rows.append(
            (
                name,
                f"{one['right_b'] / one['count']:.1%}",
                f"{one['right_a'] / one['count']:.1%}",
                f"{one['difference']:+.1%}",
                f"{low:+.1%}–{high:+.1%}",
                f"{one['only_b']} / {one['only_a']}",
                f"{one['p_value']:.3g}",
            )
        )
    titles = ("", "this", "other", "gain", "95 % (Newcombe)", "right alone: this / other", "p (McNemar)")
    verdict = "" if other["allow"] is None else f"; a loss of {other['allow']:.2%} is allowed: {other['standing']}"
    whole = f"<h2>Against {escape(other['model'])}{escape(verdict)}</h2>{_table(titles, rows)}"
    if not other["scores"]:
        return whole
    scores = []
    for one in other["scores"]:
        low, high = one["interval"] or (None, None)
        lies = "" if low is None else f"{low:+.3f}–{high:+.3f}"
        means = (f"{one['b']:.3f}", f"{one['a']:.3f}", f"{one['difference']:+.3f}")
        scores.append((one["field"], one["measure"], *means, lies))
    return whole + _table(("", "measure", "this", "other", "gain", "95 % (bootstrap over lines)"), scores)


def _confusion(one: JsonMapping) -> str:
    labels = sorted({label for label, _, _ in one["confusion"]})
    answers = sorted({answer for _, answer, _ in one["confusion"]} - {*labels})
    counts = {(label, answer): count for label, answer, count in one["confusion"]}
    rows = [(label, *(str(counts.get((label, answer), "")) for answer in (*labels, *answers))) for label in labels]
    title = f"<h2>{escape(one['name'])}: label (row) and answer (column)</h2>"
    return title + _table(("", *labels, *answers), rows)


def _wrong(one: JsonMapping, pictures: Sequence[ShownPicture]) -> str:
    label, value = (json.dumps(one[name], ensure_ascii=False) for name in ("label", "value"))
    images = "".join(thumbnail_html(picture, 160) for picture in pictures)
    told = f"{escape(one['path'])}: <mark>{escape(value)}</mark>, right is {escape(label)}"
    return f"<div style='{_SHEET}'>{images}<div class=name>{escape(one['line'])}</div>{told}</div>"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
