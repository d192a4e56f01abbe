"""Cost of a hit of 1,000 tokens: shared where it lies, or copied to another row; and of attention to shared rows.

python benchmarks/bench_prefix_sharing.py [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from qvl.backends.local.model.kv_storage import Layout, Storage
from qvl.backends.local.model.shared_rows import add_shared, attention_with_sums
from qvl.backends.local.scheduling.kv_cache import Copy, KvCache, Resize
from qvl.backends.local.scheduling.prefix_cache import PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.text.processor import PreparedRequest
from qvl.types import SamplingParams

# Layers, query heads, key heads and their width: the bundled model's, Qwen3-VL-2B's and Qwen3-VL-8B's.
SHAPES = {"bundled": (4, 4, 2, 32), "2B": (28, 16, 8, 128), "8B": (36, 32, 8, 128)}
TOKENS, OWN, REPEATS = 1000, 64, 40


def milliseconds(run: Callable[[], object]) -> float:
    """Return the shortest processor time of `run`: what else the machine does is no cost of it."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1e3)
    return min(times)


def hit() -> float:
    """Milliseconds of a whole admission whose prompt shares 1,000 of its tokens with a kept row."""
    kv = KvCache(1 << 20, 8192)
    scheduler = Scheduler(kv, PrefixIndex(kv, 1 << 18), 32, 2048)

    def sequence(arrival: int, own: int) -> Sequence:
        tokens = [*range(TOKENS), *range(10_000 * arrival, 10_000 * arrival + own)]
        prepared = PreparedRequest(tokens, np.zeros((3, len(tokens)), dtype=np.int64), 0, ())
        return Sequence(None, 0, prepared, SamplingParams(max_tokens=1000), arrival, seed=0)

    first = sequence(1, 900)
    scheduler.add(first)
    scheduler.schedule()
    first.num_computed = len(first.tokens)
    scheduler.finish(first)
    times = []
    for arrival in range(2, 2 + REPEATS):
        asked = sequence(arrival, 30)
        asked.hashes.extend(asked.tokens)  # which every prompt needs, found or not
        start = time.process_time()
        scheduler.add(asked)
        scheduler.schedule()
        times.append((time.process_time() - start) * 1e3)
        assert asked.shared
        assert asked.num_cached >= TOKENS - 1
        scheduler.preempt(asked)
        scheduler.finish(asked)
    return min(times)


def copy(layers: int, heads: int, width: int, dtype: torch.dtype) -> float:
    """Milliseconds of the copy of 1,000 tokens of KV from one row to another."""
    storage = Storage(Layout([torch.device("cpu")] * layers, heads, width, dtype))
    storage.apply([Resize(1024, 2)])
    return milliseconds(lambda: storage.apply([Copy((1024, 0), (1024, 1), TOKENS)]))


def attention(rows: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of one layer's decode attention: each row with a copy of the prefix, and all with one prefix."""
    _, heads, kv_heads, width = shape
    group = heads // kv_heads
    keys, values = torch.randn((2, rows, kv_heads, 2048, width)).to(dtype)
    queries = torch.randn((rows, heads, width)).to(dtype)
    query = queries.view(rows, kv_heads, group, width)
    end = TOKENS + OWN
    sums = torch.empty((rows, heads))

    def copied() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end])

    def shared() -> None:
        out, found = attention_with_sums(query, keys[:, :, :OWN], values[:, :, :OWN])
        sums[:] = found.reshape(rows, heads)
        add_shared(out.reshape(rows, -1), sums, queries, keys[0, :, :TOKENS], values[0, :, :TOKENS], slice(0, rows))

    return milliseconds(copied), milliseconds(shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    torch.set_num_threads(1)
    print(f"one thread, {dtype}; milliseconds of processor time, the best of {REPEATS}")
    print(f"a hit of {TOKENS} tokens, shared: {hit():.3f} (any model)")
    for name, shape in SHAPES.items():
        layers, _, heads, width = shape
        print(f"{name}: the copy of {TOKENS} tokens {copy(layers, heads, width, dtype):.2f}")
        for rows in (1, 2, 8, 32):
            copied, shared = attention(rows, shape, dtype)
            print(f"  a layer's attention, {rows:2} rows: {copied:.3f} copied, {shared:.3f} shared")


if __name__ == "__main__":
    main()
