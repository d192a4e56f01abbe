"""One answer of an endpoint with the times of its pieces."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvl.types import Usage


@dataclass(slots=True)
class TimedAnswer:
    """One answer with its times in `perf_counter` seconds; `first` is when the first non-empty chunk arrived."""

    headers_at: float = 0.0
    first: float | None = None
    last: float = 0.0
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    pieces: int = 0
    streamed: bool = True
    done: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None
    cache: str | None = None
    server_queue: float | None = None
    server_total: float | None = None
    url: str | None = None

    def piece(self, now: float, text: str = "") -> None:
        """Record the arrival time of a chunk, and its text: "" for a part that is none, such as a call."""
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.pieces += 1
        self.text.append(text)
