"""Cost of a cached prefix: the copy of 31 blocks of 32 tokens (a prompt of 1,000) out of a row and into another.

python benchmarks/bench_prefix_copy.py [--device cpu] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from qvl.backends.local.model.kv_storage import Layout, Storage
from qvl.backends.local.scheduling.kv_cache import Copy, LoadBlocks, Resize
from qvl.backends.local.scheduling.prefix_cache import BLOCK

# Layers, key heads and their width: the bundled model's, Qwen3-VL-2B's and Qwen3-VL-8B's.
SHAPES = {"bundled": (4, 2, 32), "2B": (28, 8, 128), "8B": (36, 8, 128)}
TOKENS, CAPACITY, REPEATS = 1000, 1024, 40


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Return the shortest time of `run`: what else the machine does is no cost of the copy."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def attention(rows: int, dtype: torch.dtype, own: int = 64) -> tuple[float, float]:
    """Milliseconds of one layer's decode attention on a CPU, 2B's heads, each row with its copy of the shared prefix.

    Whole, and as two attentions merged by log-sum-exp, of which the first reads the prefix once for all.
    """
    heads, group, width = 8, 2, 128
    keys, values = torch.randn((2, rows, heads, 2048, width)).to(dtype)
    query = torch.randn((rows, heads, group, width)).to(dtype)
    joint = query.transpose(0, 1).reshape(1, heads, rows * group, width)
    flash, end = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, TOKENS + own

    def whole() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end])

    def merged() -> None:
        shared, sum_shared = flash(joint, keys[:1, :, :TOKENS], values[:1, :, :TOKENS])
        alone, sum_alone = flash(query, keys[:, :, TOKENS:end], values[:, :, TOKENS:end])
        shared = shared.view(heads, rows, group, width).transpose(0, 1)
        weight = torch.sigmoid(sum_shared.view(heads, rows, group).transpose(0, 1) - sum_alone)
        torch.lerp(alone, shared, weight.unsqueeze(-1).to(dtype))

    cpu = torch.device("cpu")
    return milliseconds(whole, cpu), milliseconds(merged, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    blocks = tuple(range(TOKENS // BLOCK))
    print(f"{torch.get_num_threads()} threads, {device}, {dtype}; milliseconds")
    print("model     MB     keep   reuse   copy of a row")
    for name, (layers, heads, width) in SHAPES.items():
        storage = Storage(Layout([device] * layers, heads, width, dtype))
        storage.apply([Resize(CAPACITY, 2)])

        def keep(storage: Storage = storage) -> None:
            storage.save(CAPACITY, 0, [(block, block) for block in blocks], len(blocks))

        def reuse(storage: Storage = storage) -> None:
            storage.apply([LoadBlocks(blocks, (CAPACITY, 1))])

        def copy(storage: Storage = storage) -> None:
            storage.apply([Copy((CAPACITY, 0), (CAPACITY, 1), len(blocks) * BLOCK)])

        size = storage.layout.bytes_per_token * len(blocks) * BLOCK / 1e6
        row = [milliseconds(run, device) for run in (keep, reuse, copy)]
        print(f"{name:8} {size:5.1f} " + " ".join(f"{value:7.2f}" for value in row))
    if device.type == "cpu":
        print("decode attention of a layer over a shared prefix: rows, whole, merged")
        for rows in (1, 8, 32):
            print(rows, *(f"{value:.2f}" for value in attention(rows, dtype)))


if __name__ == "__main__":
    main()
