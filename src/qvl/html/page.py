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
th{overflow-wrap:normal}
.scroll{overflow-x:auto}
.scroll td,.scroll th{white-space:nowrap}
p.facts{margin:.2rem 0}
td.number,th.number,td.price{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
ul{list-style:none;margin:0;padding:0}
ul ul{border-left:2px solid var(--line);margin-left:.4rem;padding-left:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;margin:.1rem 0 .5rem;font-size:.85rem}
dd{margin:0;overflow-wrap:anywhere}
figure{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:.6rem}
figure{padding:.6rem;max-width:60rem;overflow-x:auto}
figure svg{width:100%;min-width:34rem;height:auto}
figure svg text{fill:currentColor}
.wide{overflow-x:auto}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:0 0 .8rem}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.4rem .8rem;min-width:6.5rem}
.tiles b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
.tiles span{color:var(--dim);font-size:.85rem}
.controls{display:flex;flex-wrap:wrap;gap:.5rem .8rem;align-items:end;margin:.8rem 0}
.controls label{display:flex;flex-direction:column;font-size:.85rem;color:var(--dim)}
.controls :is(input,select,button){font:inherit;color:var(--text);background:var(--card);border:1px solid var(--line)}
.controls :is(input,select,button){border-radius:.4rem;padding:.4rem .6rem;min-height:2.4rem;max-width:100%}
.controls button[aria-pressed=true]{background:var(--main);color:var(--on-main)}
:focus-visible{outline:3px solid var(--main);outline-offset:2px}
[hidden]{display:none!important}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.8rem}
.sheet article{display:block;border:1px solid var(--line);border-radius:.6rem;padding:.5rem;background:var(--card)}
.sheet .answer{font-size:.8rem}
.sheet .facts,.sheet td.number{display:none}
.sheet .pictures img,.sheet .pictures svg{max-width:100%;width:100%;height:8.5rem;object-fit:contain}
@media(max-width:30rem){body{margin:1rem auto}.pictures{flex-basis:100%}td,th{padding-right:.5rem}}
dt,.facts,.name,.note{color:var(--dim);font-size:.85rem;overflow-wrap:anywhere}
.failed{color:var(--bad);font-weight:600}
.warning{border-left:4px solid var(--note);padding:.3rem .8rem;font-weight:600}
"""


@cache
def theme() -> str:
    """Return the stylesheet of colours that reports share with the server's page."""
    return (files("qvl.html") / "theme.css").read_text(encoding="utf-8")


def page_html(title: str, body: str, script: str = "") -> str:
    """Return a page of `title` (text, which is escaped), `body` (HTML) and a `script` of this package, if any."""
    code = f'<script type="module">{script}</script>' if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{theme()}{_STYLE}</style></head>'
        f"<body>{body}{code}</body></html>\n"
    )
