"""Makes untrusted text safe to print in a terminal.

Catalogues, file names, model names and endpoints come from others. Their control characters (which set colours, titles
and the clipboard) and bidirectional marks are printed as `?`, in JSON as escapes.
"""

from __future__ import annotations

import re
from typing import Final

_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return `text` with `?` for control characters and bidirectional marks; line breaks and tabs stay."""
    return _OBEYED.sub("?", text.replace("\r\n", "\n"))


def escaped(json_text: str) -> str:
    """Return equivalent JSON with control characters and bidirectional marks escaped."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match.group()):04x}", json_text)
