"""The smallest adapters that the examples show hold every contract, and stay as small as CONTRIBUTING says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from qvl import Backend, Cache, Pipeline
from qvl.errors import CacheError
from qvl.testing import BackendContract, CacheContract

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own_cache, own_backend = load("own_cache"), load("own_backend")


class TestOwnCache(CacheContract):
    shared: ClassVar[bool] = False

    @pytest.fixture
    def make_cache(self) -> Callable[[], Cache]:
        return own_cache.DictCache


class TestOwnBackend(BackendContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return own_backend.ParrotBackend


def test_a_pipeline_is_made_of_both() -> None:
    with Pipeline(backend=own_backend.ParrotBackend(), cache=own_cache.DictCache()) as pipe:
        answers = [pipe.chat([{"role": "user", "content": "good morning"}]) for _ in range(2)]
    assert [(answer.text, answer.cache) for answer in answers] == [("good morning ", "miss"), ("good morning ", "hit")]


def test_a_cache_that_cannot_list_its_entries_says_so() -> None:
    for browse in (lambda cache: list(cache.items()), lambda cache: cache.find(), lambda cache: cache.count_by("task")):
        with pytest.raises(CacheError, match="DictCache cannot list its entries"):
            browse(own_cache.DictCache())


def test_a_cache_keeps_at_most_its_most() -> None:
    from qvl.testing.cache_contract import entry

    cache = own_cache.DictCache(most=3)
    for number in range(5):
        cache.set(f"k{number}", entry())
    assert [number for number in range(5) if cache.get(f"k{number}")] == [2, 3, 4]


@pytest.mark.parametrize(("name", "most"), [("own_cache", 30), ("own_backend", 40)])
def test_they_are_small(name: str, most: int) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    body = text[text.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= most
