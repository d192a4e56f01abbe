"""Takes out of a notebook with outputs what changes at every run: times, versions, the notice without a model.

python -m tests.examples.tidy_notebook NOTEBOOK
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat


def main(path: Path) -> None:
    """Write the notebook at `path` anew."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
