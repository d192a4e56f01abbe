"""Times of the CPU's kernels, of matrix products and attention, on this processor: measured once, kept in a file."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from bisect import bisect_left
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

from qvl.backends.local.model.attention_kernels import DECODE_ATTENTION, PROMPT_ATTENTION
from qvl.backends.local.model.bandwidth import host_bandwidth
from qvl.backends.local.model.cpu import cpu_name, has_bfloat16, is_busy
from qvl.backends.local.model.kernel_race import DISTURBED_SECONDS, clock, race
from qvl.backends.local.model.linear_kernels import INT8_KERNELS, KERNELS
from qvl.config import cache_folder
from qvl.errors import first_line
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from qvl.backends.local.model.linear_kernels import LinearKernel
    from qvl.types import JsonObject

log = logger(__name__)

# The numbers of rows that are timed; the last stands for prompts and pictures.
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 256)
# Of a larger weight the first rows are timed, to which the time is in proportion.
LARGEST: Final = 12 << 20
# A decode step finds no weight in the processor's caches: bytes of weights that are multiplied in turn.
WORKING_SET: Final = 96 << 20
# From so many rows on, computing and not memory is the limit, and fewer weights are enough.
COMPUTE_BOUND: Final = 64
# The weight by which "auto" chooses between float32 and bfloat16, and the rows.
STANDARD: Final = (1024, 2048)
STANDARD_NAME: Final = f"{STANDARD[0]}x{STANDARD[1]}"
# How many times as long as float32 bfloat16 must take, in the geometric mean, for "auto" to be float32.
CLEARLY: Final = 1.15
STANDARD_ROWS: Final = (1, 8, 32, 256)

# The form of a name in the file, the largest file that is read, and the range of what can be measured.
NUMBER: Final = r"[1-9][0-9]{0,9}"
WEIGHT: Final = rf"{NUMBER}x{NUMBER} (float32|bfloat16)"
ATTENTION: Final = rf"(decode|prompt) {NUMBER}/{NUMBER}x{NUMBER}( over {NUMBER})? (float32|bfloat16)"
THREAD_COUNTS: Final = rf"threads {NUMBER}x{NUMBER} (float32|bfloat16)"
THREADS: Final = r" [1-9][0-9]{0,4} threads?"
PRODUCTS: Final = frozenset({*KERNELS, *INT8_KERNELS})
ATTENTIONS: Final = frozenset({*DECODE_ATTENTION, *PROMPT_ATTENTION})
LARGEST_FILE: Final = 4 << 20
LEAST: Final = 1e-6
MOST: Final = 1e6

Times: TypeAlias = dict[str, dict[int, float]]
"""Milliseconds by number of rows, by the kernel's name."""


class _Processor(TypedDict, total=False):
    """The measurements of one processor with one release of torch; `times` by what, its shape, dtype and threads."""

    read_gb_s: float
    dtype: str
    times: dict[str, dict[str, dict[str, float]]]


_lock = threading.RLock()
_memo: dict[str, _Processor] = {}
# What was measured while others had the processor: for this process alone.
_passing: _Processor = {}


def kernel_times(shape: tuple[int, int], dtype: torch.dtype, names: Sequence[str], rows: Sequence[int] = ROWS) -> Times:
    """Return the milliseconds of each kernel that works here for a weight [out, in] of `dtype`, at each of `rows`.

    Blocking: a second for a large weight that was never measured here.
    """
    size = timed_shape(shape)
    return kept_times(f"{size[0]}x{size[1]}", dtype, names, rows, partial(measure_products, size, dtype))


def name_of(what: str, dtype: torch.dtype) -> str:
    """Return the name by which the times of `what` are kept, which torch's number of threads is a part of."""
    import torch

    threads = torch.get_num_threads()
    return f"{what} {str(dtype).removeprefix('torch.')} {threads} thread{'s' if threads != 1 else ''}"


def kept_times(
    what: str,
    dtype: torch.dtype,
    names: Sequence[str],
    rows: Sequence[int],
    measure: Callable[[Sequence[str], Sequence[int]], Times],
) -> Times:
    """Return the milliseconds of each of `names` that works here, at each of `rows`, measured if they never were.

    `what` names what is computed in the file. Once this process has measured for MOST_SECONDS, what was not measured is
    left out. Times that were disturbed are not kept, but for those of the standard weight: all processes must agree on
    the dtype that they decide.
    """
    key, needed = name_of(what, dtype), set(map(str, rows))
    with _lock:
        known, passing = (of.setdefault("times", {}).setdefault(key, {}) for of in (_known(), _passing))
        times = {**known, **passing}
        # A kernel that does not work here has no times, and is not tried again.
        new = any(name not in times or (times[name] and not times[name].keys() >= needed) for name in names)
        if new and clock.left > 0:
            log.info("measuring_kernels", what=key, kernels=",".join(names))
            try:
                with clock.bounded():
                    measured = measure(names, rows)
            except (TimeoutError, MemoryError, RuntimeError) as exc:
                # Nor is there time, or memory, for the others.
                clock.left = 0.0
                log.info("measuring_kernels_stopped", what=key, reason=first_line(exc))
            else:
                passes = clock.disturbed and what != STANDARD_NAME
                of = passing if passes else known
                for name in names:
                    found = {str(count): ms for count, ms in measured.get(name, {}).items()}
                    passing.pop(name, None)
                    of[name] = times[name] = of.get(name, {}) | found if found.keys() >= needed else {}
                if passes:
                    clock.left = min(clock.left, DISTURBED_SECONDS)
                else:
                    _write()
        whole = [name for name in names if needed <= times.get(name, {}).keys()]
        return {name: {int(count): ms for count, ms in times[name].items()} for name in whole}


def standard_times(dtype: torch.dtype, names: Sequence[str]) -> Times:
    """Return `kernel_times` of the STANDARD weight at each of ROWS; those that are not timed have the next one's."""
    times = kernel_times(STANDARD, dtype, names, STANDARD_ROWS)
    timed = {count: STANDARD_ROWS[bisect_left(STANDARD_ROWS, count)] for count in ROWS}
    return {name: {count: of[timed[count]] for count in ROWS} for name, of in times.items()}


def read_bandwidth() -> float:
    """Return the GB/s at which this machine reads memory."""
    with _lock:
        found = known_bandwidth()
        if found is None:
            found = round(host_bandwidth() / 1e9, 1)
            if is_busy():
                _passing["read_gb_s"] = found
            else:
                _known()["read_gb_s"] = found
                _write()
        return found


def faster_dtype() -> str:
    """Return "bfloat16", or "float32" if its best kernels take CLEARLY less time over STANDARD_ROWS here.

    Where both take about as long, noise would choose, and answers of two processes would not be each other's in a
    cache; bfloat16 takes half the memory. Without instructions for it, bfloat16 is emulated, several times slower, and
    not measured.
    """
    import torch

    if not has_bfloat16():
        return "float32"
    with _lock:
        known = _known()
        if "dtype" not in known:
            costs = {}
            for dtype in (torch.bfloat16, torch.float32):
                times = kernel_times(STANDARD, dtype, tuple(KERNELS), STANDARD_ROWS).values()
                if not times:
                    return "bfloat16"
                costs[dtype] = sum(math.log(min(of[count] for of in times)) for count in STANDARD_ROWS)
            saved = (costs[torch.bfloat16] - costs[torch.float32]) / len(STANDARD_ROWS)
            measured: Literal["float32", "bfloat16"] = "float32" if saved > math.log(CLEARLY) else "bfloat16"
            # Another process that started beside this one may have decided first.
            known["dtype"] = _read(_path()).get(_processor(), {}).get("dtype", measured)
            _write()
        return known["dtype"]


def known_dtype() -> str | None:
    """Return what `faster_dtype` would, without torch; None if that needs a measurement."""
    if not has_bfloat16():
        return "float32"
    with _lock:
        return _known().get("dtype")


def known_bandwidth() -> float | None:
    """Return what `read_bandwidth` measured here before, or None; without torch."""
    with _lock:
        return _known().get("read_gb_s", _passing.get("read_gb_s"))


def known_times(form: str = WEIGHT) -> dict[str, Times]:
    """Return what was measured here before, by name, as "1024x2048 bfloat16 2 threads"; without torch.

    `form` is WEIGHT, ATTENTION or THREAD_COUNTS.
    """
    with _lock:
        return {
            what: {name: {int(count): ms for count, ms in of.items()} for name, of in times.items() if of}
            for what, times in _known().get("times", {}).items()
            if re.match(form, what)
        }


def by_rows(names: Sequence[str]) -> str:
    """Return in words which kernel is taken for how many rows; `names` has one for each of ROWS."""
    ends = [index for index in range(len(ROWS)) if index + 1 == len(ROWS) or names[index] != names[index + 1]]
    parts = [f"{names[end]} for up to {ROWS[end]} row{'s' if ROWS[end] > 1 else ''}" for end in ends[:-1]]
    return ", ".join([*parts, f"{names[-1]} beyond" if parts else names[-1]])


def measure_products(size: tuple[int, int], dtype: torch.dtype, names: Sequence[str], rows: Sequence[int]) -> Times:
    """Return the milliseconds of each kernel that works here for weights of `size`, at each of `rows`."""
    import torch

    from qvl.backends.local.model.int8_store import quantise
    from qvl.backends.local.model.linear_kernels import pack

    copies = min(4 if size == STANDARD else 8, max(1, WORKING_SET // (size[0] * size[1] * dtype.itemsize)))
    dice = torch.Generator().manual_seed(0)
    times: Times = {name: {} for name in names}
    with torch.inference_mode():
        some = (torch.randn(size, generator=dice) * 0.02).half().to(dtype)
        weights = [some.clone() for _ in range(copies)]
        codes = [quantise(weight) for weight in weights] if any(name in INT8_KERNELS for name in names) else []
        usable: dict[str, list[LinearKernel]] = {}
        for name in names:
            for weight in codes if name in INT8_KERNELS else weights:
                clock.go_on()
                if (kernel := pack(name, weight, None)) is not None:
                    usable.setdefault(name, []).append(kernel)
        for count in rows:
            x = torch.randn((count, size[1]), generator=dice).to(dtype)
            for name, ms in race(usable, x, 2 if count >= COMPUTE_BOUND else copies).items():
                times[name][count] = ms
    return times


def timed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the first rows of a weight, which are timed."""
    return min(shape[0], max(1, LARGEST // shape[1])), shape[1]


def _path() -> Path:
    return cache_folder() / "kernels.json"


def _processor() -> str:
    try:
        release = version("torch")
    except PackageNotFoundError:
        release = "none"
    return f"{cpu_name()}, {os.cpu_count()} processors, torch {release}"


def _known() -> _Processor:
    """Return the measurements of this processor, from the file at the first call."""
    if not _memo:
        _memo.update(_read(_path()))
    return _memo.setdefault(_processor(), {})


def _read(path: Path) -> dict[str, _Processor]:
    """Return what the file holds by processor, without what is no measurement; nothing if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return {}
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: _usable(of) for name, of in saved.items() if isinstance(of, dict)} if isinstance(saved, dict) else {}


def _usable(saved: JsonObject) -> _Processor:
    """Return the measurements of one processor that have the right form."""
    kept: _Processor = {"times": {}}
    if _positive(saved.get("read_gb_s")):
        kept["read_gb_s"] = float(saved["read_gb_s"])
    if saved.get("dtype") in ("bfloat16", "float32"):
        kept["dtype"] = saved["dtype"]
    every = saved.get("times")
    if isinstance(every, dict):
        kept["times"] = {what: times for what, times in every.items() if _measured(what, times)}
    return kept


def _measured(what: str, times: object) -> bool:
    """True if these are times of kernels that there are, one of which works here: one that does not has no times."""
    return (
        re.fullmatch(rf"({WEIGHT}|{ATTENTION}|{THREAD_COUNTS}){THREADS}", what) is not None
        and isinstance(times, dict)
        and any(times.values())
        and all(_named(what, name) for name in times)
        and all(isinstance(of, dict) and all(map(_row, of.items())) for of in times.values())
    )


def _named(what: str, name: str) -> bool:
    if re.match(THREAD_COUNTS, what):
        return re.fullmatch(NUMBER, name) is not None
    return name in (ATTENTIONS if re.match(ATTENTION, what) else PRODUCTS)


def _row(item: tuple[str, object]) -> bool:
    return item[0] in map(str, ROWS) and _positive(item[1])


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST < value < MOST


def _write() -> None:
    """Add what is known to the file, in which other processes may have written meanwhile."""
    path = _path()
    saved = _read(path)
    for name, known in _memo.items():
        other = saved.get(name, _Processor())
        times = {what: of for what, of in known.get("times", {}).items() if of}
        saved[name] = {**other, **known, "times": {**other.get("times", {}), **times}}
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Where nothing can be written, every process measures for itself.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps(saved, indent=1), encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
