"""How many threads torch computes with: by measurement, within what the process may use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from qvl.backends.local.model import cpu, kernel_times, linear, thread_times
from qvl.backends.local.model.cpu import Processors, processors
from qvl.backends.local.model.kernel_race import clock
from qvl.backends.local.model.kernel_times import STANDARD_ROWS, Times
from qvl.backends.local.model.thread_times import choose_threads, fastest_count
from qvl.config import cache_folder

if TYPE_CHECKING:
    from qvl.types import ChatRequest
    from tests.backends.local.conftest import Opener

TWO = Processors(2, 2, 2)


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch takes two threads of its own, nobody asked for a number, and nothing was measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in thread_times.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    as_new(monkeypatch)
    monkeypatch.setattr(thread_times, "is_busy", lambda: False)
    yield
    torch.set_num_threads(before)


def as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process: what an earlier one wrote is all that is known."""
    monkeypatch.setattr(kernel_times, "_memo", {})
    monkeypatch.setattr(kernel_times, "_passing", {})
    monkeypatch.setattr(thread_times, "_decided", threading.Event())


def system(folder: Path, siblings: dict[int, str], files: dict[str, str] | None = None) -> Path:
    """A folder with what Linux tells of processors and of the cgroup."""
    named = {f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    for name, text in {**named, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


PAIRS = {0: "0,4\n", 1: "1,5\n", 2: "2,6\n", 3: "3,7\n", 4: "0,4\n", 5: "1,5\n", 6: "2,6\n", 7: "3,7\n"}


@pytest.mark.parametrize(
    ("allowed", "siblings", "files", "found", "counts"),
    [
        # Two hardware threads of one core are all there is.
        ({0, 1}, {0: "0-1\n", 1: "0-1\n"}, {}, (2, 1, 2), (2, 1)),
        ({0, 1}, {0: "0\n", 1: "1\n"}, {}, (2, 2, 2), (2, 1)),
        (set(range(8)), PAIRS, {}, (8, 4, 8), (8, 4, 2)),
        # By affinity one of each pair, or both of two.
        ({0, 1, 2, 3}, PAIRS, {}, (4, 4, 4), (4, 2)),
        ({0, 4, 1, 5}, PAIRS, {}, (4, 2, 4), (4, 2, 1)),
        # Containers with a quota: two and a half processors of eight; none; cgroups of the first version.
        (set(range(8)), PAIRS, {"fs/cgroup/cpu.max": "250000 100000\n"}, (8, 4, 3), (3, 2)),
        (set(range(8)), PAIRS, {"fs/cgroup/cpu.max": "max 100000\n"}, (8, 4, 8), (8, 4, 2)),
        (
            set(range(8)),
            PAIRS,
            {"fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            (8, 4, 1),
            (1,),
        ),
        (
            {0, 1},
            {},
            {"fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            (2, 2, 2),
            (2, 1),
        ),
        # A service, of a slice that has less; what a cgroup outside of the folder has is none of ours.
        (
            set(range(8)),
            PAIRS,
            {
                "proc": "0::/our.slice/our.service\n",
                "fs/cgroup/our.slice/our.service/cpu.max": "600000 100000\n",
                "fs/cgroup/our.slice/cpu.max": "500000 100000\n",
                "fs/cpu.max": "100000 100000\n",
            },
            (8, 4, 5),
            (5, 4, 2),
        ),
        # Nothing is told, or nothing that makes sense.
        ({3}, {}, {}, (1, 1, 1), (1,)),
        ({0, 1}, {}, {"fs/cgroup/cpu.max": "lots\n"}, (2, 2, 2), (2, 1)),
        ({0, 1}, {}, {"fs/cgroup/cpu.max": "100000 0\n"}, (2, 2, 2), (2, 1)),
    ],
)
def test_the_candidates_are_all_processors_one_a_core_and_half_within_the_quota(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    allowed: set[int],
    siblings: dict[int, str],
    files: dict[str, str],
    found: tuple[int, int, int],
    counts: tuple[int, ...],
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
    here = processors(system(tmp_path, siblings, files), tmp_path / "proc")
    assert here == found
    assert here.thread_counts() == counts


def times(**milliseconds: float) -> Times:
    """By the number of threads, at each of the rows that are timed."""
    return {name.removeprefix("n"): dict.fromkeys(STANDARD_ROWS, ms) for name, ms in milliseconds.items()}


def test_another_number_than_torchs_own_must_save_a_tenth() -> None:
    assert fastest_count(times(n2=1.0, n1=0.95), 2) == 2
    assert fastest_count(times(n2=1.0, n1=0.85), 2) == 1
    assert fastest_count(times(n8=1.0, n4=0.8, n2=0.5), 4) == 2
    # Decode alone does not decide: the time of prompts counts as well.
    uneven: Times = {"2": {1: 1.0, 8: 1.0, 32: 1.0, 256: 1.0}, "1": {1: 0.8, 8: 0.8, 32: 1.0, 256: 2.0}}
    assert fastest_count(uneven, 2) == 2
    assert fastest_count({}, 2) == 2


def measured(monkeypatch: pytest.MonkeyPatch, here: Processors, by_count: dict[int, float]) -> list[int]:
    """Made-up processors and times; the numbers of threads at which something was measured."""
    seen: list[int] = []

    def products(size: object, dtype: object, names: tuple[str, ...], rows: tuple[int, ...]) -> Times:
        seen.append(torch.get_num_threads())
        return {name: dict.fromkeys(rows, by_count[seen[-1]] * (index + 1)) for index, name in enumerate(names)}

    monkeypatch.setattr(thread_times, "processors", lambda: here)
    monkeypatch.setattr(thread_times, "measure_products", products)
    return seen


def choose() -> int:
    return choose_threads((4096, 2048), torch.bfloat16, ("plain", "onednn"))


def test_the_fastest_number_is_taken_and_kept_for_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measured(monkeypatch, TWO, {2: 3.0, 1: 2.0})
    assert choose() == torch.get_num_threads() == 1
    assert seen == [2, 1]
    # Another model of this process finds it decided.
    seen.clear()
    assert choose_threads((2048, 4096), torch.float32, ("plain",)) == 1
    assert seen == []
    torch.set_num_threads(2)
    as_new(monkeypatch)
    # Kept, so it does not matter that the machine is busy now.
    monkeypatch.setattr(thread_times, "is_busy", lambda: True)
    assert choose() == torch.get_num_threads() == 1
    assert seen == []
    # A container with a quota has other candidates.
    torch.set_num_threads(2)
    as_new(monkeypatch)
    measured(monkeypatch, Processors(2, 2, 1), {})
    assert choose() == torch.get_num_threads() == 1


def test_torchs_own_number_stays_where_it_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, TWO, {2: 1.0, 1: 1.9})
    assert choose() == torch.get_num_threads() == 2


def test_a_quota_is_kept_to_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(8)
    seen = measured(monkeypatch, Processors(8, 8, 4), {4: 1.0})
    assert choose() == torch.get_num_threads() == 4
    assert seen == []


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = measured(monkeypatch, TWO, {})
    monkeypatch.setattr(thread_times, "is_busy", lambda: True)
    assert choose() == torch.get_num_threads() == 2
    assert seen == []
    # Others that came while it was measured leave no trace.
    as_new(monkeypatch)
    seen = measured(monkeypatch, TWO, {2: 3.0, 1: 2.0})
    monkeypatch.setattr(thread_times, "is_busy", lambda: False)
    monkeypatch.setattr(clock, "disturbed", True)
    monkeypatch.setattr(clock, "bounded", nullcontext)
    assert choose() == torch.get_num_threads() == 2
    assert seen == [2, 1]
    assert not (cache_folder() / "kernels.json").exists()
    load = {"now": 1.9}
    monkeypatch.setattr("os.getloadavg", lambda: (load["now"], 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert not cpu.is_busy()
    load["now"] = 2.1
    assert cpu.is_busy()


@pytest.mark.parametrize("variable", thread_times.VARIABLES)
def test_a_number_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    seen = measured(monkeypatch, TWO, {})
    torch.set_num_threads(7)
    assert choose() == torch.get_num_threads() == 7, "no number that torch takes by itself here"
    torch.set_num_threads(2)
    as_new(monkeypatch)
    monkeypatch.setenv(variable, "2")
    assert choose() == torch.get_num_threads() == 2
    assert seen == []


def test_the_engines_thread_computes_with_the_chosen_number(
    monkeypatch: pytest.MonkeyPatch, opened: Opener, mixed_300: list[ChatRequest]
) -> None:
    measured(monkeypatch, TWO, {2: 2.0, 1: 1.0})
    monkeypatch.setattr(linear, "SMALL", 1)
    kinds = ("plain", "onednn", "fbgemm")
    monkeypatch.setattr(
        linear, "kernel_times", lambda *_: {name: dict.fromkeys(kernel_times.ROWS, 1.0) for name in kinds}
    )
    monkeypatch.setattr(linear, "read_bandwidth", lambda: 10.0)
    seen = []
    real = linear.Linear.__call__

    def watched(self: linear.Linear, x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return real(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linear.Linear, "__call__", watched)
    backend = opened()
    assert "on 1 thread" in backend.describe()
    asyncio.run(backend.generate(mixed_300[0]))
    assert set(seen) == {1}
