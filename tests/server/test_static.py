"""The files of the page: modules of one sitting, no HTML from text, no address but the server's."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from qvl.server.routes.pages import static_names

STATIC = Path(str(files("qvl.server") / "static"))
SCRIPTS = sorted(STATIC.glob("*.js"))
PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
AS_HTML = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML")
# Names of things, not places that are asked.
NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_module_is_short_and_makes_no_html_of_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert not AS_HTML.search(text)
    imported = re.findall(r'from "\./([\w.]+)"', text)
    assert set(imported) <= static_names()


def test_no_file_names_a_foreign_address() -> None:
    for path in STATIC.iterdir():
        if path.suffix in {".js", ".css", ".html"}:
            text = path.read_text(encoding="utf-8").replace(NAMESPACE, "")
            assert not re.search(r"https?://[\w]|\burl\(|@import", text), path.name


def test_what_the_pages_load_is_there() -> None:
    for path in STATIC.glob("*.html"):
        loaded = re.findall(r'(?:src|href)="static/([^"]+)"', path.read_text(encoding="utf-8"))
        assert loaded
        assert set(loaded) <= static_names()


def test_the_samples_are_pictures_of_the_examples() -> None:
    known = {path.read_bytes() for path in PICTURES.iterdir()}
    samples = [path for path in STATIC.iterdir() if path.name.startswith("sample-")]
    assert len(samples) == 4
    assert {path.read_bytes() for path in samples} <= known
