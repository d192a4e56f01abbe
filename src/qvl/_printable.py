"""Texts of others, made fit for a terminal: nothing is left in them that it would obey.

Catalogues, file names, models and endpoints are written by others. Their control characters (which set colours, titles
and the clipboard) and the marks that turn the direction of text are shown as `?`, in JSON as escapes.
"""

from __future__ import annotations

import re
from typing import Final

_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` with `?` for every character that a terminal would obey; line breaks and tabs stay."""
    return _OBEYED.sub("?", text.replace("\r\n", "\n"))


def escaped(json_text: str) -> str:
    """JSON that means the same, with escapes for every character that a terminal would obey."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match.group()):04x}", json_text)
