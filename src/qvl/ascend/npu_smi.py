"""Parser of the table of `npu-smi info`.

The table has two rows per chip, and its columns differ between driver versions: the second cell of the second row is
absent (23.0 to 25.x on 910B), `Device` (310B, 310P) or `Phy-ID` (two chips per card); `HBM-Usage` is absent on chips
without HBM. The number in `/dev/davinciN` is `Device` or `Phy-ID` if present, else the NPU number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

_VERSION = re.compile(r"npu-smi\s+(\S+)\s+Version:\s*(\S+)")
_PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")
_USED_FLOOR_MB = 6144
_USED_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class NpuProcess:
    """A process that uses memory of a chip. `name` is "" if npu-smi does not know it (another container)."""

    pid: int
    name: str
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Npu:
    """One chip. Memory is in MiB, of HBM if the chip has it; `power_w` and `temperature_c` are None if not measured."""

    npu_id: int
    chip_id: int
    device_id: int
    name: str
    health: str
    power_w: float | None
    temperature_c: int | None
    memory_used_mb: int
    memory_total_mb: int
    processes: tuple[NpuProcess, ...] = ()

    @property
    def memory_free_mb(self) -> int:
        """The free memory in MiB."""
        return self.memory_total_mb - self.memory_used_mb

    @property
    def used_by_hidden(self) -> bool:
        """True if much memory is in use but no process is listed: processes of other containers are hidden.

        An idle chip has 3 to 4 GiB in use by the driver and the device's own system.
        """
        limit = max(_USED_FLOOR_MB, _USED_SHARE * self.memory_total_mb)
        return not self.processes and self.memory_used_mb > limit


@dataclass(frozen=True, slots=True)
class NpuSmi:
    """The parsed table: the version of npu-smi, which is the driver's too, and the chips by device number."""

    version: str
    npus: tuple[Npu, ...]


def parse(text: str) -> NpuSmi | None:
    """Return the parsed table, or None if `text` has none (an error message of the driver, for instance)."""
    version = _VERSION.search(text)
    if version is None:
        return None
    chips: list[Npu] = []
    processes: dict[tuple[int, int], list[NpuProcess]] = {}
    upper: list[str] | None = None
    numbered = in_processes = False
    for cells in _rows(text):
        if "Process id" in cells[1:2]:
            in_processes = True
        elif cells[0].startswith("Chip"):
            numbered = len(cells[0].split()) > 1
        elif in_processes:
            _add_process(processes, cells)
        elif upper is not None:
            chip = _chip(upper, cells, numbered)
            upper = None
            if chip is not None:
                chips.append(chip)
        elif len(cells) == 3 and re.match(r"\d+\s+\S", cells[0]):
            upper = cells
    npus = (replace(chip, processes=tuple(processes.get((chip.npu_id, chip.chip_id), ()))) for chip in chips)
    return NpuSmi(version[2], tuple(sorted(npus, key=lambda npu: npu.device_id)))


def _rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        inside = line.strip()
        if inside.startswith("|") and inside.endswith("|") and len(inside) > 1:
            cells = [cell.strip() for cell in inside[1:-1].split("|")]
            if cells[0]:
                yield cells


def _chip(upper: list[str], lower: list[str], numbered: bool) -> Npu | None:
    npu_id, _, name = upper[0].partition(" ")
    numbers = lower[0].split()
    memory = _PAIR.findall(lower[2]) if len(lower) == 3 else []
    if not memory or not numbers[0].isdigit():
        return None
    chip_id = int(numbers[0])
    has_device = numbered and len(numbers) > 1 and numbers[1].isdigit()
    measures = upper[2].split()
    used, total = memory[-1]
    return Npu(
        npu_id=int(npu_id),
        chip_id=chip_id,
        device_id=int(numbers[1]) if has_device else int(npu_id),
        name=name.strip(),
        health=upper[1],
        power_w=_number(measures[0]) if measures else None,
        temperature_c=_whole(measures[1]) if len(measures) > 1 else None,
        memory_used_mb=int(used),
        memory_total_mb=int(total),
    )


def _add_process(processes: dict[tuple[int, int], list[NpuProcess]], cells: list[str]) -> None:
    numbers = cells[0].split()
    if len(cells) < 4 or not cells[1].isdigit() or not all(part.isdigit() for part in numbers):
        return
    chip = (int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0)
    memory = _whole(cells[3])
    processes.setdefault(chip, []).append(NpuProcess(int(cells[1]), cells[2], memory or 0))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None
