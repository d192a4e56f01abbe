"""Times of the CPU's kernels for matrix products on this processor: measured once, kept in a small file."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from bisect import bisect_left
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

from qvl.backends.local.model.bandwidth import host_bandwidth
from qvl.backends.local.model.cpu import cpu_name, has_bfloat16
from qvl.backends.local.model.linear_kernels import INT8_KERNELS, KERNELS
from qvl.config import cache_folder
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Sequence
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
ROUNDS: Final = 5
MOST_ROUNDS: Final = 20
# Seconds for one number of rows, after the first ROUNDS.
RACE_S: Final = 0.05
# A kernel that takes so many times the best one's time is not timed again.
HOPELESS: Final = 1.6
# The weight by which "auto" chooses between float32 and bfloat16, and the rows.
STANDARD: Final = (1024, 2048)
# How many times as long as float32 bfloat16 must take, in the geometric mean, for "auto" to be float32.
CLEARLY: Final = 1.15
STANDARD_ROWS: Final = (1, 8, 32, 256)

# The form of a weight's name in the file, the largest file that is read, and the range of what can be measured.
WEIGHT: Final = r"[1-9][0-9]{0,9}x[1-9][0-9]{0,9} (float32|bfloat16) [1-9][0-9]{0,4} threads?"
LARGEST_FILE: Final = 4 << 20
LEAST: Final = 1e-6
MOST: Final = 1e6

Times: TypeAlias = dict[str, dict[int, float]]
"""Milliseconds by number of rows, by the kernel's name."""


class _Processor(TypedDict, total=False):
    """The measurements of one processor with one release of torch; `times` by shape, dtype and threads."""

    read_gb_s: float
    dtype: str
    times: dict[str, dict[str, dict[str, float]]]


_lock = threading.RLock()
_memo: dict[str, _Processor] = {}


def kernel_times(shape: tuple[int, int], dtype: torch.dtype, names: Sequence[str], rows: Sequence[int] = ROWS) -> Times:
    """Return the milliseconds of each kernel that works here for a weight [out, in] of `dtype`, at each of `rows`.

    Blocking: a second for a large weight that was never measured here.
    """
    import torch

    size = (min(shape[0], max(1, LARGEST // shape[1])), shape[1])
    threads = torch.get_num_threads()
    key = f"{size[0]}x{size[1]} {str(dtype).removeprefix('torch.')} {threads} thread{'s' if threads != 1 else ''}"
    with _lock:
        times = _known().setdefault("times", {}).setdefault(key, {})
        # A kernel that does not work here has no times, and is not tried again.
        new = [
            name
            for name in names
            if name not in times or (times[name] and not times[name].keys() >= set(map(str, rows)))
        ]
        if new:
            log.info("measuring_kernels", weight=key, kernels=",".join(names))
            for name, measured in _measure(size, dtype, names, rows).items():
                times[name] = times.get(name, {}) | {str(count): ms for count, ms in measured.items()}
            _write()
        return {name: {int(count): ms for count, ms in times[name].items()} for name in names if times[name]}


def standard_times(dtype: torch.dtype, names: Sequence[str]) -> Times:
    """Return `kernel_times` of the STANDARD weight at each of ROWS; those that are not timed have the next one's."""
    times = kernel_times(STANDARD, dtype, names, STANDARD_ROWS)
    timed = {count: STANDARD_ROWS[bisect_left(STANDARD_ROWS, count)] for count in ROWS}
    return {name: {count: of[timed[count]] for count in ROWS} for name, of in times.items()}


def read_bandwidth() -> float:
    """Return the GB/s at which this machine reads memory."""
    with _lock:
        known = _known()
        if "read_gb_s" not in known:
            known["read_gb_s"] = round(host_bandwidth() / 1e9, 1)
            _write()
        return known["read_gb_s"]


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
        return _known().get("read_gb_s")


def known_times() -> dict[str, Times]:
    """Return what was measured here before, by weight, as "1024x2048 bfloat16 2 threads"; without torch."""
    with _lock:
        return {
            weight: {name: {int(count): ms for count, ms in of.items()} for name, of in times.items() if of}
            for weight, times in _known().get("times", {}).items()
        }


def _measure(size: tuple[int, int], dtype: torch.dtype, names: Sequence[str], rows: Sequence[int]) -> Times:
    import torch

    from qvl.backends.local.model.int8_store import quantise
    from qvl.backends.local.model.linear_kernels import pack

    quick = size == STANDARD
    copies = min(4 if quick else 8, max(1, WORKING_SET // (size[0] * size[1] * dtype.itemsize)))
    dice = torch.Generator().manual_seed(0)
    times: Times = {name: {} for name in names}
    with torch.inference_mode():
        weights = [(torch.randn(size, generator=dice) * 0.02).half().to(dtype) for _ in range(copies)]
        codes = [quantise(weight) for weight in weights] if any(name in INT8_KERNELS for name in names) else []
        packed = {
            name: [pack(name, weight, None) for weight in (codes if name in INT8_KERNELS else weights)]
            for name in names
        }
        usable = {name: [kernel for kernel in kernels if kernel is not None] for name, kernels in packed.items()}
        usable = {name: kernels for name, kernels in usable.items() if kernels}
        for count in rows:
            x = torch.randn((count, size[1]), generator=dice).to(dtype)
            seconds = 0.0 if quick else RACE_S
            for name, ms in _race(usable, x, 2 if count >= COMPUTE_BOUND else copies, seconds).items():
                times[name][count] = ms
    return times


def _race(kernels: dict[str, list[LinearKernel]], x: torch.Tensor, copies: int, seconds: float) -> dict[str, float]:
    """Return the least milliseconds of each kernel for one product with x; one that fails drops out of `kernels`."""

    def turn(of: list[LinearKernel]) -> float:
        return _seconds(lambda: [kernel(x) for kernel in of[:copies]]) / min(copies, len(of)) * 1e3

    best: dict[str, float] = {}
    for name in list(kernels):
        try:
            kernels[name][0](x)
            best[name] = turn(kernels[name])
        except (RuntimeError, NotImplementedError, AttributeError):
            del kernels[name]
    # In turns, so that what else the machine does meets all alike.
    end = time.perf_counter() + seconds
    rounds = 1
    while rounds < ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        rounds += 1
        for name, of in kernels.items():
            if best[name] < HOPELESS * min(best.values()):
                best[name] = min(best[name], turn(of))
    return {name: round(ms, 5) for name, ms in best.items()}


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
    weights = saved.get("times")
    if isinstance(weights, dict):
        kept["times"] = {weight: times for weight, times in weights.items() if _measured(weight, times)}
    return kept


def _measured(weight: str, times: object) -> bool:
    """True if these are times of kernels that there are, one of which works here: one that does not has no times."""
    return (
        re.fullmatch(WEIGHT, weight) is not None
        and isinstance(times, dict)
        and any(times.values())
        and times.keys() <= {*KERNELS, *INT8_KERNELS}
        and all(isinstance(of, dict) and all(map(_row, of.items())) for of in times.values())
    )


def _row(item: tuple[str, object]) -> bool:
    return item[0] in map(str, ROWS) and _positive(item[1])


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST < value < MOST


def _write() -> None:
    path = _path()
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Where nothing can be written, every process measures for itself.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps(_memo, indent=1), encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
