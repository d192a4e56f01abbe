"""Accelerators of a host: device nodes, visible devices, and the processes that use each NPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final

from qvl.ascend import chips, npu_smi
from qvl.ascend.host import Completed, Host
from qvl.errors import ConfigError

VISIBLE_DEVICES: Final = "ASCEND_RT_VISIBLE_DEVICES"
_NODE = re.compile(r"davinci(\d+)")
_CONTAINER_ID = re.compile(r"([0-9a-f]{64})")
_COMM_LENGTH = 15
_LOOK: ContextVar[dict[int, npu_smi.NpuSmi | None] | None] = ContextVar("npu_smi_tables", default=None)


@dataclass(frozen=True, slots=True)
class Visible:
    """ASCEND_RT_VISIBLE_DEVICES as the runtime parses it.

    The runtime parses numbers separated by commas and stops at the first other character, blanks included; `read` are
    the parsed numbers, `dropped` is the ignored rest. Numbers must be ascending.
    """

    read: tuple[int, ...]
    dropped: str

    @property
    def ascending(self) -> bool:
        """True if every number is larger than the one before."""
        return all(a < b for a, b in zip(self.read, self.read[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses an NPU. `container` is a name or a short id, None for a process of the host itself.

    `here` is True for a process of this container, whose `pid` is then its number in it.
    """

    device_id: int
    pid: int | None
    process: str
    memory_mb: int
    container: str | None
    here: bool = False

    def __str__(self) -> str:
        where = f" in container {self.container}" if self.container else " in this container" if self.here else ""
        pid = f" (pid {self.pid})" if self.pid is not None else ""
        return f"NPU {self.device_id} is held by {self.process}{pid}{where}, {self.memory_mb} MiB"


def device_numbers(host: Host) -> tuple[int, ...]:
    """Return the N of every `/dev/davinciN`, ascending."""
    return numbers_of(host.names("/dev"))


def numbers_of(nodes: Iterable[str]) -> tuple[int, ...]:
    """Return the N of every `davinciN` among names below /dev, ascending."""
    matches = (_NODE.fullmatch(name) for name in nodes)
    return tuple(sorted(int(match[1]) for match in matches if match))


def has_cuda(host: Host) -> bool:
    """True if the host has an NVIDIA driver: its control node, or nvidia-smi."""
    return host.path("/dev/nvidiactl").exists() or host.which("nvidia-smi") is not None


def npu_smi_program(host: Host) -> str | None:
    """Return the path of npu-smi, on PATH or where the driver installs it; None if it is absent."""
    found = host.which("npu-smi")
    return found or next((path for tool in chips.TOOLS if (path := host.which(str(host.path(tool))))), None)


def run_npu_smi(host: Host, *arguments: str) -> Completed:
    """Run npu-smi and return its outcome, code 127 if it is not installed."""
    return host.run([npu_smi_program(host) or "npu-smi", *arguments])


def kind_of(host: Host) -> str:
    """Return `npu`, `cuda` or `cpu`: the host's accelerator, by its device nodes and tools, not by torch."""
    has_npu = bool(device_numbers(host)) or npu_smi_program(host) is not None
    if has_npu or host.path("/usr/local/Ascend/driver").exists():
        return "npu"
    return "cuda" if has_cuda(host) else "cpu"


def query(host: Host) -> npu_smi.NpuSmi | None:
    """Return the parsed output of `npu-smi info`; None if the tool is missing or fails."""
    look = _LOOK.get()
    if look is None:
        return table_of(host, run_npu_smi(host, "info").stdout)
    if id(host) not in look:
        look[id(host)] = table_of(host, run_npu_smi(host, "info").stdout)
    return look[id(host)]


@contextmanager
def one_look() -> Iterator[None]:
    """Let `query` run npu-smi once per host inside the block: a call takes a second and more where there are many."""
    token = _LOOK.set({})
    try:
        yield
    finally:
        _LOOK.reset(token)


def table_of(host: Host, text: str) -> npu_smi.NpuSmi | None:
    """Return the table of npu-smi's output `text`, with the numbers of this host's device nodes; None without a table.

    Where the table only has the NPUs' own numbers and they are no nodes (boards that count slots), `npu-smi info -m`
    tells which node each is.
    """
    table = npu_smi.parse(text)
    nodes = device_numbers(host)
    if table is None or table.numbered or {npu.device_id for npu in table.npus} <= {*nodes}:
        return table
    mapping = npu_smi.parse_mapping(run_npu_smi(host, "info", "-m").stdout)
    npus = []
    for npu in table.npus:
        logic, number = mapping.get((npu.npu_id, npu.chip_id), (None, None))
        if number is None and logic is not None and logic < len(nodes):
            number = nodes[logic]
        npus.append(npu if number is None else replace(npu, device_id=number))
    return replace(table, npus=tuple(sorted(npus, key=lambda npu: npu.device_id)))


def chip_name(host: Host, npus: tuple[int, ...]) -> str:
    """Return the chip name that npu-smi shows for `npus`; "" if unknown.

    Raises:
        ConfigError: they are of several kinds, which need containers of different images.
    """
    table, nodes = query(host), host.names("/dev")
    names = list(dict.fromkeys(npu.name for npu in table.npus if npu.device_id in npus)) if table else []
    if len({chips.find(name, nodes) for name in names}) > 1:
        hint = "one container for each kind: --npus names those of one"
        raise ConfigError(f"the NPUs of --npus are of several kinds: {', '.join(names)}", hint=hint)
    return names[0] if names else ""


def smallest_memory(host: Host, npus: tuple[int, ...]) -> int:
    """Return the memory in MiB of the one of `npus` that has least, by npu-smi; 0 if it is not known of all."""
    table = query(host)
    sizes = [npu.memory_total_mb or 0 for npu in table.npus if npu.device_id in npus] if table else []
    return min(sizes) if sizes and len(sizes) == len(npus) else 0


def chip_of(host: Host, table: npu_smi.NpuSmi | None) -> chips.Chip | None:
    """Return the facts about the host's chips, by npu-smi's first name and the device nodes; None if neither tells."""
    nodes = host.names("/dev")
    named = (chips.find(npu.name, nodes) for npu in table.npus) if table else iter(())
    return next((chip for chip in named if chip), None) or chips.find_by_nodes(nodes)


def parse_visible(text: str) -> Visible:
    """Return the value of ASCEND_RT_VISIBLE_DEVICES, parsed as the Ascend runtime does.

    Source: CANN's reference of environment variables, "ASCEND_RT_VISIBLE_DEVICES".
    """
    match = re.match(r"\d+(,\d+)*", text)
    if match is None:
        return Visible((), text)
    return Visible(tuple(int(number) for number in match[0].split(",")), text[match.end() :])


def addressable(nodes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers by which processes address the NPUs of device `nodes`.

    The runtime counts the nodes that it sees from 0, whatever their own numbers: on a host with davinci0, 1, 3 and 4,
    and in a container that got davinci6 and 7.
    """
    return tuple(range(len(nodes)))


def parse_npus(text: str, present: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return the NPU numbers in `text` (`0,1`, `0-3`, `0-1,6`, or `all` for `present`) in ascending order.

    Raises ConfigError for anything else, and for the same NPU twice.
    """
    if text.strip() == "all":
        if not present:
            hint = "run it on the NPU host, or name that host's NPUs, such as --npus 0,1"
            raise ConfigError("--npus all: no /dev/davinciN on this host", hint=hint)
        return present
    numbers: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,3})(?:-([0-9]{1,3}))?\s*", piece)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(
                f"--npus {text!r}: {piece.strip()!r} is not an NPU number", hint="write 0,1 or 0-3 or all"
            )
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"--npus {text!r} names an NPU twice", hint="name each once")
    return tuple(sorted(numbers))


def holders(host: Host, table: npu_smi.NpuSmi) -> tuple[Holder, ...]:
    """Return every process that uses an NPU, and one Holder per NPU with memory in use by hidden processes."""
    holding: list[Holder] = []
    containers: dict[str, str] | None = None
    for npu in table.npus:
        for process in npu.processes:
            if table.in_container and host.in_container:
                holding.append(_seen_inside(npu.device_id, process))
                continue
            container = _container_of(host, process)
            if container and containers is None:
                containers = _container_names(host)
            label = (containers or {}).get(container[:12], container[:12]) if container else None
            name = process.name or _process_name(host, process.pid) or "a process without a name"
            holding.append(Holder(npu.device_id, process.pid, name, process.memory_mb, label))
        if npu.used_by_hidden:
            hidden = "a process of another container or of the host"
            holding.append(Holder(npu.device_id, None, hidden, npu.memory_used_mb or 0, None))
    return tuple(holding)


def _seen_inside(device_id: int, process: npu_smi.NpuProcess) -> Holder:
    # npu-smi itself says which processes are of this container, so /proc need not be compared.
    if process.container_pid is not None:
        name = process.name or "a process without a name"
        return Holder(device_id, process.container_pid, name, process.memory_mb, None, here=True)
    name = f"{process.name or 'a process'} of another container or of the host"
    return Holder(device_id, None, name, process.memory_mb, None)


def _process_name(host: Host, pid: int) -> str | None:
    text = host.read(f"/proc/{pid}/comm")
    return text.strip() if text and text.strip() else None


def _container_of(host: Host, process: npu_smi.NpuProcess) -> str | None:
    local_name = _process_name(host, process.pid)
    # npu-smi gives the host's pid; inside a container the same number is another process, told by its name.
    if local_name is None or (process.name and process.name[:_COMM_LENGTH] != local_name[:_COMM_LENGTH]):
        return None
    match = _CONTAINER_ID.search(host.read(f"/proc/{process.pid}/cgroup") or "")
    return match[1] if match else None


def _container_names(host: Host) -> dict[str, str]:
    done = host.run(["docker", "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}"], timeout=10)
    pairs = (line.split(None, 1) for line in done.stdout.splitlines() if len(line.split(None, 1)) == 2)
    return {identity[:12]: name.strip() for identity, name in pairs}
