"""The summary of a run (`summary.json`), computed only from the files of its folder."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NotRequired, TypedDict

from qvl.bench.apis import find_api
from qvl.bench.metrics import FORMULAS, Group, GroupSummary, Windows
from qvl.bench.pairs import Agreement, AgreementSummary, Pairs, PairSummary
from qvl.bench.plan import PlanFacts
from qvl.bench.record import RESULTS, RUN, BadLines, ClientFacts, RequestRecord, RunRequest, Session, read_records

KNEE: Final = 0.9
KEPT_POINTS: Final = 4_000
KEPT_GAPS: Final = 50_000
LATE_SHARE: Final = 0.02
SLOW_PACE: Final = 0.9


class WarmUpCounts(TypedDict):
    sent: int
    ok: int


class EndpointSummary(GroupSummary):
    """The figures of one endpoint; `clients` is the level of a sweep."""

    url: str
    model: str
    clients: int | None
    expected: AgreementSummary | None
    warmup: WarmUpCounts


class SweepLevel(TypedDict):
    clients: int | None
    requests_per_second: float | None
    goodput_requests_per_second: float | None
    completion_tokens_per_second: float | None
    ttft_p50: float | None
    e2e_p50: float | None
    e2e_p99: float | None
    success_rate: float | None


class SummaryData(TypedDict):
    """The content of `summary.json`: `endpoints` are the shown figures, `all` also has every level of a sweep."""

    format: str
    asked: RunRequest
    interrupted: bool
    sessions: int
    formulas: dict[str, str]
    all: list[EndpointSummary]
    sweep: NotRequired[list[list[SweepLevel]]]
    knees: NotRequired[list[int | None]]
    endpoints: list[EndpointSummary]
    paired: list[PairSummary]
    client: ClientFacts
    bad_lines: BadLines
    warnings: list[str]


@dataclass(slots=True)
class Points:
    """Data for plots: a uniform sample of (start, end, ttft, latency, success, endpoint), and requests per second.

    `gaps` are seconds between two pieces of an answer, by endpoint, of the first answers.
    """

    kept: list[tuple[float, float, float | None, float, bool, int]] = field(default_factory=list)
    seconds: dict[int, list[int]] = field(default_factory=dict)
    gaps: dict[int, list[float]] = field(default_factory=dict)
    count: int = 0
    _dice: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, record: RequestRecord, offset: float) -> None:
        start, end = record.start + offset, record.end + offset
        self.seconds.setdefault(int(end), [0, 0])[not record.success] += 1
        gaps = self.gaps.setdefault(record.endpoint, [])
        if record.success and len(gaps) < KEPT_GAPS:
            gaps += record.itl
        self.count += 1
        point = (start, end, record.ttft, record.latency, record.success, record.endpoint)
        if len(self.kept) < KEPT_POINTS:
            self.kept.append(point)
        elif (index := self._dice.randrange(self.count)) < KEPT_POINTS:
            self.kept[index] = point


@dataclass(frozen=True, slots=True)
class Summary:
    """The summary of a run: `data` is written to `summary.json`; `points` are only for plots."""

    data: SummaryData
    points: Points

    @property
    def success_rate(self) -> float:
        """The share (0 to 1) of successful requests at all endpoints, without warm-up; 1 if none was sent."""
        sent = sum(group["requests"]["sent"] for group in self.data["all"])
        ok = sum(group["requests"]["ok"] for group in self.data["all"])
        return ok / sent if sent else 1.0


def summarise(folder: Path) -> Summary:
    """Return the summary of the run in `folder`, reading its records once.

    Raises:
        ConfigError: the results cannot be read.
    """
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    request: RunRequest = run["asked"]
    sessions: list[Session] = run["sessions"]
    urls = request["endpoints"]
    groups: dict[tuple[int, int], Group] = {}
    expected = [Agreement() for _ in urls]
    warm: list[WarmUpCounts] = [{"sent": 0, "ok": 0} for _ in urls]
    pairs, points = Pairs(len(urls)), Points()
    offsets: dict[int, float] = {}
    end = 0.0
    for record in read_records(folder / RESULTS):
        if record.phase == "warmup":
            warm[record.endpoint]["sent"] += 1
            warm[record.endpoint]["ok"] += record.success
            continue
        offset = offsets.setdefault(record.session, end)
        end = max(end, record.end + offset)
        points.add(record, offset)
        key = (record.endpoint, record.stage)
        if key not in groups:
            groups[key] = _group(key, sessions, request["plan"])
        groups[key].add(record)
        if record.expected is not None:
            expected[record.endpoint].add(record.expected, record.response)
        if len(urls) > 1:
            pairs.add(record)
    stages: dict[tuple[int, int], EndpointSummary] = {
        (number, stage): {
            "url": urls[number]["url"],
            "model": urls[number]["model"],
            "clients": stage or None,
            **group.summary(),
            "expected": expected[number].summary(),
            "warmup": warm[number],
        }
        for (number, stage), group in groups.items()
    }
    last: Session = sessions[-1] if sessions else {"windows": [], "ended": None}
    data: SummaryData = {
        "format": "qvl-bench-1",
        "asked": request,
        "interrupted": bool(last.get("interrupted")),
        "sessions": len(sessions),
        "formulas": FORMULAS,
        "all": list(stages.values()),
        "endpoints": [],
        "paired": pairs.summary() if len(urls) > 1 else [],
        "client": _client(sessions),
        "bad_lines": last.get("bad_lines") or {"count": 0, "lines": []},
        "warnings": [],
    }
    keys = sorted(stages)
    if request["plan"]["sweep"]:
        data["sweep"], data["knees"] = _sweep(stages, len(urls))
        keys = [(number, knee) for number, knee in enumerate(data["knees"]) if knee is not None]
    data["endpoints"] = [stages[key] for key in keys]
    data["warnings"] = _warnings(data)
    return Summary(data, points)


def _group(key: tuple[int, int], sessions: list[Session], plan: PlanFacts) -> Group:
    windows = {}
    for number, session in enumerate(sessions):
        steady = [window for window in session["windows"] if (window[0], window[1]) == key]
        if steady:
            windows[number] = Windows((window[2], window[3]) for window in steady)
    return Group(windows, bool(windows), plan["slo"], open_loop=plan["rate"] is not None)


def _sweep(
    stages: Mapping[tuple[int, int], EndpointSummary], endpoints: int
) -> tuple[list[list[SweepLevel]], list[int | None]]:
    """Return (levels, knee) per endpoint; the knee is the fewest clients with 90 % of the best throughput.

    With bounds (`--slo`), throughput counts only requests within them.
    """
    levels: list[list[SweepLevel]] = []
    knees: list[int | None] = []
    for number in range(endpoints):
        rows: list[SweepLevel] = []
        for group in (stages[key] for key in sorted(stages) if key[0] == number):
            rates, ttft, e2e = group["throughput"], group["figures"]["ttft"], group["figures"]["e2e"]
            rows.append(
                {
                    "clients": group["clients"],
                    "requests_per_second": rates["requests_per_second"],
                    "goodput_requests_per_second": rates["goodput_requests_per_second"],
                    "completion_tokens_per_second": rates["completion_tokens_per_second"],
                    "ttft_p50": ttft and ttft["p50"],
                    "e2e_p50": e2e and e2e["p50"],
                    "e2e_p99": e2e and e2e["p99"],
                    "success_rate": group["requests"]["success_rate"],
                }
            )
        levels.append(rows)
        knees.append(knee(rows))
    return levels, knees


def knee(rows: Sequence[SweepLevel]) -> int | None:
    """Return the fewest clients that reach 90 % of the sweep's best throughput; None without levels."""
    rates = [_rate(row) for row in rows]
    best = max(rates, default=0.0)
    return next((row["clients"] for row, rate in zip(rows, rates, strict=True) if rate >= KNEE * best), None)


def _rate(row: SweepLevel) -> float:
    good = row["goodput_requests_per_second"]
    return (row["requests_per_second"] if good is None else good) or 0.0


def _client(sessions: list[Session]) -> ClientFacts:
    facts = [session["client"] for session in sessions if session.get("client")]
    return {
        "lag_p50": max((session["lag_p50"] for session in facts), default=0.0),
        "lag_p99": max((session["lag_p99"] for session in facts), default=0.0),
        "starved_share": max((session["starved_share"] for session in facts), default=0.0),
        "behind": max((session["behind"] for session in facts), default=0.0),
        "pace": min((session["pace"] for session in facts), default=1.0),
        "limits": [limit for session in facts for limit in session["limits"]][-2000:],
    }


def _warnings(data: SummaryData) -> list[str]:
    warnings = []
    for endpoint in data["endpoints"]:
        warnings += _picture_warning(endpoint, target_of(data["asked"]))
        if endpoint["tokens"]["counted_by"] != "the server":
            warnings.append(f"{endpoint['url']} did not count the tokens of every answer: stream chunks were counted")
        if not endpoint["throughput"]["steady"]:
            warnings.append(
                f"{endpoint['url']}: there was no steady part (fewer requests than clients, or a run cut off): "
                "requests/s are of the whole run"
            )
        ttft = endpoint["figures"]["ttft"]
        if ttft and data["client"]["lag_p50"] > LATE_SHARE * ttft["p50"]:
            warnings.append(
                f"this client itself was late by {data['client']['lag_p50'] * 1000:.1f} ms at the median, which is "
                f"above 2 % of the time to first token of {endpoint['url']}: use a quieter machine"
            )
    if data["client"]["starved_share"] > 0.05:
        share = data["client"]["starved_share"]
        warnings.append(f"clients waited {share:.0%} of their time for pictures to be read, which lowered the load")
    rate = data["asked"]["plan"]["rate"]
    behind, pace = data["client"]["behind"], data["client"]["pace"]
    if rate and (behind > max(0.1, 10 / rate) or pace < SLOW_PACE):
        total = f", {pace:.0%} of the rate in all" if pace < SLOW_PACE else ""
        warnings.append(
            f"requests were sent up to {behind:.2f} s later than meant{total}: the most in flight "
            "(--concurrency), or what this machine can send, was reached; latencies count that wait"
        )
    if data["bad_lines"]["count"]:
        warnings.append(f"{data['bad_lines']['count']} lines of the input were invalid and were skipped")
    return warnings


def target_of(asked: RunRequest) -> str:
    """Return the name of the API that a run asked; runs from before there was a choice asked chat."""
    return asked.get("target", "chat")


def _picture_warning(endpoint: EndpointSummary, target: str) -> list[str]:
    pictures = endpoint["pictures"]
    if not find_api(target).counts_pictures:
        return []
    if not pictures["requests"] or pictures["image_tokens"] or not endpoint["requests"]["ok"]:
        return []
    if not endpoint["tokens"]["prompt"] or not pictures["prompt_tokens"]:
        counted = "and no prompt tokens either"
    else:
        counted = (
            f"and {pictures['prompt_tokens']} prompt tokens in all, where Qwen3-VL makes about "
            f"{pictures['expected_tokens']} of the pictures alone"
        )
    return [
        f"NO PICTURE TOKENS: {endpoint['url']} got {pictures['requests']} requests with pictures, "
        f"counted none, {counted}"
    ]
