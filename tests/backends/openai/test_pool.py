"""The choice of an endpoint, told by a clock that the test turns."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.hash_ring import HashRing
from qvl.backends.openai.pool import EndpointPool, Member, Ticket, weights_by_url
from qvl.errors import BackendUnavailableError, ConfigError, RateLimitError, UnknownNameError

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def down() -> Failed:
    return Failed(BackendUnavailableError("refused"), Repeat.ANYWHERE, Impact.DOWN)


def fault() -> Failed:
    return Failed(BackendUnavailableError("500"), Repeat.ANYWHERE, Impact.FAULT)


def busy(retry_after: float) -> Failed:
    return Failed(RateLimitError("429"), Repeat.ANYWHERE, Impact.BUSY, retry_after=retry_after)


def pool_of(*names: str, clock: Clock | None = None, **options: Any) -> EndpointPool[str]:
    members = [Member(name, name, **options.pop(name, {})) for name in names]
    return EndpointPool(members, clock=clock or Clock(), rng=random.Random(1), **options)


async def take(pool: EndpointPool[str], cost: float = 1.0, key: str | None = None, *exclude: str) -> Ticket[str]:
    ticket = await pool.acquire(cost=cost, key=key, exclude=frozenset(exclude), until=pool.clock() + 5)
    assert ticket is not None
    return ticket


async def none_left(pool: EndpointPool[str], *exclude: str) -> bool:
    return await pool.acquire(exclude=frozenset(exclude), until=pool.clock() + 5) is None


async def test_least_outstanding_balances_picture_tokens_not_requests() -> None:
    pool = pool_of("a", "b")
    big = await take(pool, 1000)
    small = [await take(pool, 100) for _ in range(5)]
    assert {ticket.member.name for ticket in small} == {"b"}
    assert big.member.name == "a"
    for ticket in small:
        ticket.release()
    assert (await take(pool, 100)).member.name == "b"


async def test_weights_share_the_load() -> None:
    for policy in ("least_outstanding", "round_robin"):
        pool = pool_of("a", "b", policy=policy, a={"weight": 3.0})
        counts = Counter([(await take(pool)).member.name for _ in range(400)])
        assert counts == {"a": 300, "b": 100}


async def test_round_robin_does_not_make_up_for_time_away() -> None:
    clock = Clock()
    pool = pool_of("a", "b", policy="round_robin", clock=clock)
    first = await take(pool)
    first.failed(down())
    first.release()
    for _ in range(50):
        (await take(pool)).release()
    clock.now += 100
    trial = await take(pool)
    assert trial.member.name == "a"
    trial.first_token()
    trial.release()
    counts = Counter([(await take(pool)).member.name for _ in range(40)])
    assert abs(counts["a"] - 20) <= 1


async def test_affinity_sends_the_same_picture_to_the_same_endpoint() -> None:
    pool = pool_of("a", "b", "c", "d", policy="affinity")
    homes = {f"picture-{n}": (await take(pool, 1, f"picture-{n}")).member.name for n in range(200)}
    again = {key: (await take(pool, 1, key)).member.name for key in homes}
    assert again == homes
    assert set(homes.values()) == {"a", "b", "c", "d"}


async def test_affinity_moves_only_the_pictures_of_the_endpoint_that_went() -> None:
    pool = pool_of("a", "b", "c", "d", policy="affinity")
    homes = {f"picture-{n}": (await take(pool, 1, f"picture-{n}")).member.name for n in range(200)}
    asyncio.get_running_loop().call_later(0.01, lambda: None)
    await pool.remove(pool.drain("c"), timeout=0.01)
    for key, home in homes.items():
        now = (await take(pool, 1, key)).member.name
        assert now == home or home == "c"
        assert now != "c"


async def test_an_endpoint_that_is_down_rests_and_is_tried_by_one_request() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    ticket = await take(pool)
    ticket.failed(down())
    ticket.release()
    assert {(await take(pool)).member.name for _ in range(10)} == {"b"}
    clock.now += 2
    trial = await take(pool)
    assert trial.member.name == "a"
    assert {(await take(pool)).member.name for _ in range(10)} == {"b"}
    trial.failed(down())
    trial.release()
    clock.now += 1
    assert (await take(pool)).member.name == "b"
    clock.now += 1.1
    trial = await take(pool)
    assert trial.member.name == "a"
    trial.first_token()
    trial.release()
    assert "a" in {(await take(pool)).member.name for _ in range(10)}
    assert [state.state for state in pool.snapshot()] == ["up", "up"]


async def test_a_trial_that_was_given_up_leaves_the_trial_to_the_next() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    ticket = await take(pool)
    ticket.failed(down())
    ticket.release()
    clock.now += 2
    (await take(pool)).release()
    assert (await take(pool)).member.name == "a"


async def test_rests_grow_to_a_minute() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    rests = []
    for _ in range(10):
        ticket = await take(pool, 1, None, "b")
        ticket.failed(down())
        ticket.release()
        rests.append(pool.snapshot()[0].rest_seconds)
        clock.now += 61
    assert rests[0] <= 1
    assert all(later >= earlier * 0.75 for earlier, later in itertools.pairwise(rests))
    assert 45 <= rests[-1] <= 60


async def test_a_single_fault_does_not_rest_an_endpoint_but_three_in_a_row_do() -> None:
    pool = pool_of("a", "b")
    member = pool.find("a")
    pool.record_failure(member, fault())
    pool.record_failure(member, fault())
    assert pool.snapshot()[0].state == "up"
    pool.recovered(member)
    for _ in range(3):
        assert pool.snapshot()[0].state == "up"
        pool.record_failure(member, fault())
    assert pool.snapshot()[0].state == "resting"


async def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_asked() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    pool.record_failure(pool.find("a"), busy(7))
    assert {(await take(pool)).member.name for _ in range(6)} == {"b"}
    assert pool.next_chance(frozenset({"b"})) == pytest.approx(7)
    clock.now += 7.1
    assert (await take(pool)).member.name == "a"


async def test_one_endpoint_alone_is_never_rested() -> None:
    pool = pool_of("a")
    for _ in range(5):
        ticket = await take(pool)
        ticket.failed(down())
        ticket.release()
    assert await none_left(pool, "a")


async def test_a_full_endpoint_makes_requests_wait_their_turn() -> None:
    pool = pool_of("a", a={"limit": 1})
    first = await take(pool)
    order: list[int] = []

    async def next_one(number: int) -> None:
        ticket = await take(pool)
        order.append(number)
        await asyncio.sleep(0)
        ticket.release()

    waiting = [asyncio.ensure_future(next_one(n)) for n in range(5)]
    await asyncio.sleep(0)
    assert pool.waiting == 5
    waiting[2].cancel()
    first.release()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [0, 1, 3, 4]
    assert pool.find("a").running == 0


async def test_waiting_ends_with_the_time_allowed_and_has_a_bound() -> None:
    pool = pool_of("a", a={"limit": 1}, max_waiting=1)
    await take(pool)
    with pytest.raises(RateLimitError, match="timed out waiting for a free endpoint"):
        await pool.acquire(until=pool.clock() + 0.01)
    waiting = asyncio.ensure_future(pool.acquire(until=pool.clock() + 5))
    await asyncio.sleep(0)
    with pytest.raises(RateLimitError, match="queue is full"):
        await pool.acquire(until=pool.clock() + 5)
    pool.close()
    with pytest.raises(BackendUnavailableError):
        await waiting


async def test_a_waiter_goes_elsewhere_when_another_endpoint_comes() -> None:
    pool = pool_of("a", a={"limit": 1})
    await take(pool)
    waiting = asyncio.ensure_future(take(pool))
    await asyncio.sleep(0)
    pool.add(Member("b", "b"))
    assert (await asyncio.wait_for(waiting, 1)).member.name == "b"


async def test_draining_waits_for_what_is_running_and_gives_nothing_new() -> None:
    pool = pool_of("a", "b")
    ticket = await take(pool, 1, None, "b")
    removing = asyncio.ensure_future(pool.remove(pool.drain("a")))
    await asyncio.sleep(0)
    assert {(await take(pool)).member.name for _ in range(5)} == {"b"}
    assert pool.snapshot()[0].state == "draining"
    assert not removing.done()
    ticket.release()
    await asyncio.wait_for(removing, 1)
    assert [state.url for state in pool.snapshot()] == ["b"]


async def test_requests_wait_for_the_trial_of_the_last_endpoint() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    for name in ("a", "b"):
        pool.record_failure(pool.find(name), down())
    assert await none_left(pool)
    assert "a: refused" in (pool.unavailable_reason() or "")
    clock.now += 2
    trial = await take(pool, 1, None, "b")
    waiting = asyncio.ensure_future(take(pool, 1, None, "b"))
    await asyncio.sleep(0)
    assert not waiting.done()
    trial.first_token()
    assert (await asyncio.wait_for(waiting, 1)).member.name == "a"


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="policy"):
        pool_of("a", policy="fastest")
    with pytest.raises(ConfigError, match="weight"):
        pool_of("a", a={"weight": 0.0})
    with pytest.raises(ConfigError, match="limit"):
        pool_of("a", a={"limit": 0})
    with pytest.raises(ConfigError, match="duplicate endpoint"):
        pool_of("a").add(Member("a", "a"))
    with pytest.raises(UnknownNameError, match="did you mean"):
        pool_of("http://one/v1").find("http://onee/v1")
    with pytest.raises(ConfigError, match="expected 1 weights, one for each endpoint, got 3"):
        weights_by_url(["a"], [1, 2, 3])
    with pytest.raises(ConfigError, match="not a base_url"):
        weights_by_url(["a"], {"b": 1})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(min_size=1), st.floats(0.1, 4), min_size=1, max_size=8), st.text())
def test_the_ring_names_everybody_once(weights: dict[str, float], key: str) -> None:
    assert sorted(HashRing(weights).order(key)) == sorted(weights)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(["take", "release", "fail", "answer", "tick"]), max_size=60), st.randoms())
def test_no_place_is_ever_lost(steps: list[str], rng: random.Random) -> None:
    async def walk() -> None:
        clock = Clock()
        pool = pool_of("a", "b", "c", clock=clock, a={"limit": 2}, policy="affinity")
        held: list[Ticket[str]] = []
        for step in steps:
            if step == "take" and len(held) < 2:
                ticket = await pool.acquire(cost=rng.random(), key=str(rng.random()), until=clock() + 1)
                held += [ticket] if ticket else []
            elif step == "tick":
                clock.now += rng.choice([0.1, 3.0, 70.0])
            elif held:
                ticket = rng.choice(held)
                if step == "release":
                    held.remove(ticket)
                    ticket.release()
                    ticket.release()
                elif step == "fail":
                    ticket.failed(rng.choice([down(), fault(), busy(2)]))
                elif step == "answer":
                    ticket.first_token()
        for ticket in held:
            ticket.release()
        assert all(m.running == 0 and m.cost == 0 and not (m.half_open and not m.resting) for m in pool.members)
        clock.now += 1000
        assert await pool.acquire(until=clock() + 1) is not None

    asyncio.run(walk())


async def test_a_popular_picture_gets_a_second_home_before_its_first_is_much_busier_than_the_others() -> None:
    pool = pool_of("a", "b", "c", "d", policy="affinity")
    tickets = [await take(pool, key="sha256:popular") for _ in range(60)]
    load = Counter(ticket.member.name for ticket in tickets)
    # A quarter and four more than the mean, which is 15.
    assert max(load.values()) <= 1.25 * 15 + 5
    home = tickets[0].member.name
    assert load[home] == max(load.values())
    for ticket in tickets:
        ticket.release()
    assert {(await take(pool, key="sha256:popular")).member.name for _ in range(4)} == {home}
