"""`import qvl` costs next to nothing, and its public names are what `__all__` says."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qvl

HEAVY = ("torch", "openai", "fastapi", "redis", "transformers", "PIL", "numpy", "httpx", "pydantic", "anyio", "pluggy")


def modules_after(code: str) -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy():
    assert not modules_after("import qvl") & set(HEAVY)


@pytest.mark.parametrize("name", ["Pipeline", "AsyncPipeline", "ProductAnalysis"])
def test_the_pipeline_loads_no_backend_and_no_store(name):
    assert not modules_after(f"from qvl import {name}") & {"torch", "openai", "fastapi", "redis", "transformers"}


def test_all_is_sorted_and_every_name_is_there():
    assert qvl.__all__ == sorted(qvl.__all__)
    for name in qvl.__all__:
        assert getattr(qvl, name) is not None
    assert dir(qvl) == qvl.__all__


def test_all_are_the_public_names_that_type_checkers_see():
    tree = ast.parse(Path(qvl.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported - {"annotations", "TYPE_CHECKING", "_lazy"} == set(qvl.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = qvl.Pipelin


def test_no_module_hides_a_public_name_of_its_package():
    """Importing a module sets it as a name of its package, whatever the package's own `__getattr__` would give."""
    for folder in sorted(Path(qvl.__file__).parent.rglob("__init__.py")):
        tree = ast.parse(folder.read_text(encoding="utf-8"))
        public: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                public = set(ast.literal_eval(node.value))
        modules = {module.name for module in pkgutil.iter_modules([str(folder.parent)])}
        assert not public & modules, folder


@pytest.mark.parametrize(
    "code",
    [
        "from qvl.parity import acompare, compare",
        "import qvl.cli.parity; from qvl.parity import golden; from qvl.parity import compare",
    ],
)
def test_compare_is_the_function_whatever_was_imported_before(code):
    """In a process of its own, since here others may have imported it already."""
    ran = [sys.executable, "-c", f"{code}; print(callable(compare))"]
    assert subprocess.run(ran, capture_output=True, text=True, timeout=120, check=True).stdout.strip() == "True"
