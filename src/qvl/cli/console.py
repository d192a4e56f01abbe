"""The rich console on which every command prints tables and text."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qvl._printable import plain


def stdout() -> PlainConsole:
    """Return a console for the current stdout."""
    return PlainConsole(highlight=False, emoji=False)


class PlainConsole(Console):
    """A console that removes escape sequences from printed text, so that only its own styles reach the terminal.

    A closed pipe raises, so that the command ends in the same way whichever code was writing.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)
