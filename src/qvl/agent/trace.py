"""The chain of calls of a run, as a live tree in the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qvl.agent.steps import Event, StepFacts

if TYPE_CHECKING:
    from rich.tree import Tree

MAX_VALUE: Final = 160
WHO: Final = {
    "analyze": "model: look at the picture",
    "search": "tool: search the catalogue",
    "judge": "model: which of them fit the wish",
    "answer": "answer",
}
_QUIET: Final = ("cache", "tokens", "failed")


@dataclass(slots=True)
class TracedStep:
    """One step, or a call within it; `state` is "running", "done" or "failed"."""

    name: str
    state: str = "running"
    seconds: float = 0.0
    data: StepFacts = field(default_factory=StepFacts)
    began: float = 0.0
    calls: list[TracedStep] = field(default_factory=list)

    @property
    def facts(self) -> list[str]:
        """Return time (so far, if running), tokens and cache state as short texts, as far as they are known."""
        facts = [_seconds(max(0.0, time.time() - self.began) if self.state == "running" else self.seconds)]
        if tokens := self.data.get("tokens"):
            facts.append(f"{tokens} tokens")
        if cache := self.data.get("cache"):
            facts.append(f"cache {cache}")
        return facts

    @property
    def arguments(self) -> dict[str, str]:
        """Return the step's data that is not in `facts`, as short text by name."""
        texts = {}
        for name, value in self.data.items():
            if name not in _QUIET and value not in ("", None, [], {}):
                share = name == "confidence" and isinstance(value, float)
                texts[name.replace("_", " ")] = f"{value:.1%}" if share else _short(plain(value))
        return texts


class Trace:
    """Collects the events of one run and shows them as a tree."""

    def __init__(self, wish: str = "", picture: str = "") -> None:
        self.wish, self.picture = wish, picture
        self.events: list[Event] = []
        self.steps: list[TracedStep] = []

    def add(self, event: Event) -> None:
        self.events.append(event)
        calls = self.steps
        if event.name != event.step and self.steps:
            calls = self.steps[-1].calls
        if event.kind == "start":
            calls.append(TracedStep(event.name, data=event.data, began=event.at))
            return
        call = next(call for call in reversed(calls) if call.name == event.name)
        failed = event.kind == "error" or bool(event.data.get("failed"))
        call.state = "failed" if failed else "done"
        call.seconds, call.data = event.seconds, event.data

    def tree(self) -> Tree:
        """Return a rich tree: user -> agent -> model, tool, answer."""
        from rich.text import Text
        from rich.tree import Tree

        request = " · ".join(filter(None, (self.picture, self.wish)))
        root = Tree(Text(f"user: {request}", style="bold"))
        agent = root.add(Text("agent"))

        def grow(branch: Tree, call: TracedStep) -> None:
            style = {"failed": "bold red", "running": "yellow"}.get(call.state, "")
            mark = {"failed": "✗ ", "running": "… "}.get(call.state, "")
            label = Text(mark + WHO.get(call.name, call.name), style=style)
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


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def plain(value: object) -> str:
    """Return a value as short text: "brand NORVIK, category mug, color red"."""
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
