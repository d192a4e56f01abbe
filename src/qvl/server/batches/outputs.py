"""The two files that a batch writes, answers and errors: a line each, whole or not at all, and never one twice."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_core import from_json

from qvl.errors import ConfigError, write_failed
from qvl.server.answers import dumps
from qvl.server.batches.objects import BatchUsage

if TYPE_CHECKING:
    from qvl.types import JsonObject


def line_id(scope: str, raw: bytes) -> str:
    """Return the id of the answer to the input line `raw`, the same each time; `scope` tells batches apart."""
    return f"batch_req_{hashlib.sha256(scope.encode() + b'/' + raw).hexdigest()[:24]}"


def no_usage() -> BatchUsage:
    return {
        "input_tokens": 0,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 0,
    }


class Outputs:
    """The answers and the errors of a run, appended to their files as they come. Thread-safe.

    What a killed process left is read again by `resume`: `done` has the ids of all lines that were written, by
    custom_id. Each line is written by one call of the system, so that a kill leaves no more than one line torn, and
    that one at the end of its file, where it is cut off.
    """

    def __init__(self, answers: Path, errors: Path) -> None:
        self.answers = answers
        self.errors = errors
        self.done: dict[str, str] = {}
        self.completed = 0
        self.failed = 0
        self.usage = no_usage()
        self.size = 0
        self._lock = threading.Lock()

    def resume(self) -> None:
        """Read what the files hold already.

        Raises:
            QvlError: one of them cannot be read or written, or holds something else.
        """
        for path, failed in ((self.answers, False), (self.errors, True)):
            try:
                self._resume(path, failed)
            except OSError as exc:
                raise write_failed(str(path), exc) from exc

    def _resume(self, path: Path, failed: bool) -> None:
        if not path.exists():
            return
        whole = 0
        with path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    self._count(from_json(line), failed)
                except (ValueError, KeyError, TypeError, AttributeError) as exc:
                    raise ConfigError(f"{path} is not the output of a batch", hint="name another file") from exc
            file.truncate(whole)
        self.size += whole

    def add(self, answer: JsonObject, *, failed: bool) -> None:
        """Append one line to its file; it is on its way to the disk when this returns.

        Raises:
            QvlError: it cannot be written.
        """
        data = dumps(answer) + b"\n"
        path = self.errors if failed else self.answers
        with self._lock:
            try:
                # Opened for each: what another process or a person moves away is not written into.
                number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
                try:
                    written = os.write(number, data)
                    if written < len(data):
                        os.ftruncate(number, os.fstat(number).st_size - written)
                        raise OSError(28, "no space left on device")
                finally:
                    os.close(number)
            except OSError as exc:
                raise write_failed(str(path), exc) from exc
            self.size += len(data)
            self._count(answer, failed)

    def sync(self) -> None:
        """Wait until both files are on the disk."""
        for path in (self.answers, self.errors):
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())

    def _count(self, answer: JsonObject, failed: bool) -> None:
        self.done[answer["custom_id"]] = answer["id"]
        if failed:
            self.failed += 1
            return
        self.completed += 1
        usage = answer["response"]["body"].get("usage") or {}
        asked = usage.get("input_tokens", usage.get("prompt_tokens")) or 0
        # Anthropic's form counts what a prefix cache gave apart from the other input.
        apart = usage.get("cache_read_input_tokens") or 0
        asked += apart
        said = usage.get("output_tokens", usage.get("completion_tokens")) or 0
        details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
        reasoned = usage.get("output_tokens_details") or usage.get("completion_tokens_details") or {}
        total = self.usage
        total["input_tokens"] += asked
        total["output_tokens"] += said
        total["total_tokens"] += asked + said
        total["input_tokens_details"]["cached_tokens"] += details.get("cached_tokens") or apart
        thought = reasoned.get("reasoning_tokens") or reasoned.get("thinking_tokens") or 0
        total["output_tokens_details"]["reasoning_tokens"] += thought


def answered(identity: str, custom_id: str, status: int, request_id: str, body: object) -> JsonObject:
    """Return the line of an answer, or of the error that a route answered with."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": identity, "custom_id": custom_id, "response": response, "error": None}


def unanswered(identity: str, custom_id: str, code: str, message: str) -> JsonObject:
    """Return the line of a request that was not asked."""
    return {"id": identity, "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}
