"""The tables of several driver versions and chips, and what is no table."""

from __future__ import annotations

import random

import pytest

from qvl.ascend import npu_smi
from tests.ascend.conftest import RECORDINGS, recording


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
        ("25.7.rc1-950PR.txt", "25.7.rc1", (0, 1), "Ascend950PR", [(86120, 114688), (4218, 114688)]),
        ("25.6.0-950DT.txt", "25.6.0", (0, 1), "Ascend950DT", [(5021, 98304), (71044, 98304)]),
        ("26.0.rc2-910B3-in-container.txt", "26.0.rc2", (0, 1), "910B3", [(39120, 65536), (20611, 65536)]),
        ("26.0.rc2-910-two-chips.txt", "26.0.rc2", (0, 1), "Ascend910", [(3419, 65536), (15874, 65536)]),
        ("25.5.0-910B2-single-spaced.txt", "25.5.0", (0,), "910B2", [(3402, 65536)]),
        ("22.0.4-910A.txt", "22.0.4", (0,), "910A", [(0, 32768)]),
        ("21.0.4-310.txt", "21.0.4", (0, 1), "310", [(2703, 8192), (2703, 8192)]),
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
    assert parsed.unread == ()


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


def test_a_950_gives_health_power_and_the_process_that_holds_it() -> None:
    held, idle = table("25.7.rc1-950PR.txt").npus

    assert (held.health, held.power_w, held.temperature_c) == ("Alarm", 212.4, 51)
    assert held.processes == (npu_smi.NpuProcess(481722, "VLLM::Worker", 81902),)
    assert (idle.health, idle.processes) == ("OK", ())


def test_the_number_in_the_container_is_read_where_npu_smi_prints_it() -> None:
    parsed = table("26.0.rc2-910B3-in-container.txt")

    assert parsed.in_container
    assert [npu.processes for npu in parsed.npus] == [
        (npu_smi.NpuProcess(485946, "qvl-serve", 35175, container_pid=212),),
        (npu_smi.NpuProcess(502118, "pytest", 17101),),
    ]
    assert not table("25.2.0-910-two-chips.txt").in_container


def test_a_half_printed_chip_is_told_and_does_not_shift_the_others() -> None:
    parsed = table("24.1.0-310P3-half-printed.txt")

    assert [(npu.device_id, npu.name, npu.health, npu.memory_total_mb) for npu in parsed.npus] == [
        (1, "310P3", "OK", 21527)
    ]
    assert parsed.unread == ("NPU 3 (310P3, health Critical) has no second row, so no memory and no number",)


def test_memory_that_is_not_known_is_none_and_the_chip_stays() -> None:
    npu = table("23.0.6-310P3-memory-na.txt").npus[0]

    assert (npu.memory_used_mb, npu.memory_total_mb, npu.memory_free_mb) == (None, 21527, None)
    assert not npu.lost
    assert not npu.used_by_hidden


def test_a_card_without_any_figure_is_lost() -> None:
    parsed = table("24.1.rc3-910B4-lost-card.txt")

    assert [(npu.device_id, npu.lost, npu.health) for npu in parsed.npus] == [(0, False, "OK"), (1, True, "UNKNOWN")]
    assert parsed.npu(1) is parsed.npus[1]
    assert parsed.npu(7) is None


@pytest.mark.parametrize(
    "row",
    [
        "| 0 | 910B4 | OK | 80.0 | 35 |",
        "| zero  910B4 | OK | 80.0 35 0 / 0 |",
        "| 0 | 0000:C1:00.0 | 0 0 / 0 2800 / 32768 |",
    ],
)
def test_a_row_of_a_layout_to_come_is_told_and_not_passed_over(row: str) -> None:
    parsed = npu_smi.parse(f"| npu-smi 99.0   Version: 99.0 |\n{row}\n")

    assert parsed is not None
    assert parsed.npus == ()
    assert len(parsed.unread) == 1


def test_npu_smis_own_warning_is_kept() -> None:
    line = "[WARNING]The driver package may not be completely installed, please reinstall it."
    parsed = npu_smi.parse(recording("24.1.rc3-910B4.txt") + line + "\n")

    assert parsed is not None
    assert parsed.warnings == (line,)


def test_a_cut_off_table_gives_the_rows_that_are_whole() -> None:
    lines = recording("24.1.rc3-910B4.txt").splitlines()
    cut = next(index for index, line in enumerate(lines) if "| 2     910B4" in line) + 1

    parsed = npu_smi.parse("\n".join(lines[:cut]))

    assert parsed is not None
    assert [npu.device_id for npu in parsed.npus] == [0, 1]
    assert parsed.unread == ("NPU 2 (910B4, health OK) has no second row, so no memory and no number",)


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.glob("[0-9]*.txt")))
def test_a_line_that_is_lost_never_takes_a_chip_along_in_silence(name: str) -> None:
    whole = table(name)
    lines = recording(name).splitlines()
    for index, line in enumerate(lines):
        if "Version:" in line:
            continue
        parsed = npu_smi.parse("\n".join(lines[:index] + lines[index + 1 :]))

        assert parsed is not None
        assert len(parsed.npus) == len(whole.npus) or parsed.unread, line


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.glob("[0-9]*.txt")))
def test_a_table_that_ends_anywhere_is_read_without_an_error(name: str) -> None:
    text = recording(name)
    for end in range(0, len(text), 7):
        npu_smi.parse(text[:end])
        npu_smi.parse(text[:end].replace("|", "||"))


def table_text(*rows: str) -> str:
    return "\n".join(["| npu-smi 24.1.rc3   Version: 24.1.rc3 |", *rows])


UPPER, LOWER = "| 0  910B4 | OK | 80.0  35  0 / 0 |", "| 0 | 0000:C1:00.0 | 0  0 / 0  2800 / 32768 |"
HEADING = "| NPU  Chip | Process id | Process name | Process memory(MB) |"


@pytest.mark.parametrize("figure", ["3²", "٣", "१", "9" * 5000])
def test_a_figure_that_int_does_not_take_is_told_and_raises_nothing(figure: str) -> None:
    rows = table_text(UPPER, LOWER, HEADING, "| 0 0 | 4711 | python | 99 |")
    for cell in ("| 0  910B4", "| 0 | 0000", "2800", "32768", "| 0 0 |", "4711"):
        number = next(word for word in cell.split() if word.isdecimal())
        parsed = npu_smi.parse(rows.replace(cell, cell.replace(number, figure, 1), 1))

        assert parsed is not None
        assert parsed.unread, cell


def test_what_a_terminal_or_a_log_does_to_a_table_raises_nothing() -> None:
    chance = random.Random(7)
    texts = [recording(path.name) for path in sorted(RECORDINGS.glob("[0-9]*.txt"))]
    for _ in range(400):
        letters = list(chance.choice(texts))
        for _ in range(chance.randint(1, 30)):
            letters[chance.randrange(len(letters))] = chance.choice("|²٣ \t/-N9\n\x00é")
        npu_smi.parse("".join(letters))


def test_rows_whose_end_is_cut_off_are_told_with_the_process_that_has_no_chip_then() -> None:
    parsed = npu_smi.parse(table_text(UPPER[:-1], LOWER[:-1], HEADING, "| 0 0 | 4711 | python | 99 |"))

    assert parsed is not None
    assert parsed.npus == ()
    assert [line.partition(":")[0] for line in parsed.unread[:2]] == ["a row is cut off", "a row is cut off"]
    assert parsed.unread[2] == "process 4711 is on NPU 0, chip 0, which has no whole rows"


@pytest.mark.parametrize(
    ("used", "total", "hidden"), [(6144, 32768, False), (6145, 32768, True), (9830, 65536, False), (9831, 65536, True)]
)
def test_memory_in_use_tells_of_a_hidden_process_over_both_bounds(used: int, total: int, hidden: bool) -> None:
    parsed = npu_smi.parse(table_text(UPPER, LOWER.replace("2800 / 32768", f"{used} / {total}"), HEADING))

    assert parsed is not None
    assert parsed.npus[0].used_by_hidden is hidden
