"""Compares two sides case by case: asks, records, names where they part, judges, and looks for causes."""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.errors import ConfigError, QvlError
from qvl.parity.budgets import Budgets
from qvl.parity.case import check_ids, digest
from qvl.parity.diagnose import Diagnosis
from qvl.parity.differences import LAYERS, TOLERANCE, differ
from qvl.parity.observation import SelfCheck
from qvl.parity.probing import Probing
from qvl.parity.record_file import RecordFile
from qvl.parity.report import ParityReport, WorstCase, kl_of, medians
from qvl.parity.sides import LiveSide, ParitySide, RecordedSide, SideLike
from qvl.parity.tally import ParityTally
from qvl.types import canonical_json

if TYPE_CHECKING:
    from qvl.media.picture import Picture
    from qvl.parity.case import Case
    from qvl.parity.causes import Cause
    from qvl.types import JsonMapping, JsonObject

SELF_CHECKED: Final = 32
# An unfinished run that is older is not gone on with: what answers may have been changed since.
STALE_SECONDS: Final = 24 * 3600.0
NO_REQUEST: Final[JsonObject] = {}


def compare(
    a: SideLike | RecordFile,
    b: SideLike,
    cases: Sequence[Case],
    *,
    budgets: Budgets | None = None,
    self_check: bool = False,
    probe: bool = True,
    request: JsonMapping = NO_REQUEST,
    work: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Return where the answers of `a` and `b` to `cases` part, and why; see `acompare`. Blocking.

    Raises:
        ConfigError: no case, two with one id, or what would fail for every case.
        BackendError: a side cannot be opened.
    """
    coming = acompare(
        a, b, cases, budgets=budgets, self_check=self_check, probe=probe, request=request, work=work, advance=advance
    )
    return asyncio.run(coming)


async def acompare(
    a: SideLike | RecordFile,
    b: SideLike,
    cases: Sequence[Case],
    *,
    budgets: Budgets | None = None,
    self_check: bool = False,
    probe: bool = True,
    request: JsonMapping = NO_REQUEST,
    work: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ParityReport:
    """Return where the answers of `a` and `b` to `cases` part, and why.

    Args:
        a: a pipeline, the name of a model as Pipeline takes it, or a record of one (`RecordFile`).
        b: a pipeline or the name of a model.
        budgets: what the report judges; without them it only tells.
        self_check: ask `a` twice first; the difference is the noise within which two sides are the same. A record
            that has it measured is compared so in any case.
        probe: ask the sides again, alone and in a batch, where cases part, and show them pictures as they are stored.
        request: parameters of every request, as of `ask`; temperature is 0 unless it is named.
        work: a folder that keeps what was answered, so that an interrupted run goes on; None keeps nothing.
        advance: called for each answer, of both sides.

    Raises:
        ConfigError: no case, two with one id, or what would fail for every case.
        BackendError: a side cannot be opened.
    """
    check_ids(cases)
    context = tempfile.TemporaryDirectory(prefix="qvl-parity-") if work is None else nullcontext(str(work))
    with context as folder:
        async with AsyncExitStack() as stack:
            asked = await asyncio.to_thread(digest, cases)
            live_b = LiveSide(b, request)
            stack.push_async_callback(live_b.aclose)
            side_a: ParitySide
            if isinstance(a, RecordFile):
                record_a, side_a = a, RecordedSide(a)
                _check_recorded(a, cases, self_check=self_check)
            else:
                async with _opened(a, request) as live_a:
                    # What is wrong with B is told before A is asked, which may take hours; of two models that are
                    # both loaded for this, one at a time is.
                    await live_b.refuse_missing()
                    if not live_a.owned or not live_b.backend.wants_pixels:
                        await live_b.open()
                    side_a = live_a
                    record_a = stack.enter_context(_record(Path(folder), "a", live_a, asked, request))
                    if self_check and record_a.self_check is None:
                        record_a.add_self_check(await measure_noise(live_a, cases))
                    await ask_missing(live_a, cases, record_a, advance)
            await live_b.open()
            record_b = stack.enter_context(_record(Path(folder), "b", live_b, asked, request))
            await ask_missing(live_b, cases, record_b, advance)
            checked = record_a.self_check if self_check or record_a is a else None
            tolerance = TOLERANCE if checked is None else max(TOLERANCE, 4 * checked.deviation)
            tally, diagnosis = ParityTally(), Diagnosis((side_a.identity, live_b.identity))
            for case in cases:
                seen_a, seen_b = record_a.get(case.id), record_b.get(case.id)
                one = differ(seen_a, seen_b, tolerance)
                tally.add(one)
                if one.layer is not None:
                    await asyncio.to_thread(diagnosis.add, case, one, seen_a, seen_b)
            causes = diagnosis.causes()
            if probe:
                told = (record_a.get, record_b.get)
                probing = Probing(cases, tally, diagnosis, tolerance)
                await probing.ask("B", live_b, told)
                if not isinstance(a, RecordFile) and probing.wanted(live_a):
                    # One model at a time is loaded, of those that are made here.
                    await live_b.aclose()
                    async with _opened(a, request) as live_a:
                        await probing.ask("A", live_a, told[::-1])
                causes = probing.causes()
            by_id = {case.id: case for case in cases}
            worst = []
            for one in tally.worst():
                case = by_id[one.case]
                seen = (record_a.get(one.case), record_b.get(one.case))
                worst.append(WorstCase(one, *seen, case.facts(), await _pictures(case)))
            report = _report(side_a, live_b, tally, causes, tolerance, checked, worst)
            live = (record_b,) if record_a is a else (record_a, record_b)
            again = sum(record.get(name).retryable for record in live for name in record.failed)
            report = replace(report, retryable=again)
            verdicts = (budgets or Budgets({})).judge(report.agreement, report.kl, _noise(checked), report.failed)
        # Only an unfinished run is gone on with: one that was stopped, or whose endpoint was away.
        for record in (record_a, record_b):
            if record is not a and not report.retryable:
                record.path.unlink(missing_ok=True)
    return replace(report, verdicts=verdicts)


@asynccontextmanager
async def _opened(source: SideLike, request: JsonMapping) -> AsyncIterator[LiveSide]:
    side = LiveSide(source, request)
    try:
        await side.open()
        yield side
    finally:
        await side.aclose()


def _record(folder: Path, name: str, side: LiveSide, asked: str, request: JsonMapping) -> RecordFile:
    header = header_of(side, asked, request)
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(canonical_json(header).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = folder / f"{name}-{key}.jsonl.gz"
    if path.exists() and time.time() - path.stat().st_mtime > STALE_SECONDS:
        path.unlink()
    return RecordFile(path, header)


def header_of(side: LiveSide, asked: str, request: JsonMapping) -> JsonObject:
    """Return what a record of `side` says of itself: equal for runs that may go on with each other's answers.

    `asked` is the digest of the cases.
    """
    return {
        "model": side.label,
        "identity": dict(side.identity),
        "language": side.language,
        "cases": asked,
        "request": dict(request),
    }


def _check_recorded(record: RecordFile, cases: Sequence[Case], *, self_check: bool) -> None:
    if self_check and record.self_check is None:
        what = f"{record.path} does not tell what A differs by from itself, and A cannot be asked here"
        raise ConfigError(what, hint="qvl parity record A --self-check")
    missing = [case.id for case in cases if case.id not in record.places]
    if missing:
        what = f"{record.path} has no answer to {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        raise ConfigError(what, hint="run the same qvl parity record again; it goes on where it ended")


async def ask_missing(
    side: LiveSide, cases: Sequence[Case], record: RecordFile, advance: Callable[[], None] = lambda: None
) -> None:
    """Ask `side` about the cases without an answer in `record`, several at a time; add each answer as it comes.

    A case that failed before is asked again.
    """
    missing = [case for case in cases if record.missing(case.id)]
    todo = iter(missing)
    for _ in range(len(cases) - len(missing)):
        advance()

    async def work() -> None:
        for case in todo:
            record.add(await side.observe(case))
            advance()

    tasks = [asyncio.create_task(work()) for _ in range(side.concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure_noise(side: LiveSide, cases: Sequence[Case]) -> SelfCheck:
    """Return what `side` differs by from itself; asks it about the first cases together, then one at a time."""
    chosen = cases[:SELF_CHECKED]
    turn = asyncio.Semaphore(side.concurrency)

    async def one(case: Case) -> object:
        async with turn:
            return await side.observe(case)

    tally = ParityTally()
    for case, together in zip(chosen, await asyncio.gather(*map(one, chosen)), strict=True):
        alone = await side.observe(case)
        tally.add(differ(together, alone))  # type: ignore[arg-type]
    # One that is never answered says nothing of noise.
    count = tally.cases - tally.both_failed
    same = count - sum(tally.layers[name] for name in LAYERS if name != "log-probabilities")
    return SelfCheck(count, same, tally.ties, max(tally.deviations, default=0.0))


async def _pictures(case: Case) -> list[Picture]:
    """Return the pictures of a case for a page; none where they cannot be read."""
    from qvl.media import gate

    try:
        return [await gate.aload(source, decode=False) for source in case.pictures]  # type: ignore[arg-type]
    except QvlError:
        return []


def _noise(checked: SelfCheck | None) -> str:
    if checked is None or checked.same + checked.ties >= checked.cases:
        return ""
    return f"A disagrees with itself in {checked.cases - checked.same} of {checked.cases} cases"


def _report(
    a: ParitySide,
    b: ParitySide,
    tally: ParityTally,
    causes: Sequence[Cause],
    tolerance: float,
    checked: SelfCheck | None,
    worst: Sequence[WorstCase],
) -> ParityReport:
    return ParityReport(
        a=a.label,
        b=b.label,
        identities=(a.identity, b.identity),
        cases=tally.cases,
        failed=(tally.both_failed, tally.one_failed),
        layer=tally.first_layer,
        layers=dict(tally.layers),
        shown=dict(tally.shown),
        ties=tally.ties,
        agreement=tally.agreement(),
        kl=kl_of(tally),
        deviation=max(tally.deviations, default=None),
        tolerance=tolerance,
        causes=causes,
        self_check=checked,
        worst=worst,
        distances={name: statistics.fmean(values) for name, values in tally.distances.items()},
        seconds=medians(tally.seconds),
        tokens=medians(tally.tokens),
        reasons=tally.reasons(),
    )
