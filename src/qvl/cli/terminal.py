"""The streams of the program: there even where they were closed, and able to write every letter."""

from __future__ import annotations

import io
import json
import os
import sys

from qvl._printable import escaped


def open_streams() -> None:
    """Give the program its three streams, whichever were closed, with escapes for letters that they cannot write."""
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
    """Return `value` as JSON that stdout can write and no terminal obeys."""
    text = json.dumps(value, ensure_ascii=False, default=str, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, default=str, indent=indent)
    return escaped(text)


def print_json(value: object) -> None:
    """Print `value` as one line of JSON, at once."""
    print(json_line(value), flush=True)


def _fill(number: int) -> None:
    """Take a closed descriptor, so that no file or socket opened later is written to as stdout or stderr."""
    try:
        os.fstat(number)
    except OSError:
        empty = os.open(os.devnull, os.O_RDWR)
        if empty != number:
            os.dup2(empty, number)
            os.close(empty)
