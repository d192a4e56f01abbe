"""The processor's name and those of its instruction sets that decide which kernel is right. No torch."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple


@cache
def cpu_info() -> str:
    """Return the first processor's part of /proc/cpuinfo, or an empty text on other systems than Linux."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0]
    except OSError:
        return ""


def cpu_name() -> str:
    """Return the processor's name, family and model; in a virtual machine the name may be the vendor's alone."""
    fields = dict(re.findall(r"^(model name|cpu family|model|CPU part)\s*: (.*)$", cpu_info(), re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return " ".join([name, *(fields[field] for field in ("cpu family", "model", "CPU part") if field in fields)])


def has_bfloat16() -> bool:
    """True if the processor has instructions for products of bfloat16."""
    return re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpu_info()) is not None


def has_vnni() -> bool:
    """True if products of 8-bit integers are summed in 32 bits without saturation; on x86 by VNNI or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return re.search(r"\b(avx512_vnni|avx_vnni|amx_int8)\b", cpu_info()) is not None


class Processors(NamedTuple):
    """The processors that this process may use.

    Args:
        threads: hardware threads.
        cores: the physical cores they belong to; a virtual machine may tell each hardware thread as a core.
        limit: how many of them the quotas of the process' cgroups pay for, or all without one.
    """

    threads: int
    cores: int
    limit: int

    def thread_counts(self) -> tuple[int, ...]:
        """Return the numbers of threads of which one may be best, the largest first: all, one a core, half of that."""
        counts = (self.threads, self.cores, max(1, self.cores // 2))
        return tuple(sorted({min(count, self.limit) for count in counts}, reverse=True))


def processors(system: Path = Path("/sys"), groups: Path = Path("/proc/self/cgroup")) -> Processors:
    """Return the processors within the process' affinity and the quotas of its cgroups: a container's, a service's.

    `system` and `groups` are Linux' files.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for number in allowed:
        siblings = system / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        cores.add(_first_line(siblings) or str(number))
    # In a container its own cgroup is the root; elsewhere the second version's line "0::/path" names it.
    own = system / "fs/cgroup" / _first_line(groups).partition("0::/")[2]
    folders = [own, *own.parents][: len(own.parts) - len(system.parts) - 1]
    quotas = [_first_line(folder / "cpu.max").split() for folder in folders]
    # The first version of cgroups.
    quotas.append([_first_line(system / f"fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")])
    limit = len(allowed)
    for quota in quotas:
        with suppress(ValueError, ZeroDivisionError):
            spent, period = map(int, quota)
            limit = min(limit, ceil(spent / period)) if spent > 0 else limit
    return Processors(len(allowed), len(cores), limit)


def is_busy() -> bool:
    """True if processes waited for more than half of the machine's processors in the last minute."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    except (AttributeError, OSError):
        return False


def _first_line(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""
