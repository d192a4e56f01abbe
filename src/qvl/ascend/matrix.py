"""The dated matrix of compatible versions, and the comparison of version strings.

`matrix.json` is data: a date, its sources, and facts. A version that it does not list is reported as unknown, never
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
    """The versions that one release of vllm-ascend needs."""

    vllm: str
    cann: str
    torch: str
    torch_npu: NotRequired[str]
    python: NotRequired[list[str]]


class ChipFacts(TypedDict, total=False):
    """The properties in which a chip differs from the default."""

    dtypes: list[str]
    graph_mode_cann: str
    max_model_len: int
    shm: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """The content of matrix.json; field names are its keys."""

    date: str
    sources: tuple[str, ...]
    python: dict[str, str]
    transformers: dict[str, str]
    cann_for_torch_npu: dict[str, str]
    vllm_ascend: dict[str, VllmAscendRelease]
    chips: dict[str, ChipFacts]
    model_types: dict[str, str]

    def chip(self, name: str) -> ChipFacts:
        """Return the special properties of a chip by the prefix of its npu-smi name; default ones if not listed."""
        plain = name.removeprefix("Ascend")
        return next((facts for prefix, facts in self.chips.items() if plain.startswith(prefix)), ChipFacts())


@lru_cache(maxsize=1)
def load() -> Matrix:
    """Return the matrix that ships with this version of qvl."""
    body = json.loads(resources.files("qvl.ascend").joinpath("matrix.json").read_text(encoding="utf-8"))
    return Matrix(**{**body, "sources": tuple(body["sources"])})


def key(version: str) -> tuple[int, ...]:
    """Return a sort key of a version: `8.3.RC1` < `8.3.RC2` < `8.3.0`, `2.9` < `2.9.post2`; `+cpu` is ignored."""
    text = version.split("+")[0].lower().lstrip("v")
    match = re.match(r"(\d+(?:\.\d+)*)", text)
    numbers = [int(part) for part in match[1].split(".")] if match else []
    stage = re.search(r"\.?(rc|alpha|beta|post)\.?(\d*)", text)
    order = {"alpha": -3, "beta": -2, "rc": -1, "post": 1}
    tail = (order[stage[1]], int(stage[2] or 0)) if stage else (0, 0)
    return (*[*numbers, 0, 0, 0][:3], *tail)


def release(version: str) -> tuple[int, ...]:
    """Return (major, minor, patch) of a version, which must be equal for torch and torch_npu."""
    return key(version)[:3]


def same(a: str, b: str) -> bool:
    """True if two spellings mean the same version (`8.3.RC1`, `8.3.rc1`)."""
    return key(a) == key(b)
