"""The page before a real `qvl-serve --calibration`, whose file the real `qvl calibrate` made of drawn pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.tiny import render
from tests.server.conftest import data_url_of
from tests.server.page.conftest import drop, go, shot
from tests.server.processes import Process, launch

QUESTION = "Is it red?"
# Sixty pictures are asked three questions each before the first test.
pytestmark = pytest.mark.timeout(600)
TOO_UNSURE = "cannot tell (it would too often be wrong)"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures, some of which the model misreads, labels of them, and the calibration made with these."""
    made = tmp_path_factory.mktemp("shelf")
    render.main([str(made), "--n", "60", "--boxes", "--difficulty", "0.5", "--unknown-brands", "0.4"])
    lines = [json.loads(line) for line in (made / "labels.jsonl").read_text().splitlines()]
    for line in lines:
        del line["expected"]["evidence"]
        line["expected"][QUESTION] = line["expected"]["attributes"].get("color") == "red"
    (made / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--locate", "the brand", "--question", QUESTION, "--cache", "off", "-o", str(made / "cal.json")]
    command = [sys.executable, "-m", "qvl.cli", "calibrate", str(made / "labels.jsonl"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "QVL_CACHE": "off"})
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def server(shelf: Path) -> Iterator[Process]:
    running = launch("--calibration", str(shelf / "cal.json"), "--no-canary").wait_ready()
    yield running
    running.end()


@pytest.fixture(scope="module")
def unsure(shelf: Path, server: Process) -> Path:
    """A picture whose brand the model reads, but not surely enough."""
    for path in sorted(shelf.glob("*.png")):
        body = {"image": data_url_of(path.read_bytes()), "abstain": 0.9}
        told = server.post(body, "/v1/analyze").json()
        if told["abstained"].get("brand"):
            return path
    raise AssertionError("the model is sure of every brand")


def asked(page: Any, kind: str) -> None:
    page.click(f"#{kind}")
    page.wait_for_selector(f"#{kind}:enabled")


def test_what_is_too_unsure_is_said_so_and_calibrated_confidences_are_marked(
    page: Any, server: Process, unsure: Path
) -> None:
    go(page, server.address)
    page.click("#tab-analyze")
    drop(page, "mug.png", unsure.read_bytes())
    page.wait_for_selector("#pictures img")
    asked(page, "analyze")
    brand = page.locator(".field[data-path=brand]")
    assert brand.locator(".value").inner_text() not in ("", "—")
    assert brand.locator(".badge").inner_text() == "calibrated"
    assert re.search(r"the model's own: (< 1|\d+) %", brand.inner_text())
    page.fill("#abstain", "0.9")
    asked(page, "analyze")
    assert brand.locator(".untold").inner_text() == TOO_UNSURE
    assert brand.locator("meter").evaluate("meter => meter.value") < 0.9
    shown = page.locator(".field:has(.value)")
    assert shown.count() == page.locator(".field:has(.value) .badge").count() > 0
    shot(page, "calibrated")
    # The same in a table of several, and in what a batch writes.
    drop(page, "again.png", unsure.read_bytes())
    page.locator("#pictures img").nth(1).wait_for()
    asked(page, "analyze")
    assert page.locator(".results tbody .untold").all_inner_texts() == ["cannot tell", "cannot tell"]
    shot(page, "calibrated-table")
    page.click("#tab-batch")
    page.set_input_files("#batch-files", str(unsure))
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="1 of 1 answered").wait_for()
    with page.expect_download() as waiting:
        page.locator(".batch").get_by_role("button", name="JSONL").click()
    told = json.loads(waiting.value.path().read_text())
    assert [told["analysis"]["brand"], told["abstained"]["brand"]] == [None, "below_threshold"]


def test_boxes_and_decisions_are_marked_too_and_those_of_no_calibration_are_not(
    page: Any, server: Process, shelf: Path
) -> None:
    go(page, server.address)
    page.click("#tab-locate")
    boxes = [json.loads(line) for line in (shelf / "labels.jsonl").read_text().splitlines()]
    branded = next(line["image"] for line in boxes if line["expected"]["the brand"])
    drop(page, "mug.png", (shelf / branded).read_bytes())
    page.wait_for_selector("#pictures img")
    asked(page, "locate")
    assert page.locator("#answer .field .badge").inner_text() == "calibrated"
    assert "the model's own" in page.locator("#answer .field").inner_text()
    page.fill("#targets", "the mug")
    asked(page, "locate")
    assert page.locator("#answer .field .badge").count() == 0
    assert page.get_by_text("A bar is how likely these very numbers were").count() == 1
    page.click("#tab-decide")
    page.get_by_label("Question 1", exact=True).fill(QUESTION)
    asked(page, "decide")
    assert page.locator(".decision .badge").inner_text() == "calibrated"
    shot(page, "calibrated-decision")
    # A schema of one's own is none that was measured: its confidences are the model's, and to leave out is refused.
    page.click("#tab-analyze")
    page.select_option("#schema-kind", "fields")
    asked(page, "analyze")
    assert page.locator(".field .badge").count() == 0
    page.fill("#abstain", "0.9")
    asked(page, "analyze")
    page.locator("#error", has_text="calibration").wait_for()
