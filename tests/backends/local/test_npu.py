"""The whole engine on a make-believe NPU, and every way in which an NPU fails to be one. Each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.suggest import install_line

FAKE = Path(__file__).parent / "fake_npu"
SOURCE = Path(__file__).parents[3] / "src"


def python(code: str | Path, *arguments: str, installed: bool = True, timeout: float = 280, **environment: str) -> str:
    """stdout and stderr of a fresh interpreter that sees the fake torch_npu."""
    paths = [str(SOURCE), *([str(FAKE)] if installed else [])]
    command = [str(code), *arguments] if isinstance(code, Path) else ["-c", code]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.stdout + done.stderr


DESCRIBE = "from qvl.backends.local.model.device import open_device; print('GOT', open_device('auto').describe())"
NPU = "from qvl.backends.local.model.device import open_device; print('GOT', open_device('npu:0').describe())"


FUSED = ("npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_fusion_attention")


def counted(*arguments: str, timeout: float = 280, **environment: str) -> dict[str, float]:
    """What was counted while the engine answered, on the fake NPU, as on the CPU."""
    told = python(FAKE / "run_engine.py", *arguments, timeout=timeout, **environment)
    assert "\nequal " in f"\n{told}", told
    return dict(json.loads(told.strip().splitlines()[-1]))


def test_the_engine_gives_the_same_answers_on_the_npu_by_its_fused_kernels() -> None:
    stats = counted("6")
    assert all(stats[name] > 40 for name in FUSED)
    assert stats["graph_replays"] == 0, "recording is for those who ask for it on an NPU"
    assert stats.get("empty_cache", 0) == 0, "memory is given back by policy, not behind each request"


@pytest.mark.slow
def test_states_are_right_in_recorded_steps_which_repeat_a_sequence_to_fill_their_shape() -> None:
    pytest.importorskip("transformers.models.qwen3_5", reason="this transformers does not know Qwen3.5")
    stats = counted("6", "hybrid", "decode_graphs=on")
    assert stats["graph_replays"] > 10


@pytest.mark.slow
def test_an_npu_out_of_memory_ends_the_request_that_is_too_large_and_no_other() -> None:
    told = python(FAKE / "run_out_of_memory.py", FAKE_NPU_BYTES=str(1 << 20))
    assert "large DeviceMemoryError" in told, told
    assert "small equal" in told, told


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_engine_gives_the_same_answers_on_the_npu_for_300() -> None:
    counted("300", timeout=1400)


@pytest.mark.slow
def test_recorded_decode_steps_give_the_same_answers() -> None:
    stats = counted("4", "random", "decode_graphs=on")
    assert stats["graph_replays"] == stats["replay"] > 10


@pytest.mark.slow
def test_recorded_steps_of_adapters_and_the_model_itself_give_the_same_answers() -> None:
    stats = counted("10", "lora", "decode_graphs=on")
    assert stats["graph_replays"] > 10


@pytest.mark.slow
def test_a_checkpoint_spread_over_two_cards_gives_the_same_answers() -> None:
    assert counted("3", "random", "two-cards", "decode_graphs=on")["graph_replays"] == 0


@pytest.mark.parametrize("chip", ["unfused", "wrong"])
@pytest.mark.slow
def test_fused_kernels_that_fail_or_lie_are_not_used(chip: str) -> None:
    stats = counted("1", "random", FAKE_NPU=chip)
    assert all(stats.get(name, 0) <= 1 for name in FUSED), "tried once, at the start"


def test_the_npu_comes_first_and_takes_bfloat16() -> None:
    assert "GOT npu:0 (Ascend910B3), bfloat16" in python(DESCRIBE)


@pytest.mark.slow
def test_a_chip_without_bfloat16_takes_float16() -> None:
    assert "GOT npu:0 (Ascend310P3), float16" in python(DESCRIBE, FAKE_NPU="310P3")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"FAKE_NPU": "count0"}, "sees no NPU", marks=pytest.mark.slow),
        pytest.param({"FAKE_NPU": "broken"}, "does not import: libhccl.so", marks=pytest.mark.slow),
        pytest.param({"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, "not in ascending order", marks=pytest.mark.slow),
    ],
)
def test_an_npu_that_is_present_but_unusable_is_told_with_its_reason(environment: dict[str, str], reason: str) -> None:
    told = python(DESCRIBE, **environment)
    assert "GOT cpu" in told
    assert "the NPU is not used: " in told
    assert reason in told
    asked = python(NPU, **environment)
    assert "ConfigError" in asked
    assert reason in asked


@pytest.mark.slow
def test_asking_for_an_npu_without_torch_npu_names_the_pip_line() -> None:
    assert install_line("npu") in python(NPU, installed=False)


@pytest.mark.slow
def test_the_environment_chooses_the_device() -> None:
    assert "GOT cpu" in python(DESCRIBE, QVL_DEVICE="cpu")
    assert "GOT cpu" in python(DESCRIBE, DEVICE="cpu")
    assert "does not exist" in python(NPU.replace("npu:0", "npu:7"))


def test_out_of_memory_is_recognised_in_every_wording() -> None:
    import torch

    from qvl.backends.local.model.device import open_device

    device = open_device("cpu")
    assert device.is_out_of_memory(torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 GiB"))
    assert device.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert device.is_out_of_memory(RuntimeError("EL0004: failed to allocate memory, error code 207018"))
    assert not device.is_out_of_memory(RuntimeError("size mismatch"))
    assert not device.is_out_of_memory(ValueError("out of memory"))
