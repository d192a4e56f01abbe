"""Matrix products of a few rows with a large weight, as fast as the device has them.

A decode step multiplies 1 to 32 rows with every weight. The general kernels of CPUs handle 4 to 16 rows badly;
oneDNN's, on a weight laid out for them once, take half the time (measured at 8 rows: 23 against 49 ms for twelve
768 x 4096 weights in float32, one thread of a 2.5 GHz Xeon). torch has them as the operators that its compiler uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Linear:
    """`x @ weight.T + bias` for x [rows, in]. `weight` is None once it is laid out anew; `size` is its numbers."""

    __slots__ = ("_packed", "bias", "size", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.size = weight.numel()
        self._packed = _pack(weight)
        self.weight = None if self._packed is not None else weight
        self.bias = bias

    @property
    def packed(self) -> bool:
        return self._packed is not None

    def __call__(self, x: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        if self._packed is None:
            return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """base + self(x)."""
        import torch

        if self._packed is None and self.bias is None:
            return torch.addmm(base, x, self.weight.t())  # type: ignore[union-attr]
        return self(x).add_(base)


def _pack(weight: Tensor) -> Any:
    """The weight in oneDNN's own layout, or None where that does not pay or does not exist."""
    import torch

    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or not getattr(torch._C, "_has_mkldnn", False):
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None


def join(linears: Sequence[Any]) -> Linear:
    """The weights of several nn.Linear below each other, as one.

    The modules keep views, or nothing where the weight is laid out anew, so that no memory is doubled.
    """
    import torch

    many = len(linears) > 1
    joined = torch.cat([linear.weight.detach() for linear in linears]) if many else linears[0].weight.detach()
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    made = Linear(joined, bias)
    first = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        kept = joined.new_empty(0) if made.packed else joined[first : first + rows]
        linear.weight = torch.nn.Parameter(kept, requires_grad=False)
        first += rows
    return made
