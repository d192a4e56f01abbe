"""A run as HTML: a page with the picture and the chain of calls, and what a notebook shows of a recommendation."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from qvl.agent.trace import WHO
from qvl.errors import QvlError
from qvl.html.cards import products_html, thumbnail_html

if TYPE_CHECKING:
    from qvl.agent.steps import Recommendation
    from qvl.agent.trace import Trace, TracedStep
    from qvl.media.picture import PictureSource

_STYLE: Final = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem}
h1{font-size:1.3rem;margin:0 0 1rem}
h2{font-size:.8rem;text-transform:uppercase;letter-spacing:.06em;color:gray;margin:1.6rem 0 .4rem}
header{display:flex;gap:1.5rem;align-items:flex-start;flex-wrap:wrap}
header img{border-radius:6px}
header div{flex:1 1 20rem}
ul{list-style:none;margin:0;padding:0}
ul ul{border-left:2px solid #8884;margin-left:.4rem;padding-left:1rem}
.facts{color:gray;font-size:.88rem}
.failed{color:#c22;font-weight:600}
.note{color:gray;font-size:.88rem;margin:.2rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;margin:.1rem 0 .5rem;font-size:.85rem}
dt{color:gray}
dd{margin:0;overflow-wrap:anywhere}
.answer{white-space:pre-wrap;margin:0}
table{border-collapse:collapse;font-size:.9rem}
th{color:gray;font-weight:500}
td,th{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}
tr+tr td{border-top:1px solid #8883}
td.price{text-align:right;white-space:nowrap}
"""


def page(trace: Trace, recommendation: Recommendation, picture: PictureSource | None = None) -> str:
    """Return a run as one self-contained HTML page: the picture, the answer, the products and the chain of calls."""
    products = products_html(recommendation.rows())
    if products:
        products = f"<h2>Products</h2>{products}"
    image = "" if picture is None else _image(picture)
    title = escape(trace.wish or "What is it, and what is like it?")
    steps = "".join(_item(call) for call in trace.steps)
    failed = f"<p class=failed>{escape(recommendation.failed)} failed</p>" if recommendation.failed else ""
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in recommendation.notes)
    facts = f"request {recommendation.request_id}, text by {recommendation.written_by or 'nobody'}"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>qvl agent</title><style>{_STYLE}</style>"
        f"<header>{image}<div><h1>{title}</h1>{failed}"
        f"<p class=answer>{escape(recommendation.text)}</p>{notes}</div></header>"
        f"{products}"
        f"<h2>Chain of calls</h2><ul><li>user<ul><li>agent<ul>{steps}</ul></ul></ul>"
        f"<p class=facts>{escape(facts)}</p></html>"
    )


def _image(picture: PictureSource) -> str:
    from qvl.media import gate

    try:
        return thumbnail_html(gate.load(picture), 256)
    except QvlError as exc:
        return f"<p class=failed>{escape(exc.message)}</p>"


def _item(call: TracedStep) -> str:
    state = "failed" if call.state == "failed" else "step"
    values = "".join(f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in call.arguments.items())
    values = f"<dl>{values}</dl>" if values else ""
    inner = f"<ul>{''.join(map(_item, call.calls))}</ul>" if call.calls else ""
    name = escape(WHO.get(call.name, call.name))
    mark = "✗ " if state == "failed" else ""
    facts = f"<span class=facts>{escape(', '.join(call.facts))}</span>"
    return f"<li><span class={state}>{mark}{name}</span> {facts}{values}{inner}</li>"
