"""What the scripted programs of a made-up host share: its folder, its state, and how a program ends.

The folder is in MADE_UP: `root` is its file tree, `first.json` what was installed, pulled and started, `other.json` the
same of another host like it.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
MADE_UP = Path(os.environ["MADE_UP"])
ROOT = MADE_UP / "root"


class ToolError(Exception):
    """What a program says before it ends with `code`."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def state() -> Any:
    first, path = MADE_UP / "first.json", MADE_UP / f"{os.environ.get('MADE_UP_HOST', 'first')}.json"
    kept: dict[str, Any] = {"pip": [], "images": [], "pushed": [], "containers": {}, "kubernetes": []}
    if path.exists():
        kept = json.loads(path.read_text())
    elif first.exists():
        # Another host, on which the same was installed, and nothing runs.
        kept |= {"images": json.loads(first.read_text())["images"]}
    yield kept
    path.write_text(json.dumps(kept))


def need(condition: object, message: str, code: int = 1) -> None:
    if not condition:
        raise ToolError(message, code)


def at(path: str) -> Path:
    """A path of the made-up host, which the test has already put below its root, or not."""
    return Path(path) if path.startswith(str(MADE_UP)) else ROOT / path.lstrip("/")


def option(words: list[str], *names: str) -> list[str]:
    """The values of an option that may be repeated."""
    found = [words[place + 1] for place, word in enumerate(words[:-1]) if word in names]
    return found + [word.partition("=")[2] for word in words if word.partition("=")[0] in names and "=" in word]
