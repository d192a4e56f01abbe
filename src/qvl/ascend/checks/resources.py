"""Shared memory, disk, open files, ports, clock."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator

from qvl.ascend import matrix
from qvl.ascend.host import Host
from qvl.ascend.report import Finding, Status

GIB = 2**30
SHM = "/dev/shm"  # noqa: S108 - measured, nothing is written there
_SHM_GIB = 1
_DISK_GIB = 20
_OPEN_FILES = 4096
_HCCL_BASE = 60000
_HCCL_PORTS = 16


def shared_memory(host: Host) -> Iterator[Finding]:
    """There is a gibibyte of shared memory: docker's default of 64 MiB stops tensor parallel workers."""
    space = host.space(SHM)
    if space is None or not host.path(SHM).exists():
        status: Status = "warn" if host.in_container else "skip"
        yield Finding("shm", status, f"{SHM} is not there", fix="start the container with --shm-size=1g")
        return
    size = space[0] / GIB
    # A file system a few pages short of a round size is what --shm-size=1g makes on some kernels.
    if size >= _SHM_GIB * 0.99:
        yield Finding("shm", "ok", f"{SHM} has {size:.1f} GiB", {"bytes": space[0]})
    else:
        yield Finding(
            "shm",
            "warn",
            f"{SHM} has {space[0] // 2**20} MiB",
            {"bytes": space[0]},
            "start the container with --shm-size=1g (10g on 310P); --ipc=host is not needed then",
        )


def disk(host: Host, folder: str) -> Iterator[Finding]:
    """The folder for weights and answers has room."""
    space = host.space(folder)
    if space is None:
        yield Finding("disk", "skip", f"{folder} cannot be measured")
        return
    free = space[1] / GIB
    enough = free >= _DISK_GIB
    yield Finding(
        "disk",
        "ok" if enough else "warn",
        f"{free:.0f} GiB free at {folder}",
        {"free_bytes": space[1]},
        None if enough else f"free some space: the weights of an 8B model take 17 GiB; {_DISK_GIB} GiB are wanted",
    )


def open_files(host: Host) -> Iterator[Finding]:
    """Enough open files for a server: two a connection, some hundred for weights and libraries."""
    limit = host.open_files_limit()
    if limit < 0 or limit >= _OPEN_FILES:
        shown = "unlimited" if limit < 0 else str(limit)
        yield Finding("open-files", "ok", f"{shown} open files allowed", {"limit": limit})
    else:
        yield Finding(
            "open-files",
            "warn",
            f"only {limit} open files allowed",
            {"limit": limit},
            "ulimit -n 65536, or docker run --ulimit nofile=65536:65536",
        )


def ports(host: Host, wanted: tuple[int, ...], npus: int) -> Iterator[Finding]:
    """The service's ports are free, and with several NPUs the range that HCCL uses."""
    listening = host.listening_ports()
    taken = [port for port in wanted if port in listening]
    for port in taken:
        free = next((number for number in range(port + 1, 65536) if number not in listening), port)
        yield Finding("ports", "warn", f"port {port} is in use", {"port": port}, f"serve on another: --port {free}")
    if wanted and not taken:
        yield Finding("ports", "ok", f"free: {', '.join(map(str, wanted))}")
    base = host.environ.get("HCCL_IF_BASE_PORT", "")
    start = int(base) if base.isdigit() else _HCCL_BASE
    clash = sorted(port for port in listening if start <= port < start + _HCCL_PORTS)
    if npus > 1 and clash:
        yield Finding(
            "hccl-ports",
            "warn",
            f"port {clash[0]} is in use within HCCL's range {start}-{start + _HCCL_PORTS - 1}",
            {"in_use": clash},
            "export HCCL_IF_BASE_PORT=50000, or another start of 16 free ports",
        )


def clock(host: Host, today: datetime.date | None = None) -> Iterator[Finding]:
    """The clock is not behind the matrix's date: TLS, tokens and cache expiry depend on it."""
    now = today or datetime.datetime.now(tz=datetime.UTC).date()
    if now < datetime.date.fromisoformat(matrix.load().date):
        yield Finding("clock", "warn", f"the clock says {now}", fix="set the clock, for instance with chrony or ntpd")
    else:
        yield Finding("clock", "ok", f"the clock says {now}")


def processor(host: Host) -> Iterator[Finding]:
    """Cores and memory of a host without accelerator."""
    memory = 0
    for line in (host.read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            memory = int(line.split()[1]) * 1024
    cores = host.cores()
    text = f"{cores} cores" + (f", {math.floor(memory / GIB)} GiB of memory available" if memory else "")
    if memory and memory < 8 * GIB:
        yield Finding("cpu", "warn", text, {"memory": memory}, "the bundled model runs; a 2B model wants 8 GiB or more")
    else:
        yield Finding("cpu", "ok", text, {"cores": cores, "memory": memory})
