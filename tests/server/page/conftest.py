"""A real Chromium on the page at `/`. Screenshots go to build/page, which git ignores."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AS_FOUND

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
BUILD = Path(__file__).parents[3] / "build"
SHOTS = BUILD / "page"
AXE = "axe-core@4.14.1"
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
    found.set_default_timeout(60_000)
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


@pytest.fixture(scope="package")
def axe() -> Path:
    """The script of axe-core, which npm fetches once into build."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here: apt-get install nodejs npm")
    folder = BUILD / "axe"
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), AXE]
        subprocess.run(command, check=True, timeout=280, env=AS_FOUND)
    return script


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


class Line:
    """A TCP connection to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.to = self.listener.getsockname()[1], port
        self.ends: list[socket.socket] = [self.listener]
        self.threads: list[threading.Thread] = []
        self._begin(self._accept)

    def _begin(self, target: Callable[..., None], *args: socket.socket) -> None:
        self.threads.append(threading.Thread(target=target, args=args, daemon=True))
        self.threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                self.ends += [near, far]
                self._begin(self._carry, near, far)
                self._begin(self._carry, far, near)

    @staticmethod
    def _carry(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        for end in self.ends:
            end.close()


@pytest.fixture
def line() -> Iterator[list[Line]]:
    lines: list[Line] = []
    yield lines
    for one in lines:
        one.cut()
