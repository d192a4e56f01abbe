"""One load over several endpoints."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.bench.test_load import prompts
from tests.scripted_endpoint import ScriptedEndpoint, ScriptedExchange


def test_one_load_is_spread_evenly_and_each_record_names_its_endpoint(bench, lines, records, tmp_path: Path) -> None:
    in_flight: list[tuple[int, int]] = []

    class Full:
        """Answers once four requests have come, so that they are in flight together."""

        def __init__(self, endpoint: ScriptedEndpoint) -> None:
            self.answering = endpoint.default

        async def __call__(self, exchange: ScriptedExchange) -> None:
            while len(one.chats) + len(two.chats) < 4:
                await asyncio.sleep(0.01)
            in_flight.append((len(one.chats), len(two.chats)))
            await self.answering(exchange)

    with ScriptedEndpoint() as one, ScriptedEndpoint() as two:
        one.default, two.default = Full(one), Full(two)
        both = ",".join(held.url.removeprefix("http://").removesuffix("/v1") for held in (one, two))
        ran = bench(
            "--endpoints", both, "-d", lines(*prompts(20)), "-c", 4, "--out", tmp_path / "run", "--no-html", "--json"
        )
        counts = [len(one.chats), len(two.chats)]
        urls = [one.url, two.url]
    assert ran.exit_code == 0, ran.output
    assert sum(counts) == 20
    # Later ones go where fewer are in flight, which is where answers are quicker.
    assert in_flight[0] == (2, 2)
    assert [sum(record.url == url for record in records()) for url in urls] == counts
    assert {record.endpoint for record in records()} == {0}


def test_comparing_and_spreading_together_are_refused(bench, lines, tmp_path: Path) -> None:
    ran = bench("--endpoints", "a:1", "--url", "b:1", "-d", lines(*prompts(1)), "--out", tmp_path / "run")
    assert ran.exit_code == 2
    assert "--url compares" in ran.stderr
