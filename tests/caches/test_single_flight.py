"""One answer for all processes: real pipelines in processes of their own, over each store that processes can share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.pipeline.cache_store import BEATS
from qvl.testing.cache_contract import eventually

# Long enough for a machine that is busy with other things to renew it in time.
LEASE = 2.0
pytestmark = pytest.mark.slow


class Askers:
    """Starts processes that ask the same question of one cache, and counts how often a backend worked."""

    def __init__(self, cache: str, folder: Path) -> None:
        self.cache = cache
        self.log = folder / "worked"
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, what: str = "answer", *, seconds: float = 0.0) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("asker.py")
        command = [sys.executable, str(script), self.cache, str(self.log), str(LEASE), str(seconds), what]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        self.started.append(child)
        return child

    @property
    def worked(self) -> int:
        return len(self.noted())

    def noted(self, what: str = "") -> list[str]:
        """The process of each time that a backend worked, or a lease was renewed (".renew") or waited for (".wait")."""
        path = self.log.with_name(self.log.name + what)
        return path.read_text().splitlines() if path.exists() else []

    def at_work(self) -> bool:
        return self.worked > 0


def said(child: subprocess.Popen[str]) -> str:
    out, _ = child.communicate(timeout=280)
    assert child.returncode == 0
    return out.strip()


@pytest.fixture(params=["sqlite", "redis"])
def ask(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    cache = f"sqlite:///{tmp_path / 'cache.db'}" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    askers = Askers(cache, tmp_path)
    yield askers
    for child in askers.started:
        if child.poll() is None:
            child.kill()
        child.communicate()


def test_of_sixteen_processes_one_backend_works(ask: Askers) -> None:
    children = [ask(seconds=2 * LEASE) for _ in range(16)]
    states = [said(child) for child in children]
    assert ask.worked == 1
    assert states.count("miss") == 1
    assert states.count("hit") == 15


def test_an_answer_that_takes_longer_than_the_lease_is_computed_once(ask: Askers) -> None:
    first = ask(seconds=2.5 * LEASE)
    eventually(ask.at_work, 120)
    second = ask()
    assert (said(first), said(second)) == ("miss", "hit")
    assert ask.worked == 1


def test_a_killed_holder_is_followed_by_one_of_those_who_wait(ask: Askers) -> None:
    first = ask(seconds=600)
    eventually(ask.at_work, 120)
    others = [ask(), ask()]
    eventually(lambda: len(set(ask.noted(".wait"))) == 2, 120)
    # They wait for longer than the lease was granted for.
    renewals = len(ask.noted(".renew"))
    eventually(lambda: len(ask.noted(".renew")) > renewals + 2 * BEATS, 120)
    assert ask.worked == 1
    first.send_signal(signal.SIGKILL)
    assert sorted(said(child) for child in others) == ["hit", "miss"]
    assert ask.worked == 2


def test_who_gives_up_waiting_leaves_the_holder_to_its_work(ask: Askers) -> None:
    first = ask(seconds=4 * LEASE)
    eventually(ask.at_work, 120)
    assert said(ask("leave")) == "left"
    assert said(first) == "miss"
    assert said(ask()) == "hit"
    assert ask.worked == 1


def test_a_holder_that_gives_up_leaves_the_work_to_those_who_wait(ask: Askers) -> None:
    first = ask("leave", seconds=600)
    eventually(ask.at_work, 120)
    second = ask()
    assert (said(first), said(second)) == ("left", "miss")


def test_an_error_is_not_kept_and_the_next_one_works(ask: Askers) -> None:
    first = ask("fail", seconds=2 * LEASE)
    eventually(ask.at_work, 120)
    second = ask()
    assert "out of order" in said(first)
    assert said(second) == "miss"
    assert said(ask()) == "hit"
    assert ask.worked == 2
