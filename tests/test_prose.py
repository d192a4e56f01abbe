"""Docstrings of public functions and classes begin with what is returned or done."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qvl

ROOT = Path(qvl.__file__).parent
FIRST_WORDS = {"Whether", "What", "How", "As", "It", "Its"}


def public_docstrings(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of the public functions, classes and methods of a module or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield child.name, ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from public_docstrings(child)


@pytest.mark.parametrize(
    ("docstring", "first"), [("Whether it is.", True), ("As `ask`.", True), ("Return it.", False), ("Assert.", False)]
)
def test_the_first_word_is_told(docstring: str, first: bool) -> None:
    module = ast.parse(f'class A:\n    def b(self):\n        """{docstring}"""\n')
    assert [text.split()[0] in FIRST_WORDS for name, text in public_docstrings(module) if name == "b"] == [first]


def test_public_docstrings_begin_with_what_is_returned_or_done() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in sorted(ROOT.rglob("*.py"))
        for name, text in public_docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if text and text.split()[0] in FIRST_WORDS
    ]
    assert offenders == []
