"""The figures that the client gives are those that the server noted on its own clock."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from qvl.bench.dataset import Files
from qvl.bench.plan import Plan
from qvl.bench.run import Run, Target
from tests.bench.timed_endpoint import timed_endpoint

FIRST, GAP, TOKENS = 1.5, 0.1, 11


@pytest.mark.parametrize("clients", [1, 16, 128])
def test_known_delays_are_given_back_within_two_percent(clients: int, lines, records, tmp_path: Path) -> None:
    count = 3 * clients
    data = lines(*({"prompt": f"question {number}"} for number in range(count)))

    with timed_endpoint(FIRST, GAP, TOKENS) as remote:
        run = Run(Target((remote.url,)), Files([str(data)]), Plan(concurrency=clients), tmp_path / "run")
        summary = run.work()

    found = summary.data["endpoints"][0]
    notes = [remote.notes[record.request_id] for record in records()]
    assert len(notes) == count
    theirs = {
        "ttft": median(note["sent"][0] - note["received"] for note in notes),
        "e2e": median(note["done"] - note["received"] for note in notes),
        "tpot": median((note["done"] - note["sent"][0]) / (TOKENS - 1) for note in notes),
        "itl": median(
            after - before for note in notes for before, after in zip(note["sent"], note["sent"][1:], strict=False)
        ),
    }
    ours = {name: found["figures"][name]["p50"] for name in theirs}
    assert ours == pytest.approx(theirs, rel=0.02)
    # The server's own busy time: from the first request it got to the last of those that had a follower.
    begun = min(note["received"] for note in notes)
    last_begun = max(note["received"] for note in notes)
    ended = sum(note["done"] <= last_begun + 0.25 for note in notes) if clients > 1 else count
    until = last_begun if clients > 1 else max(note["done"] for note in notes)
    assert found["throughput"]["steady"]
    assert found["throughput"]["requests_per_second"] == pytest.approx(ended / (until - begun), rel=0.02)
    assert max(note["running"] for note in notes) == clients
