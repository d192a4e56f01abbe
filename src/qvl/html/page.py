"""The HTML page around every report, self-contained: head and stylesheet in one file."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files
from typing import Final

_STYLE: Final = """
:root{color-scheme:light dark}
body{margin:2rem auto;max-width:70rem;padding:0 1rem}
h1{font-size:1.4rem;margin:0 0 1rem}
h2{font-size:1.1rem;overflow-wrap:anywhere}
header,article{display:flex;flex-wrap:wrap;gap:1.2rem;align-items:flex-start}
header div{flex:1 1 20rem}
article{border-top:1px solid var(--line);padding:1rem 0}
img{border-radius:6px}
.pictures{flex:0 0 200px;display:flex;flex-direction:column;gap:.4rem}
.pictures img{max-width:192px;max-height:192px}
.pictures:has(svg){flex-basis:456px}
.pictures svg{max-width:100%;height:auto}
.answer{flex:1 1 24rem;min-width:0}
.answer p,p.answer{white-space:pre-wrap;margin:.2rem 0}
table{border-collapse:collapse;margin:.5rem 0}
td,th{text-align:left;padding:.15rem .9rem .15rem 0;vertical-align:top;overflow-wrap:anywhere}
td.number,td.price{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
ul{list-style:none;margin:0;padding:0}
ul ul{border-left:2px solid var(--line);margin-left:.4rem;padding-left:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;margin:.1rem 0 .5rem;font-size:.85rem}
dd{margin:0;overflow-wrap:anywhere}
figure{margin:1rem 0;background:#fff;color:#000;padding:.5rem;max-width:60rem}
figure svg{width:100%;height:auto}
dt,.facts,.name,.note{color:var(--dim);font-size:.85rem;overflow-wrap:anywhere}
.failed{color:var(--bad);font-weight:600}
.warning{border-left:4px solid var(--note);padding:.3rem .8rem;font-weight:600}
"""


@cache
def theme() -> str:
    """Return the stylesheet of colours that reports share with the server's page."""
    return (files("qvl.html") / "theme.css").read_text(encoding="utf-8")


def page_html(title: str, body: str) -> str:
    """Return a page of `title` (text, which is escaped) and `body` (HTML)."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{theme()}{_STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
