"""HTML of a run: a page with the picture and the chain of calls, and the notebook display of a recommendation."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qvl.agent.trace import WHO
from qvl.errors import QvlError
from qvl.evidence.shapes import Located
from qvl.html.cards import products_html, strip_html, thumbnail_html
from qvl.html.overlays import pictures_html
from qvl.html.page import page_html

if TYPE_CHECKING:
    from qvl.agent.steps import Recommendation
    from qvl.agent.trace import Trace, TracedStep
    from qvl.media.picture import PictureSource
    from qvl.types import JsonMapping


def page(trace: Trace, recommendation: Recommendation, picture: PictureSource | None = None) -> str:
    """Return a run as one self-contained HTML page: the picture, the answer, the products and the chain of calls."""
    products = products_html(recommendation.rows())
    if products:
        products = f"<h2>Products</h2>{products}"
    image = "" if picture is None else _shown(picture, recommendation.evidence)
    title = escape(trace.wish or "What is it, and what is like it?")
    steps = "".join(_item(call) for call in trace.steps)
    failed = f"<p class=failed>{escape(recommendation.failed)} failed</p>" if recommendation.failed else ""
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in recommendation.notes)
    facts = f"request {recommendation.request_id}, text by {recommendation.written_by or 'nobody'}"
    return page_html(
        "qvl agent",
        f"<header>{image}<div><h1>{title}</h1>{failed}<p class=answer>{escape(recommendation.text)}</p>{notes}</div>"
        f"</header>{products}<h2>Chain of calls</h2><ul><li>user<ul><li>agent<ul>{steps}</ul></ul></ul>"
        f"<p class=facts>{escape(facts)}</p>",
    )


def _shown(picture: PictureSource, evidence: JsonMapping) -> str:
    from qvl.media import gate
    from qvl.media.load_video import load_video
    from qvl.media.video_head import looks_like_video

    try:
        if looks_like_video(picture):
            return strip_html(load_video(picture))
        shown = gate.load(picture)
        located = [Located.from_json(item) for item in evidence.values()]
        return pictures_html([shown], located) if located else thumbnail_html(shown, 256)
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
