"""What a run leaves behind, also when it is cut off, and how a later one goes on with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qvl.bench.metrics import KEPT, Group, Sample, Windows
from qvl.bench.record import Done, RequestRecord
from qvl.errors import ConfigError
from tests.bench.test_load import Slow, prompts
from tests.scripted_endpoint import ScriptedEndpoint

FIELDS = [
    "id", "request_id", "success", "response", "error", "latency", "tokens_used", "prompt_tokens",
    "completion_tokens", "retry_count",
]  # fmt: skip


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qvl.cli", "bench", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path: Path, count: int) -> None:
    """Until so many results are on disk."""
    for _ in range(3000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} has no {count} lines")


def test_each_line_of_the_results_begins_with_the_known_fields_in_their_order(
    endpoint, measure, lines, tmp_path
) -> None:
    measure(lines(*prompts(3)), endpoint)

    for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines():
        assert list(json.loads(line))[: len(FIELDS)] == FIELDS


def test_a_run_leaves_results_summary_and_a_page_that_needs_no_other_file(
    endpoint, bench, lines, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    ran = bench("--url", endpoint.url, "-d", lines(*prompts(12)), "-c", 3, "--out", out, "--slo", "ttft=5s")

    assert ran.exit_code == 0, ran.output
    assert "TTFT" in ran.stdout
    assert "(E2E - TTFT) / (completion tokens - 1)" in ran.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.jsonl", "run.json", "summary.json"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3
    for title in ("Latency distribution", "Time between tokens", "Timeline", endpoint.url):
        assert title in page
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)


def test_the_page_of_a_sweep_and_of_several_endpoints_is_written(bench, lines, tmp_path: Path) -> None:
    with ScriptedEndpoint() as one, ScriptedEndpoint() as other:
        urls = ("--url", one.url, "--url", other.url)
        ran = bench(*urls, "-d", lines(*prompts(4)), "--sweep", "-c", 2, "-n", 6, "--out", tmp_path / "o")

    assert ran.exit_code == 0, ran.output
    assert "knee" in ran.stdout
    assert f"{other.url} minus {one.url}" in (tmp_path / "o" / "report.html").read_text()


def test_json_on_stdout_is_the_summary_and_nothing_else(endpoint, bench, lines, tmp_path: Path) -> None:
    ran = bench("--url", endpoint.url, "-d", lines(*prompts(3)), "--json", "--no-html", "--out", tmp_path / "o")

    assert json.loads(ran.stdout) == json.loads((tmp_path / "o" / "summary.json").read_text())


def test_two_runs_are_compared_with_intervals(bench, lines, tmp_path: Path) -> None:
    for name, delay in (("a", 0.0), ("b", 0.2)):
        with ScriptedEndpoint(default=Slow(delay)) as endpoint:
            bench("--url", endpoint.url, "-d", lines(*prompts(6)), "--no-html", "--out", tmp_path / name)

    ran = bench("compare", tmp_path / "a" / "summary.json", tmp_path / "b", "--json")

    rows = {row["name"]: row for row in json.loads(ran.stdout)["rows"]}
    found = rows["E2E mean, ms"]
    assert found["change"] > 0
    assert found["interval"][0] <= found["new"] - found["old"] <= found["interval"][1]
    assert "requests/s" in bench("compare", tmp_path / "a", tmp_path / "b").stdout
    assert bench("compare", tmp_path / "a", tmp_path / "nothing").exit_code == 2


def test_ctrl_c_ends_cleanly_with_the_figures_of_what_was_done(lines, tmp_path: Path) -> None:
    out = tmp_path / "o"
    with ScriptedEndpoint(default=Slow(0.05)) as endpoint:
        process = start("--url", endpoint.url, "-d", lines(*prompts(500)), "-c", 2, "--no-html", "--out", out)
        wait_for_lines(out / "results.jsonl", 6)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stdout
    summary = json.loads((out / "summary.json").read_text())
    done = (out / "results.jsonl").read_text().splitlines()
    assert summary["interrupted"]
    assert 6 <= summary["endpoints"][0]["requests"]["sent"] == len(done) < 500


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_resume_after_a_kill_does_nothing_twice(bench, lines, tmp_path: Path) -> None:
    out, data, clients = tmp_path / "o", lines(*prompts(60)), 3
    with ScriptedEndpoint(default=Slow(0.05)) as endpoint:
        arguments = ("--url", endpoint.url, "-d", data, "-c", clients, "--no-html", "--out", out)
        process = start(*arguments)
        wait_for_lines(out / "results.jsonl", 10)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        kept = (out / "results.jsonl").read_bytes()
        before = {json.loads(line)["id"] for line in kept.splitlines(keepends=True) if line.endswith(b"\n")}
        # As a kill in the middle of a write leaves it.
        (out / "results.jsonl").write_bytes(kept + b'{"id":"q59","request_id"')
        count = len(endpoint.chats)

        ran = bench(*arguments, "--resume")

        assert ran.exit_code == 0, ran.output
        again = [
            received.body["messages"][0]["content"].replace("question ", "q") for received in endpoint.chats[count:]
        ]
    assert not before & set(again)
    ids = Counter(json.loads(line)["id"] for line in (out / "results.jsonl").read_text().splitlines())
    assert ids == Counter(f"q{number}" for number in range(60))
    # Only what was under way at the kill was asked for a second time.
    assert len(endpoint.chats) <= 60 + clients
    assert json.loads((out / "summary.json").read_text())["endpoints"][0]["requests"]["sent"] == 60


def test_a_run_that_is_done_has_nothing_left_to_do(endpoint, measure, lines) -> None:
    data = lines(*prompts(5))
    measure(data, endpoint)
    summary = measure(data, endpoint, resume=True)

    assert len(endpoint.chats) == 5
    assert summary.data["endpoints"][0]["requests"]["sent"] == 5


def test_resume_refuses_another_input_and_a_folder_in_use_is_not_written_over(endpoint, measure, lines) -> None:
    measure(lines(*prompts(2)), endpoint)
    with pytest.raises(ConfigError, match="already has a run"):
        measure(lines(*prompts(2)), endpoint)
    with pytest.raises(ConfigError, match="another input"):
        measure(lines(*prompts(9)), endpoint, resume=True)
    with pytest.raises(ConfigError, match="no run"):
        measure(lines(*prompts(9)), endpoint, resume=True, out="elsewhere")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "endpoint"),
        (("--url", "http://127.0.0.1:9/v1"), "give one source of requests"),
        (("--url", "http://127.0.0.1:9/v1", "--synthetic", "2", "--size", "big"), "--size big"),
        (("--url", "http://127.0.0.1:9/v1", "--synthetic", "2", "--slo", "x"), "--slo"),
        (("--url", "http://127.0.0.1:9/v1", "--synthetic", "2", "--resume"), "--out"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: tuple[str, ...], said: str, bench) -> None:
    ran = bench(*arguments, *(() if arguments else ("--synthetic", "2")))

    assert ran.exit_code == 2
    assert said in ran.stderr


def test_a_sample_of_more_than_it_keeps_has_exact_mean_and_near_percentiles() -> None:
    sample = Sample()
    for number in range(2 * KEPT):
        sample.add(float(number))

    stats = sample.stats()
    assert stats is not None
    assert len(sample.values) == KEPT
    assert stats["mean"] == pytest.approx(KEPT - 0.5)
    assert stats["p99"] == pytest.approx(1.98 * KEPT, rel=0.01)


def overloaded(open_loop: bool) -> dict[str, Any]:
    """The throughput of 300 requests that came at 30/s to an endpoint that answers 10/s, one after the other."""
    group = Group({0: Windows([(0.0, 10.0)])}, True, {}, open_loop=open_loop)
    for number in range(300):
        record = RequestRecord(id=str(number), request_id="", index=number, start=number / 30, end=(number + 1) / 10)
        record.success, record.phase, record.latency = True, "measure", record.end - record.start
        record.prompt_tokens = record.completion_tokens = 7
        group.add(record)
    return group.throughput()


def test_waiting_under_overload_is_no_throughput() -> None:
    found = overloaded(open_loop=True)
    assert found["requests_per_second"] == pytest.approx(10, rel=0.02)
    assert found["completion_tokens_per_second"] == pytest.approx(70, rel=0.02)


def test_a_few_answers_inside_the_steady_part_are_taken_over_the_whole_session() -> None:
    group = Group({0: Windows([(0.0, 0.1)])}, True, {}, open_loop=True)
    for number in range(20):
        record = RequestRecord(id=str(number), request_id="", index=number, start=0.0, end=float(number + 1))
        record.success, record.phase, record.latency = True, "measure", record.end
        group.add(record)
    assert group.throughput()["requests_per_second"] == 1.0


def test_a_request_counts_by_the_share_of_its_time_inside_the_steady_parts() -> None:
    windows = Windows([(0.0, 10.0), (20.0, 30.0)])

    assert windows.length == 20
    assert windows.share(2, 4) == 1
    assert windows.share(8, 12) == 0.5
    assert windows.share(5, 25) == 0.5
    assert windows.share(12, 18) == 0


def test_what_is_done_is_known_by_endpoint_and_place() -> None:
    done = Done()
    for index in (0, 7, 8, 100_000):
        done.add(1, index)

    assert (1, 7) in done
    assert (1, 9) not in done
    assert (0, 7) not in done
    assert done.count == 4


def test_the_page_draws_load_and_tokens_and_nothing_of_three_points(bench, lines, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qvl.bench.run.GROWTH", 0)  # no level is the last one, however busy the machine
    with ScriptedEndpoint() as endpoint:
        bench("--url", endpoint.url, "-d", lines(*prompts(3)), "--out", tmp_path / "few", "-p", "temperature=0.5")
        sweep = ("--sweep", "-c", 4, "-n", 12, "--out", tmp_path / "many")
        bench("--url", endpoint.url, "-d", lines(*prompts(12)), *sweep)
    few, many = ((tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("few", "many"))
    drawn = ("Latency distribution", "Timeline", "Throughput against concurrency", "Latency against load")
    assert "<figure>" not in few
    assert all(title in many for title in (*drawn, "Distribution at each level", "Time between tokens"))
    assert "<tr><th>temperature</th><td>0.5</td></tr>" in few
    assert "currentColor" in many
    assert "#000000" not in many
