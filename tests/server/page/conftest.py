"""A real Chromium on the page at `/`. Screenshots go to build/page, which git ignores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SHOTS = Path(__file__).parents[3] / "build" / "page"
DROP = """([name, bytes, type]) => {
  const held = new DataTransfer();
  held.items.add(new File([Uint8Array.from(bytes)], name, {type}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: held, bubbles: true}));
}"""

# Files are read when the test says so: `window.readNow()`.
SLOW_FILES = """
  const read = FileReader.prototype.readAsDataURL, waiting = [];
  FileReader.prototype.readAsDataURL = function (file) { waiting.push(() => read.call(this, file)); };
  window.readNow = () => waiting.splice(0).forEach((start) => start());
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in here:
        item.add_marker(pytest.mark.browser)
        if not Path(CHROMIUM).exists():
            item.add_marker(pytest.mark.skip(reason="there is no Chromium here"))


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def inside(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def watched(context: Any) -> tuple[Any, list[str]]:
    """A page, and what it does wrong: it throws, reaches outside the server, or breaks the content security policy."""
    found = context.new_page()
    found.set_default_timeout(20_000)
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("request", lambda request: None if inside(request.url) else faults.append(request.url))
    found.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    return found, faults


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test when it does what `watched` looks for."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    found, faults = watched(context)
    yield found
    context.close()
    assert not faults


def drop(page: Any, name: str, data: bytes, kind: str = "image/png") -> None:
    page.evaluate(DROP, [name, list(data), kind])


def go(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#state.ready")


def shot(page: Any, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"{name}.png"), full_page=True)
