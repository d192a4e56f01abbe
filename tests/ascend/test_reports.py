"""The public reports of failed bring-ups, each on a made-up host: does the doctor name the cause?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.ascend.doctor import examine
from tests.ascend import reports
from tests.ascend.conftest import Machine

if TYPE_CHECKING:
    from tests.ascend.reports import Report

NAMED = [row for row in reports.REPORTS if row.make or row.explains]
PAGE = Path(__file__).parents[2] / "docs" / "ascend-reports.md"


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.threads)
def test_the_cause_of_a_public_report_is_named(row: Report, healthy: Machine) -> None:
    assert row.printed(healthy)


@pytest.mark.parametrize("row", [row for row in NAMED if row.make], ids=lambda row: row.threads)
def test_nothing_else_is_blamed(row: Report, healthy: Machine) -> None:
    assert row.failing(healthy) <= {row.check, *row.also}


def test_all_26_rows_are_here_and_at_least_22_are_named() -> None:
    assert len(reports.REPORTS) == 26
    assert len(NAMED) >= 22


def test_a_row_is_not_named_on_the_healthy_host_so_that_its_words_mean_something(healthy: Machine) -> None:
    said = examine(healthy.host(), reports.QUIET).findings

    assert [finding for finding in said if finding.status in ("warn", "fail")] == []


@pytest.mark.parametrize("name", ["error-8020.txt", "error-8005.txt"])
def test_an_npu_held_elsewhere_is_never_met_with_a_reboot(name: str, healthy: Machine) -> None:
    healthy.write("/.dockerenv")
    healthy.npu_smi(name, code=1)
    found = [item for item in examine(healthy.host(), reports.QUIET).findings if item.check == "npu-smi"]

    assert "another container" in found[0].summary
    assert "reboot" not in (found[0].fix or "")
    assert "device-share" in (found[0].fix or "")


def test_the_page_of_reports_is_what_the_doctor_prints(tmp_path: Path) -> None:
    assert PAGE.read_text(encoding="utf-8") == reports.page(tmp_path), "make docs writes it again"
