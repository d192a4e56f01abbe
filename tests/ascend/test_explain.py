"""`qvl doctor --explain`: codes in whatever form they are pasted, and what is not known."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qvl.ascend.explain import codes_in, explanations, known
from qvl.cli import app

LOG = (
    "NPU function error: c10_npu::SetDevice(device_id_), error code is 507033\n[ERROR] 2025-11-19-11:14:58 (PID:356, "
    "Device:0, RankID:-1) ERR00100 PTA call acl api failed\nE30006: 2025-11-19-11:14:58.516 Failed to verify the OPP"
)


def test_at_least_forty_codes_have_a_cause_and_a_way_out_of_one_line_each() -> None:
    assert len(known()) >= 40
    for item in known().values():
        assert codes_in(item.code) == (item.code,)
        assert item.name
        assert item.cause
        assert item.fix
        assert "\n" not in item.cause + item.fix


def test_a_reset_which_takes_all_npus_of_a_server_is_told_after_the_services_that_it_would_stop() -> None:
    resets = [item.fix for item in known().values() if "reset" in item.fix]

    assert resets
    assert all("stop all services" in fix.partition("reset")[0] for fix in resets)


def test_a_way_out_that_points_to_another_code_points_to_one_that_is_known() -> None:
    pointing = {item.code: codes_in(item.fix.replace("for ", "")) for item in known().values() if "as for" in item.fix}

    assert pointing
    assert all(code in known() for codes in pointing.values() for code in codes)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("207001", ("207001",)),
        ("error code is 207001.", ("207001",)),
        ("ret is -8020", ("-8020",)),
        ("ej0003", ("EJ0003",)),
        ("EJ0003: [PID: 356] Failed to bind", ("EJ0003",)),
        ("(ERR02200)", ("ERR02200",)),
        ("pid 1207001, 2025-11-19", ()),
        ("8005", ()),
        ("", ()),
        ("错误码507018，请检查", ("507018",)),
        ("错误EI0006：建立连接失败", ("EI0006",)),
        ("返回-8020。", ("-8020",)),
        ("ret:8020", ("-8020",)),
        ("dcmi init failed, ret is 8005", ("-8005",)),
        ("error code 8020", ("-8020",)),
        ("error: port 8020", ()),
        ("http://host:8020/v1, ret_8020", ()),
        ("5070180", ()),
        ("٥٠٧٠١٨", ()),
    ],
)
def test_a_code_is_found_in_what_is_pasted(text: str, codes: tuple[str, ...]) -> None:
    assert codes_in(text) == codes


def test_of_several_codes_those_that_only_pass_an_error_on_come_last() -> None:
    assert [item.code for item in explanations(LOG)] == ["507033", "E30006", "ERR00100"]


@pytest.mark.parametrize("code", sorted(known()))
def test_the_command_explains_every_code(code: str) -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", code])

    assert done.exit_code == 0
    assert done.stdout.startswith(f"{code} (")
    assert "fix: " in done.stdout


def test_json_has_the_same_facts() -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", "-8020", "--json"])

    assert json.loads(done.stdout) == [
        {name: getattr(known()["-8020"], name) for name in ("code", "name", "cause", "fix")}
    ]


def test_an_unknown_code_beside_a_known_one_is_told() -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", "107002 and 599999"])

    assert done.exit_code == 2
    assert done.stdout.startswith("107002 (")
    assert "no explanation of 599999" in done.stderr


def test_what_has_no_code_is_called_so() -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", "nonsense"])

    assert done.exit_code == 2
    assert "'nonsense' is not an error code" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("more", [["--device", "banana"], ["--device", "auto"], ["--no-probe"], ["--port", "1"]])
def test_options_of_an_examination_are_refused_beside_explain(more: list[str]) -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", "107002", *more])

    assert (done.exit_code, done.stdout) == (2, "")
    assert more[0].replace("--no-", "--") in done.stderr


@pytest.mark.parametrize("text", ["100000", "hello", "EI9998"])
def test_an_unknown_code_is_one_line_and_exit_code_2(text: str) -> None:
    done = CliRunner().invoke(app, ["doctor", "--explain", text])

    assert done.exit_code == 2
    assert done.stdout == ""
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
