"""The chain of calls of a run: a tree in the terminal while it happens, JSON events, and a page with the picture."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.tree import Tree

    from qvl.agent.steps import Event, Recommendation

MAX_VALUE: Final = 160
_WHO: Final = {"analyze": "model: look at the picture", "search": "tool: search the catalogue", "answer": "answer"}
_QUIET: Final = ("cache", "tokens", "failed")
_STYLE: Final = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
ul{list-style:none;border-left:2px solid #8886;padding-left:1rem}
.facts{color:gray;font-size:.9rem}
.failed{color:#c22;font-weight:600}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;margin:.2rem 0}
.answer{white-space:pre-wrap}
table{border-collapse:collapse}
td,th{text-align:left;padding:.15rem .9rem .15rem 0;vertical-align:top}
"""


@dataclass(slots=True)
class Call:
    """One step, or a call within it; `state` is "running", "done" or "failed"."""

    name: str
    state: str = "running"
    seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)
    began: float = 0.0
    calls: list[Call] = field(default_factory=list)

    @property
    def facts(self) -> list[str]:
        """Time (so far, while it runs), tokens and cache state, as far as they are known."""
        found = [_seconds(max(0.0, time.time() - self.began) if self.state == "running" else self.seconds)]
        if self.data.get("tokens"):
            found.append(f"{self.data['tokens']} tokens")
        if self.data.get("cache"):
            found.append(f"cache {self.data['cache']}")
        return found

    @property
    def arguments(self) -> dict[str, str]:
        """Everything else that the step tells, short and in words."""
        found = {}
        for name, value in self.data.items():
            if name not in _QUIET and value not in ("", None):
                is_share = name == "confidence" and isinstance(value, float)
                found[name] = f"{value:.1%}" if is_share else _short(plain(value))
        return found


class Trace:
    """Collects the events of one run."""

    def __init__(self, wish: str = "", picture: str = "") -> None:
        self.wish, self.picture = wish, picture
        self.events: list[Event] = []
        self.steps: list[Call] = []

    def add(self, event: Event) -> None:
        self.events.append(event)
        calls = self.steps
        if event.name != event.step and self.steps:
            calls = self.steps[-1].calls
        if event.kind == "start":
            calls.append(Call(event.name, data=event.data, began=event.at))
            return
        call = next(call for call in reversed(calls) if call.name == event.name)
        failed = event.kind == "error" or bool(event.data.get("failed"))
        call.state = "failed" if failed else "done"
        call.seconds, call.data = event.seconds, event.data

    def tree(self) -> Tree:
        """user -> agent -> model, tool, answer, for rich."""
        from rich.text import Text
        from rich.tree import Tree

        asked = " · ".join(filter(None, (self.picture, self.wish)))
        root = Tree(Text(f"user: {asked}", style="bold"))
        agent = root.add(Text("agent"))

        def grow(branch: Tree, call: Call) -> None:
            style = {"failed": "bold red", "running": "yellow"}.get(call.state, "")
            mark = {"failed": "✗ ", "running": "… "}.get(call.state, "")
            label = Text(mark + _WHO.get(call.name, call.name), style=style)
            if call.facts:
                label.append(f"  {', '.join(call.facts)}", style="dim")
            inner = branch.add(label)
            for name, value in call.arguments.items():
                inner.add(Text(f"{name}: {value}", style="red" if name in ("error", "refused") else "dim"))
            for child in call.calls:
                grow(inner, child)

        for call in self.steps:
            grow(agent, call)
        return root

    def to_jsonl(self) -> str:
        """One JSON object a line and event."""
        return "".join(json.dumps(event.to_json(), ensure_ascii=False, default=str) + "\n" for event in self.events)

    def to_html(self, found: Recommendation, picture: Any = None) -> str:
        """A page that needs no other file: the picture, the chain of calls, the products and the answer."""
        image = ""
        if picture is not None:
            from qvl import media
            from qvl.errors import QvlError
            from qvl.notebook import thumbnail_html

            try:
                image = thumbnail_html(media.load(picture), 256)
            except QvlError as exc:
                image = f"<p class=failed>{escape(exc.message)}</p>"
        rows = "".join(
            f"<tr><td>{escape(hit.product.name)}</td><td>{escape(hit.product.price_text)}</td>"
            f"<td>{escape(hit.product.id)}</td><td>{escape(', '.join(hit.why))}</td></tr>"
            for hit in found.products
        )
        products = f"<table><tr><th>product<th>price<th>id<th>why</tr>{rows}</table>" if rows else ""
        notes = "".join(f"<p class=facts>{escape(note)}</p>" for note in found.notes)
        failed = f"<p class=failed>{escape(found.failed)} failed</p>" if found.failed else ""
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>qvl agent</title><style>{_STYLE}</style>"
            f"<h1>{escape(self.wish or 'What is it, and what is like it?')}</h1>{image}"
            f"<ul><li>user<ul><li>agent<ul>{''.join(map(_item, self.steps))}</ul></ul></ul>{failed}"
            f"<p class=answer>{escape(found.text)}</p>{products}{notes}"
            f"<p class=facts>request {escape(found.request_id)}, text by {escape(found.written_by or 'nobody')}</p>"
            "</html>"
        )


def _item(call: Call) -> str:
    cls = " class=failed" if call.state == "failed" else ""
    values = "".join(f"<pre>{escape(name)}: {escape(value)}</pre>" for name, value in call.arguments.items())
    inner = f"<ul>{''.join(map(_item, call.calls))}</ul>" if call.calls else ""
    name = escape(_WHO.get(call.name, call.name))
    return f"<li><span{cls}>{name}</span> <span class=facts>{escape(', '.join(call.facts))}</span>{values}{inner}</li>"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def plain(value: Any) -> str:
    """A value as people read it: "brand NORVIK, category mug, color red"."""
    if isinstance(value, Mapping):
        parts = []
        for name, inner in value.items():
            if inner in ("", None):
                continue
            # What attributes hold has names of its own.
            parts.append(plain(inner) if name == "attributes" else f"{str(name).replace('_', ' ')} {plain(inner)}")
        return ", ".join(filter(None, parts))
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _short(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
