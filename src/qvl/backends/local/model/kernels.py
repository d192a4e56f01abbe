"""The operators between the matrix products: torch's own, and the fused ones of Ascend's torch_npu.

On a CPU attention is computed in the way that was measured to be fastest (`attention_times`).
A fused operator is used if torch_npu offers it and its result for a small example equals torch's on this very chip,
since which operator works differs between chips and CANN releases. Signatures: torch_npu's API reference; attention as
in transformers' integrations/npu_flash_attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.attention_kernels import DECODE_ATTENTION, pays_in_float32
from qvl.backends.local.model.attention_times import SMALL, AttentionChoice, Heads, measured_choice
from qvl.errors import first_line
from qvl.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch
    from torch import Tensor

log = logger(__name__)

# npu_fusion_attention takes a causal mask of this size for any length when sparse_mode is 3 (last query, last key).
NPU_MASK: Final = 2048
NPU_DOWN_RIGHT: Final = 3


class Kernels:
    """The operators, computed by torch. `fused` names those that a subclass computes by a fused kernel instead."""

    fused: tuple[str, ...] = ()

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Return x after root mean square normalisation over the last dimension."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def rotary_cos_sin(self, angles: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, [tokens, 1, head_dim], of float32 angles [tokens, head_dim / 2].

        The first half of the sine is negated, so that rotating is `x * cos + roll(x, head_dim / 2) * sin`.
        """
        import torch

        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat((cos, cos), -1).to(dtype).unsqueeze(1), torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1)

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x [tokens, heads, head_dim] rotated; the two halves of the last dimension are the pairs."""
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half])
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    def swiglu(self, x: Tensor) -> Tensor:
        """Return silu(first half) * second half of the last dimension."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def choose_attention(self, heads: Heads, dtype: torch.dtype, *, decodes: bool = False) -> None:
        """Decide how attention of this shape is computed, before its first use; `decodes`: also in decode steps."""

    def describe(self) -> str:
        """Return in words what was decided, of the text model; empty if nothing was."""
        return ""

    def widens(self, heads: Heads) -> bool:
        """True if attention of many queries is computed in float32, being faster so than in its dtype."""
        return False

    def decode_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, capacity: int) -> Tensor:
        """Return the attention of one token a row, [rows, kv heads, n, head_dim].

        Args:
            query: [rows, kv heads, n, head_dim], of the n heads that share a key head.
            key, value: [rows, kv heads, keys, head_dim], of KV rows that can hold `capacity` tokens.
            mask: added to the scores, [rows, 1, 1, keys].
        """
        return DECODE_ATTENTION["grouped"](query, key, value, mask)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention of every query to every key; all are [1, heads, tokens, head_dim]."""
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return F.scaled_dot_product_attention(query, key, value)

    def causal_mask(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the mask of `causal_attention` for more keys than queries.

        On CUDA in half precision it only says so, and the flash kernel needs no more; else it is [queries, keys].
        """
        import torch
        from torch.nn.attention.bias import causal_lower_right

        if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
            return causal_lower_right(queries, keys)
        return torch.full((queries, keys), float("-inf"), dtype=dtype, device=device).triu_(keys - queries + 1)

    def causal_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return attention where the last of n queries sees all keys, the one before it all but the last, and so on.

        Args:
            query: [1, heads, n, head_dim]; key and value may have fewer heads.
            mask: of `causal_mask`; None when there are n keys or one query.
        """
        import torch.nn.functional as F  # noqa: N812 - torch's own convention

        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class CpuKernels(Kernels):
    """torch's operators; attention in the way that was measured to be fastest on this processor."""

    def __init__(self) -> None:
        self._chosen: dict[Heads, AttentionChoice] = {}

    def choose_attention(self, heads: Heads, dtype: torch.dtype, *, decodes: bool = False) -> None:
        import torch

        if dtype in (torch.float32, torch.bfloat16) and heads.query * heads.dim >= SMALL:
            known = self._chosen.get(heads)
            # The tower's heads may be as many as the text model's, which decode.
            if known is None or (decodes and not known.decode):
                self._chosen[heads] = measured_choice(heads, dtype, decodes=decodes)

    def describe(self) -> str:
        return next((choice.describe() for choice in self._chosen.values() if choice.decode), "")

    def widens(self, heads: Heads) -> bool:
        choice = self._chosen.get(heads)
        return choice is not None and choice.prompt == "float32"

    def decode_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, capacity: int) -> Tensor:
        rows, kv_heads, each, dim = query.shape
        choice = self._chosen.get(Heads(kv_heads * each, kv_heads, dim))
        if choice is None or not choice.decode:
            return super().decode_attention(query, key, value, mask, capacity)
        return DECODE_ATTENTION[choice.of_rows(rows, capacity)](query, key, value, mask)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self._pays(query, key, None):
            return super().attention(query, key, value)
        return super().attention(query.float(), key.float(), value.float()).to(query.dtype)

    def causal_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if not self._pays(query, key, mask):
            return super().causal_attention(query, key, value, mask)
        wide = None if mask is None else mask.float()
        return super().causal_attention(query.float(), key.float(), value.float(), wide).to(query.dtype)

    def _pays(self, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
        heads = Heads(query.shape[1], key.shape[1], query.shape[3])
        return self.widens(heads) and pays_in_float32(query, key, mask)


class NpuKernels(Kernels):
    """The fused operators of torch_npu that exist and agree with torch's; torch's own for the others.

    Args:
        torch_npu: the module.
        device: the NPU on which they are tried.
        dtype: the dtype in which they are tried.
    """

    def __init__(self, torch_npu: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
        self._npu = torch_npu
        self._masks: dict[torch.device, Tensor] = {}
        self._ones: dict[tuple[torch.device, int], Tensor] = {}
        self.fused = tuple(name for name, agrees in self._trials(device, dtype) if agrees)
        log.info("npu_kernels", fused=",".join(self.fused) or "none")

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        if "rms_norm" not in self.fused:
            return super().rms_norm(x, weight, eps)
        return self._rms_norm(x, weight, eps)

    def rotary_cos_sin(self, angles: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        cos, sin = super().rotary_cos_sin(angles, dtype, scaling)
        return (cos, self._unsigned(sin)) if "rotate" in self.fused else (cos, sin)

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._apply_rotary(x, cos, sin) if "rotate" in self.fused else super().apply_rotary(x, cos, sin)

    def swiglu(self, x: Tensor) -> Tensor:
        return self._npu.npu_swiglu(x, dim=-1) if "swiglu" in self.fused else super().swiglu(x)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if "attention" not in self.fused:
            return super().attention(query, key, value)
        return self._attention(query, key, value)

    def causal_mask(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None if "attention" in self.fused else super().causal_mask(queries, keys, dtype, device)

    def causal_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if "attention" not in self.fused:
            return super().causal_attention(query, key, value, mask)
        if query.shape[2] == 1:
            return self._attention(query, key, value)
        return self._attention(query, key, value, self._mask(query.device))

    def _rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        if weight is None:
            key = x.device, x.shape[-1]
            weight = self._ones.get(key)
            if weight is None:
                weight = self._ones[key] = x.new_ones(x.shape[-1])
        out: Tensor = self._npu.npu_rms_norm(x, weight, epsilon=eps)[0]
        return out

    def _apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The operator wants [batch, tokens, heads, head_dim].
        out: Tensor = self._npu.npu_rotary_mul(x.contiguous().unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0))
        return out[0]

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scale = query.shape[-1] ** -0.5
        causal = {} if mask is None else {"atten_mask": mask, "sparse_mode": NPU_DOWN_RIGHT}
        out: Tensor = self._npu.npu_fusion_attention(query, key, value, query.shape[1], "BNSD", scale=scale, **causal)[
            0
        ]
        return out

    def _mask(self, device: torch.device) -> Tensor:
        import torch

        mask = self._masks.get(device)
        if mask is None:
            mask = torch.ones((NPU_MASK, NPU_MASK), dtype=torch.bool, device="cpu").triu(1).to(device)
            self._masks[device] = mask
        return mask

    @staticmethod
    def _unsigned(sin: Tensor) -> Tensor:
        import torch

        half = sin.shape[-1] // 2
        return torch.cat((sin[..., half:], sin[..., half:]), -1)

    def _trials(self, device: torch.device, dtype: torch.dtype) -> list[tuple[str, bool]]:
        """Return (name, True if the fused operator gives torch's numbers) of each operator."""
        import torch

        dice = torch.Generator().manual_seed(0)

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=dice).to(dtype).to(device)

        x, weight, wide = some(5, 4, 64), some(64), some(5, 128)
        angles = torch.randn((5, 32), generator=dice).to(device)
        query, row = some(1, 4, 5, 64), some(2, 2, 16, 64)
        key, value = row[:1, :, :9], row[1:, :, :9]
        mask = torch.zeros((5, 9)).masked_fill_(torch.ones((5, 9)).triu(5).bool(), float("-inf")).to(dtype).to(device)
        cos, sin = super().rotary_cos_sin(angles, dtype)

        def causal() -> Tensor:
            return self._attention(query, key, value, self._mask(device))

        def rotary() -> Tensor:
            return self._apply_rotary(x, cos, self._unsigned(sin))

        plain = Kernels()
        return [
            ("rms_norm", _agree(lambda: self._rms_norm(x, weight, 1e-6), lambda: plain.rms_norm(x, weight, 1e-6))),
            ("rotate", _agree(rotary, lambda: plain.apply_rotary(x, cos, sin))),
            ("swiglu", _agree(lambda: self._npu.npu_swiglu(wide, dim=-1), lambda: plain.swiglu(wide))),
            ("attention", _agree(causal, lambda: plain.causal_attention(query, key, value, mask))),
        ]


def _agree(fused: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    import torch

    try:
        result = fused().cpu().float()
    except Exception as exc:  # noqa: BLE001 - an operator that a chip lacks fails in many ways; then torch's is used
        log.debug("npu_kernel_unusable", error=first_line(exc))
        return False
    return torch.allclose(result, plain().cpu().float(), atol=3e-2, rtol=3e-2)
