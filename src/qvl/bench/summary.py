"""The whole of a run as `summary.json` has it, made from the files of its folder alone."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qvl.bench.metrics import FORMULAS, Group, Windows
from qvl.bench.pairs import Agreement, Pairs
from qvl.bench.record import RESULTS, RUN, RequestRecord, read_records

KNEE: Final = 0.9
KEPT_POINTS: Final = 4_000
LATE_SHARE: Final = 0.02
SLOW_PACE: Final = 0.9


@dataclass(slots=True)
class Points:
    """A fair draw of (start, end, ttft, latency, success, endpoint), for plots; counts of each second, of all."""

    kept: list[tuple[float, float, float | None, float, bool, int]] = field(default_factory=list)
    seconds: dict[int, list[int]] = field(default_factory=dict)
    seen: int = 0
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, record: RequestRecord, offset: float) -> None:
        start, end = record.start + offset, record.end + offset
        self.seconds.setdefault(int(end), [0, 0])[not record.success] += 1
        self.seen += 1
        point = (start, end, record.ttft, record.latency, record.success, record.endpoint)
        if len(self.kept) < KEPT_POINTS:
            self.kept.append(point)
        elif (place := self._dice.randrange(self.seen)) < KEPT_POINTS:
            self.kept[place] = point


@dataclass(frozen=True, slots=True)
class Summary:
    """`data` goes to `summary.json`; `points` only to the plots."""

    data: dict[str, Any]
    points: Points

    @property
    def success_rate(self) -> float:
        """Over all endpoints, warm-up left out; 1 of nothing."""
        sent = sum(found["requests"]["sent"] for found in self.data["all"])
        ok = sum(found["requests"]["ok"] for found in self.data["all"])
        return ok / sent if sent else 1.0


def summarise(folder: Path) -> Summary:
    """Reads a run's folder once from end to end.

    Raises:
        ConfigError: the results cannot be read.
    """
    held = json.loads((folder / RUN).read_text(encoding="utf-8"))
    asked, sessions = held["asked"], held["sessions"]
    urls = asked["endpoints"]
    groups: dict[tuple[int, int], Group] = {}
    expected = [Agreement() for _ in urls]
    warm: list[list[int]] = [[0, 0] for _ in urls]
    pairs, points = Pairs(len(urls)), Points()
    offsets: dict[int, float] = {}
    end = 0.0
    for record in read_records(folder / RESULTS):
        if record.phase == "warmup":
            warm[record.endpoint][0] += 1
            warm[record.endpoint][1] += record.success
            continue
        offset = offsets.setdefault(record.session, end)
        end = max(end, record.end + offset)
        points.add(record, offset)
        key = (record.endpoint, record.stage)
        if key not in groups:
            groups[key] = _group(key, sessions, asked["plan"])
        groups[key].add(record)
        if record.expected is not None:
            expected[record.endpoint].add(record.expected, record.response)
        if len(urls) > 1:
            pairs.add(record)
    stages = {key: _named(group.summary(), urls[key[0]], key[1]) for key, group in groups.items()}
    data: dict[str, Any] = {
        "format": "qvl-bench-1",
        "asked": asked,
        "interrupted": bool(sessions[-1].get("interrupted")) if sessions else False,
        "sessions": len(sessions),
        "formulas": FORMULAS,
        "all": list(stages.values()),
    }
    if asked["plan"].get("sweep"):
        data["sweep"], data["knees"] = _sweep(stages, len(urls))
        keys = [(number, knee) for number, knee in enumerate(data["knees"]) if knee is not None]
    else:
        keys = sorted(stages)
    shown = data["endpoints"] = [stages[key] for key in keys]
    for (number, _), found in zip(keys, shown, strict=True):
        found["expected"] = expected[number].summary()
        found["warmup"] = {"sent": warm[number][0], "ok": warm[number][1]}
    data["paired"] = pairs.summary() if len(urls) > 1 else []
    data["client"] = _client(sessions)
    data["bad_lines"] = (sessions[-1].get("bad_lines") if sessions else None) or {"count": 0, "lines": []}
    data["warnings"] = _warnings(data)
    return Summary(data, points)


def _group(key: tuple[int, int], sessions: list[dict[str, Any]], plan: Mapping[str, Any]) -> Group:
    windows, full = {}, False
    for number, session in enumerate(sessions):
        mine = [window for window in session["windows"] if (window[0], window[1]) == key]
        if mine:
            windows[number] = Windows((window[2], window[3]) for window in mine)
            full = full or any(window[4] for window in mine)
    return Group(windows, full, plan.get("slo") or {}, open_loop=plan.get("rate") is not None)


def _named(found: dict[str, Any], endpoint: Mapping[str, str], stage: int) -> dict[str, Any]:
    return {"url": endpoint["url"], "model": endpoint["model"], "clients": stage or None, **found}


def _sweep(
    stages: Mapping[tuple[int, int], dict[str, Any]], endpoints: int
) -> tuple[list[list[dict[str, Any]]], list[int | None]]:
    """The levels of each endpoint, and the knee: the fewest clients that reach 90 % of the best throughput.

    Where there are bounds (`--slo`), throughput means requests that keep them.
    """
    levels: list[list[dict[str, Any]]] = []
    knees: list[int | None] = []
    for number in range(endpoints):
        mine = [stages[key] for key in sorted(stages) if key[0] == number]
        rows = []
        for found in mine:
            rates, figures = found["throughput"], found["figures"]
            rows.append(
                {
                    "clients": found["clients"],
                    "requests_per_second": rates["requests_per_second"],
                    "goodput_requests_per_second": rates["goodput_requests_per_second"],
                    "completion_tokens_per_second": rates["completion_tokens_per_second"],
                    "ttft_p50": (figures["ttft"] or {}).get("p50"),
                    "e2e_p50": (figures["e2e"] or {}).get("p50"),
                    "e2e_p99": (figures["e2e"] or {}).get("p99"),
                    "success_rate": found["requests"]["success_rate"],
                }
            )
        levels.append(rows)
        knees.append(knee(rows))
    return levels, knees


def knee(rows: list[dict[str, Any]]) -> int | None:
    """The fewest clients whose throughput is within 10 % of the best of all levels."""
    rates = [_rate(row) for row in rows]
    best = max(rates, default=0.0)
    return next((row["clients"] for row, rate in zip(rows, rates, strict=True) if rate >= KNEE * best), None)


def _rate(row: Mapping[str, Any]) -> float:
    good = row["goodput_requests_per_second"]
    return float((row["requests_per_second"] if good is None else good) or 0.0)


def _client(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of the load client itself: how late it woke, how long clients waited for a request to send."""
    noted = [session["client"] for session in sessions if session.get("client")]
    return {
        "lag_p50": max((found["lag_p50"] for found in noted), default=0.0),
        "lag_p99": max((found["lag_p99"] for found in noted), default=0.0),
        "starved_share": max((found["starved_share"] for found in noted), default=0.0),
        "behind": max((found["behind"] for found in noted), default=0.0),
        "pace": min((found.get("pace", 1.0) for found in noted), default=1.0),
        "limits": [limit for found in noted for limit in found.get("limits", ())][-2000:],
    }


def _warnings(data: Mapping[str, Any]) -> list[str]:
    said = []
    for found in data["endpoints"]:
        said += _picture_warning(found)
        if found["tokens"]["counted_by"] != "the server":
            said.append(f"{found['url']} did not count its tokens for every answer: pieces of the stream were counted")
        if not found["throughput"]["steady"]:
            said.append(
                f"{found['url']}: there was no steady part (fewer requests than clients, or a run cut off): requests/s "
                "are of the whole run"
            )
        ttft = found["figures"]["ttft"]
        if ttft and data["client"]["lag_p50"] > LATE_SHARE * ttft["p50"]:
            said.append(
                f"this client itself was late by {data['client']['lag_p50'] * 1000:.1f} ms at the median, which is "
                f"above 2 % of the time to first token of {found['url']}: use a quieter machine"
            )
    if data["client"]["starved_share"] > 0.05:
        share = data["client"]["starved_share"]
        said.append(f"clients waited {share:.0%} of their time for this client to read pictures: the load was lower")
    rate = data["asked"]["plan"].get("rate")
    behind, pace = data["client"]["behind"], data["client"]["pace"]
    if rate and (behind > max(0.1, 10 / rate) or pace < SLOW_PACE):
        share = f", {pace:.0%} of the rate in all" if pace < SLOW_PACE else ""
        said.append(
            f"requests were sent up to {behind:.2f} s later than meant{share}: the most in flight "
            "(--concurrency), or what this machine can send, was reached; latencies count that wait"
        )
    if data["bad_lines"]["count"]:
        said.append(f"{data['bad_lines']['count']} lines of the input were no requests and were skipped")
    return said


def _picture_warning(found: Mapping[str, Any]) -> list[str]:
    pictures = found["pictures"]
    if not pictures["requests"] or pictures["image_tokens"] or not found["requests"]["ok"]:
        return []
    if not found["tokens"]["prompt"] or not pictures["prompt_tokens"]:
        seen = "and no prompt tokens either"
    else:
        seen = (
            f"and {pictures['prompt_tokens']} prompt tokens in all, where Qwen3-VL makes about "
            f"{pictures['expected_tokens']} of the pictures alone"
        )
    return [
        f"NO PICTURE TOKENS: {found['url']} got {pictures['requests']} requests with pictures, counted none, {seen}"
    ]
