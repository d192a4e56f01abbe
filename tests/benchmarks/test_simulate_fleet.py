"""The figures of docs/scaling.md are those that its command gives with the measured times that it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMES = ROOT / "benchmarks" / "fleet-times.json"
PAGE = ROOT / "docs" / "scaling.md"


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows of figures, without the last one: how long a choice takes differs each time."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    return [[cell.strip() for cell in line.strip("|").split("|")][:-1] for line in lines]


@pytest.mark.parametrize("engines", ["8", pytest.param("64", marks=pytest.mark.slow)])
def test_the_page_has_the_figures_of_its_command(engines: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "python benchmarks/simulate_fleet.py --times benchmarks/fleet-times.json" in page
    command = [sys.executable, "benchmarks/simulate_fleet.py", "--times", str(TIMES), "--engines", engines]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = rows(told)
    assert len(found) == 3
    assert found == [row for row in rows(page) if row[0] == engines]


def test_the_page_names_the_measured_times() -> None:
    """And shows each number of engines with each policy once."""
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    times = json.loads(TIMES.read_text(encoding="utf-8"))
    new, text, answer = (round(times[name] * 1000) for name in ("encode", "prefill", "decode"))
    assert f"({new} ms for a new picture, {text} ms for a text, {answer} ms for an answer;" in page
    assert f"{times['slope']:.0%} longer for each other one" in page
    policies = ("round_robin", "least_outstanding", "affinity")
    expected = [[engines, policy] for engines in ("8", "64", "512") for policy in policies]
    assert [row[:2] for row in rows(PAGE.read_text(encoding="utf-8"))] == expected
