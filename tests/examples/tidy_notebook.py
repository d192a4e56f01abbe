"""Takes out of notebooks what belongs to this machine: folders, versions, times of cells, what is told on stderr.

python -m tests.examples.tidy_notebook NOTEBOOK...
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]


def main(paths: list[Path]) -> None:
    """Write each notebook anew."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.language_info = {"name": "python"}
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "outputs" in cell:
                cell.outputs = [tidied(output) for output in cell.outputs if kept(output)]
        nbformat.write(notebook, path)


def kept(output: nbformat.NotebookNode) -> bool:
    """False for what is told on stderr, and for bars that move only where they are run."""
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") != "stderr" and widget not in output.get("data", {})


def tidied(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output with the folders of this machine as they are called in the project."""
    text = json.dumps(output)
    for folder, name in ((str(ROOT), "qvl"), (tempfile.gettempdir() + "/", "")):
        text = text.replace(folder, name)
    return nbformat.from_dict(json.loads(text))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
