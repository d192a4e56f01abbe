"""Sizes by config.json are those of real checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qvl.backends.local.model.model_folder import bundled_folder
from qvl.backends.local.model.model_size import PUBLISHED, size_of
from tests.backends.local.checkpoints import random_mixture


def counted(folder: Path) -> int:
    """The numbers in the weights of a checkpoint."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def test_sizes_by_config_are_those_of_the_weights(tmp_path: Path) -> None:
    for folder in (bundled_folder(), random_mixture(tmp_path / "mixture")):
        size = size_of(json.loads((folder / "config.json").read_text()), folder.name)
        assert size.parameters == pytest.approx(counted(folder), rel=0.005)


def test_published_sizes_are_those_that_were_counted_in_the_checkpoints() -> None:
    counts = {"2B": 2.1, "4B": 4.4, "8B": 8.8, "32B": 33.4, "30B-A3B": 31.1, "235B-A22B": 235.7}
    assert {name: round(size.parameters / 1e9, 1) for name, size in PUBLISHED.items()} == counts
    assert [round(PUBLISHED[name].read_per_token / 1e9) for name in ("30B-A3B", "235B-A22B")] == [3, 22]
