"""Errors of commands: one line for people, a JSON object for programs, and the exit code."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from qvl.errors import AnalysisError, ConfigError, QvlError

if TYPE_CHECKING:
    from rich.console import Console

FAILED: Final = 1
WRONG_USE: Final = 2


def exit_code(error: QvlError) -> int:
    """Return the exit code: 2 for wrong usage, 1 for any other failure."""
    return WRONG_USE if isinstance(error, ConfigError) else FAILED


def stderr() -> Console:
    """Return a console for the current stderr; without a terminal it prints no colours and does not wrap lines."""
    from qvl.cli.console import PlainConsole

    return PlainConsole(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def report(error: QvlError, about: str = "") -> None:
    """Print `error: … (hint)` in red on one line, after the picture's name `about` unless the message has the name."""
    text = str(error)
    if about and about not in text:
        text = f"{about}: {text}"
    stderr().print(f"error: {one_line(text)}", style="bold red")


def one_line(text: str) -> str:
    """Return `text` without line breaks and terminal control characters."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def as_json(error: QvlError) -> dict[str, object]:
    """Return the error as JSON values; `raw` is the text of an answer that could not be parsed."""
    names = ["code", "message", "hint", "param", "retryable", *(["raw"] if isinstance(error, AnalysisError) else ())]
    return {"type": type(error).__name__, **{name: getattr(error, name) for name in names}}


def abandon_stdout() -> None:
    """Redirect stdout to the null device, so that flushing its buffer does not fail on a closed pipe."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open until the process ends
