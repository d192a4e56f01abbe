"""Checks of device nodes, driver and firmware, and of chip health, memory and processes; nvidia-smi on NVIDIA hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qvl.ascend import devices, matrix, npu_smi
from qvl.ascend.host import Host
from qvl.ascend.report import Finding

_TIGHT_MB = 8192
_RANGE = re.compile(r"\[([^\],]+),([^\]]+)\]")


def device_nodes(host: Host) -> Iterator[Finding]:
    """Check that `/dev/davinci*` and the three control nodes exist, are device nodes, and may be used by this user."""
    numbers = devices.device_numbers(host)
    nodes = [*(f"davinci{number}" for number in numbers), *devices.CONTROL_NODES]
    if not numbers:
        yield Finding.fail(
            "device-nodes",
            "no /dev/davinciN: no NPU found on this host",
            "host: install the Ascend driver and firmware, then reboot; container: start it with --device "
            "/dev/davinci0 (`qvl launch` writes the command)",
        )
    missing = [name for name in devices.CONTROL_NODES if not host.path(f"/dev/{name}").exists()]
    folders = [name for name in nodes if host.path(f"/dev/{name}").is_dir()]
    closed = [name for name in nodes if name not in missing and not host.may_use(f"/dev/{name}")]
    for name in missing:
        yield Finding.fail("device-nodes", f"/dev/{name} is missing", f"give the container --device /dev/{name}")
    for name in folders:
        yield Finding.fail(
            "device-nodes",
            f"/dev/{name} is a folder, not a device: docker creates it for -v with a missing node",
            f"pass it as --device /dev/{name}, and remove the empty folder",
        )
    for name in closed:
        yield Finding.fail(
            "device-nodes",
            f"/dev/{name} cannot be read and written by user {host.uid}",
            "add the user to the driver's group: usermod -aG HwHiAiUser USER, then log in again",
        )
    if numbers and not (missing or folders or closed):
        yield Finding.ok("device-nodes", f"{len(numbers)} NPU nodes and the control nodes", {"npus": numbers})


def smi(host: Host) -> Iterator[Finding]:
    """Check that `npu-smi info` runs; report each chip's health, memory and processes."""
    if host.which("npu-smi") is None:
        yield Finding(
            "npu-smi",
            "warn" if host.in_container else "fail",
            "npu-smi is not on PATH",
            fix="container: mount /usr/local/bin/npu-smi and /usr/local/dcmi; host: install the driver",
        )
        return
    done = host.run(["npu-smi", "info"])
    table = npu_smi.parse(done.stdout)
    if table is None:
        reason = done.last_line
        yield Finding.fail(
            "npu-smi",
            f"npu-smi info printed no table: {reason}",
            _smi_fix(done.stdout + done.stderr),
            {"exit_code": done.code},
        )
        return
    names = sorted({npu.name for npu in table.npus})
    summary = f"npu-smi {table.version}: {len(table.npus)} x {', '.join(names) or 'no chip'}"
    yield Finding.ok("npu-smi", summary, {"version": table.version, "chips": names})
    yield from _health(table)
    yield from _memory(table)
    yield from _holders(host, table)


def firmware(host: Host) -> Iterator[Finding]:
    """Check that the firmware is in the compatible range that the driver's version.info states."""
    driver = fields(host.read("/usr/local/Ascend/driver/version.info"))
    installed = fields(host.read("/usr/local/Ascend/firmware/version.info"))
    version = driver.get("version")
    if version is None:
        yield Finding(
            "driver",
            "fail" if not host.in_container else "warn",
            "/usr/local/Ascend/driver/version.info cannot be read",
            fix="host: install the Ascend driver; container: mount that file and /usr/local/Ascend/driver/lib64",
        )
        return
    detail = {"driver": version, "firmware": installed.get("version"), "accepts": driver.get("compatible_version_fw")}
    limits = _RANGE.search(driver.get("compatible_version_fw", ""))
    if not installed.get("version") or limits is None:
        yield Finding.ok("driver", f"driver {version}; the firmware's version is not readable here", detail)
        return
    low, high = (tuple(int(number) for number in re.findall(r"\d+", limits[part])) for part in (1, 2))
    current = tuple(int(number) for number in re.findall(r"\d+", installed["version"]))
    if low <= current[: len(low)] and current[: len(high)] <= high:
        yield Finding.ok("driver", f"driver {version}, firmware {installed['version']}", detail)
    else:
        yield Finding.fail(
            "driver",
            f"driver {version} needs firmware {limits[1]} to {limits[2]}, not {installed['version']}",
            "install the firmware of the driver's own release, then reboot the host",
            detail,
        )


def chip_dtypes(host: Host, dtype: str | None) -> Iterator[Finding]:
    """Check that every chip can compute in `dtype`; None only reports the dtypes of chips that lack some."""
    table = devices.query(host)
    for name in sorted({npu.name for npu in table.npus} if table else ()):
        allowed = matrix.load().chip(name).get("dtypes")
        if allowed and dtype and dtype not in ("auto", *allowed):
            yield Finding.fail(
                "dtype",
                f"{name} does not compute in {dtype}",
                f"use --dtype {allowed[0]}",
                {"chip": name, "allowed": allowed},
            )
        elif allowed:
            yield Finding.ok("dtype", f"{name} computes in {', '.join(allowed)} only", {"allowed": allowed})


def nvidia(host: Host) -> Iterator[Finding]:
    """Check that nvidia-smi runs; report each GPU's memory, driver and processes."""
    columns = "index,name,driver_version,memory.total,memory.used"
    done = host.run(["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 4]
    if done.code != 0 or not rows:
        yield Finding.fail(
            "nvidia-smi",
            f"nvidia-smi printed no table: {done.last_line}",
            "install the NVIDIA driver; container: start it with --gpus",
            {"exit_code": done.code},
        )
        return
    yield Finding.ok("nvidia-smi", f"driver {rows[0][2]}: {len(rows)} x {rows[0][1]}", {"gpus": rows})
    for index, name, _, total, used in rows:
        if total.isdigit() and used.isdigit() and int(total) - int(used) < _TIGHT_MB:
            yield Finding.warn(
                "memory",
                f"GPU {index} ({name}) has {int(total) - int(used)} of {total} MiB free",
                "stop what holds it (nvidia-smi shows the process), or choose another with CUDA_VISIBLE_DEVICES",
                {"gpu": index, "used_mb": int(used), "total_mb": int(total)},
            )
    apps = host.run(
        ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    )
    for line in apps.stdout.splitlines():
        pid, comma, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if comma and pid.strip().isdigit():
            yield Finding.warn(
                "gpu-holders",
                f"a GPU is held by {name.strip() or 'a process'} (pid {pid.strip()}), {used.strip()} MiB",
                "stop that process, or choose another GPU with CUDA_VISIBLE_DEVICES",
                {"pid": int(pid)},
            )


def fields(text: str | None) -> dict[str, str]:
    """Return the `key=value` or `key: value` lines of an Ascend version file, keys in lower case."""
    pairs = (re.match(r"\s*([A-Za-z_]+)\s*[=:]\s*(.*?)\s*$", line) for line in (text or "").splitlines())
    return {match[1].lower(): match[2] for match in pairs if match}


def _smi_fix(text: str) -> str:
    if "-8005" in text or "-8020" in text or "dcmi" in text.lower():
        return (
            "the driver is not loaded, or firmware was upgraded without a reboot: reboot the host; container: give it "
            "/dev/davinci_manager and mount /usr/local/dcmi and /usr/local/Ascend/driver"
        )
    return "run `npu-smi info` by hand as this user; the driver's log is under /var/log/ascend_seclog"


def _health(table: npu_smi.NpuSmi) -> Iterator[Finding]:
    ill = [npu for npu in table.npus if npu.health != "OK"]
    for npu in ill:
        yield Finding(
            "npu-health",
            "warn" if npu.health == "Warning" else "fail",
            f"NPU {npu.device_id} ({npu.name}) reports health {npu.health}",
            {"npu": npu.device_id, "health": npu.health, "temperature_c": npu.temperature_c},
            f"see `npu-smi info -t health -i {npu.npu_id}`; leave this NPU out of --npus until it says OK",
        )
    if table.npus and not ill:
        yield Finding.ok("npu-health", f"all {len(table.npus)} NPUs report OK")


def _memory(table: npu_smi.NpuSmi) -> Iterator[Finding]:
    detail = {f"npu{npu.device_id}": f"{npu.memory_free_mb} of {npu.memory_total_mb} MiB free" for npu in table.npus}
    tight = [npu for npu in table.npus if npu.memory_free_mb < _TIGHT_MB]
    for npu in tight:
        yield Finding.warn(
            "memory",
            f"NPU {npu.device_id} has {npu.memory_free_mb} of {npu.memory_total_mb} MiB free",
            "stop what holds it, choose another NPU, or a smaller model",
            detail,
        )
    if table.npus and not tight:
        free = min(npu.memory_free_mb for npu in table.npus)
        yield Finding.ok("memory", f"every NPU has at least {free} MiB free", detail)


def _holders(host: Host, table: npu_smi.NpuSmi) -> Iterator[Finding]:
    holders = devices.holders(host, table)
    for holder in holders:
        yield Finding.warn(
            "npu-holders",
            str(holder),
            f"docker stop {holder.container}" if holder.container else "stop that process, or choose another NPU",
            {"npu": holder.device_id, "pid": holder.pid, "container": holder.container, "memory_mb": holder.memory_mb},
        )
    if table.npus and not holders:
        yield Finding.ok("npu-holders", "no process holds an NPU")
