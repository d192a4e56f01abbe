"""What the kept times of kernels say of this processor: for people, and for estimates of speed. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.backends.local.model import kernel_times
from qvl.backends.local.model.attention_times import known_choices
from qvl.backends.local.model.kernel_times import Times, by_rows
from qvl.backends.local.model.linear import SMALL, best_layouts, bytes_read
from qvl.backends.local.model.linear_kernels import INT8_KERNELS

if TYPE_CHECKING:
    from qvl.types import JsonObject


@dataclass(frozen=True, slots=True)
class MeasuredWeight:
    """The times of a large weight's kernels, of one form of its numbers.

    Args:
        name: as "1024x2048 bfloat16 2 threads".
        size: its numbers.
        form: "float32", "bfloat16" or "int8".
        times: all with a time for one row.
    """

    name: str
    size: int
    form: str
    times: Times

    @property
    def fastest(self) -> str:
        """Return the name of the kernel that is fastest for one row."""
        return min(self.times, key=lambda name: self.times[name][1])

    @property
    def gb_s(self) -> float:
        """Return the GB/s at which that kernel reads the weight."""
        return self.size * self.bytes_each / self.times[self.fastest][1] / 1e6

    @property
    def bytes_each(self) -> float:
        """Return the bytes of a number in that kernel's layout."""
        return bytes_read(self.fastest, 4 if "float32" in self.name else 2)


def measured_weights(form: str | None = None) -> list[MeasuredWeight]:
    """Return what was measured here of large weights, in `form` or in all, the largest first."""
    found = []
    for name, times in kernel_times.known_times().items():
        shape, dtype, *_ = name.split()
        out, width = map(int, shape.split("x"))
        for kind in (dtype, "int8"):
            of = {
                kernel: ms for kernel, ms in times.items() if (kernel in INT8_KERNELS) == (kind == "int8") and 1 in ms
            }
            if of and out * width >= SMALL and form in (None, kind):
                found.append(MeasuredWeight(name, out * width, kind, of))
    return sorted(found, key=lambda weight: (-weight.size, weight.name, weight.form))


def summary() -> tuple[str, JsonObject] | None:
    """Return a line (dtype of "auto", bandwidth, threads and kernels of the largest weight) and the details behind it.

    None before anything was measured.
    """
    weights, bandwidth, dtype = measured_weights(), kernel_times.known_bandwidth(), kernel_times.known_dtype()
    if not weights:
        return None
    largest = next((weight for weight in weights if weight.form == dtype), weights[0])
    reached = _share(largest, bandwidth)
    attention = known_choices()
    same = [choice for name, choice in attention.items() if name.split()[1:] == largest.name.split()[1:]]
    parts = [
        f"auto is {dtype}" if dtype else "",
        f"memory reads {bandwidth:g} GB/s" if bandwidth else "",
        f"{largest.name}: {by_rows(best_layouts(largest.times, second=True))}{reached}",
        *(choice.describe() for choice in same[:1]),
    ]
    detail: JsonObject = {
        "dtype": dtype,
        "attention": {name: choice.detail() for name, choice in attention.items()},
        "read_gb_s": bandwidth,
        "weights": [
            {"weight": weight.name, "form": weight.form, "fastest": weight.fastest, "gb_s": round(weight.gb_s, 1)}
            | {"ms": weight.times[weight.fastest][1]}
            for weight in weights
        ],
    }
    return "; ".join(part for part in parts if part), detail


def _share(weight: MeasuredWeight, bandwidth: float | None) -> str:
    return f", one row at {min(1.0, weight.gb_s / bandwidth):.0%} of it" if bandwidth else ""


def one_row(form: str) -> tuple[float, float] | None:
    """Return (bytes that a number of the weights is read as, GB/s), of all large weights of `form` that were measured.

    None where there are none.
    """
    weights = measured_weights(form)
    if not weights:
        return None
    numbers = sum(weight.size for weight in weights)
    read = sum(weight.size * weight.bytes_each for weight in weights)
    return read / numbers, read / sum(weight.times[weight.fastest][1] for weight in weights) / 1e6
