"""Every notebook runs from top to bottom on the bundled model, and shows what it promises."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
README = Path(__file__).parents[2] / "README.md"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown(notebook: Any, mime: str) -> str:
    """Everything of one kind that the cells show, one after the other."""
    found = [output.get("data", {}).get(mime, "") for output in outputs(notebook)]
    return "\n".join(found)


def printed(notebook: Any, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a notebook in its folder, with caches of its own."""
    for name in [name for name in os.environ if name.startswith(("QVL_", "VISION_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    def start(path: Path) -> Any:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
        asyncio.run(client.async_execute())
        return notebook

    return start


def test_there_are_six_and_readme_leads_to_each() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert names == ["agent", "evidence", "many_pictures", "parity", "quickstart", "serving_and_measuring"]
    readme = README.read_text(encoding="utf-8")
    assert all(f"examples/notebooks/{name}.ipynb" in readme for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_with_their_outputs_and_without_this_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert_shows(path.stem, notebook)
    # Each cell as it was run last, from top to bottom.
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < 400_000
    assert notebook.metadata.kernelspec.name == "python3"
    for folder in ("/home/", "/tmp/", "/root/", "/work/"):
        assert folder not in path.read_text(encoding="utf-8")


def assert_shows_evidence(notebook: Any) -> None:
    """Boxes drawn on pictures, the table of decisions, a diagram, and an unknown brand that is not told."""
    html, text = shown(notebook, "text/html"), printed(notebook)
    assert html.count("<svg") + html.count("<img") >= 2
    assert "Which brand is on the picture?" in html
    assert len(shown(notebook, "image/png")) > 20_000
    for word in ("largest shift by another order: 0.0", "evidence.brand, for 95%", "of such boxes are right", "NYTAD"):
        assert word in text, word
    assert "told: None {'brand': 'below_threshold'}" in text


def assert_shows(name: str, notebook: Any) -> None:
    """Pictures, a table and a plot, and what the notebook promises."""
    html = shown(notebook, "text/html")
    assert shown(notebook, "image/png"), "no plot"
    assert "<table" in html
    assert "<img" in html or shown(notebook, "image/png").count("\n\n") > 1
    text = html + printed(notebook) + shown(notebook, "text/plain")
    for word in WORDS[name]:
        assert word in text, word
    if name == "evidence":
        assert_shows_evidence(notebook)


WORDS = {
    "quickstart": ("NORVIK", "QUBANA miss hit", "手机", "'shoe'"),
    "many_pictures": (
        *(
            "no such file",
            "attributes.color",
            "confidence.brand",
            "the row has no picture",
            "did you mean 'concurrency'",
        ),
        *("Sorted", "'hit'"),
    ),
    "evidence": ("NORVIK", "wrote calibration.json"),
    "parity": (
        *("no difference found at any layer", "log-probabilities", "field.brand", "A has dtype float32, B bfloat16"),
        *("within, exit code 0", "undecided, exit code 2"),
    ),
    "agent": ("model: look at the picture", "Haxley Iris 100", "0 inferences"),
    "serving_and_measuring": ("NORVIK", "12 of 12", "request_id", "exit code 0"),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, run: Any) -> None:
    notebook = run(path)
    assert "Traceback" not in printed(notebook, "stderr")
    assert_shows(path.stem, notebook)
