"""What is told of the measured kernels: a short line, the details, and the speed of one row for estimates."""

from __future__ import annotations

import json

import pytest

from qvl.ascend.checks.resources import processor
from qvl.ascend.host import Host
from qvl.backends.local.model import kernel_report, kernel_times
from qvl.config import cache_folder

LARGE = {"1": 1.0, "2": 1.0, "4": 1.0, "8": 1.0, "16": 9.0, "32": 9.0, "64": 9.0, "256": 9.0}
FLAT = dict.fromkeys(LARGE, 4.0)
SAVED = {
    "read_gb_s": 33.3,
    "dtype": "bfloat16",
    "times": {
        "4096x4096 bfloat16 2 threads": {"fbgemm": LARGE, "plain": FLAT, "fbgemm-int8": {**LARGE, "1": 0.8}},
        "2048x1024 bfloat16 1 thread": {"plain": FLAT},
        "4096x4096 float32 2 threads": {"plain": FLAT, "onednn": {}},
        "64x64 bfloat16 2 threads": {"plain": {"1": 0.001}},
        "8192x4096 bfloat16 2 threads": {"onednn": {"256": 3.0}},
        "threads 4096x4096 bfloat16 2 threads": {"2": LARGE, "1": FLAT},
        "decode 16/8x128 over 256 bfloat16 2 threads": {
            "grouped": {"1": 1.0, "8": 8.0, "32": 9.0},
            "by-head": {"1": 1.0, "8": 5.0, "32": 8.5},
        },
        "prompt 16/8x128 bfloat16 2 threads": {"grouped": {"256": 3.0}, "float32": {"256": 2.0}},
        "decode 16/8x128 over 256 bfloat16 1 thread": {"grouped": {"1": 1.0, "8": 8.0, "32": 9.0}},
    },
}


@pytest.fixture(autouse=True)
def _saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "_memo", {})
    monkeypatch.setattr(kernel_times, "has_bfloat16", lambda: True)
    cache_folder().mkdir(parents=True)
    (cache_folder() / "kernels.json").write_text(json.dumps({kernel_times._processor(): SAVED}))


def test_the_line_has_dtype_bandwidth_and_the_kernels_of_the_largest_weight() -> None:
    told = kernel_report.summary()
    assert told is not None
    line, detail = told
    assert line == (
        "auto is bfloat16; memory reads 33.3 GB/s; 4096x4096 bfloat16 2 threads:"
        " fbgemm for up to 8 rows, plain beyond, one row at 100% of it;"
        " attention of steps grouped or by-head, of prompts in float32"
    )
    assert detail["attention"]["16/8x128 bfloat16 2 threads"] == {
        "256 tokens": "grouped for up to 1 row, by-head for up to 8 rows, grouped beyond",
        "prompts": "float32",
    }
    assert [(of["weight"], of["form"], of["fastest"]) for of in detail["weights"]] == [
        ("4096x4096 bfloat16 2 threads", "bfloat16", "fbgemm"),
        ("4096x4096 bfloat16 2 threads", "int8", "fbgemm-int8"),
        ("4096x4096 float32 2 threads", "float32", "plain"),
        ("2048x1024 bfloat16 1 thread", "bfloat16", "plain"),
    ]


def test_the_doctor_shows_the_line_and_keeps_the_details_in_its_json() -> None:
    (finding,) = [finding for finding in processor(Host()) if finding.check == "cpu-kernels"]
    assert len(finding.summary) < 200
    assert finding.detail["read_gb_s"] == 33.3


def test_the_speed_of_one_row_is_that_of_all_large_weights_of_a_form() -> None:
    assert kernel_report.one_row("int8") == (1.0, pytest.approx(4096 * 4096 / 0.8 / 1e6))
    assert kernel_report.one_row("float32") == (4.0, pytest.approx(4096 * 4096 * 4 / 4 / 1e6))
    both = 4096 * 4096 + 2048 * 1024
    assert kernel_report.one_row("bfloat16") == (2.0, pytest.approx(both * 2 / (1.0 + 4.0) / 1e6))


def test_before_any_measurement_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    (cache_folder() / "kernels.json").unlink()
    monkeypatch.setattr(kernel_times, "_memo", {})
    assert kernel_report.summary() is None
    assert kernel_report.one_row("bfloat16") is None
