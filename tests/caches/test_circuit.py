"""The circuit breaker: a rest after a failure, one probe after the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from qvl.caches.circuit_breaker import Circuit


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def circuit(now: list[float]) -> Circuit:
    return Circuit(longest_rest=4.0, clock=lambda: now[0])


def test_while_things_go_well_everybody_may_ask(circuit: Circuit) -> None:
    assert [circuit.enter() for _ in range(5)] == [0.0] * 5
    assert not circuit.leave(None)
    assert not circuit.open


def test_after_a_failure_nobody_asks_until_the_rest_is_over_then_one(circuit: Circuit, now: list[float]) -> None:
    circuit.enter()
    assert circuit.leave("it broke")
    assert 0 < circuit.enter() <= 0.25
    assert circuit.reason == "it broke"
    now[0] += 0.26
    assert circuit.enter() == 0.0
    assert circuit.enter() > 0
    assert circuit.leave(None)
    assert [circuit.enter() for _ in range(3)] == [0.0] * 3


def test_rests_grow_up_to_the_longest(circuit: Circuit, now: list[float]) -> None:
    rests = []
    for _ in range(8):
        assert circuit.enter() == 0.0
        circuit.leave("still broken")
        rests.append(circuit.enter())
        now[0] += rests[-1]
    assert rests[3] > rests[0]
    assert max(rests) <= 4.0
    assert min(rests[5:]) >= 3.0


def test_a_probe_that_learnt_nothing_lets_the_next_one_probe(circuit: Circuit, now: list[float]) -> None:
    circuit.enter()
    circuit.leave("it broke")
    now[0] += 1
    assert circuit.enter() == 0.0
    circuit.forgo()
    assert circuit.open
    assert circuit.enter() == 0.0


def test_many_that_fail_together_are_one_failure(circuit: Circuit, now: list[float]) -> None:
    assert [circuit.enter() for _ in range(40)] == [0.0] * 40
    assert [circuit.leave("it broke") for _ in range(40)] == [True] + [False] * 39
    assert circuit.enter() <= 0.25
    now[0] += 0.26
    assert circuit.enter() == 0.0


def test_a_late_failure_does_not_end_the_probe_of_another_and_a_late_success_ends_the_rest(
    circuit: Circuit, now: list[float]
) -> None:
    for _ in range(3):
        circuit.enter()
    circuit.leave("it broke")
    now[0] += 0.26
    with ThreadPoolExecutor(1) as other:
        assert other.submit(circuit.enter).result() == 0.0
        circuit.leave("it broke")
        now[0] += 60
        assert circuit.enter() > 0
        assert circuit.leave(None)
        assert not circuit.open
        assert not other.submit(circuit.leave, None).result()
