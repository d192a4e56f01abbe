"""How many threads torch computes with, by measurement on this processor; the times are kept by `kernel_times`."""

from __future__ import annotations

import os
import threading
from functools import partial
from statistics import geometric_mean
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.cpu import is_busy, processors
from qvl.backends.local.model.kernel_times import (
    STANDARD_ROWS,
    THREAD_COUNTS,
    Times,
    kept_times,
    known_times,
    measure_products,
    name_of,
    timed_shape,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

# Share of the time that another number of threads than torch's own must save: less is noise.
WORTH: Final = 0.1
VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_lock = threading.Lock()
# Once for all models of a process: threads that have computed keep the number they began with.
_decided = threading.Event()


def choose_threads(shape: tuple[int, int], dtype: torch.dtype, names: Sequence[str]) -> int:
    """Have torch compute with the number of threads that is fastest here; return it. Blocking, as `kernel_times`.

    The candidates are all processors, one a physical core and half of these, timed with a weight of the model and the
    kernels `names`. The quota of a container or service bounds them without a measurement: bursts as short as one pass
    it. While the machine is busy nothing is measured, since what others leave says nothing of the processor. What
    OMP_NUM_THREADS, MKL_NUM_THREADS or `torch.set_num_threads` said before stays. The first model of a process decides
    for all.
    """
    import torch

    with _lock:
        own = torch.get_num_threads()
        if _decided.is_set():
            return own
        chosen = _chosen(own, shape, dtype, names)
        torch.set_num_threads(chosen)
        _decided.set()
        return chosen


def _chosen(own: int, shape: tuple[int, int], dtype: torch.dtype, names: Sequence[str]) -> int:
    here = processors()
    if any(os.environ.get(name) for name in VARIABLES) or own not in (here.threads, here.cores):
        return own
    usual, counts = min(own, here.limit), tuple(map(str, here.thread_counts()))
    size = timed_shape(shape)
    what = f"threads {size[0]}x{size[1]}"
    name = name_of(what, dtype)
    if len(counts) > 1 and (name in known_times(THREAD_COUNTS) or not is_busy()):
        kept_times(what, dtype, counts, STANDARD_ROWS, partial(_measure, size, dtype, names))
    # Without those that were disturbed.
    kept = known_times(THREAD_COUNTS).get(name, {})
    return fastest_count({count: kept[count] for count in counts if count in kept}, usual)


def fastest_count(times: Times, usual: int) -> int:
    """Return the number of threads whose time is least, in the geometric mean of all rows, if that saves WORTH.

    `times` are by the number of threads; without that of `usual` nothing is better.
    """
    means = {int(count): geometric_mean(of.values()) for count, of in times.items()}
    best = min(means, key=lambda count: means[count], default=usual)
    return best if usual in means and means[best] < (1 - WORTH) * means[usual] else usual


def _measure(
    size: tuple[int, int], dtype: torch.dtype, names: Sequence[str], counts: Sequence[str], rows: Sequence[int]
) -> Times:
    """Return the milliseconds of the fastest kernel for each of `rows`, by the number of threads."""
    import torch

    times: Times = {}
    for count in counts:
        torch.set_num_threads(int(count))
        kernels = measure_products(size, dtype, names, rows).values()
        times[count] = {number: min(of[number] for of in kernels if number in of) for number in rows}
    return times
