"""Every state of the page at three widths, light and dark: axe-core finds nothing, nothing needs sideways scrolling."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.local.backend import LocalBackend
from tests.conftest import AS_FOUND
from tests.media.films import film
from tests.media.papers import BAG, MUG, paper
from tests.server.conftest import Running, start
from tests.server.page.conftest import drop, shot, watched

ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "examples" / "pictures"
AXE = "axe-core@4.14.1"


@pytest.fixture(scope="module")
def axe() -> Path:
    """The script of axe-core, which npm fetches once into build."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here: apt-get install nodejs npm")
    folder = ROOT / "build" / "axe"
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), AXE]
        subprocess.run(command, check=True, timeout=280, env=AS_FOUND)
    return script


@pytest.fixture(scope="module")
def bundled():
    running = start(LocalBackend())
    yield running
    running.stop()


def looked_at(page: Any, width: int, name: str, wrong: list[object]) -> Callable[[str], None]:
    """Returns what looks at a state of the page; what is wrong there goes to `wrong`."""

    def look(state: str) -> None:
        shot(page, f"{name}-{state}")
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
            wrong.append((state, f"{wide} pixels wide"))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        nodes = [(one["id"], node["target"], node["failureSummary"]) for one in found for node in one["nodes"]]
        wrong.extend((state, *node) for node in nodes)

    return look


def look_at_media(page: Any, bundled: Running, look: Callable[[str], None], folder: Path) -> None:
    """PDFs and videos: before they are sent, in a turn, drawn with boxes; and what is refused."""
    page.goto(bundled.url)
    page.wait_for_selector("#state.ready")
    (folder / "bill.pdf").write_bytes(paper([MUG, BAG]))
    page.set_input_files("#files", [str(folder / "bill.pdf"), str(film(folder / "clip.webm", frames=32))])
    page.locator("#pictures .frame-at").first.wait_for(state="attached")
    look("media")
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    look("media-chat")
    page.click("#tab-locate")
    page.click("#locate")
    page.wait_for_selector("#locate:enabled")
    look("media-refused")
    page.get_by_label("Pages of bill.pdf").fill("1")
    page.click("#locate")
    page.wait_for_selector("#answer .place rect")
    look("media-locate")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_every_state_is_for_everybody(
    browser, axe: Path, bundled: Running, width: int, scheme: str, tmp_path: Path
) -> None:
    height = 844 if width < 800 else 1000
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.add_init_script(path=str(axe))
    page, faults = watched(context)
    look = looked_at(page, width, f"state-{width}-{scheme}", wrong := [])
    page.goto(bundled.url)
    page.wait_for_selector("#state.ready")
    look("empty")
    drop(page, "a-name-that-is-rather-long-norvik-mug-red.png", (PICTURES / "norvik-mug-red.png").read_bytes())
    page.locator("#pictures .count", has_text="tokens").wait_for()
    page.click("#send")
    page.wait_for_selector(".turn .facts dd")
    page.wait_for_selector("#send:enabled")
    drop(page, "shoe.webp", (PICTURES / "shoe.webp").read_bytes(), "image/webp")
    page.locator("#pictures .count", has_text="tokens").wait_for()
    look("chat")
    page.locator(".turn.user").get_by_role("button", name="Edit").click()
    look("edit")
    page.locator(".turn.user").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Copy as …").click()
    look("code")
    page.keyboard.press("Escape")
    page.locator(".turn .picture").click()
    look("picture")
    page.keyboard.press("Escape")
    page.click("#tab-analyze")
    page.check("#where")
    drop(page, "mug.png", (PICTURES / "norvik-mug-red.png").read_bytes())
    page.locator("#pictures .count", has_text="tokens").nth(1).wait_for()
    page.click("#analyze")
    page.wait_for_selector("#analyze:enabled")
    page.locator(".field.placed").first.focus()
    look("analyze")
    page.select_option("#schema-kind", "fields")
    look("fields")
    page.select_option("#schema-kind", "json")
    page.locator("#schema").press_sequentially(', {"t')
    look("schema")
    page.select_option("#schema-kind", "product")
    page.click("#tab-locate")
    page.click("#locate")
    page.wait_for_selector("#locate:enabled")
    look("locate")
    page.click("#tab-decide")
    page.get_by_label("Question 1", exact=True).fill("Is it red?")
    page.click("#decide")
    page.wait_for_selector("#decide:enabled")
    look("decide")
    page.click("#tab-compare")
    page.fill("#max_tokens-b", "1")
    page.click("#compare")
    page.wait_for_selector("#compare:enabled")
    look("compare")
    page.click("#tab-batch")
    page.set_input_files("#batch-folder", str(PICTURES))
    page.wait_for_selector("#batch-start:enabled")
    page.click("#batch-start")
    page.locator(".batch [role=status]", has_text="12 of 12").wait_for(timeout=120_000)
    look("batch")
    page.click("#history-button")
    page.locator("#history .entry").first.wait_for()
    page.click("#settings-button")
    look("panels")
    look_at_media(page, bundled, look, tmp_path)
    page.goto(f"{bundled.url}/docs")
    page.click("summary")
    look("docs")
    context.close()
    assert not faults
    assert not wrong, "\n".join(map(str, wrong))
