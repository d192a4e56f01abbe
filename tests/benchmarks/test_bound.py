"""The share of a device's bandwidth that decoding reaches is counted over the bytes that a step really reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def device_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_engine_device

    yield bench_engine_device
    for name in ("bench_engine_device", "bench_engine_checkpoint"):
        sys.modules.pop(name, None)


def test_bytes_of_weights_are_those_of_the_language_model_and_its_output_layer(device_bench: Any) -> None:
    from safetensors import safe_open

    from qvl.backends.local.model.model_folder import bundled_folder

    folder = bundled_folder()
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    with safe_open(str(folder / "model.safetensors"), "pt") as weights:
        # The output layer is the embedding: tied.
        mine = [name for name in weights.keys() if ".visual." not in name and not name.startswith("visual.")]  # noqa: SIM118
        numbers = sum(weights.get_tensor(name).numel() for name in mine if name != "lm_head.weight")
    assert device_bench.weight_bytes(text, 2) == 2 * numbers


def test_the_share_of_a_known_shape_is_what_a_hand_computes(device_bench: Any) -> None:
    text = {
        "hidden_size": 10, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 100,
    }  # fmt: skip
    # A layer: q 10x8, k and v 10x4 each, o 8x10, gate, up and down 10x20 each, norms 10 + 10 + 4 + 4.
    weights = 3 * (80 + 40 + 40 + 80 + 600 + 28) + 10 + 1000
    # Keys and values of 3 layers, 1 head of 4, for 50 and 70 tokens.
    cache = 2 * 3 * 4 * 120
    assert device_bench.weight_bytes(text, 2) == 2 * weights
    assert device_bench.kv_bytes(text, 2, [50, 70]) == 2 * cache
    assert device_bench.share(text, 2, [50, 70], 0.001, 1e8) == pytest.approx((2 * weights + 2 * cache) / 1e5)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("NVIDIA H200", 4800), ("NVIDIA H100 PCIe", 2000), ("NVIDIA A100-SXM4-80GB", 2039), ("Ascend910B3", 1600)],
)
def test_bandwidth_is_known_by_the_longest_name_that_fits(device_bench: Any, name: str, gigabytes: float) -> None:
    assert device_bench.known_peak(name) == gigabytes * 1e9


def test_an_unknown_device_has_no_known_bandwidth(device_bench: Any) -> None:
    assert device_bench.known_peak("Some Card 9") is None


@pytest.mark.slow
def test_without_an_accelerator_it_says_in_one_line_what_it_needs_and_ends_with_2() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("an accelerator is here")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_engine_device.py"), "--shape", "8b"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "36 GiB" in done.stderr
    assert not done.stdout
