"""The outcome of checks: a Finding per check, and the report of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warn", "fail", "skip"]
MARKS: Final[Mapping[str, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "red"),
    "skip": ("skip", "dim"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    `summary` is one line. `detail` has the measured values. `fix` is one line with the remedy; every `warn` and `fail`
    has one.
    """

    check: str
    status: Status
    summary: str
    detail: Mapping[str, object] = field(default_factory=dict)
    fix: str | None = None

    @classmethod
    def ok(cls, check: str, summary: str, detail: Mapping[str, object] | None = None) -> Finding:
        return cls(check, "ok", summary, detail or {})

    @classmethod
    def skip(cls, check: str, summary: str, detail: Mapping[str, object] | None = None) -> Finding:
        return cls(check, "skip", summary, detail or {})

    @classmethod
    def warn(cls, check: str, summary: str, fix: str, detail: Mapping[str, object] | None = None) -> Finding:
        return cls(check, "warn", summary, detail or {}, fix)

    @classmethod
    def fail(cls, check: str, summary: str, fix: str, detail: Mapping[str, object] | None = None) -> Finding:
        return cls(check, "fail", summary, detail or {}, fix)

    def __post_init__(self) -> None:
        if self.status in ("warn", "fail") and not self.fix:
            raise ValueError(f"finding {self.check!r} is a {self.status} without a fix line")


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All findings of one examination, in the order of the checks."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, object] = field(default_factory=dict)

    def count(self, status: Status) -> int:
        """Return the number of findings with a status."""
        return sum(finding.status == status for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 all ok, 1 warnings only, 2 at least one failure."""
        if self.count("fail"):
            return 2
        return 1 if self.count("warn") else 0

    def to_json(self) -> str:
        """Return the report as JSON: `exit_code`, `counts`, `facts`, and `findings` with all their fields."""
        counts = {status: sum(item.status == status for item in self.findings) for status in MARKS}
        body = {
            "exit_code": self.exit_code,
            "counts": counts,
            "facts": dict(self.facts),
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(body, ensure_ascii=False, indent=2, default=str)
