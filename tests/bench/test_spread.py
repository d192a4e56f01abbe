"""One load over several endpoints."""

from __future__ import annotations

from pathlib import Path

from tests.bench.test_load import prompts
from tests.scripted_endpoint import ScriptedEndpoint


def test_one_load_is_spread_evenly_and_each_record_names_its_endpoint(bench, lines, records, tmp_path: Path) -> None:
    with ScriptedEndpoint() as one, ScriptedEndpoint() as two:
        both = ",".join(held.url.removeprefix("http://").removesuffix("/v1") for held in (one, two))
        ran = bench(
            "--endpoints", both, "-d", lines(*prompts(20)), "-c", 4, "--out", tmp_path / "run", "--no-html", "--json"
        )
        counts = [len(one.chats), len(two.chats)]
        urls = [one.url, two.url]
    assert ran.exit_code == 0, ran.output
    assert sum(counts) == 20
    assert min(counts) >= 5
    assert [sum(record.url == url for record in records()) for url in urls] == counts
    assert {record.endpoint for record in records()} == {0}


def test_comparing_and_spreading_together_are_refused(bench, lines, tmp_path: Path) -> None:
    ran = bench("--endpoints", "a:1", "--url", "b:1", "-d", lines(*prompts(1)), "--out", tmp_path / "run")
    assert ran.exit_code == 2
    assert "--url compares" in ran.stderr
