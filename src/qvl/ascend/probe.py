"""Runs the operations that Qwen3-VL needs on one device, and prints the results as one line of JSON.

    python -m qvl.ascend.probe --device npu:0

It runs in a process of its own: it disables the silent CPU fallback before torch_npu is imported, and a crash in a
driver ends only this process. Each operation runs twice, because the first call on an NPU compiles it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

OPERATIONS = ("matmul", "rms_norm", "conv3d", "sdpa", "masked_assign", "isin")
DTYPES = ("float16", "bfloat16")
MARK = "QVL-PROBE "


class OperationOutcome(TypedDict, total=False):
    """The outcome of one operation: the milliseconds of both calls, and its `error` in one line if it failed."""

    op: str
    dtype: str
    first_ms: float
    second_ms: float
    error: str


class ProbeResult(TypedDict, total=False):
    """The result of one probe. Without `operations` it has an `error`, and an `exit_code` if the process crashed."""

    device: str
    torch: str
    torch_npu: str
    cuda: str | None
    device_count: int
    name: str
    operations: list[OperationOutcome]
    error: str
    exit_code: int


def operation(name: str, device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return a function that runs one operation; its inputs are created beforehand, outside the timing."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    if name == "matmul":
        left, right = random(256, 512), random(512, 256)
        return lambda: left @ right
    if name == "rms_norm":
        hidden, weight = random(4, 64, 512), random(512)
        return lambda: hidden * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(dtype) * weight
    if name == "conv3d":
        # The patch embedding of Qwen3-VL: kernel and stride are temporal 2, spatial 16 x 16.
        pixels, kernel = random(8, 3, 2, 16, 16), random(64, 3, 2, 16, 16)
        return lambda: functional.conv3d(pixels, kernel, stride=(2, 16, 16))
    if name == "sdpa":
        query, keys, values = random(1, 8, 64, 64), random(1, 8, 64, 64), random(1, 8, 64, 64)
        mask = torch.ones(64, 64, dtype=torch.bool).tril().to(device)
        return lambda: functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    if name == "masked_assign":
        # The picture's embeddings take the places of its tokens.
        embeddings, pictures = random(64, 512), random(16, 512)
        places = (torch.arange(64) % 4 == 0).to(device)

        def assign() -> torch.Tensor:
            mixed = embeddings.clone()
            mixed[places] = pictures
            return mixed

        return assign
    tokens = torch.arange(64).to(device)
    stops = torch.tensor([3, 7]).to(device)
    return lambda: torch.isin(tokens, stops)


def measure(name: str, device: str, dtype_name: str) -> OperationOutcome:
    """Run one operation twice (an NPU compiles it the first time); return both calls' milliseconds, and any error."""
    import torch

    outcome: OperationOutcome = {"op": name, "dtype": dtype_name}
    try:
        call = operation(name, device, getattr(torch, dtype_name))
        start = time.perf_counter()
        call()
        synchronize(device)
        middle = time.perf_counter()
        result = call()
        synchronize(device)
        outcome["first_ms"] = round((middle - start) * 1000, 3)
        outcome["second_ms"] = round((time.perf_counter() - middle) * 1000, 3)
        if not bool(torch.isfinite(result.float()).all().item()):
            outcome["error"] = "the result has infinite or NaN values"
    except Exception as error:  # noqa: BLE001 - whatever a driver raises is the finding
        outcome["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return outcome


def synchronize(device: str) -> None:
    """Wait until the device has finished all queued work."""
    import torch

    kind = device.partition(":")[0]
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def examine(device: str) -> ProbeResult:
    """Return versions, device count and every operation's outcome on `device` (`npu:0`, `cuda:0`, `cpu`)."""
    import torch

    kind = device.partition(":")[0]
    body: ProbeResult = {"device": device, "torch": torch.__version__, "device_count": 1, "name": "cpu"}
    if kind == "npu":
        import torch_npu

        body["torch_npu"] = torch_npu.__version__
    if kind != "cpu":
        module = getattr(torch, kind)
        body["device_count"] = int(module.device_count())
        if not module.is_available() or body["device_count"] == 0:
            return {**body, "device_count": 0, "error": f"torch.{kind} sees no device"}
        body["name"] = module.get_device_name(device)
        body["cuda"] = torch.version.cuda
    pairs = [(name, dtype) for name in OPERATIONS for dtype in (DTYPES if name != "isin" else ("float32",))]
    return {**body, "operations": [measure(name, device, dtype) for name, dtype in pairs]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the probe's result as JSON; return 0 even if an operation fails, since that is a result."""
    parser = argparse.ArgumentParser(prog="python -m qvl.ascend.probe", description="Try a device's operations.")
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args(arguments).device
    os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"
    try:
        body = examine(device)
    except Exception as error:  # noqa: BLE001 - an import that fails is the finding
        body = {"device": device, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(MARK + json.dumps(body))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
