"""An uploaded file: multipart/form-data written to disk as it arrives, refused as soon as it is seen to be wrong."""

from __future__ import annotations

import asyncio
import codecs
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qvl.errors import RequestError
from qvl.server.batches.objects import HOUR, LONGEST
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_FIELD: Final = 1000
MAX_FIELDS: Final = 20
MAX_HEADER: Final = 8192
# What stands around a file in its form.
MARGIN: Final = 64 * 1024
_WRITE_BYTES: Final = 2**20


class Upload:
    """Reads one form with a `file` and some fields. The file's name is a label, and never part of a path.

    Args:
        path: where to write the file.
        max_bytes: of the file.
        max_line: of one of its lines; a longer one could not be asked.
    """

    def __init__(self, path: Path, content_type: bytes, *, max_bytes: int, max_line: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
            raise HttpError(
                415,
                "the body must be multipart/form-data with a boundary",
                hint="send a form with the fields file and purpose",
                code="unsupported_media_type",
            )
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.size = 0
        self._path = path
        self._max_bytes = max_bytes
        self._max_line = max_line
        self._line = 0
        self._begun = False
        self._ended = False
        self._file: BinaryIO | None = None
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._part: tuple[str, str | None] | None = None
        self._value = bytearray()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._on_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._on_header(1, data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": lambda data, start, end: self._on_data(data[start:end]),
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def read(self, pieces: AsyncIterator[bytes], arrived: Callable[[int], None]) -> None:
        """Read the whole form; `arrived(bytes)` is told how much of the file there is, and may raise to stop it.

        Raises:
            HttpError: 413, the file or a line is too long; 400, it is no form, or not a file of JSON lines.
        """
        self._file = await asyncio.to_thread(self._path.open, "wb")
        try:
            async for piece in pieces:
                try:
                    self._parser.write(piece)
                except FormParserError as exc:
                    raise HttpError(400, "the body is not a valid form", code="invalid_body") from exc
                arrived(self.size)
                if self._pending_size > _WRITE_BYTES:
                    await self._flush()
            await self._flush()
            await asyncio.to_thread(os.fsync, self._file.fileno())
        finally:
            self._file.close()
        if not self._ended:
            raise HttpError(400, "the form ends in the middle", hint="send all of it", code="invalid_body")
        if not self.filename:
            raise RequestError("file is missing", param="file", code="missing_required_parameter")
        if not self._begun:
            raise RequestError("the file is empty", param="file", code="empty_file")

    async def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_size = 0
        assert self._file is not None
        await asyncio.to_thread(self._file.write, data)

    def _on_part_begin(self) -> None:
        self._headers.clear()
        self._part = None
        self._value.clear()

    def _on_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if len(self._header[0]) + len(self._header[1]) > MAX_HEADER or len(self._headers) > MAX_FIELDS:
            raise HttpError(400, "a part of the form has too long headers", code="invalid_body")

    def _on_header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        for part in self._header:
            part.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._part = name, None if filename is None else filename.decode("utf-8", "replace")
        if name == "file":
            if self.filename:
                raise RequestError("file is there twice", param="file", code="invalid_value")
            if filename is None:
                raise RequestError("file is not a file", hint="send it with a filename", param="file")
            self.filename = plain_name(self._part[1] or "")
        elif name in self.fields or len(self.fields) >= MAX_FIELDS:
            raise RequestError(f"{name[:100] or 'a field'} is there twice, or one too many", param=name[:100] or None)

    def _on_data(self, data: bytes) -> None:
        assert self._part is not None
        if self._part[0] == "file":
            self._on_file(data)
            return
        self._value += data
        if len(self._value) > MAX_FIELD:
            name = self._part[0][:100]
            raise RequestError(f"{name} is longer than {MAX_FIELD} bytes", param=name, code="invalid_value")

    def _on_file(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._max_bytes:
            raise too_large(self._max_bytes)
        last = data.rfind(b"\n")
        # All but the first line of a piece are shorter than the piece, which comes from a network.
        longest = self._line + (len(data) if last < 0 else data.index(b"\n"))
        self._line = self._line + len(data) if last < 0 else len(data) - last - 1
        if max(longest, self._line) > self._max_line + 1:
            raise HttpError(
                413,
                f"a line of the file is longer than {self._max_line} bytes",
                hint="one request a line; send smaller pictures, or URLs",
                param="file",
                code="request_too_large",
            )
        if not self._begun:
            start = data.removeprefix(codecs.BOM_UTF8) if self.size == len(data) else data
            start = start.lstrip()
            if start and start[:1] != b"{":
                raise RequestError(
                    "the file is not JSONL: it does not begin with {",
                    hint="one JSON object a line, in UTF-8",
                    param="file",
                    code="invalid_jsonl",
                )
            self._begun = bool(start)
        self._pending.append(data)
        self._pending_size += len(data)

    def _on_part_end(self) -> None:
        assert self._part is not None
        if self._part[0] != "file":
            self.fields[self._part[0]] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._ended = True


def too_large(limit: int) -> HttpError:
    return HttpError(
        413,
        f"the file is larger than {limit} bytes",
        hint="split it into several batches, or raise qvl-serve --max-batch-file-mb",
        param="file",
        code="request_too_large",
        headers=((b"connection", b"close"),),
    )


def plain_name(sent: str) -> str:
    """Return the last step of a file name as it was sent, without control characters; "upload" if nothing is left."""
    name = re.split(r"[/\\]", sent)[-1]
    name = "".join(letter for letter in name if letter.isprintable())[:255]
    return name if name.strip(". ") else "upload"


def purpose_and_expiry(fields: dict[str, str]) -> tuple[str, int | None]:
    """Return the purpose, and the seconds until the file expires if the form says so.

    Raises:
        RequestError: a field is missing, unknown or wrong.
    """
    for name in fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}:
        raise RequestError(f"unknown field {name[:100]!r}", param=name[:100], code="unsupported_parameter")
    purpose = fields.get("purpose")
    if purpose is None:
        raise RequestError("purpose is missing", hint="batch", param="purpose", code="missing_required_parameter")
    if purpose != "batch":
        message = f"files of the purpose {purpose[:50]!r} have no use here"
        raise RequestError(message, hint="purpose='batch'", param="purpose", code="unsupported_value")
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, None
    if anchor != "created_at" or seconds is None:
        raise RequestError("expires_after needs anchor=created_at and seconds", param="expires_after")
    if not seconds.isdecimal() or len(seconds) > 9 or not HOUR <= int(seconds) <= LONGEST:
        message = f"expires_after.seconds must be {HOUR} to {LONGEST}"
        raise RequestError(message, param="expires_after", code="invalid_value")
    return purpose, int(seconds)
