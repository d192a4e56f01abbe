"""The record of a request as one line of `results.jsonl`, and the folder of a run, which can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, NotRequired, TypeAlias, TypedDict

from qvl.bench.plan import PlanFacts
from qvl.errors import ConfigError, write_failed
from qvl.types import JsonObject

RESULTS: Final = "results.jsonl"
RUN: Final = "run.json"
SUMMARY: Final = "summary.json"
REPORT: Final = "report.html"
Window: TypeAlias = tuple[int, int, float, float]
"""A steady part: endpoint, stage, start, end."""


class EndpointName(TypedDict):
    url: str
    model: str


class RunRequest(TypedDict):
    """The settings of a run that must be equal when it is resumed."""

    endpoints: list[EndpointName]
    input: dict[str, object]
    params: JsonObject
    stream: bool
    target: NotRequired[str]
    plan: PlanFacts


class ClientFacts(TypedDict):
    """Delays caused by the load client itself: late wake-ups, waits for pictures, late sending in the open loop."""

    lag_p50: float
    lag_p99: float
    starved_share: float
    behind: float
    pace: float
    limits: list[tuple[float, int]]


class BadLines(TypedDict):
    count: int
    lines: list[str]


class Session(TypedDict):
    """One process's work on a run."""

    windows: list[Window]
    ended: bool | None
    interrupted: NotRequired[bool]
    client: NotRequired[ClientFacts]
    bad_lines: NotRequired[BadLines]


@dataclass(slots=True)
class RequestRecord:
    """One finished request. Times are seconds; `start` and `end` are on the session's own clock.

    Args:
        latency: from the intended start to the end of the answer, retries and waits included.
        ttft: from the intended start to the first non-empty chunk.
        tpot: (latency - ttft) / (completion_tokens - 1), of the attempt that was answered.
        wait: from the intended start to the actual sending.
        phase: `measure`, `ramp` or `warmup`.
        stage: the number of clients, in a sweep; otherwise 0.
        counted: True if the server counted the tokens; False if the chunks of the stream were counted.
    """

    id: str
    request_id: str
    success: bool = False
    response: str | None = None
    error: str | None = None
    latency: float = 0.0
    tokens_used: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retry_count: int = 0
    index: int = 0
    endpoint: int = 0
    url: str = ""
    model: str = ""
    phase: str = "measure"
    stage: int = 0
    session: int = 0
    start: float = 0.0
    end: float = 0.0
    wait: float = 0.0
    ttft: float | None = None
    tpot: float | None = None
    first_byte: float | None = None
    itl: list[float] = field(default_factory=list)
    retry_wait: float = 0.0
    retried_for: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    counted: bool = True
    pictures: int = 0
    pixel_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    cache: str | None = None
    server_queue: float | None = None
    server_total: float | None = None
    error_kind: str | None = None
    status: int | None = None
    expected: object = None

    def to_json(self) -> str:
        """Return the record as one line of JSON; `id` to `retry_count` come first, in that order."""
        line = {name: getattr(self, name) for name in NAMES}
        for name in _ROUNDED:
            if line[name] is not None:
                line[name] = round(line[name], 6)
        line["itl"] = [round(gap, 5) for gap in self.itl]
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


NAMES: Final = tuple(item.name for item in fields(RequestRecord))
_ROUNDED: Final = ("latency", "start", "end", "wait", "ttft", "tpot", "first_byte", "retry_wait")


def read_records(path: Path) -> Iterator[RequestRecord]:
    """Yield the records of a results file; a truncated last line is ignored."""
    known = frozenset(NAMES)
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
                yield RequestRecord(**{name: value for name, value in values.items() if name in known})
            except (ValueError, TypeError, AttributeError) as exc:
                raise ConfigError(
                    f"{path} has a line that is not a result: {str(exc)[:80]}", hint="start a new run"
                ) from exc


class Done:
    """The set of finished (endpoint, item) pairs, one bit each."""

    def __init__(self) -> None:
        self._bits: dict[int, bytearray] = {}
        self.count = 0

    def add(self, endpoint: int, index: int) -> None:
        bits = self._bits.setdefault(endpoint, bytearray())
        if index // 8 >= len(bits):
            bits.extend(bytes(index // 8 + 1 - len(bits) + len(bits) // 2))
        if not bits[index // 8] >> index % 8 & 1:
            bits[index // 8] |= 1 << index % 8
            self.count += 1

    def __contains__(self, key: tuple[int, int]) -> bool:
        endpoint, index = key
        bits = self._bits.get(endpoint, b"")
        return index // 8 < len(bits) and bool(bits[index // 8] >> index % 8 & 1)


class RunFolder:
    """The folder of a run: `results.jsonl`, growing, and `run.json` with the settings and sessions.

    A session is one process's work on the run. Each record is flushed to the system at once, so that it survives a
    kill.

    Raises:
        ConfigError: the folder has a run already, or (`resume`) has none or one with other settings.
    """

    def __init__(self, path: Path, request: RunRequest, *, resume: bool) -> None:
        self.path = path
        self.request: RunRequest = json.loads(json.dumps(request))
        self.sessions: list[Session] = []
        self.done = Done()
        self.worked = 0.0
        if resume:
            self._go_on()
        elif (path / RESULTS).exists():
            raise ConfigError(f"{path} already has a run", hint="choose another --out, or continue with --resume")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lines = (path / RESULTS).open("ab", buffering=0)
        except OSError as exc:
            raise write_failed(f"--out {path}", exc) from exc
        self.session = len(self.sessions)
        self.sessions.append({"windows": [], "ended": None})
        self.save()

    def add(self, record: RequestRecord) -> None:
        """Append a record."""
        try:
            self._lines.write(record.to_json().encode("utf-8", "backslashreplace") + b"\n")
        except OSError as exc:
            raise write_failed(str(self.path / RESULTS), exc) from exc

    def add_window(self, endpoint: int, stage: int, start: float, end: float) -> None:
        """Record a steady part of this session: every client was busy from `start` to `end`."""
        if end > start:
            self.sessions[-1]["windows"].append((endpoint, stage, round(start, 6), round(end, 6)))

    def save(self) -> None:
        """Write `run.json` atomically."""
        write_json(self.path / RUN, {"asked": self.request, "sessions": self.sessions})

    def close(self) -> None:
        self.save()
        self._lines.close()

    def _go_on(self) -> None:
        if not (self.path / RUN).exists():
            raise ConfigError(f"{self.path} has no run to resume", hint="leave --resume out to start one")
        run = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        for name, value in self.request.items():
            if run["asked"].get(name, "chat" if name == "target" else None) != value:
                raise ConfigError(
                    f"the run in {self.path} was started with another {name}: {run['asked'].get(name)!r:.80}",
                    hint="give the same input, endpoints and options to --resume",
                )
        self.sessions = run["sessions"]
        results = self.path / RESULTS
        if not results.exists():
            return
        _cut_torn_line(results)
        ends: dict[int, float] = {}
        for record in read_records(results):
            if record.phase != "warmup":
                self.done.add(record.endpoint, record.index)
                ends[record.session] = max(ends.get(record.session, 0.0), record.end)
        self.worked = sum(ends.values())


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically; a surrogate that stands for nothing is written as JSON escapes it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(draft, path)
    except OSError as exc:
        raise write_failed(str(path), exc) from exc
    finally:
        draft.unlink(missing_ok=True)


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill left incomplete."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            step = min(65536, end)
            file.seek(end - step)
            newline = file.read(step).rfind(b"\n")
            if newline >= 0:
                end = end - step + newline + 1
                break
            end -= step
        if end != size:
            file.truncate(end)
