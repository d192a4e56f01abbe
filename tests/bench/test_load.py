"""When requests are sent, how often, and what is counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean
from threading import Thread

import pytest

from qvl.backends.openai.retry import RetryPolicy
from qvl.bench.plan import LoadPlan, read_slo
from qvl.bench.summary import knee
from qvl.errors import ConfigError
from tests.scripted_endpoint import Echo, ScriptedEndpoint, ScriptedExchange, Status, Text

BUSY = Status(429, headers={"Retry-After": "0.05"})
NO_RETRY = RetryPolicy(max_retries=0)


def prompts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {number}", "id": f"q{number}"} for number in range(count)]


@dataclass
class Crowded:
    """Answers 429 to what comes while more than `room` are being answered."""

    room: int
    seen: list[int] = field(default_factory=list)

    async def __call__(self, exchange: ScriptedExchange) -> None:
        self.seen.append(exchange.endpoint.running)
        if exchange.endpoint.running > self.room:
            await Status(429, headers={"Retry-After": "0.01"})(exchange)
            return
        await asyncio.sleep(0.02)
        await Text("fine")(exchange)


@dataclass
class Stalling:
    """Every answer waits while the first, of `pause` seconds, is being made: a server that stops now and then."""

    pause: float
    until: float = 0.0
    came: list[float] = field(default_factory=list)

    async def __call__(self, exchange: ScriptedExchange) -> None:
        now = time.perf_counter()
        self.came.append(now)
        self.until = self.until or now + self.pause
        await asyncio.sleep(max(0.0, self.until - now))
        await Text("fine")(exchange)


@dataclass
class Slow:
    """Answers after `delay` seconds."""

    delay: float
    text: str = "fine"

    async def __call__(self, exchange: ScriptedExchange) -> None:
        await asyncio.sleep(self.delay)
        await Text(self.text)(exchange)


def test_a_closed_loop_keeps_its_number_of_clients_busy_and_never_more(measure, lines) -> None:
    crowd = Crowded(room=4)
    with ScriptedEndpoint(default=crowd) as endpoint:
        summary = measure(lines(*prompts(24)), endpoint, concurrency=4)

    assert max(crowd.seen) == 4
    assert summary.data["endpoints"][0]["requests"]["ok"] == 24
    assert summary.data["endpoints"][0]["throughput"]["steady"]


def test_every_item_is_asked_once(endpoint, measure, lines) -> None:
    measure(lines(*prompts(50)), endpoint, concurrency=7)

    asked = Counter(received.body["messages"][0]["content"] for received in endpoint.chats)
    assert asked == Counter(f"question {number}" for number in range(50))


def test_the_open_loop_does_not_wait_for_answers_and_counts_from_the_intended_start(measure, lines, records) -> None:
    stalling = Stalling(pause=1.5)
    with ScriptedEndpoint(default=stalling) as endpoint:
        measure(lines(*prompts(30)), endpoint, rate=30, arrival="constant", concurrency=5)

    latencies = [record.latency for record in records()]
    # Only 5 fit in flight, so the others were sent late; what they waited is in their latency.
    assert max(record.wait for record in records()) > 0.8
    assert all(record.latency >= record.wait for record in records())
    assert mean(latencies) > 0.6
    starts = sorted(record.start for record in records())
    assert [after - before for before, after in pairwise(starts)] == pytest.approx([1 / 30] * 29, abs=1e-4)


def test_without_a_bound_in_the_way_the_open_loop_sends_while_the_server_stalls(measure, lines) -> None:
    stalling = Stalling(pause=1.5)
    with ScriptedEndpoint(default=stalling) as endpoint:
        measure(lines(*prompts(20)), endpoint, rate=40, concurrency=1024)

    assert sum(came < stalling.until for came in stalling.came) == 20


def test_a_rate_that_this_client_cannot_send_is_told_in_the_summary(measure, lines) -> None:
    with ScriptedEndpoint(default=Text("fine")) as endpoint:
        summary = measure(lines(*prompts(200)), endpoint, rate=100_000, concurrency=1024)

    assert summary.data["client"]["pace"] < 0.9
    assert any("of the rate in all" in text for text in summary.data["warnings"])


def test_poisson_gaps_scatter_as_much_as_their_mean_and_constant_gaps_do_not() -> None:
    times = list(islice(LoadPlan(rate=10).arrivals(), 20_000))
    gaps = [after - before for before, after in pairwise(times)]
    assert mean(gaps) == pytest.approx(0.1, rel=0.03)
    assert (mean(gap**2 for gap in gaps) - mean(gaps) ** 2) ** 0.5 == pytest.approx(0.1, rel=0.05)
    assert times == list(islice(LoadPlan(rate=10).arrivals(), 20_000))

    assert list(islice(LoadPlan(rate=4, arrival="constant").arrivals(), 4)) == [0.0, 0.25, 0.5, 0.75]


def test_a_rate_that_ramps_reaches_half_its_requests_and_then_goes_on_evenly() -> None:
    times = list(islice(LoadPlan(rate=10, arrival="constant", ramp=4).arrivals(), 60))

    assert sum(when < 4 for when in times) == 20
    assert [after - before for before, after in pairwise(times[20:])] == pytest.approx([0.1] * 39)


def test_clients_that_ramp_start_one_after_another_and_those_requests_are_not_in_the_figures(
    measure, lines, records
) -> None:
    crowd = Crowded(room=9)
    with ScriptedEndpoint(default=crowd) as endpoint:
        summary = measure(lines(*prompts(80)), endpoint, concurrency=4, ramp=0.4)

    ramped = [record for record in records() if record.phase == "ramp"]
    assert ramped
    found = summary.data["endpoints"][0]
    assert found["figures"]["e2e"]["n"] == 80 - len(ramped)
    assert found["requests"]["sent"] == 80


def test_adaptive_concurrency_finds_the_room_there_is(measure, lines) -> None:
    crowd = Crowded(room=6)
    with ScriptedEndpoint(default=crowd) as endpoint:
        summary = measure(lines(*prompts(150)), endpoint, concurrency=64, adaptive=True)

    limits = [level for _, level in summary.data["client"]["limits"]]
    steps = list(zip([1, *limits], limits, strict=False))
    assert all(after == before + 1 or after == max(1, before // 2) for before, after in steps)
    assert any(after < before for before, after in steps)
    assert max(limits) < 64
    assert summary.data["endpoints"][0]["requests"]["success_rate"] > 0.9


def test_a_sweep_stops_beyond_the_knee_and_names_it(measure, lines) -> None:
    room = asyncio.Semaphore(4)

    class FourAtATime:
        async def __call__(self, exchange: ScriptedExchange) -> None:
            async with room:
                await asyncio.sleep(0.1)
            await Text("fine")(exchange)

    with ScriptedEndpoint(default=FourAtATime()) as endpoint:
        summary = measure(lines(*prompts(10)), endpoint, concurrency=64, sweep=True)

    rows = summary.data["sweep"][0]
    assert [row["clients"] for row in rows][:3] == [1, 2, 4]
    assert len(rows) < len(LoadPlan(concurrency=64).levels())
    assert summary.data["knees"][0] in (2, 4, 8)
    assert summary.data["endpoints"][0]["clients"] == summary.data["knees"][0]


def test_the_knee_is_the_fewest_clients_near_the_best_throughput() -> None:
    def row(clients: int, rate: float) -> dict[str, float | None]:
        return {"clients": clients, "requests_per_second": rate, "goodput_requests_per_second": None}

    assert knee([row(1, 10), row(2, 20), row(4, 38), row(8, 40), row(16, 39)]) == 4


def test_warm_up_is_sent_first_and_is_in_no_figure(endpoint, measure, lines, records) -> None:
    summary = measure(lines(*prompts(6)), endpoint, warmup=3)

    asked = [received.body["messages"][0]["content"] for received in endpoint.chats]
    assert len(asked) == 9
    assert asked[3:] == [f"question {number}" for number in range(6)]
    assert not set(asked[:3]) & set(asked[3:])
    assert summary.data["endpoints"][0]["requests"]["sent"] == 6
    assert summary.data["endpoints"][0]["warmup"] == {"sent": 3, "ok": 3}
    assert [record.phase for record in records()] == ["warmup"] * 3 + ["measure"] * 6


def test_count_goes_through_the_input_again_and_duration_ends_the_run(endpoint, measure, lines) -> None:
    measure(lines(*prompts(4)), endpoint, count=10)
    assert len(endpoint.chats) == 10

    summary = measure(lines(*prompts(4)), endpoint, duration=0.5, concurrency=2, out="second")
    assert summary.data["endpoints"][0]["requests"]["sent"] > 4


def test_retries_are_counted_apart_and_wait_as_they_are_told(endpoint, measure, lines, records) -> None:
    endpoint.say(BUSY, BUSY)
    summary = measure(lines(*prompts(3)), endpoint)

    first = records()[0]
    assert (first.success, first.retry_count, first.retried_for) == (True, 2, ["http_429", "http_429"])
    assert 0.1 <= first.retry_wait <= first.latency
    found = summary.data["endpoints"][0]
    assert found["requests"]["sent"] == 3
    assert found["retries"]["by_kind"] == {"http_429": 2}
    assert found["retries"]["figures"]["e2e"]["n"] == 1
    assert len(endpoint.chats) == 5


def test_failures_are_counted_by_kind_and_never_into_throughput(endpoint, measure, lines) -> None:
    endpoint.say(Status(400), Status(500), Text(""), Status(200, "<html>"))
    summary = measure(lines(*prompts(8)), endpoint, retries=NO_RETRY)

    found = summary.data["endpoints"][0]
    assert found["requests"]["failed"] == 4
    assert found["errors"] == {"http_400": 1, "http_500": 1, "empty": 1, "bad_response": 1}
    assert found["figures"]["e2e"]["n"] == 4
    rates = found["throughput"]
    assert rates["requests_per_second"] * rates["steady_seconds"] == pytest.approx(4, rel=0.02)


def test_a_stream_that_breaks_off_is_a_failure(measure, lines) -> None:
    from tests.scripted_endpoint import CutOff

    with ScriptedEndpoint(default=CutOff(after=3)) as endpoint:
        summary = measure(lines(*prompts(2)), endpoint, retries=NO_RETRY)

    assert summary.data["endpoints"][0]["errors"] == {"cut_off": 2}
    assert summary.success_rate == 0


def test_nothing_listening_is_said_in_one_line(bench, lines, tmp_path: Path) -> None:
    ran = bench("--url", "http://127.0.0.1:9/v1", "-d", lines(*prompts(1)), "--out", tmp_path / "o")

    assert ran.exit_code == 1
    assert ran.stderr.count("\n") == 1
    assert "127.0.0.1:9" in ran.stderr


class NotFound(SimpleHTTPRequestHandler):
    """What a server says whose API is under /v1, when it is asked without."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *words: object) -> None:
        return


def test_an_endpoint_without_its_v1_is_one_hint(bench, lines, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        ran = bench("--url", url, "-d", lines(*prompts(1)), "--out", tmp_path / "o")
        server.shutdown()

    assert ran.exit_code == 1
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.count("/v1?") == ran.stderr.count("(") == 1


def test_a_run_that_sends_nothing_is_an_error(bench, endpoint, lines, tmp_path: Path) -> None:
    more = ("--duration", 0.001, "--rate", 0.01)
    ran = bench("--url", endpoint.url, "-d", lines(*prompts(1)), "--out", tmp_path / "o", "--no-html", *more)
    assert ran.exit_code == 1
    assert "error: no requests were sent (see --duration" in ran.stderr


def test_too_few_answers_end_with_exit_code_1(bench, lines, tmp_path: Path) -> None:
    with ScriptedEndpoint() as endpoint:
        endpoint.say(Status(400))
        data = lines(*prompts(8))
        failed = bench("--url", endpoint.url, "-d", data, "--out", tmp_path / "a", "--no-html")
        endpoint.say(Status(400))
        passed = bench("--url", endpoint.url, "-d", data, "--out", tmp_path / "b", "--no-html", "--min-success", 80)

    assert (failed.exit_code, passed.exit_code) == (1, 0)
    assert "87.5%" in failed.stderr


def test_goodput_counts_what_keeps_every_bound(measure, lines) -> None:
    with ScriptedEndpoint(default=Slow(0.0)) as endpoint:
        endpoint.say(Slow(0.6), Slow(0.6), Slow(0.6))
        summary = measure(lines(*prompts(12)), endpoint, slo=read_slo("ttft=500ms,e2e=5s"))

    found = summary.data["endpoints"][0]
    assert found["goodput"]["share"] == 0.75
    assert found["throughput"]["goodput_requests_per_second"] < found["throughput"]["requests_per_second"]


def test_bounds_are_read_with_and_without_units() -> None:
    assert read_slo("ttft=500ms, tpot=50,e2e=10s") == {"ttft": 0.5, "tpot": 0.05, "e2e": 10.0}
    with pytest.raises(ConfigError, match="speed"):
        read_slo("speed=3")


def test_several_endpoints_get_the_same_requests_in_turns_and_are_compared_pair_by_pair(
    measure, lines, records
) -> None:
    with ScriptedEndpoint(default=Slow(0.0, "red")) as quick, ScriptedEndpoint(default=Slow(0.3, "red")) as slow:
        slow.say(Slow(0.3, "blue"))
        summary = measure(lines(*prompts(8)), quick, slow)

    assert [len(quick.chats), len(slow.chats)] == [8, 8]
    order = [(record.index, record.endpoint) for record in records()]
    assert order[:4] == [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert [found["url"] for found in summary.data["endpoints"]] == [quick.url, slow.url]
    (pair,) = summary.data["paired"]
    by_index = {(record.index, record.endpoint): record.latency for record in records()}
    differences = [by_index[index, 1] - by_index[index, 0] for index in range(8)]
    found = pair["differences"]["e2e"]
    assert found["n"] == 8
    assert found["mean"] == pytest.approx(mean(differences), abs=1e-5)
    assert 0 < found["low"] < found["mean"] < found["high"]
    assert pair["answers"] == {"compared": 8, "exact": 0.875, "fields": {}}


def test_answers_are_held_against_what_was_expected_field_by_field(measure, lines) -> None:
    data = lines(
        {"prompt": "a", "expected": "Red shoe"},
        {"prompt": "b", "expected": {"brand": "NORVIK", "attributes": {"color": "red", "count": "2"}}},
        {"prompt": "c"},
    )
    with ScriptedEndpoint() as endpoint:
        said = json.dumps({"brand": "NORVIK", "attributes": {"color": "red", "count": "3"}})
        endpoint.say(Text("Red shoe"), Text(f"```json\n{said}\n```"), Text("anything"))
        summary = measure(data, endpoint)

    assert summary.data["endpoints"][0]["expected"] == {
        "compared": 2,
        "exact": 0.5,
        "fields": {
            "brand": {"same": 1, "of": 1},
            "attributes.color": {"same": 1, "of": 1},
            "attributes.count": {"same": 0, "of": 1},
        },
    }


def test_the_first_piece_counts_only_when_it_carries_something(measure, lines, records) -> None:
    class RoleFirst:
        async def __call__(self, exchange: ScriptedExchange) -> None:
            await exchange.head()
            await exchange.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            await asyncio.sleep(1.0)
            await exchange.event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]})
            await exchange.event(b"[DONE]")

    with ScriptedEndpoint(default=RoleFirst()) as endpoint:
        summary = measure(lines(*prompts(1)), endpoint)

    (record,) = records()
    assert record.ttft >= 1.0 > record.first_byte
    assert not record.counted
    assert any("did not count" in text for text in summary.data["warnings"])


def test_cache_hits_and_misses_are_reported_apart_with_queue_and_network(measure, lines) -> None:
    class Cached:
        hits = 0

        async def __call__(self, exchange: ScriptedExchange) -> None:
            self.hits += 1
            state = "hit" if self.hits > 2 else "miss"
            body = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
            await exchange.whole(200, body, {"X-Qvl-Cache": state, "Server-Timing": "queue;dur=1.50, total;dur=2.00"})

    with ScriptedEndpoint(default=Cached()) as endpoint:
        summary = measure(lines(*prompts(6)), endpoint)

    found = summary.data["endpoints"][0]
    assert found["cache"]["states"] == {"miss": 2, "hit": 4}
    assert {state: held["e2e"]["n"] for state, held in found["cache"]["figures"].items()} == {"miss": 2, "hit": 4}
    assert found["figures"]["queue"]["mean"] == 0.0015
    assert found["figures"]["network"]["mean"] == pytest.approx(found["figures"]["e2e"]["mean"] - 0.002, abs=1e-5)
    assert found["figures"]["ttft"] is None


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"rate": -1.0}, {"rate": 1.0, "sweep": True}, {"duration": 0.0}, {"ramp": -1.0}]
)
def test_a_plan_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LoadPlan(**wrong)


def test_an_echo_that_pauses_is_streamed_piece_by_piece(measure, lines, records) -> None:
    with ScriptedEndpoint(default=Echo(pause=0.03)) as endpoint:
        measure(lines(*prompts(1)), endpoint)

    (record,) = records()
    assert len(record.itl) == record.completion_tokens - 1
    assert record.tpot == pytest.approx((record.latency - record.ttft) / (record.completion_tokens - 1), abs=1e-5)


def test_an_endpoint_can_be_held_against_itself(endpoint, measure, lines) -> None:
    data = lines(*({"prompt": f"question {number}", "expected": "x", "temperature": 0} for number in range(6)))
    summary = measure(data, endpoint, endpoint)

    assert [found["requests"]["ok"] for found in summary.data["endpoints"]] == [6, 6]
    assert [found["expected"]["compared"] for found in summary.data["endpoints"]] == [6, 6]
    assert summary.data["paired"][0]["answers"]["exact"] == 1
