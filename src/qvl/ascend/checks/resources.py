"""Checks of shared memory, disk space, open files, ports and the clock."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator

from qvl.ascend import chips, devices, matrix
from qvl.ascend.host import Host
from qvl.ascend.report import Finding, Status
from qvl.backends.local.model import kernel_report

GIB = 2**30
SHM = "/dev/shm"  # noqa: S108 - measured, nothing is written there
_SHM_GIB = 1
_DISK_GIB = 20
_OPEN_FILES = 4096
_HCCL_BASE = 60000
_HCCL_PORTS = 16
_HCCL_NPU_PORT = 16666
_RAY_SHARE = 0.3
_RAY_LARGEST_GIB = 200


def shared_memory(host: Host) -> Iterator[Finding]:
    """Check for 1 GiB of shared memory: docker's default of 64 MiB is too small for tensor parallel workers."""
    space = host.space(SHM)
    chip = devices.chip_of(host, devices.query(host)) or chips.DEFAULT
    if space is None or not host.path(SHM).exists():
        status: Status = "warn" if host.in_container else "skip"
        yield Finding("shm", status, f"{SHM} is missing", fix=f"start the container with --shm-size={chip.shm}")
        return
    size = space[0] / GIB
    # A file system a few pages short of a round size is what --shm-size=1g makes on some kernels.
    if size >= _SHM_GIB * 0.99:
        yield Finding.ok("shm", f"{SHM} has {size:.1f} GiB", {"bytes": space[0]})
    else:
        yield Finding.warn(
            "shm",
            f"{SHM} has {space[0] // 2**20} MiB",
            f"start the container with --shm-size={chip.shm}; --ipc=host is not needed then",
            {"bytes": space[0]},
        )


def ray_memory(host: Host) -> Iterator[Finding]:
    """Check that shared memory holds Ray's object store, if Ray is installed and is to join several NPUs.

    Ray gives it 30 % of the memory; where /dev/shm is smaller it uses /tmp, which is slow, or does not start.
    """
    total = re.search(r"^MemTotal:\s*(\d+)", host.read("/proc/meminfo") or "", re.MULTILINE)
    space = host.space(SHM)
    several = "RAY_ADDRESS" in host.environ or len(devices.device_numbers(host)) > 1
    if "ray" not in host.packages() or not several or total is None or space is None:
        return
    wanted = min(_RAY_SHARE * int(total[1]) * 1024, _RAY_LARGEST_GIB * GIB)
    detail = {"bytes": space[0], "wanted": int(wanted)}
    if space[0] >= wanted:
        yield Finding.ok("shm-ray", f"{SHM} holds Ray's object store of {wanted / GIB:.0f} GiB", detail)
    else:
        yield Finding.warn(
            "shm-ray",
            f"{SHM} has {space[0] / GIB:.1f} GiB, and Ray's object store takes {wanted / GIB:.0f} GiB by default",
            f"with Ray: start the container with --shm-size={math.ceil(wanted / GIB)}g, or ray start "
            f"--object-store-memory={int(space[0] * 0.8)}",
            detail,
        )


def hccl_ports(host: Host) -> Iterator[Finding]:
    """Check the port that HCCL opens on each NPU's own network: one process per NPU, unless a range is set."""
    table = devices.query(host)
    name = "HCCL_NPU_SOCKET_PORT_RANGE"
    held = devices.holders(host, table) if table else ()
    if not held or host.environ.get(name) or len(devices.device_numbers(host)) < 2:
        return
    chip = devices.chip_of(host, table)
    limit = f" ({chip.port_range_limit})" if chip and chip.port_range_limit else ""
    yield Finding.warn(
        "hccl-npu-ports",
        f"NPU {held[0].device_id} has a process already: HCCL of a second service there finds port {_HCCL_NPU_PORT} of "
        "the NPU's own network taken (EI0020, EJ0003)",
        f"give each service NPUs of its own, or export {name}=auto for both{limit}",
        {"held": sorted({holder.device_id for holder in held})},
    )


def disk(host: Host, folder: str) -> Iterator[Finding]:
    """Check the free space at `folder`, which is for weights and cached answers."""
    space = host.space(folder)
    if space is None:
        yield Finding.skip("disk", f"{folder} cannot be measured")
        return
    free = space[1] / GIB
    text, detail = f"{free:.0f} GiB free at {folder}", {"free_bytes": space[1]}
    if free >= _DISK_GIB:
        yield Finding.ok("disk", text, detail)
    else:
        fix = f"free some space: the weights of an 8B model take 17 GiB; {_DISK_GIB} GiB are recommended"
        yield Finding.warn("disk", text, fix, detail)


def open_files(host: Host) -> Iterator[Finding]:
    """Check the limit of open files: a server needs two per connection, and some hundred for weights and libraries."""
    limit = host.open_files_limit()
    if limit < 0 or limit >= _OPEN_FILES:
        shown = "unlimited" if limit < 0 else str(limit)
        yield Finding.ok("open-files", f"{shown} open files allowed", {"limit": limit})
    else:
        yield Finding.warn(
            "open-files",
            f"only {limit} open files allowed",
            "ulimit -n 65536, or docker run --ulimit nofile=65536:65536",
            {"limit": limit},
        )


def ports(host: Host, numbers: tuple[int, ...], npus: int) -> Iterator[Finding]:
    """Check that the ports `numbers` are free, and with several NPUs the port range that HCCL uses."""
    listening = host.listening_ports()
    taken = [port for port in numbers if port in listening]
    for port in taken:
        free = next((number for number in range(port + 1, 65536) if number not in listening), port)
        yield Finding.warn("ports", f"port {port} is in use", f"choose another: --port {free}", {"port": port})
    if numbers and not taken:
        yield Finding.ok("ports", f"free: {', '.join(map(str, numbers))}")
    base = host.environ.get("HCCL_IF_BASE_PORT", "")
    start = int(base) if base.isdigit() else _HCCL_BASE
    clash = sorted(port for port in listening if start <= port < start + _HCCL_PORTS)
    if npus > 1 and clash:
        yield Finding.warn(
            "hccl-ports",
            f"port {clash[0]} is in use within HCCL's range {start}-{start + _HCCL_PORTS - 1}",
            "export HCCL_IF_BASE_PORT=50000, or another start of 16 free ports",
            {"in_use": clash},
        )


def clock(host: Host, today: datetime.date | None = None) -> Iterator[Finding]:
    """Check that the clock is not before the version matrix's date: TLS, tokens and cache expiry need it."""
    now = today or datetime.datetime.now(tz=datetime.UTC).date()
    if now < datetime.date.fromisoformat(matrix.load().date):
        yield Finding.warn("clock", f"the clock says {now}", "set the clock, for instance with chrony or ntpd")
    else:
        yield Finding.ok("clock", f"the clock says {now}")


def processor(host: Host) -> Iterator[Finding]:
    """Report cores and memory of a host without accelerator, and what was measured of its kernels."""
    available = re.search(r"^MemAvailable:\s*(\d+)", host.read("/proc/meminfo") or "", re.MULTILINE)
    memory = int(available[1]) * 1024 if available else 0
    cores = host.cores()
    text = f"{cores} cores" + (f", {math.floor(memory / GIB)} GiB of memory available" if memory else "")
    if memory and memory < 8 * GIB:
        yield Finding.warn("cpu", text, "the bundled model runs; a 2B model needs 8 GiB or more", {"memory": memory})
    else:
        yield Finding.ok("cpu", text, {"cores": cores, "memory": memory})
    measured = kernel_report.summary()
    if measured is not None:
        yield Finding.ok("cpu-kernels", *measured)
    else:
        yield Finding.skip("cpu-kernels", "not measured yet: opening a local model measures which are fastest")
