"""The lines of an input file: read a few at a time, and checked before the first of them is asked."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread
from pydantic_core import from_json

from qvl.errors import QvlError
from qvl.server.batches.objects import LineProblem
from qvl.server.request_body import SMALL_BODY, checked_json

if TYPE_CHECKING:
    from types import TracebackType

    from qvl.types import JsonObject

MAX_LINES: Final = 50_000
MAX_PROBLEMS: Final = 100
MAX_ID: Final = 512
_CHUNK_LINES: Final = 64
_CHUNK_BYTES: Final = 2**20


class LineError(QvlError):
    """A line of an input file that cannot be asked."""

    def __init__(self, number: int | None, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.number = number

    def problem(self) -> LineProblem:
        return {"code": self.code, "line": self.number, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of an input file: its number in the file (from 1), and its fields."""

    number: int
    custom_id: str
    url: str
    body: JsonObject


class LineReader:
    """Reads a file of lines in chunks, so that a large one is never in memory. Blank lines are passed over."""

    def __init__(self, path: Path, max_line: int) -> None:
        self._file = path.open("rb")
        self._max_line = max_line
        self._number = 0

    def __enter__(self) -> LineReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def chunk(self) -> list[tuple[int, bytes]]:
        """Return the next lines with their numbers, a MiB or 64 of them; [] at the end.

        Raises:
            LineError: a line is too long.
        """
        found: list[tuple[int, bytes]] = []
        size = 0
        while size < _CHUNK_BYTES and len(found) < _CHUNK_LINES:
            line = self._file.readline(self._max_line + 2)
            if not line:
                break
            self._number += 1
            if self._number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            size += len(line)
            if len(line.rstrip(b"\r\n")) > self._max_line:
                raise LineError(self._number, "line_too_long", f"the line is longer than {self._max_line} bytes")
            if line.strip():
                found.append((self._number, line.strip()))
        return found


def parse_line(number: int, raw: bytes, urls: Collection[str]) -> BatchLine:
    """Return the request in one line.

    Raises:
        LineError: it is not JSON, or a field is missing or wrong.
    """
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as exc:
        raise LineError(number, "invalid_json_line", f"the line is not valid JSON: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise LineError(number, "invalid_json_line", "the line is not a JSON object")
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if value.get(name) is None:
            raise LineError(number, "missing_required_parameter", f"{name} is missing", name)
        if not isinstance(value[name], kind):
            expected = "an object" if kind is dict else "a string"
            raise LineError(number, "invalid_value", f"{name} is not {expected}", name)
    for name in value.keys() - {"custom_id", "method", "url", "body"}:
        raise LineError(number, "unsupported_parameter", f"unknown field {name[:100]!r}", name[:100])
    custom_id, url, body = value["custom_id"], value["url"], value["body"]
    if not 1 <= len(custom_id) <= MAX_ID:
        raise LineError(number, "invalid_value", f"custom_id must have 1 to {MAX_ID} characters", "custom_id")
    if value["method"] != "POST":
        raise LineError(number, "invalid_method", "method must be POST", "method")
    if url not in urls:
        message = f"url {url[:100]!r} is not {' or '.join(sorted(urls))}"
        raise LineError(number, "invalid_url" if len(urls) > 1 else "mismatched_endpoint", message, "url")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise LineError(number, "missing_required_parameter", "body.model is missing", "body.model")
    if body.get("stream"):
        raise LineError(number, "unsupported_value", "a line of a batch cannot be streamed", "body.stream")
    return BatchLine(number, custom_id, url, body)


async def check_lines(
    path: Path, urls: Collection[str], served: Callable[[str], object], *, max_line: int, max_lines: int = MAX_LINES
) -> tuple[int, str | None, list[LineProblem]]:
    """Return the number of requests of a file, the model of the first, and what is wrong with it, 100 lines at most.

    `served(model)` raises for a model that does not exist. Large lines are checked for what would hold up the event
    loop before they are parsed, and parsing is done in threads.
    """
    problems: list[LineProblem] = []
    seen: dict[str, int] = {}
    count, model = 0, None

    def check(number: int, raw: bytes) -> str:
        line = parse_line(number, raw, urls)
        if (first := seen.setdefault(line.custom_id, number)) != number:
            message = f"the custom_id {line.custom_id[:100]!r} stands in line {first} too; each must be unique"
            raise LineError(number, "duplicate_custom_id", message, "custom_id")
        name: str = line.body["model"]
        served(name)
        return name

    def check_all(lines: list[tuple[int, bytes]]) -> list[str]:
        names = []
        for number, raw in lines:
            try:
                names.append(check(number, raw))
            except QvlError as exc:
                problems.append(_problem(number, exc))
        return names

    with LineReader(path, max_line) as reader:
        while len(problems) < MAX_PROBLEMS:
            try:
                chunk = await anyio.to_thread.run_sync(reader.chunk)
            except LineError as exc:
                problems.append(exc.problem())
                break
            if not chunk:
                break
            count += len(chunk)
            if count > max_lines:
                problems.append(LineError(None, "too_many_requests", f"more than {max_lines} requests").problem())
                break
            fit = []
            for number, raw in chunk:
                try:
                    if len(raw) > SMALL_BODY:
                        await checked_json(raw)
                    fit.append((number, raw))
                except QvlError as exc:
                    problems.append(_problem(number, exc))
            names = await anyio.to_thread.run_sync(check_all, fit)
            model = model or (names[0] if names else None)
    if not count and not problems:
        problems.append(LineError(None, "empty_file", "the file has no requests").problem())
    return count, model, problems[:MAX_PROBLEMS]


def _problem(number: int, error: QvlError) -> LineProblem:
    if isinstance(error, LineError):
        return error.problem()
    return {"code": error.code, "line": number, "message": str(error), "param": error.param}
