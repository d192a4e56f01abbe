"""Tells PDF documents by the first bytes of their files, their media type or their name."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Final

from qvl.media.base64_codec import Base64Picture

# As far as readers look for the mark: some programs write a few lines in front of it.
HEAD: Final = 1024
_MARK: Final = b"%PDF-"


def is_document(head: bytes) -> bool:
    """True if `head`, the first bytes of a file (HEAD of them or all), begins a PDF document."""
    at = head[:HEAD].find(_MARK)
    if at <= 0:
        return at == 0
    from qvl.media.image_header import sniff

    return not sniff(head[:HEAD])


def _is_open_document(file: object) -> bool:
    """True for a file object that can go back to its start, where a document begins."""
    if not (isinstance(file, io.IOBase) and file.seekable()):
        return False
    with suppress(OSError, ValueError):
        file.seek(0)
        head: object = file.read(HEAD)
        file.seek(0)
        return isinstance(head, bytes) and is_document(head)
    return False


def looks_like_document(source: object, *, files: bool = True) -> bool:
    """True if `source` is a PDF by its first bytes or its media type, or a URL by its name.

    No URL is fetched for that, and with `files` False no file is opened.
    """
    if isinstance(source, Base64Picture):
        return source.head[:21].lower() == "data:application/pdf;" or is_document(source.data[:HEAD])
    if isinstance(source, bytes | bytearray | memoryview):
        return is_document(bytes(source[:HEAD]))
    if isinstance(source, str):
        text = source[:HEAD].strip()
        if text[:8].lower().startswith(("http://", "https://")):
            return False
        if text[:5].lower() == "data:":
            # JVBERi is "%PDF" in base64.
            return text[:21].lower() == "data:application/pdf;" or "base64,JVBERi" in text[:200]
    if not files:
        return False
    if not isinstance(source, str | os.PathLike):
        return _is_open_document(source)
    path = os.path.expanduser(os.fsdecode(source))
    with suppress(OSError, ValueError), open(path.removeprefix("file://"), "rb") as file:
        return is_document(file.read(HEAD))
    return False
