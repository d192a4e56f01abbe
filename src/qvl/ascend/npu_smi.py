"""Parser of the table of `npu-smi info`.

The table has two rows per chip, and its columns differ between driver versions and chips: the second number of the
second row is absent (910B), `Device` (310B, 310P) or `Phy-ID` (two dies per card); `HBM-Usage` is absent on chips
without HBM; the 950 has a cell of its own for the NPU's number, and two empty cells in the second row. The number in
`/dev/davinciN` is `Device` or `Phy-ID` if present, else the NPU's number. What the parser does not understand is
listed in `NpuSmi.unread`, so that no chip disappears without a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from qvl.ascend import chips

_VERSION = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")
# No figure of the table is longer; `isdigit` and \d also take characters that `int` does not, or that are no figures.
_FIGURE = r"[0-9]{1,9}"
_PAIR = re.compile(rf"(?<!\S)({_FIGURE}|NA|N/A|-)\s*/\s*({_FIGURE}|NA|N/A|-)(?!\S)")
_NAMED = re.compile(rf"({_FIGURE})\s+(\S.*)")
_NUMBERS = re.compile(rf"{_FIGURE}(\s+({_FIGURE}|NA|-))?")
_BUS = re.compile(r"[0-9A-Fa-f]{2,4}:[0-9A-Fa-f:.]+|NA|N/A|-|")
_MAPPING = re.compile(r"NPU ID|Slot ID|Chip ID|Chip Logic ID|Chip Phy-ID|Chip Name")
# Estimates: idle chips of the recorded tables have 1.5 to 5.0 GiB in use, which no published text bounds. The share is
# for chips with so much memory that the driver's own part may grow with it.
_USED_FLOOR_MB = 6144
_USED_SHARE = 0.15
_SHOWN = 120
_NOTED = 16


@dataclass(frozen=True, slots=True)
class NpuProcess:
    """A process that uses memory of a chip. `name` is "" if npu-smi does not know it (another container).

    `pid` is the host's number. `container_pid` is the number in the container where npu-smi ran; None on a host, for
    processes outside this container, and from an npu-smi without that column.
    """

    pid: int
    name: str
    memory_mb: int
    container_pid: int | None = None


@dataclass(frozen=True, slots=True)
class Npu:
    """One chip. Memory is in MiB, of HBM if the chip has it; every measure is None where npu-smi prints none."""

    npu_id: int
    chip_id: int
    device_id: int
    name: str
    health: str
    power_w: float | None
    temperature_c: int | None
    memory_used_mb: int | None
    memory_total_mb: int | None
    processes: tuple[NpuProcess, ...] = ()

    @property
    def memory_free_mb(self) -> int | None:
        """The free memory in MiB, None if npu-smi does not know it."""
        if self.memory_total_mb is None or self.memory_used_mb is None:
            return None
        return self.memory_total_mb - self.memory_used_mb

    @property
    def lost(self) -> bool:
        """True if npu-smi lists the chip but gets no memory figure from it, as from a card that fell off the bus."""
        return not self.memory_total_mb

    @property
    def used_by_hidden(self) -> bool:
        """True if much memory is in use but no process is listed: processes of other containers are hidden.

        Much is over 6 GiB and over 15 % of the memory, an estimate: what driver and the device's own system use of an
        idle chip is in no published text.
        """
        if self.memory_used_mb is None:
            return False
        limit = max(_USED_FLOOR_MB, _USED_SHARE * (self.memory_total_mb or 0))
        return not self.processes and self.memory_used_mb > limit


@dataclass(frozen=True, slots=True)
class NpuSmi:
    """The parsed table: the version of npu-smi, which is the driver's too, and the chips by device number.

    `unread` describes each row that was not understood or not whole, and each process of a chip that is not
    listed. `warnings` are npu-smi's own.
    `in_container` is True if it names each process's number in the container. `numbered` is True if the table itself
    has the number of `/dev/davinciN`; else the NPU's own number stands for it, which on some boards is the slot's.
    `lists_processes` is True if the table has a part for them: those of old drivers and of 310B have none, and one that
    was cut off lost it.
    """

    version: str
    npus: tuple[Npu, ...]
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    in_container: bool = False
    numbered: bool = False
    lists_processes: bool = False

    def npu(self, device_id: int) -> Npu | None:
        """Return the chip of `/dev/davinciN`, None if the table does not list it."""
        return next((npu for npu in self.npus if npu.device_id == device_id), None)


@dataclass(slots=True)
class _Table:
    """The state of a parse: what was read so far, and the first row of a chip whose second row is to come."""

    numbered: bool = False
    upper: list[str] | None = None
    columns: dict[str, int] | None = None
    chips: list[Npu] = field(default_factory=list)
    processes: dict[tuple[int, int], list[NpuProcess]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    more: int = 0

    def note(self, text: str) -> None:
        """Keep what is not right with the table; of very many rows the first, and how many more there are."""
        if len(self.unread) < _NOTED:
            self.unread.append(text)
        else:
            self.more += 1

    def read(self, line: str) -> None:
        """Take one line of the table; those that only draw it hold nothing."""
        inside = line.strip()
        if not inside.startswith("|") or _VERSION.search(inside):
            return
        if len(inside) < 2 or not inside.endswith("|"):
            self.note(f"a row is cut off: {inside[:_SHOWN]}")
            return
        cells = _cells(inside)
        if "Process id" in cells:
            self.half()
            self.columns = {name: index for index, name in enumerate(cells)}
        elif self.columns is not None:
            self.process(cells)
        elif _is_heading(cells):
            self.numbered |= re.fullmatch(r"Chip\s+\S+", cells[0]) is not None
        elif _is_upper(cells):
            self.half()
            self.upper = cells
        elif self.upper is not None and _is_lower(cells):
            self.whole(self.upper, cells)
            self.upper = None
        else:
            self.note(f"a row was not understood: {' | '.join(cells)[:_SHOWN]}")

    def half(self) -> None:
        """Note the first row that is left without a second one."""
        if self.upper is not None:
            number, name, health, _ = self.upper
            self.note(f"NPU {number} ({name}, health {health}) has no second row, so no memory and no number")
        self.upper = None

    def whole(self, upper: list[str], lower: list[str]) -> None:
        """Add the chip of two rows."""
        number, name, health, measures = upper
        numbers = [_whole(part) for part in lower[0].split()]
        npu_id = _whole(number)
        pairs = _PAIR.findall(lower[-1])
        if not pairs or npu_id is None or "/" in _PAIR.sub("", lower[-1]):
            self.note(f"NPU {number} ({name}, health {health}) has no memory column that can be read")
            return
        # Chips with DDR and HBM print both; HBM, the last, has 0 of 0 where there is none.
        used, total = next((pair for pair in reversed(pairs) if pair[1] != "0"), pairs[-1])
        own = numbers[1] if self.numbered and len(numbers) > 1 else None
        first, second = [*measures.split(), "", ""][:2]
        chip = Npu(
            npu_id=npu_id,
            chip_id=(numbers[0] if numbers else None) or 0,
            device_id=npu_id if own is None else own,
            name=name,
            health=health,
            power_w=_number(first),
            temperature_c=_whole(second),
            memory_used_mb=_whole(used),
            memory_total_mb=_whole(total),
        )
        self.chips.append(chip)

    def process(self, cells: list[str]) -> None:
        """Add a process, and pass over the lines that say that a chip has none."""
        columns = self.columns or {}
        numbers, at = [_whole(part) for part in cells[0].split()], columns["Process id"]
        if len(cells) < 2 or cells[0].startswith("No running") or not any(cells):
            return
        known = [part for part in numbers if part is not None]
        pid = _whole(cells[at]) if len(cells) == len(columns) else None
        if pid is None or not known or len(known) < len(numbers):
            self.note(f"a process was not understood: {' | '.join(cells)[:_SHOWN]}")
            return
        chip = (known[0], known[1] if len(known) > 1 else 0)
        memory = next((index for name, index in columns.items() if name.startswith("Process memory")), -1)
        inner = columns.get("Process id in container")
        process = NpuProcess(
            pid=pid,
            name=cells[columns.get("Process name", at + 1)],
            memory_mb=_whole(cells[memory]) or 0,
            container_pid=_whole(cells[inner]) if inner is not None else None,
        )
        self.processes.setdefault(chip, []).append(process)

    def end(self) -> None:
        """Note what the end of the table leaves open: a half chip, and processes of no chip."""
        self.half()
        listed = {(chip.npu_id, chip.chip_id) for chip in self.chips}
        if len(listed) < len(self.chips):
            self.note(f"{len(self.chips)} chips have rows, but only {len(listed)} different numbers")
        for (npu, chip), processes in self.processes.items():
            if (npu, chip) not in listed:
                pids = ", ".join(str(process.pid) for process in processes)
                self.note(f"process {pids} is on NPU {npu}, chip {chip}, which has no whole rows")
        if self.more:
            self.unread.append(f"{self.more} more rows are not as they should be")


def parse(text: str) -> NpuSmi | None:
    """Return the parsed table, or None if `text` has none (an error message of the driver, for instance)."""
    version = _VERSION.search(text)
    if version is None:
        return None
    table = _Table()
    for line in text.splitlines():
        table.read(line)
    table.end()
    npus = (
        replace(chip, processes=tuple(table.processes.get((chip.npu_id, chip.chip_id), ()))) for chip in table.chips
    )
    return NpuSmi(
        version=version[2],
        npus=tuple(sorted(npus, key=lambda npu: npu.device_id)),
        unread=tuple(table.unread),
        warnings=tuple(line.strip() for line in text.splitlines() if line.strip().startswith("[WARNING]")),
        in_container=bool(table.columns and "Process id in container" in table.columns),
        numbered=table.numbered,
        lists_processes=table.columns is not None,
    )


def parse_mapping(text: str) -> dict[tuple[int, int], tuple[int | None, int | None]]:
    """Return (logic id, physical id) of each chip by (NPU id, chip id), from `npu-smi info -m`; None where not given.

    The physical id is the N of `/dev/davinciN`, the logic id counts the chips from 0. {} if there is no such table.
    """
    found: dict[tuple[int, int], tuple[int | None, int | None]] = {}
    columns: list[str] = []
    for line in text.splitlines():
        heading = _MAPPING.findall(line)
        if "NPU ID" in heading:
            columns = heading
        elif columns:
            row = dict(zip(columns, line.split(), strict=False))
            npu, chip = _whole(row.get("NPU ID", "")), _whole(row.get("Chip ID", ""))
            logic, physical = _whole(row.get("Chip Logic ID", "")), _whole(row.get("Chip Phy-ID", ""))
            if npu is not None and chip is not None and (logic, physical) != (None, None):
                found[npu, chip] = (logic, physical)
    return found


def _cells(row: str) -> list[str]:
    cells = [cell.strip() for cell in row[1:-1].split("|")]
    # The 950's cells of number and name become those of the other chips: one cell, and one with numbers.
    if len(cells) == 4 and not cells[0] and not cells[1]:
        cells = cells[1:]
    if len(cells) == 3 and (named := _NAMED.fullmatch(cells[0])) and not _is_lower(cells):
        cells = [named[1], named[2], *cells[1:]]
    return cells


def _is_heading(cells: list[str]) -> bool:
    return cells[0].startswith(("NPU", "Chip")) or "Bus-Id" in cells


def _is_upper(cells: list[str]) -> bool:
    return len(cells) == 4 and _whole(cells[0]) is not None and bool(cells[1])


def _is_lower(cells: list[str]) -> bool:
    if len(cells) != 3 or not _BUS.fullmatch(cells[1]):
        return False
    # A chip may be named by a number only: `0  310` begins a chip, `0  31` ends one.
    numbers = cells[0].split()
    named = len(numbers) == 2 and chips.find(numbers[1]) is not None
    return not cells[0] or (_NUMBERS.fullmatch(cells[0]) is not None and not named)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(_FIGURE, text) else None
