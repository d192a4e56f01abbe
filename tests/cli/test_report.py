"""The page of `--html`: what it sums up, and in a real browser how it is sorted, filtered and shown as a sheet."""

from __future__ import annotations

import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from .conftest import make_picture

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


def test_the_summary_counts_and_tells_when_the_run_was(qvl, pictures):
    before = datetime.now().astimezone().replace(microsecond=0)
    assert qvl("analyze", pictures[0]).code == 0
    assert qvl("analyze", *pictures, "gone.png", "--html", "r.html").code == 1
    page = Path("r.html").read_text(encoding="utf-8")
    tiles = {name: value for value, name in re.findall(r"<b>([^<]+)</b><span>([^<]+)</span>", page)}
    assert [tiles[name] for name in ("pictures", "answered", "from the cache", "failed")] == ["6", "5", "1", "1"]
    told = datetime.fromisoformat(re.findall(r'<time datetime="([^"]+)"', page)[0])
    assert before <= told <= datetime.now().astimezone()
    assert "brand: NORVIK 5" in page
    assert page.index('class="tiles"') < page.index("<article")
    assert "://" not in re.sub(r"data:[^\"]+", "", page).replace("http://www.w3.org/", "")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium here")
def test_rows_are_sorted_filtered_and_shown_as_a_sheet(qvl, pictures):
    sync_api = pytest.importorskip("playwright.sync_api")
    make_picture("<b>tag.png", 20, 20)
    qvl("analyze", pictures[4], pictures[0], "<b>tag.png", "gone.png", "--html", "r.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(Path("r.html").resolve().as_uri())
        names = page.locator("article:visible .name")
        assert names.all_inner_texts() == ["shelf-4.png", "shelf-0.png", "<b>tag.png", "gone.png"]
        page.select_option("#sort", "name")
        assert names.all_inner_texts() == ["<b>tag.png", "gone.png", "shelf-0.png", "shelf-4.png"]
        page.select_option("#state", "failed")
        assert names.all_inner_texts() == ["gone.png"]
        page.select_option("#state", "")
        page.fill("#find", "shelf")
        assert page.inner_text("#shown") == "2 of 4 shown"
        page.click("#sheet")
        assert page.get_attribute("#sheet", "aria-pressed") == "true"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert faults == []
        browser.close()
