"""The console that every command prints tables and text on."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qvl._printable import plain


def stdout() -> PlainConsole:
    """Return a console on the present stdout."""
    return PlainConsole(highlight=False, emoji=False)


class PlainConsole(Console):
    """A console for texts of others: only colours of our own reach the terminal.

    A closed pipe is left to the command, which ends alike whoever was writing.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)
