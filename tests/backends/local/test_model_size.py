"""Sizes by config.json are those of real checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from qvl.backends.local.model.model_folder import bundled_folder
from qvl.backends.local.model.model_size import PUBLISHED, published_name, size_of
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
    found = {name.removeprefix("Qwen3-VL-"): round(size.parameters / 1e9, 1) for name, size in PUBLISHED.items()}
    assert {name: found[name] for name in counts} == counts
    mixtures = ("Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B", "Qwen3.5-35B-A3B")
    assert [round(PUBLISHED[name].read_per_token / 1e9) for name in mixtures] == [3, 22, 3]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("Qwen3.5")])
def test_a_published_qwen3_5_is_as_large_as_its_name_says(name: str) -> None:
    # Without the layers that guess several tokens, which no backend of ours reads.
    said = float(name.split("-")[1].rstrip("B"))
    assert PUBLISHED[name].parameters / 1e9 == pytest.approx(said, rel=0.14)


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("Qwen/Qwen3-VL-8B-Instruct", ("Qwen3-VL-8B", False)),
        ("Qwen/Qwen3-VL-30B-A3B-Thinking-FP8", ("Qwen3-VL-30B-A3B", True)),
        ("Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-mxfp8", ("Qwen3-VL-8B", True)),
        ("Qwen/Qwen3.5-9B", ("Qwen3.5-9B", False)),
        ("Qwen/Qwen3.5-35B-A3B-FP8", ("Qwen3.5-35B-A3B", True)),
        ("Qwen/Qwen3.5-9B-Base-GPTQ", None),
        ("Qwen/Qwen3-VL-9B-Instruct", None),
        ("Qwen/Qwen3-VL-8B", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
    ],
)
def test_a_published_model_is_known_by_its_hub_id(model: str, known: tuple[str, bool] | None) -> None:
    assert published_name(model) == known
