"""The standard streams: opened even if the caller closed them, and able to write every character."""

from __future__ import annotations

import io
import json
import os
import sys

from qvl._printable import escaped


def open_streams() -> None:
    """Open closed standard streams on the null device; let the output streams escape characters they cannot encode."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _fill(number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif (
            name != "stdin" and isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape")
        ):
            stream.reconfigure(errors="backslashreplace")


def json_line(value: object, *, indent: int | None = None) -> str:
    """Return `value` as JSON that stdout's encoding can represent, without terminal control characters."""
    text = json.dumps(value, ensure_ascii=False, default=str, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, default=str, indent=indent)
    return escaped(text)


def print_json(value: object) -> None:
    """Print `value` as one line of JSON and flush."""
    print(json_line(value), flush=True)


def _fill(number: int) -> None:
    """Open the closed descriptor `number`, so that no later file or socket gets it and receives stdout or stderr."""
    try:
        os.fstat(number)
    except OSError:
        empty = os.open(os.devnull, os.O_RDWR)
        if empty != number:
            os.dup2(empty, number)
            os.close(empty)
