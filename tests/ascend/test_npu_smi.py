"""The tables of several driver versions and chips, and what is no table."""

from __future__ import annotations

import pytest

from qvl.ascend import npu_smi
from tests.ascend.conftest import recording


def table(name: str) -> npu_smi.NpuSmi:
    parsed = npu_smi.parse(recording(name))
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("name", "version", "devices", "chip", "memory"),
    [
        ("23.0.2.1-910B2C.txt", "23.0.2.1", (0, 1), "910B2C", [(21240, 65536), (3384, 65536)]),
        ("23.0.0-310B4.txt", "23.0.0", (0,), "310B4", [(2914, 15609)]),
        ("24.1.rc3-910B4.txt", "24.1.rc3", (0, 1, 2, 3), "910B4", [(2800 + i, 32768) for i in range(4)]),
        ("24.1.0.1-310P3.txt", "24.1.0.1", (2, 3), "310P3", [(9120, 44280), (1510, 43693)]),
        (
            "25.2.0-910-two-chips.txt",
            "25.2.0",
            (0, 1, 2, 3),
            "Ascend910",
            [(3150, 65536), (2890, 65536), (53402, 65536), (3021, 65536)],
        ),
        (
            "25.5.2-910B3.txt",
            "25.5.2",
            (0, 1, 2, 3),
            "910B3",
            [(3401, 65536), (60012, 65536), (3399, 65536), (41109, 65536)],
        ),
    ],
)
def test_every_driver_version_gives_device_numbers_names_and_memory(
    name: str, version: str, devices: tuple[int, ...], chip: str, memory: list[tuple[int, int]]
) -> None:
    parsed = table(name)

    assert parsed.version == version
    assert tuple(npu.device_id for npu in parsed.npus) == devices
    assert {npu.name for npu in parsed.npus} == {chip}
    assert [(npu.memory_used_mb, npu.memory_total_mb) for npu in parsed.npus] == memory


def test_health_power_and_temperature_are_read_and_a_dash_is_not_a_number() -> None:
    npus = table("25.2.0-910-two-chips.txt").npus

    assert (npus[0].health, npus[0].power_w, npus[0].temperature_c) == ("OK", 165.0, 38)
    assert (npus[1].power_w, npus[1].temperature_c) == (None, 37)
    assert table("23.0.0-310B4.txt").npus[0].health == "Alarm"
    assert table("25.5.2-910B3.txt").npus[2].health == "Warning"


def test_a_process_stands_at_the_chip_that_it_holds_and_may_have_no_name() -> None:
    two_chips = table("25.2.0-910-two-chips.txt").npus
    unnamed = table("25.5.2-910B3.txt").npus

    assert [len(npu.processes) for npu in two_chips] == [0, 0, 1, 0]
    assert two_chips[2].processes[0] == npu_smi.NpuProcess(990711, "VLLM::Worker", 50122)
    assert unnamed[1].processes[0] == npu_smi.NpuProcess(1333928, "", 56601)


def test_much_memory_without_a_process_means_a_holder_that_is_not_seen_from_here() -> None:
    npus = table("25.5.2-910B3.txt").npus

    assert [npu.used_by_hidden for npu in npus] == [False, False, False, True]


@pytest.mark.parametrize("text", ["", "npu-smi: command not found", "| broken |\n", recording("error-8005.txt")])
def test_what_is_no_table_is_none(text: str) -> None:
    assert npu_smi.parse(text) is None


def test_a_cut_off_table_gives_the_rows_that_are_whole() -> None:
    lines = recording("24.1.rc3-910B4.txt").splitlines()
    cut = next(index for index, line in enumerate(lines) if "| 2     910B4" in line) + 1

    parsed = npu_smi.parse("\n".join(lines[:cut]))

    assert parsed is not None
    assert [npu.device_id for npu in parsed.npus] == [0, 1]
