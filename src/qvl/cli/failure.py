"""Errors: as one line for people, an object for machines, and an exit code."""

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
    """Return 2 for what the caller has to write differently, 1 for what failed."""
    return WRONG_USE if isinstance(error, ConfigError) else FAILED


def stderr() -> Console:
    """Return a console on the present stderr; without a terminal it writes no colours and never folds a line."""
    from qvl.cli.console import PlainConsole

    return PlainConsole(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def report(error: QvlError, about: str = "") -> None:
    """Print `error: … (hint)`, in red, on one line; `about` names the picture unless the message does."""
    text = str(error)
    if about and about not in text:
        text = f"{about}: {text}"
    stderr().print(f"error: {one_line(text)}", style="bold red")


def one_line(text: str) -> str:
    """Return `text` without line breaks or anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def as_json(error: QvlError) -> dict[str, object]:
    """Return the error as JSON values; `raw` is the model's text where it could not be read."""
    names = ["code", "message", "hint", "param", "retryable", *(["raw"] if isinstance(error, AnalysisError) else ())]
    return {"type": type(error).__name__, **{name: getattr(error, name) for name in names}}


def abandon_stdout() -> None:
    """Send what is still in stdout's buffer nowhere, since nobody reads it."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open until the process ends
