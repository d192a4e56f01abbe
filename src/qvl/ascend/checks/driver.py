"""Checks of device nodes, driver and firmware, of chip health, memory and processes; nvidia-smi on NVIDIA hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from qvl.ascend import chips, devices, npu_smi
from qvl.ascend.host import Host
from qvl.ascend.report import Finding

_TIGHT_MB = 8192
FOLDERS: Final = ("uburma",)
_RANGE = re.compile(r"\[([^\],]+),([^\]]+)\]")


def device_nodes(host: Host) -> Iterator[Finding]:
    """Check that `/dev/davinci*` and the chip's control nodes exist, are device nodes, and may be used by this user."""
    numbers = devices.device_numbers(host)
    known = devices.chip_of(host, devices.query(host))
    chip = known or chips.DEFAULT
    of_chip = f" of {known.kind}" if known else ""
    nodes = [*(f"davinci{number}" for number in numbers), *chip.control_nodes]
    missing = [name for name in chip.control_nodes if not host.path(f"/dev/{name}").exists()]
    if not numbers:
        yield Finding.fail(
            "device-nodes",
            "no /dev/davinciN: no NPU found on this host"
            + (f", nor {', '.join(f'/dev/{name}' for name in missing)}" if missing else ""),
            "host: install the Ascend driver and firmware, then reboot; container: start it with --device "
            "/dev/davinci0 (`qvl launch` writes the command)",
        )
    folders = [name for name in nodes if name not in FOLDERS and host.path(f"/dev/{name}").is_dir()]
    closed = [name for name in nodes if name not in (*missing, *FOLDERS) and not host.may_use(f"/dev/{name}")]
    # Without an NPU they have the same cause, and are in its line.
    for name in missing if numbers else ():
        yield Finding.fail(
            "device-nodes",
            f"the control node /dev/{name}{of_chip} is missing",
            f"container: give it --device /dev/{name}; host: install the driver of this chip, then reboot",
        )
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
        text = f"{_count(len(numbers), 'NPU node')} and the control nodes{of_chip}"
        yield Finding.ok("device-nodes", text, {"npus": numbers})


def smi(host: Host) -> Iterator[Finding]:
    """Check that `npu-smi info` runs and lists every NPU; report each chip's health, memory and processes."""
    if devices.npu_smi_program(host) is None:
        yield Finding(
            "npu-smi",
            "warn" if host.in_container else "fail",
            f"npu-smi is neither on PATH nor at {' or '.join(chips.TOOLS)}",
            fix="container: mount the host's npu-smi (/usr/local/bin or /usr/local/sbin) and /usr/local/dcmi; "
            "host: install the driver",
        )
        return
    done = devices.run_npu_smi(host, "info")
    table = devices.table_of(host, done.stdout)
    if table is None:
        text = done.stdout + done.stderr
        yield Finding.fail(
            "npu-smi",
            f"npu-smi info printed no table: {done.last_line}{_held_elsewhere(text)}",
            _smi_fix(host, text),
            {"exit_code": done.code},
        )
        return
    yield from _listed(host, table)
    yield from _health(table)
    yield from _memory(table)
    yield from _holders(host, table)


def firmware(host: Host) -> Iterator[Finding]:
    """Check that the firmware is in the compatible range that the driver's version.info states."""
    driver = fields(host.read("/usr/local/Ascend/driver/version.info"))
    installed = fields(host.read("/usr/local/Ascend/firmware/version.info"))
    version = driver.get("version")
    chip = devices.chip_of(host, devices.query(host))
    if version is None and chip is not None and not chip.has_version_info:
        yield Finding.skip("driver", f"the driver of {chip.kind} is part of its system and keeps no version.info")
        return
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


def _held_elsewhere(text: str) -> str:
    if "-8020" in text:
        return " (the NPU is used by another container)"
    return " (most often the NPU is held by another container)" if "-8005" in text else ""


def _smi_fix(host: Host, text: str) -> str:
    held = "-8020" in text or "-8005" in text
    if held and (host.in_container or "-8020" in text):
        return (
            "stop the other container (on the host: docker ps, npu-smi info), give this one another "
            "--device /dev/davinciN, or share the NPU between containers of one user, before one uses it: "
            "npu-smi set -t device-share -i N -d 1; only if none holds it, check /dev/davinci_manager and the mounts "
            "of /usr/local/dcmi and /usr/local/Ascend/driver"
        )
    if held or "dcmi" in text.lower():
        return (
            "see whether a container holds the NPUs (docker ps); if none does, the driver is not loaded, or firmware "
            "was upgraded without a reboot: reboot the host"
        )
    return "run `npu-smi info` by hand as this user; the driver's log is under /var/log/ascend_seclog"


def _listed(host: Host, table: npu_smi.NpuSmi) -> Iterator[Finding]:
    names = sorted({npu.name for npu in table.npus})
    detail = {"version": table.version, "chips": names, "unread": table.unread}
    nodes = devices.device_numbers(host)
    listed = tuple(npu.device_id for npu in table.npus)
    again = "run `npu-smi info` by hand; if the table is whole, please report it: `qvl doctor --json` and the table"
    for line in table.unread:
        yield Finding.fail("npu-smi", f"npu-smi {table.version}: {line}", again, detail)
    for line in table.warnings:
        yield Finding.warn("npu-smi", line, "install the driver again, then reboot the host", detail)
    if not table.npus:
        if not table.unread:
            yield Finding.fail("npu-smi", f"npu-smi {table.version} lists no chip", again, detail)
        return
    if len(nodes) > len(listed):
        lost = [number for number in nodes if number not in listed] or list(nodes[len(listed) :])
        named = ", ".join(f"/dev/davinci{number}" for number in lost)
        yield Finding.fail(
            "npu-smi",
            f"{_count(len(nodes), 'NPU node')} but {_count(len(listed), 'chip')} in npu-smi: {named} "
            f"{'is a lost card' if len(lost) == 1 else 'are lost cards'}",
            "leave it out of --npus; on the host see dmesg and the slot; reboot when no service runs on the other NPUs",
            {"nodes": nodes, "listed": listed},
        )
    elif nodes and len(nodes) < len(listed) and not host.in_container:
        absent = [number for number in listed if number not in nodes] or list(listed[len(nodes) :])
        yield Finding.fail(
            "npu-smi",
            f"npu-smi lists {_count(len(listed), 'chip')}, but there is no /dev/davinci{absent[0]}",
            "install the driver again, then reboot the host",
            {"nodes": nodes, "listed": listed},
        )
    elif not table.unread and not table.warnings:
        yield Finding.ok("npu-smi", f"npu-smi {table.version}: {len(listed)} x {', '.join(names)}", detail)


def _health(table: npu_smi.NpuSmi) -> Iterator[Finding]:
    ill = [npu for npu in table.npus if npu.health != "OK"]
    for npu in table.npus:
        if npu.lost:
            yield Finding.fail(
                "npu-health",
                f"NPU {npu.device_id} ({npu.name}) gives no memory figure, health {npu.health}: a lost card",
                "leave it out of --npus; on the host see dmesg and the slot; reboot when no service runs on the others",
                {"npu": npu.device_id, "health": npu.health},
            )
    ill = [npu for npu in ill if not npu.lost]
    for npu in ill:
        yield Finding(
            "npu-health",
            "warn" if npu.health == "Warning" else "fail",
            f"NPU {npu.device_id} ({npu.name}) reports health {npu.health}",
            {"npu": npu.device_id, "health": npu.health, "temperature_c": npu.temperature_c},
            f"see `npu-smi info -t health -i {npu.npu_id}`; leave this NPU out of --npus until it says OK",
        )
    if table.npus and not ill and not table.unread and not any(npu.lost for npu in table.npus):
        text = "the NPU reports OK" if len(table.npus) == 1 else f"all {len(table.npus)} NPUs report OK"
        yield Finding.ok("npu-health", text)


def _memory(table: npu_smi.NpuSmi) -> Iterator[Finding]:
    free = {npu.device_id: npu.memory_free_mb for npu in table.npus if npu.memory_free_mb is not None}
    detail = {
        f"npu{npu.device_id}": f"{npu.memory_free_mb} of {npu.memory_total_mb} MiB free"
        for npu in table.npus
        if npu.device_id in free
    }
    unknown = [npu for npu in table.npus if npu.device_id not in free and not npu.lost]
    tight = [npu for npu in table.npus if free.get(npu.device_id, _TIGHT_MB) < _TIGHT_MB]
    for npu in unknown:
        yield Finding.warn(
            "memory",
            f"NPU {npu.device_id}: npu-smi does not say how much of {npu.memory_total_mb} MiB is in use",
            f"run `npu-smi info -t usages -i {npu.npu_id}`; choose another NPU while it does not answer",
            detail,
        )
    for npu in tight:
        yield Finding.warn(
            "memory",
            f"NPU {npu.device_id} has {npu.memory_free_mb} of {npu.memory_total_mb} MiB free",
            "stop what holds it, choose another NPU, or a smaller model",
            detail,
        )
    if free and not tight and not unknown:
        yield Finding.ok("memory", f"every NPU has at least {min(free.values())} MiB free", detail)


def _holders(host: Host, table: npu_smi.NpuSmi) -> Iterator[Finding]:
    holders = devices.holders(host, table)
    for holder in holders:
        yield Finding.warn(
            "npu-holders",
            str(holder),
            _free_it(holder),
            {"npu": holder.device_id, "pid": holder.pid, "container": holder.container, "memory_mb": holder.memory_mb},
        )
    if table.npus and not holders and not table.unread and not table.lists_processes:
        yield Finding.warn(
            "npu-holders",
            f"npu-smi {table.version} printed no list of processes: what holds the NPUs is not known, though none has "
            "much memory in use",
            "run `npu-smi info` by hand: the table was cut off, unless the driver is older than 23 or the chip a 310B",
        )
    elif table.npus and not holders and not table.unread:
        yield Finding.ok("npu-holders", "no process holds an NPU")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _free_it(holder: devices.Holder) -> str:
    if holder.container:
        return f"docker stop {holder.container}"
    if holder.here:
        return f"kill {holder.pid} in this container, or choose another NPU"
    return "stop that process, or choose another NPU"
