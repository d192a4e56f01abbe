"""Memory does not grow with the number of requests: the benchmark of 100,000, with fewer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"
REQUESTS = 7000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the size is read from /proc")
def test_memory_stays_flat_under_every_kind_of_request(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPT), "--requests", str(REQUESTS), "--json", str(file)]
    subprocess.run(command, check=True, timeout=850, stdout=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    # Five of seven kinds are answered, one is refused, one leaves before it has an answer.
    assert found["statuses"] == {"200": REQUESTS // 7 * 5, "400": REQUESTS // 7}
    later = [size for done, size in found["points"] if done >= REQUESTS // 2]
    assert len(later) > 20
    assert max(later) - min(later) < 6, "MiB in 3,500 requests"
