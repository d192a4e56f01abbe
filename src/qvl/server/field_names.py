"""Refusals in the words of a route: the fields that the client sent, where the pipeline calls them otherwise."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TypeVar

from qvl.errors import QvlError

ErrorT = TypeVar("ErrorT", bound=QvlError)


def named_as_sent(error: ErrorT, names: Mapping[str, str]) -> ErrorT:
    """Return `error` with each field in `names` called what it maps to, in its message, hint and param.

    A place within `messages` is none of the client's where those were made of something else, and is left out. A name
    that is a word of English too (`messages`, `stop`) is taken for one in a sentence, unless it is written as a field.
    """
    if not names or not isinstance(error, QvlError):
        return error
    found = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?!\w)")
    renamed = copy.copy(error)
    renamed.message = _in_text(error.message, names, found)
    renamed.hint = None if error.hint is None else _in_text(error.hint, names, found)
    if error.param is not None and (match := found.match(error.param)):
        renamed.param = names[match[0]] + ("" if match[0] == "messages" else error.param[match.end() :])
    return renamed


def _in_text(text: str, names: Mapping[str, str], found: re.Pattern[str]) -> str:
    pieces, done = [], 0
    for match in found.finditer(text):
        name, end = match[0], match.end()
        if match.start() < done or not ("_" in name or text[end : end + 1] in ("[", "=", ":", "'")):
            continue
        if name == "messages":
            end += len(re.match(r"(?:\[\d+\]|\.\w+)*", text[end:])[0])  # type: ignore[index]  # it matches nothing too
        pieces += [text[done : match.start()], names[name]]
        done = end
    return "".join([*pieces, text[done:]])
