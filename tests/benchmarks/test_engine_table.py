"""The table of the engine's benchmark: the middle of several runs, and qvl's speed by that of the other servers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_engine

    yield bench_engine
    for name in [name for name in sys.modules if name.startswith("bench_engine")]:
        sys.modules.pop(name, None)


def row(server: str, clients: int, speed: float) -> dict[str, Any]:
    times = {"ttft_p50": 1.0, "ttft_p95": 2.0, "itl_p50": 0.05, "itl_p95": 0.1}
    return {"server": server, "dtype": "float32", "clients": clients, "tokens_per_s": speed, **times}


def test_ratios_are_taken_at_the_same_number_of_clients(bench: Any) -> None:
    told = bench.table([row("qvl", 1, 30.0), row("vllm", 1, 20.0), row("qvl", 8, 90.0), row("vllm", 8, 100.0)])
    ratios = [line.split("|")[-2].strip() for line in told.splitlines()[2:]]
    assert ratios == ["", "1.50 x", "", "0.90 x"]


def test_of_several_runs_the_middle_one_is_told(bench: Any) -> None:
    told = bench.table([row("qvl", 8, speed) for speed in (10.0, 500.0, 20.0)])
    assert "| 20.0 |" in told
    assert "500.0" not in told


def test_the_known_picture_stands_in_a_table_of_its_own(bench: Any) -> None:
    same = {"server": "qvl", "dtype": "float32", "cold_ttft": 2.0, "warm_ttft": 0.5, "warm_to_cold": 0.25}
    assert "| qvl | float32 | 2.000 s | 0.500 s | 0.25 |" in bench.table([row("qvl", 8, 10.0), same])


def test_figures_of_a_cell_are_those_of_its_answers(bench: Any) -> None:
    cell = bench.Cell(2, seconds=4.0, tokens=128, requests=2, first=[1.0, 3.0], gaps=[0.1] * 99 + [5.0], processor=6.4)
    found = cell.figures()
    assert (found["tokens_per_s"], found["processor_ms_per_token"]) == (32.0, 50.0)
    assert (found["ttft_p95"], found["itl_p50"], found["itl_p95"]) == (3.0, 0.1, 0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_processor_time_is_that_of_the_whole_group(bench: Any) -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=os.setpgrp
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert bench.processor_seconds(process.pid) >= 0.28
    finally:
        os.killpg(process.pid, 9)
        process.communicate()
