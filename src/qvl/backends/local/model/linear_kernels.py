"""The kernels that torch has for `x @ weight.T + bias` on a CPU, behind one call.

Each keeps the weight in a layout of its own. Which is fastest depends on the processor and on the number of rows, so
`kernel_times` measures them and `linear` chooses.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.cpu import has_vnni
from qvl.backends.local.model.int8_store import Int8Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import ScriptObject, Tensor

# Half of the smallest step of float16: what rounding may do to a number too small for float16's full precision.
HALF_ERROR: Final = 2.0**-25
# Rows that are as fast as one with oneDNN's int8 kernel, which is slower with fewer.
INT8_ROWS: Final = 4
# The filters of warnings are the whole process's.
_filters = threading.Lock()


class LinearKernel(ABC):
    """One weight [out, in] in the layout of one kernel; x is [rows, in] in the weight's dtype."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, [rows, out], in the dtype of x."""

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """Return gelu(self(x)); `approximate` as of torch's gelu."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return F.gelu(self(x), approximate=approximate)

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """Return base + self(x)."""
        return self(x).add_(base)


class PlainKernel(LinearKernel):
    """torch's general kernel, on the weight as it is; the only one on devices other than the CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return F.linear(x, self.weight, self.bias)

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        import torch

        if self.bias is None:
            return torch.addmm(base, x, self.weight.t())
        return super().added_to(base, x)


class OneDnnKernel(LinearKernel):
    """oneDNN's kernel, on a repacked float32 or bfloat16 weight. torch has it as an operator of its compiler."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        import torch

        if not getattr(torch._C, "_has_mkldnn", False):
            raise NotImplementedError("this torch has no oneDNN")
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        import torch

        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "gelu", [], approximate)
        return out

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        import torch

        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, base, self._packed, self._bias, "add")
        return out


class HalfKernel(LinearKernel):
    """FBGEMM's kernel, which reads weights in float16 and computes in float32, for few rows, where memory limits.

    Raises:
        ValueError: float16 cannot represent the weight. It can if the weight was stored in bfloat16 or float16,
            but for numbers beyond its range; of those nearer to 0 than 6e-5 the last bits may go, 3e-8 at most.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        import torch

        single = weight.float()
        if not bool(((single.half().float() - single).abs() <= HALF_ERROR).all()):
            raise ValueError("float16 does not hold these weights")
        with _fbgemm():
            self._packed: ScriptObject = torch.ops.quantized.linear_prepack_fp16(
                single.contiguous(), None if bias is None else bias.float()
            )

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return out.to(x.dtype)


class Int8Kernel(LinearKernel):
    """A weight in int8 with a scale for each output, times x in 8 bits with a scale for each row.

    Every row of x is quantised by itself, symmetrically, and products are added up in int32: a row's result depends
    on no other row. Where the processor would saturate the sum of two products (no VNNI), x has 7 bits.
    """

    def __init__(self, bias: Tensor | None) -> None:
        self._bias = None if bias is None else bias.float()
        self._full = has_vnni()

    def _finish(self, out: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        out = out.mul_(scale)
        if self._bias is not None:
            out = out.add_(self._bias)
        return out.to(dtype)


class OneDnnInt8Kernel(Int8Kernel):
    """`Int8Kernel` by oneDNN."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        import torch

        super().__init__(bias)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self._scale, self._zeros = weight.scale, torch.zeros(len(weight.scale), dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        zero, most = (128, 127) if self._full else (64, 63)
        single = x.float()
        scale = _row_scale(single, most)
        rounded = (single / scale).round_().add_(zero).to(torch.uint8)
        rows = len(x)
        if rows < INT8_ROWS:
            rounded = F.pad(rounded, (0, 0, 0, INT8_ROWS - rows))
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, zero, self._packed, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return self._finish(out[:rows], scale, x.dtype)


class FbgemmInt8Kernel(Int8Kernel):
    """`Int8Kernel` by FBGEMM, which chooses one scale for all rows: they are brought to one range before, [-1, 1]."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        import torch

        super().__init__(bias)
        zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
        with _fbgemm():
            # torch warns that its quantised tensors will go; without them oneDNN's kernel is taken.
            with _filters, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                signed = torch._make_per_channel_quantized_tensor(weight.codes, weight.scale.double(), zeros, 0)
            self._packed: ScriptObject = torch.ops.quantized.linear_prepack(signed, None)
        # A first row that reaches from -1 to 1, so that FBGEMM's scale is the same whatever rows follow.
        self._ends = torch.zeros((1, weight.codes.shape[1]))
        self._ends[0, :2] = torch.tensor((1.0, -1.0))

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        single = x.float()
        scale = _row_scale(single, 1)
        spread = torch.cat([self._ends, single / scale])
        out: Tensor = torch.ops.quantized.linear_dynamic(spread, self._packed, not self._full)
        return self._finish(out[1:], scale, x.dtype)


KERNELS: Final[dict[str, Callable[[Tensor, Tensor | None], LinearKernel]]] = {
    "plain": PlainKernel,
    "onednn": OneDnnKernel,
    "fbgemm": HalfKernel,
}
INT8_KERNELS: Final[dict[str, Callable[[Int8Weight, Tensor | None], LinearKernel]]] = {
    "onednn-int8": OneDnnInt8Kernel,
    "fbgemm-int8": FbgemmInt8Kernel,
}


def pack(name: str, weight: Tensor | Int8Weight, bias: Tensor | None) -> LinearKernel | None:
    """Return the kernel `name` for weight [out, in]; None if torch or the processor lacks it, or results differ."""
    try:
        return INT8_KERNELS[name](weight, bias) if isinstance(weight, Int8Weight) else KERNELS[name](weight, bias)
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


def _row_scale(x: Tensor, most: int) -> Tensor:
    """Return [rows, 1], by which each row of float32 x is divided to lie in [-most, most]."""
    import torch

    return x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(most)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Let torch pack quantised weights for FBGEMM, as it does by default on x86."""
    import torch

    engine = torch.backends.quantized.engine
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise NotImplementedError("this torch has no FBGEMM")
    if engine in ("x86", "fbgemm"):
        yield
        return
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = engine
