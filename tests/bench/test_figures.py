"""The figures that the client gives are those that the server noted on its own clock.

Clients start spread over one answer's time. 128 requests at the same instant would measure how long the scripted
server takes to read them, which it cannot note.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest

from qvl.bench.dataset import Files
from qvl.bench.plan import LoadPlan
from qvl.bench.run import Run, Target
from tests.bench.timed_endpoint import timed_endpoint

FIRST, GAP, TOKENS = 2.0, 0.2, 11
WHOLE = FIRST + GAP * (TOKENS - 1)


# Sixteen seconds each, in which next to nothing is computed.
@pytest.mark.parametrize(
    "clients", [1, pytest.param(16, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
def test_known_delays_are_given_back_within_two_percent(clients: int, lines, records, tmp_path: Path) -> None:
    data = lines(*({"prompt": f"question {number}"} for number in range(3 * clients)))
    plan = LoadPlan(concurrency=clients, ramp=WHOLE if clients > 1 else 0.0)

    with timed_endpoint(FIRST, GAP, TOKENS) as remote:
        summary = Run(Target((remote.url,)), Files([str(data)]), plan, tmp_path / "run").work()

    found = summary.data["endpoints"][0]
    assert found["requests"]["ok"] == len(remote.notes) == 3 * clients
    measured = [remote.notes[record.request_id] for record in records() if record.phase == "measure"]
    assert len(measured) >= 1.5 * clients
    wholes = [note["done"] - note["received"] for note in measured]
    theirs = {
        "ttft": median(note["sent"][0] - note["received"] for note in measured),
        "e2e": median(wholes),
        "tpot": median((note["done"] - note["sent"][0]) / (TOKENS - 1) for note in measured),
        "itl": median(after - before for note in measured for before, after in pairwise(note["sent"])),
    }
    assert {name: found["figures"][name]["p50"] for name in theirs} == pytest.approx(theirs, rel=0.02)
    # By Little's law: every client was busy for the whole of the steady part.
    assert found["throughput"]["steady"]
    assert found["throughput"]["requests_per_second"] == pytest.approx(clients / mean(wholes), rel=0.02)
    rate = found["throughput"]["completion_tokens_per_second"]
    assert rate == pytest.approx(TOKENS * clients / mean(wholes), rel=0.02)
    assert max(note["running"] for note in measured) == clients
