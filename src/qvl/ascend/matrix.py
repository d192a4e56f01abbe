"""The dated table of versions that go together, and how to compare versions of this field.

`matrix.json` is data: a date, its sources, and facts. A version that it does not know is reported as unknown, never
as wrong.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import NotRequired, TypedDict


class VllmAscendRelease(TypedDict):
    """The versions that one release of vllm-ascend is built for."""

    vllm: str
    cann: str
    torch: str
    torch_npu: NotRequired[str]
    python: NotRequired[list[str]]


class ChipFacts(TypedDict, total=False):
    """The facts about a chip in which it differs from a usual one."""

    dtypes: list[str]
    graph_mode_cann: str
    max_model_len: int
    shm: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """The facts of matrix.json; field names are its keys."""

    date: str
    sources: tuple[str, ...]
    python: dict[str, str]
    transformers: dict[str, str]
    cann_for_torch_npu: dict[str, str]
    vllm_ascend: dict[str, VllmAscendRelease]
    chips: dict[str, ChipFacts]
    model_types: dict[str, str]

    def chip(self, name: str) -> ChipFacts:
        """Return what is special about a chip, by the beginning of its npu-smi name; empty for a usual one."""
        plain = name.removeprefix("Ascend")
        return next((facts for prefix, facts in self.chips.items() if plain.startswith(prefix)), ChipFacts())


@lru_cache(maxsize=1)
def load() -> Matrix:
    """The matrix that ships with this version."""
    body = json.loads(resources.files("qvl.ascend").joinpath("matrix.json").read_text(encoding="utf-8"))
    return Matrix(**{**body, "sources": tuple(body["sources"])})


def key(version: str) -> tuple[int, ...]:
    """A sortable key: `8.3.RC1` < `8.3.RC2` < `8.3.0`, `2.9.0` < `2.9.0.post2`; a local part (`+cpu`) is left out."""
    text = version.split("+")[0].lower().lstrip("v")
    match = re.match(r"(\d+(?:\.\d+)*)", text)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    stage = re.search(r"\.?(rc|alpha|beta|post)\.?(\d*)", text)
    order = {"alpha": -3, "beta": -2, "rc": -1, "post": 1}
    tail = (order[stage[1]], int(stage[2] or 0)) if stage else (0, 0)
    return (*[*numbers, 0, 0, 0][:3], *tail)


def release(version: str) -> tuple[int, ...]:
    """Major, minor and patch of a version: what torch and torch_npu must share."""
    return key(version)[:3]


def same(a: str, b: str) -> bool:
    """True if two spellings mean the same version (`8.3.RC1`, `8.3.rc1`)."""
    return key(a) == key(b)
