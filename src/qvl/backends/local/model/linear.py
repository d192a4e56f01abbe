"""Matrix products of a few rows with a large weight, as fast as the device has them.

A decode step multiplies 1 to 32 rows with every weight, and on a CPU mostly waits for the weights to come from memory.
The general kernels handle 4 to 16 rows badly besides. Two others, measured on all weights of 11 layers of 768 by two
threads of a 2.5 GHz Xeon, milliseconds at 1 / 8 / 32 / 128 rows (general kernel 33 / 86 / 114 / 294):

- oneDNN's, on a weight laid out for it once: 37 / 39 / 80 / 236. torch has it as an operator of its compiler.
- FBGEMM's, which reads weights in float16 and computes in float32: 19 / 20 / 75 / 290. It is taken for few rows where
  the weight says the same in float16, as all weights that were stored in bfloat16 or float16 do; the other layout stays
  for prompts, so this costs half as much memory again, and is done while a quarter of the host's memory remains free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.device import host_memory

if TYPE_CHECKING:
    from torch import ScriptObject, Tensor, nn

# Above this many rows float32 weights are multiplied faster.
FEW_ROWS: Final = 32
# Rows of every product whose result may not depend on how many rows there are; as many cost a decode step little.
TILE: Final = 32
# Half of the smallest step of float16: what rounding may do to a number too small for float16's full precision.
HALF_ERROR: Final = 2.0**-25


class Linear:
    """`x @ weight.T + bias` for x [rows, in]. `weight` is None once it is laid out anew; `size` is its numbers.

    `steps`: whether decode steps use it, which bring few rows. `tiled`: whether all products are of TILE rows, filled
    up with zeros, so that one kernel computes every row in one order, whatever other rows there are.
    """

    __slots__ = ("_half", "_packed", "bias", "size", "tiled", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, steps: bool = False, tiled: bool = False) -> None:
        self.size = weight.numel()
        self.tiled = tiled
        self._packed = _pack(weight)
        self._half = _halve(weight, bias) if steps and self._packed is not None else None
        self.weight = None if self._packed is not None else weight
        self.bias = bias

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def __call__(self, x: Tensor) -> Tensor:
        if not self.tiled:
            return self._product(x)
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        rows = x.shape[0]
        tiles = torch.split(F.pad(x, (0, 0, 0, -rows % TILE)), TILE)
        return torch.cat([self._product(tile) for tile in tiles])[:rows]

    def _product(self, x: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        if self._packed is None:
            return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        out: Tensor
        if self._half is not None and x.shape[0] <= FEW_ROWS:
            out = torch.ops.quantized.linear_dynamic_fp16(x, self._half)
            return out
        out = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """Return gelu(self(x)); `approximate` as of torch's gelu."""
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        if self._packed is None:
            return F.gelu(self(x), approximate=approximate)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "gelu", [], approximate)
        return out

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """Return base + self(x)."""
        import torch

        if self.tiled:
            return self(x).add_(base)
        if self._packed is None and self.bias is None:
            return torch.addmm(base, x, self.weight.t())  # type: ignore[union-attr]
        if self._packed is None or (self._half is not None and x.shape[0] <= FEW_ROWS):
            return self(x).add_(base)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, self._packed, self.bias, "add")
        return out


def _pack(weight: Tensor) -> Tensor | None:
    """Return the weight in oneDNN's own layout, or None where that does not pay or does not exist."""
    import torch

    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or not getattr(torch._C, "_has_mkldnn", False):
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
    return packed


def _halve(weight: Tensor, bias: Tensor | None) -> ScriptObject | None:
    """Return a float32 weight in FBGEMM's float16 layout; None where that changes it, is too much, or does not exist.

    Beyond float16's range nothing is taken; of numbers nearer to 0 than 6e-5 the last bits may go, 3e-8 at most.
    """
    import torch

    free, total = host_memory()
    if "fbgemm" not in torch.backends.quantized.supported_engines or free < total // 4:
        return None
    if not bool(((weight.half().float() - weight).abs() <= HALF_ERROR).all()):
        return None
    try:
        half: ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
    return half


def join(linears: Sequence[nn.Linear], *, steps: bool = False, tiled: bool = False) -> Linear:
    """The weights of several nn.Linear below each other, as one.

    The modules keep views, or nothing where the weight is laid out anew, so that no memory is doubled.
    """
    import torch

    many = len(linears) > 1
    joined = torch.cat([linear.weight.detach() for linear in linears]) if many else linears[0].weight.detach()
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    made = Linear(joined, bias, steps=steps, tiled=tiled)
    first = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        kept = joined.new_empty(0) if made.packed else joined[first : first + rows]
        linear.weight = torch.nn.Parameter(kept, requires_grad=False)
        first += rows
    return made
