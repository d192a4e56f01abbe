"""Metrics of several server processes as one: sums over the workers, those that died included."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NotRequired, TypeAlias, TypedDict, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# (name, type, documentation, [(sample, labels, value)])
Family: TypeAlias = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class SavedMetrics(TypedDict):
    """The counts of one process; `merged` names the file of a dead worker that is in these sums."""

    pid: int
    families: list[Family]
    merged: NotRequired[str]


SAVE_SECONDS: Final = 1.0
ASK_SECONDS: Final = 1.0
DEAD: Final = "dead.json"
SUPERVISOR: Final = "supervisor.json"
# Gauges are summed, but for those of which the sum says nothing.
_LEAST: Final = frozenset({"qvl_ready"})
_MOST: Final = ("_seconds", "_weight", "_state", "_perc")


class WorkerMetrics:
    """The metrics of one worker, and through their sockets in `folder` those of all.

    What this one counted is saved every second and whenever a worker is asked for the metrics, so that a sum never
    decreases when a worker is killed. A killed worker loses at most its last second.
    """

    def __init__(self, folder: Path, number: int, registry: CollectorRegistry) -> None:
        self._folder = folder
        self._number = number
        self._registry = registry
        self._file = folder / f"worker-{os.getpid()}.json"
        self._server: asyncio.Server | None = None
        self._saving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen for the other workers. Must be called on the server's event loop."""
        path = self._folder / f"{self._number}.sock"
        # That of a predecessor which was killed.
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._answer, path)
        self._saving = asyncio.create_task(self._save_regularly())

    async def stop(self) -> None:
        """Save what was counted, and listen no more."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        self._save()

    async def render(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format."""
        self._save()
        own = f"{self._number}.sock"
        await asyncio.gather(*(_ask(path) for path in self._folder.glob("*.sock") if path.name != own))
        return rendered(merged(_saved(self._folder)))

    def _save(self) -> None:
        _write(self._file, {"pid": os.getpid(), "families": list(families(self._registry))})

    async def _save_regularly(self) -> None:
        while True:
            self._save()
            await asyncio.sleep(SAVE_SECONDS)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._save()
        writer.write(b".")
        writer.close()


class SupervisorMetrics:
    """The supervisor's part of the metrics: the number of workers, and the counts of those that died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._deaths = 0

    def workers(self, count: int) -> None:
        """Record the number of workers."""
        self._count = count
        self._save()

    def died(self, pid: int) -> None:
        """Add what the worker `pid` had counted to the sum of the dead."""
        self._deaths += 1
        self._save()
        path, total = self._folder / f"worker-{pid}.json", self._folder / DEAD
        read = [content for name in (total, path) if (content := _read(name)) is not None]
        counted = [family for content in read for family in content["families"] if family[1] != "gauge"]
        # Named, so that nobody counts it twice who reads between the two steps.
        _write(total, {"pid": 0, "merged": path.name, "families": list(merged([counted]))})
        path.unlink(missing_ok=True)

    def _save(self) -> None:
        made: list[Family] = [
            ("qvl_workers", "gauge", "Server processes behind the port.", [("qvl_workers", {}, float(self._count))]),
            (
                "qvl_worker_deaths",
                "counter",
                "Server processes that died and were replaced.",
                [("qvl_worker_deaths_total", {}, float(self._deaths))],
            ),
        ]
        _write(self._folder / SUPERVISOR, {"pid": os.getpid(), "families": made})


def families(registry: CollectorRegistry) -> Iterator[Family]:
    """Yield what `registry` collects now."""
    for metric in registry.collect():
        samples = [(sample.name, dict(sample.labels), float(sample.value)) for sample in metric.samples]
        yield metric.name, metric.type, metric.documentation, samples


def merged(parts: Iterable[Iterable[Family]]) -> Iterator[Family]:
    """Yield each family of `parts` once, its samples with equal labels put together: most are summed."""
    known: dict[str, tuple[str, str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for part in parts:
        for name, kind, text, samples in part:
            values = known.setdefault(name, (kind, text, {}))[2]
            join = _joining(name, kind)
            for sample, labels, value in samples:
                key = sample, tuple(labels.items())
                values[key] = join(values[key], value) if key in values else value
    for name, (kind, text, values) in known.items():
        yield name, kind, text, [(sample, dict(labels), value) for (sample, labels), value in values.items()]


def _joining(name: str, kind: str) -> Callable[[float, float], float]:
    if kind != "gauge":
        return _sum
    if name in _LEAST:
        return min
    return max if name.endswith(_MOST) else _sum


def _sum(one: float, other: float) -> float:
    return one + other


def rendered(parts: Iterable[Family]) -> bytes:
    """Return families in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Given(parts))
    return generate_latest(registry)


class _Given(Collector):
    """A collector of families that are there already."""

    def __init__(self, parts: Iterable[Family]) -> None:
        self._parts = list(parts)

    def collect(self) -> Iterator[Metric]:
        for name, kind, text, samples in self._parts:
            metric = Metric(name, text, kind)
            for sample, labels, value in samples:
                metric.add_sample(sample, labels, value)
            yield metric


async def _ask(path: Path) -> None:
    """Have the worker that listens at `path` save its metrics, unless it is dead or too busy."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(ASK_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            await reader.read()
            writer.close()


def _saved(folder: Path) -> Iterator[list[Family]]:
    """Yield what every process has saved; of those that died without a word, counters alone."""
    total = _read(folder / DEAD)
    if total is not None:
        yield total["families"]
    for path in [folder / SUPERVISOR, *sorted(folder.glob("worker-*.json"))]:
        content = _read(path)
        if content is None or (total is not None and total.get("merged") == path.name):
            continue
        alive = _is_alive(content["pid"])
        yield [family for family in content["families"] if alive or family[1] != "gauge"]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(path: Path, content: SavedMetrics) -> None:
    new = path.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):
        new.write_text(json.dumps(content), encoding="utf-8")
        new.replace(path)


def _read(path: Path) -> SavedMetrics | None:
    with suppress(OSError, ValueError):
        return cast("SavedMetrics", json.loads(path.read_text(encoding="utf-8")))
    return None
