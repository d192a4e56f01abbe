"""Matrix products with a large weight, each by the kernel that was measured to be fastest for its number of rows.

A decode step multiplies 1 to 32 rows with every weight and mostly waits for the weights to come from memory; a prompt
brings hundreds of rows, where computing is the limit. On a CPU no kernel is best at both, on any processor.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from qvl.backends.local.model.device import host_memory
from qvl.backends.local.model.kernel_times import (
    LARGEST,
    ROWS,
    Times,
    by_rows,
    kernel_times,
    read_bandwidth,
    standard_times,
)
from qvl.backends.local.model.linear_kernels import INT8_KERNELS, KERNELS, PlainKernel, pack
from qvl.backends.local.model.thread_times import choose_threads
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from qvl.backends.local.model.int8_store import Int8Store
    from qvl.backends.local.model.linear_kernels import LinearKernel

# Rows of every product whose result may not depend on how many rows there are; as many cost a decode step little.
TILE: Final = 32
# Weights of fewer numbers are not measured: they take what is best for the standard weight in bfloat16, which `auto`
# has measured anyway, and these in float32.
SMALL: Final = 1 << 20
SMALL_FLOAT32: Final = ("fbgemm",) * 6 + ("onednn",) * 2
# In 8 bits: one that is not there is replaced by the other.
SMALL_INT8: Final = ("fbgemm-int8",) * 8
MEASURED: Final = ("float32", "bfloat16")
# What a number of a weight takes in a kernel's layout, where that is not its dtype's size.
NUM_BYTES: Final = {"fbgemm": 2, "onednn-int8": 1, "fbgemm-int8": 1}
# A second layout of a weight must save this share of the time at some number of rows.
WORTH: Final = 0.1
# By what share layouts may be slower than torch's own kernel at some number of rows: less is noise.
NOISE: Final = 0.05


class AdapterRows(NamedTuple):
    """The rows of a matrix that an adapter changes: int64 [n], or None for all."""

    adapter: int
    rows: Tensor | None


class LowRank(NamedTuple):
    """The weights by which an adapter adds `(x @ down.T) @ up.T`: down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class ModulePart:
    """The outputs of a Linear that are those of one module.

    Args:
        linear: several modules' weights may be joined in it.
        first: the first of the outputs, of which there are `count`.
        rows: which of the module's outputs they are, in this order; None for all.
    """

    linear: Linear
    first: int
    count: int
    rows: Tensor | None = None


class Linear:
    """Computes `x @ weight.T + bias` for x [rows, in]; `size` is the number of elements of the weight [outputs, in].

    `adapters` are what LoRA adapters add, by their numbers: to the rows of `x` that are theirs, behind one product with
    the weight for all rows.

    Args:
        weight: it is not kept.
        kernels: one for each of ROWS; the last also for more rows.
        tiled: True if all products have TILE rows, padded with zeros, so that one kernel adds up every row in the same
            order, whatever the other rows are.
    """

    __slots__ = ("_kernels", "adapters", "outputs", "size", "tiled")

    def __init__(self, weight: Tensor, kernels: Sequence[LinearKernel], *, tiled: bool = False) -> None:
        self.size, self.outputs = weight.numel(), len(weight)
        self.tiled = tiled
        self.adapters: dict[int, LowRank] = {}
        self._kernels = tuple(kernels)

    def _kernel(self, rows: int) -> LinearKernel:
        return self._kernels[min(bisect_left(ROWS, rows), len(ROWS) - 1)]

    def __call__(self, x: Tensor, adapted: Sequence[AdapterRows] = ()) -> Tensor:
        """Return x @ weight.T + bias, and what the adapters of `adapted` add to their rows, [rows, out]."""
        product = self._tiles(x, self._kernel(TILE)) if self.tiled else self._kernel(len(x))(x)
        return self._adapt(product, x, adapted)

    def gelu(self, x: Tensor, approximate: str, adapted: Sequence[AdapterRows] = ()) -> Tensor:
        """Return gelu(self(x, adapted)); `approximate` as of torch's gelu."""
        if any(part.adapter in self.adapters for part in adapted):
            import torch.nn.functional as F  # noqa: N812 - torch's own convention

            return F.gelu(self(x, adapted), approximate=approximate)
        return self._kernel(len(x)).gelu(x, approximate)

    def added_to(self, base: Tensor, x: Tensor, adapted: Sequence[AdapterRows] = ()) -> Tensor:
        """Return base + self(x, adapted)."""
        if self.tiled:
            return self(x, adapted).add_(base)
        return self._adapt(self._kernel(len(x)).added_to(base, x), x, adapted)

    def _tiles(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Return product(x), computed of TILE rows at a time."""
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        rows = len(x)
        tiles = torch.split(F.pad(x, (0, 0, 0, -rows % TILE)), TILE)
        return torch.cat([product(tile) for tile in tiles])[:rows]

    def _adapt(self, out: Tensor, x: Tensor, adapted: Sequence[AdapterRows]) -> Tensor:
        """Add to `out` what the adapters say of their rows of `x`; return it."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        for adapter, rows in adapted:
            low = self.adapters.get(adapter)
            if low is None:
                continue
            some = x if rows is None else x.index_select(0, rows)

            def product(some: Tensor, low: LowRank = low) -> Tensor:
                return F.linear(F.linear(some, low.down), low.up)

            added = self._tiles(some, product) if self.tiled else product(some)
            if rows is None:
                out += added
            else:
                out.index_add_(0, rows, added)
        return out


@dataclass
class LinearPlan:
    """Makes the Linears of a model, each with the kernels for its weight. Thread-safe.

    Args:
        kernel: the name of the one kernel to use, or "auto": the fastest by measurement.
        int8: where the text model's weights in 8 bits come from, or None to compute with the weights as they are.

    Attributes:
        parts: where the outputs of each module are, of those whose weights were joined.
        threads: of torch, chosen with the first large weight; None before, and without one.
    """

    kernel: str = "auto"
    int8: Int8Store | None = None
    parts: dict[nn.Module, list[ModulePart]] = field(default_factory=dict)
    threads: int | None = None
    _numbers: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _milliseconds: float = 0.0
    _bytes: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, *, name: str | None = None, tiled: bool = False
    ) -> Linear:
        """Return the Linear of weight [out, in].

        Args:
            name: name of the weight if decode steps, which have few rows, use it; None for prompts or pictures alone.
            tiled: see Linear.

        Raises:
            ConfigError: the kernel for `kernel` or `quantize` does not work with this weight on this processor.
        """
        kernels = self._kernels(weight, bias, name, tiled=tiled)
        return Linear(weight, kernels, tiled=tiled)

    def join(self, linears: Sequence[nn.Linear], *, name: str | None = None, tiled: bool = False) -> Linear:
        """Return one Linear whose weight is those of `linears` concatenated along the output dimension.

        The modules' weights become views of it, or empty if no kernel keeps the plain layout.
        """
        import torch

        many = len(linears) > 1
        joined = torch.cat([linear.weight.detach() for linear in linears]) if many else linears[0].weight.detach()
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        kernels = self._kernels(joined, bias, name, tiled=tiled)
        keeps = any(isinstance(kernel, PlainKernel) for kernel in kernels)
        made = Linear(joined, kernels, tiled=tiled)
        first = 0
        for linear in linears:
            rows = linear.weight.shape[0]
            part = joined[first : first + rows] if keeps else joined.new_empty(0)
            linear.weight = torch.nn.Parameter(part, requires_grad=False)
            self.parts[linear] = [ModulePart(made, first, rows)]
            first += rows
        return made

    def describe(self) -> str:
        """Return one line: the kernels of most decode weights, what of the memory's bandwidth they reach, threads."""
        if not self._numbers:
            return ""
        line = by_rows(self._numbers.most_common(1)[0][0])
        if not self._milliseconds:
            return line
        reached, available = self._bytes / self._milliseconds / 1e6, read_bandwidth()
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{line}; one row reads {reached:.0f} of {max(available, reached):.0f} GB/s on {threads}"

    def _kernels(self, weight: Tensor, bias: Tensor | None, name: str | None, *, tiled: bool) -> list[LinearKernel]:
        steps = name is not None
        int8 = self.int8 if steps else None
        candidates = list(KERNELS if int8 is None else INT8_KERNELS)
        numbers = weight if int8 is None or name is None else int8.take(name, weight)
        while candidates:
            times = self._times(weight, candidates, steps=steps)
            names = self._names(weight, candidates, times, steps=steps, tiled=tiled)
            packed = {name: pack(name, numbers, bias) for name in dict.fromkeys(names)}
            unusable = [name for name, kernel in packed.items() if kernel is None]
            if not unusable:
                if steps:
                    self._count(weight, names, times)
                return [kernel for name in names if (kernel := packed[name]) is not None]
            if steps and self.kernel in unusable:
                break
            candidates = [name for name in candidates if name not in unusable]
        what = "quantize='int8'" if int8 else f"decode_kernel={self.kernel!r}"
        raise ConfigError(
            f"{what} does not work with these weights on this processor",
            hint="leave it out",
            param=what.partition("=")[0],
        )

    def _count(self, weight: Tensor, names: tuple[str, ...], times: Times) -> None:
        with self._lock:
            self._numbers[names] += weight.numel()
            if times:
                self._milliseconds += times[names[0]][1] * max(1.0, weight.numel() / LARGEST)
                self._bytes += weight.numel() * bytes_read(names[0], weight.itemsize)

    def _names(
        self, weight: Tensor, candidates: Sequence[str], times: Times, *, steps: bool, tiled: bool
    ) -> tuple[str, ...]:
        """Return the kernel for each of ROWS."""
        dtype = _dtype_name(weight) if weight.device.type == "cpu" else ""
        int8 = self.int8 is not None and steps
        if not times and dtype == "bfloat16" and not int8:
            times = standard_times(weight.dtype, candidates)
        if not times:
            fixed = SMALL_INT8 if int8 else SMALL_FLOAT32 if dtype == "float32" else ()
            other = candidates[0] if int8 else "plain"
            names = tuple(name if name in candidates else other for name in fixed) or ("plain",) * len(ROWS)
        else:
            free, total = host_memory()
            second = self.int8 is None and steps and not tiled and free >= total // 4
            names = best_layouts(times, second=second, tiled=tiled)
        if not steps:
            return names[-1:] * len(ROWS)
        return (self.kernel,) * (len(ROWS) - 1) + names[-1:] if self.kernel in candidates else names

    def _times(self, weight: Tensor, candidates: Sequence[str], *, steps: bool) -> Times:
        """Return the milliseconds of each kernel; nothing where there is no choice or the weight is small."""
        small = weight.numel() < SMALL
        if weight.device.type != "cpu" or _dtype_name(weight) not in MEASURED or small:
            return {}
        shape = (weight.shape[0], weight.shape[1])
        with self._lock:
            if self.threads is None:
                self.threads = choose_threads(shape, weight.dtype, candidates)
        return kernel_times(shape, weight.dtype, candidates, ROWS if steps else ROWS[-1:])


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def bytes_read(kernel: str, itemsize: int) -> int:
    """Return the bytes of a number in the layout of `kernel`, for a dtype of `itemsize` bytes."""
    return NUM_BYTES.get(kernel, itemsize)


def best_layouts(times: Times, *, second: bool, tiled: bool = False) -> tuple[str, ...]:
    """Return the name of the kernel for each of ROWS, with one layout of the weight, or two if `second` and worth it.

    At no number of rows are they slower than "plain", where that is among them.

    Args:
        times: milliseconds by rows of each kernel, all for the same rows.
        tiled: True if all products have TILE rows.
    """
    rows = [TILE] if tiled else [count for count in ROWS if all(count in of for of in times.values())]
    best = {count: min(of[count] for of in times.values()) for count in rows}

    def takes(first: str, other: str, count: int) -> str:
        return other if count != ROWS[-1] and times[other][count] < (1 - WORTH) * times[first][count] else first

    def cost(pair: tuple[str, str]) -> float:
        relative = (times[takes(*pair, count)][count] / best[count] for count in rows)
        return sum(relative) + (WORTH if pair[0] != pair[1] else 0)

    def slower(pair: tuple[str, str]) -> bool:
        plain = times.get("plain", {})
        return any(times[takes(*pair, count)][count] > (1 + NOISE) * plain.get(count, inf) for count in rows)

    pairs = [(first, other) for first in times for other in (times if second else (first,))]
    chosen = min((pair for pair in pairs if not slower(pair)), key=cost)
    return tuple(takes(*chosen, count) if count in rows else chosen[0] for count in ROWS)
