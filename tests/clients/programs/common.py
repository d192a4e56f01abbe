"""What every client's program needs: the server, a picture, and a report of what worked.

    python PROGRAM URL MODEL PICTURE

A program is a script in an environment of its own, so it imports nothing of the tests.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

URL, MODEL, FILE = sys.argv[1:4]
PNG = base64.b64encode(Path(FILE).read_bytes()).decode()
DATA_URL = f"data:image/png;base64,{PNG}"
QUESTION = "What brand is it?"
BRAND = "NORVIK"
# What the bundled model says to a question about no picture.
TEXT = "I need a picture."
# Values of a closed set, so that a model of any size gives an answer that ends.
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "string", "enum": ["small", "large"]}},
    "required": ["size"],
    "additionalProperties": False,
}


class Picked(BaseModel):
    """The size that is picked."""

    size: Literal["small", "large"]


def check(text: object, wanted: str) -> None:
    assert str(text).strip() == wanted, f"{text!r} instead of {wanted!r}"


def fails(call: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...], word: str = "nope") -> None:
    """Check that `call` raises `kind` with the server's own words in it."""
    caught: Exception | None = None
    try:
        call()
    except kind as exc:
        caught = exc
    assert word in str(caught), f"{caught!r}"


def run(package: str, **features: Callable[[], object]) -> None:
    """Try each feature and print {"version", "results"} as JSON: "ok", or the traceback of what failed."""
    results = {}
    for name, feature in features.items():
        try:
            feature()
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()[-1500:]
    print("\n" + json.dumps({"version": importlib.metadata.version(package), "results": results}))
