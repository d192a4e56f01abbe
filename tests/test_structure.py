"""The house in order: one class, one name; imports lead one way; few modules stand at the top."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import qvl

ROOT = Path(qvl.__file__).parent


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def _module(path: Path) -> str:
    steps = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(steps[:-1] if steps[-1] == "__init__" else steps)


@cache
def paths() -> dict[str, Path]:
    return {_module(path): path for path in trees()}


def test_a_class_name_stands_for_one_class() -> None:
    homes = defaultdict(list)
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(_module(path))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_few_modules_stand_at_the_top() -> None:
    named = {path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("_")}
    assert named == {"types", "chunks", "errors", "config", "log", "ids", "sampling", "suggest"}


def test_the_layout_in_the_design_is_the_listing() -> None:
    page = (ROOT.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    layout = page.partition("src/qvl/\n")[2].partition("```")[0]
    told, folder = defaultdict(set), "."
    for line in layout.splitlines():
        if line.strip().startswith("#"):
            continue
        if line.rstrip().endswith("/"):
            folder = line.strip().rstrip("/")
        else:
            told[folder].update(line.split())
    there = defaultdict(set)
    for path in trees():
        if path.stem != "__init__":
            there[path.parent.relative_to(ROOT).as_posix()].add(path.stem)
    assert told == there


def _imports(tree: ast.Module) -> Iterator[str]:
    """Modules that a file imports, wherever: under TYPE_CHECKING and inside functions too. Packages lead nowhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in paths() else node.module for name in full)


def _circle(edges: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle in their order, none where there is no circle."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for target in sorted(edges[module]):
            if found := walk(target, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def test_imports_lead_one_way() -> None:
    targets = {name for name, path in paths().items() if path.name != "__init__.py"}
    edges = {name: (set(_imports(trees()[path])) & targets) - {name} for name, path in paths().items()}
    assert _circle(edges) == []


@pytest.mark.parametrize(("edges", "circle"), [({"a": {"b"}, "b": set()}, []), ({"a": {"b"}, "b": {"a"}}, ["a", "b"])])
def test_a_circle_is_found(edges: dict[str, set[str]], circle: list[str]) -> None:
    assert _circle(edges) == circle
