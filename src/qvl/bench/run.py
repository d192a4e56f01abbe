"""A whole run: model lookup, warm-up, blocks of requests or sweep levels, and the output files."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Final

from qvl.bench.apis import BenchApi, NoRequestError, find_api
from qvl.bench.dataset import Dataset, Drawn, Files, Item, NamedRequest, endless
from qvl.bench.exchange import AttemptFailedError, LoadedEndpoint
from qvl.bench.load import Load
from qvl.bench.metrics import Windows
from qvl.bench.plan import FEWEST_A_LEVEL, LoadPlan
from qvl.bench.prepare import Feeder, Preparer, unlike
from qvl.bench.record import SUMMARY, RequestRecord, RunFolder, RunRequest, write_json
from qvl.bench.spread import SpreadEndpoint
from qvl.bench.summary import Summary, summarise
from qvl.errors import BackendUnavailableError, ConfigError, MissingDependencyError
from qvl.media.policy import MediaPolicy
from qvl.suggest import install_line
from qvl.types import JsonMapping

GROWTH: Final = 1.1
AHEAD: Final = 64
WARM_SEED: Final = 1_000_000_000


@dataclass(frozen=True)
class Target:
    """The endpoints of a run, with their headers and request fields; with `spread` they are loaded as one.

    `api` names the API that is asked: chat, responses, completions, messages or decisions.

    Raises:
        ConfigError: there is no such API.
    """

    urls: tuple[str, ...]
    model: str | None = None
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    params: JsonMapping = field(default_factory=dict)
    stream: bool = True
    max_pixels: int | None = None
    min_pixels: int | None = None
    verify: bool = True
    spread: bool = False
    api: str = "chat"

    def __post_init__(self) -> None:
        find_api(self.api)

    def make_api(self) -> BenchApi:
        """Return the API with the fields of every request."""
        return find_api(self.api)(self.params, stream=self.stream)


class Run:
    """One process's share of a benchmark run.

    Args:
        on_record: called with each record, for a progress bar.

    Raises:
        ConfigError: no endpoint, or a sweep to resume; by work(): the folder, the input or an endpoint is invalid.
    """

    def __init__(
        self,
        target: Target,
        dataset: Dataset,
        plan: LoadPlan,
        out: Path,
        *,
        resume: bool = False,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        if not target.urls:
            raise ConfigError("no endpoint given", hint="as --url http://127.0.0.1:8000/v1")
        if resume and plan.sweep:
            raise ConfigError("a sweep cannot be resumed", hint="start a new one in another --out")
        if len(target.urls) > 1 and not target.spread:
            _need_scipy()
        self.target, self.dataset, self.plan, self.out, self.resume = target, dataset, plan, out, resume
        self.api = target.make_api()
        self._check_input()
        self.on_record = on_record
        self.load: Load | None = None
        self.expected: int | None = None
        self._starved = 0.0
        self._client_seconds = 0.0

    def _check_input(self) -> None:
        """Refuse what the command line asks and the API has no form for; lines of files are skipped one by one."""
        try:
            self.api.body((), {})
        except NoRequestError as exc:
            raise ConfigError(str(exc), hint="leave it out, or choose another --target") from exc
        if isinstance(self.dataset, Files):
            return
        for item in islice(self.dataset, 1):
            try:
                self.api.body(item.messages, item.params)
            except NoRequestError as exc:
                raise ConfigError(str(exc), hint="choose another --target, or another input") from exc

    def work(self) -> Summary:
        """Do the remaining requests, write `summary.json` and return the summary. Ctrl-C ends the run early."""
        with _more_files():
            _run(self._work())
        summary = summarise(self.out)
        write_json(self.out / SUMMARY, summary.data)
        return summary

    async def _work(self) -> None:
        endpoints = self._endpoints()
        try:
            await _name_models(endpoints)
            request: RunRequest = {
                "endpoints": [{"url": endpoint.url, "model": endpoint.model} for endpoint in endpoints],
                "input": self.dataset.facts(),
                "params": dict(self.target.params),
                "stream": self.api.stream,
                "target": self.api.name,
                "plan": self.plan.facts(),
            }
            await self._load(endpoints, RunFolder(self.out, request, resume=self.resume))
        finally:
            for endpoint in endpoints:
                endpoint.close()

    async def _load(self, endpoints: list[LoadedEndpoint], folder: RunFolder) -> None:
        load = self.load = Load(self.plan, endpoints, folder, self.on_record)
        lag = asyncio.get_running_loop().create_task(load.watch())
        try:
            with _on_ctrl_c(load.interrupt):
                await self._phases(load)
        finally:
            lag.cancel()
            with suppress(asyncio.CancelledError):
                await lag
            self._note(folder, load)
            folder.close()

    def _endpoints(self) -> list[LoadedEndpoint]:
        headers = {**self.api.headers(self.target.api_key), **self.target.headers}
        endpoints = [
            LoadedEndpoint(
                url,
                model=self.target.model,
                api=self.api,
                timeout=self.plan.timeout,
                headers=headers,
                verify=self.target.verify,
            )
            for url in self.target.urls
        ]
        return [SpreadEndpoint(endpoints)] if self.target.spread else endpoints

    async def _phases(self, load: Load) -> None:
        policy = MediaPolicy().with_sizes(self.target.max_pixels, self.target.min_pixels)
        preparer = Preparer(self.api, policy)
        if self.plan.warmup:
            for number in range(len(load.endpoints)):
                await self._warm_up(load, preparer, number)
        if load.interrupted:
            return
        load.origin = perf_counter()
        if self.plan.sweep:
            await self._sweep(load, preparer)
        else:
            await self._blocks(load, preparer)

    async def _warm_up(self, load: Load, preparer: Preparer, number: int) -> None:
        """Send warm-up requests with pictures that no measured request has, so that no cache is warmed."""
        first = next(iter(self.dataset), None)
        size = self.dataset.size if isinstance(self.dataset, Drawn) else (512, 512)
        items: Iterable[Item] = Drawn(self.plan.warmup, size, first_seed=WARM_SEED + number * self.plan.warmup)
        if first is not None and not any(True for _ in first.picture_parts()):
            items = (
                Item(index, "", ({"role": "user", "content": f"Warm-up {index} of endpoint {number}: say ready."},))
                for index in range(self.plan.warmup)
            )
        named = (unlike(item, index) for index, item in enumerate(items))
        feeder = Feeder(named, preparer, AHEAD)
        try:
            await feeder.fill()
            await load.closed(feeder, number, min(self.plan.concurrency, self.plan.warmup), phase="warmup")
        finally:
            feeder.close()

    def _items(self, laps: bool) -> Iterator[Item]:
        return endless(self.dataset) if laps else iter(self.dataset)

    async def _blocks(self, load: Load, preparer: Preparer) -> None:
        """Send all requests to one endpoint; with several, send each block to every endpoint, in changing order."""
        plan, several = self.plan, len(load.endpoints) > 1
        items = self._items(plan.count is not None or plan.duration is not None)
        if plan.count is not None:
            items = islice(items, plan.count)
        deadline = None
        if plan.duration is not None:
            deadline = perf_counter() + max(0.0, plan.duration - load.folder.worked)
        if not several:
            todo = (item for item in items if (0, item.index) not in load.folder.done)
            await self._block(load, preparer, todo, 0, 0, ramp=plan.ramp, deadline=deadline)
            return
        part = 0
        while block := list(islice(items, plan.block())):
            order = list(range(len(load.endpoints)))
            for number in order[part % len(order) :] + order[: part % len(order)]:
                todo = (item for item in block if (number, item.index) not in load.folder.done)
                await self._block(load, preparer, todo, number, part, ramp=plan.ramp if part == 0 else 0.0)
            part += 1
            if load.interrupted or (deadline is not None and perf_counter() >= deadline):
                return

    async def _block(
        self,
        load: Load,
        preparer: Preparer,
        items: Iterator[Item],
        number: int,
        part: int,
        *,
        ramp: float,
        deadline: float | None = None,
        stage: int = 0,
        clients: int | None = None,
    ) -> None:
        if load.interrupted:
            return
        feeder = Feeder(items, preparer, AHEAD)
        clients = clients or self.plan.concurrency
        try:
            await feeder.fill()
            begun = perf_counter()
            if self.plan.rate is not None:
                steady, end = await load.open(feeder, number, part=part, ramp=ramp, deadline=deadline)
            else:
                steady, end = await load.closed(feeder, number, clients, stage=stage, ramp=ramp, deadline=deadline)
            self._starved += feeder.starved
            self._client_seconds += (perf_counter() - begun) * clients
        finally:
            feeder.close()
        if end > steady:
            load.folder.add_window(number, stage, steady - load.origin, end - load.origin)

    async def _sweep(self, load: Load, preparer: Preparer) -> None:
        """Run level after level until doubling the clients raises throughput by less than 10 %."""
        items = self._items(laps=True)
        best = [0.0] * len(load.endpoints)
        over = [False] * len(load.endpoints)
        for level in self.plan.levels():
            if all(over) or load.interrupted:
                return
            block = None
            if self.plan.duration is None:
                block = list(islice(items, self.plan.count or max(FEWEST_A_LEVEL, 8 * level)))
            for number in range(len(load.endpoints)):
                if over[number]:
                    continue
                spans: list[tuple[float, float]] = []
                load.on_record = _also(self.on_record, spans)
                deadline = None if self.plan.duration is None else perf_counter() + self.plan.duration
                todo = items if block is None else iter(block)
                await self._block(
                    load, preparer, todo, number, 0, ramp=0.0, deadline=deadline, stage=level, clients=level
                )
                load.on_record = self.on_record
                rate = _rate(load, number, level, spans)
                over[number] = rate < GROWTH * best[number]
                best[number] = max(best[number], rate)

    def _note(self, folder: RunFolder, load: Load) -> None:
        lags = sorted(load.lags) or [0.0]
        session = folder.sessions[-1]
        session["interrupted"], session["ended"] = load.interrupted, True
        session["client"] = {
            "lag_p50": round(max(0.0, lags[len(lags) // 2]), 6),
            "lag_p99": round(max(0.0, lags[min(len(lags) - 1, len(lags) * 99 // 100)]), 6),
            "starved_share": round(self._starved / self._client_seconds, 4) if self._client_seconds else 0.0,
            "behind": round(load.behind, 4),
            "pace": round(load.pace, 4),
            "limits": [(round(when, 3), level) for when, level in load.limits[-2000:]],
        }
        if isinstance(self.dataset, Files):
            bad = self.dataset
            session["bad_lines"] = {"count": bad.bad_count, "lines": [str(line) for line in bad.bad[:100]]}

    def total(self) -> int | None:
        """Return the number of requests of the run; None if it is not known in advance."""
        each = self.plan.count
        if each is None and isinstance(self.dataset, NamedRequest):
            each = 1
        if each is None and isinstance(self.dataset, Drawn):
            each = self.dataset.count
        if each is None or self.plan.duration is not None or self.plan.sweep:
            return None
        return each if self.target.spread else each * len(self.target.urls)


async def _name_models(endpoints: list[LoadedEndpoint]) -> None:
    for endpoint in endpoints:
        try:
            await endpoint.find_model()
            await endpoint.find_route()
        except AttemptFailedError as exc:
            hint = exc.hint or "check that the server runs and --url ends in /v1"
            raise BackendUnavailableError(exc.message, hint=hint) from exc


def _also(
    on_record: Callable[[RequestRecord], None], spans: list[tuple[float, float]]
) -> Callable[[RequestRecord], None]:
    """Return `on_record` extended to append (start, end) of each answer to `spans`."""

    def note(record: RequestRecord) -> None:
        if record.success:
            spans.append((record.start, record.end))
        on_record(record)

    return note


def _rate(load: Load, number: int, level: int, spans: list[tuple[float, float]]) -> float:
    noted = load.folder.sessions[-1]["windows"]
    windows = Windows((window[2], window[3]) for window in noted if window[:2] == (number, level))
    if windows.length > 0:
        return sum(windows.share(start, end) for start, end in spans) / windows.length
    if not spans:
        return 0.0
    return len(spans) / max(1e-9, max(end for _, end in spans) - min(start for start, _ in spans))


@contextmanager
def _on_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """In the context, call `stop` at the first Ctrl-C; a second one raises KeyboardInterrupt as usual."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    try:
        loop.add_signal_handler(signal.SIGINT, once)
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _more_files() -> Iterator[None]:
    """Raise the limit of open files to its hard limit in the context."""
    try:
        import resource
    except ImportError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _need_scipy() -> None:
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise MissingDependencyError("comparing endpoints needs the scipy package", hint=install_line("bench"))


def _run(work: Coroutine[None, None, None]) -> None:
    """Run `work` with asyncio, on uvloop if installed, since a slow client would measure its own delay."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(work)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)
