"""The ways in which torch computes attention on a CPU, behind one call: the same numbers, but for the last bits.

Which is fastest depends on the processor, the dtype, the heads, and how many queries and keys there are, so
`attention_times` measures them and `kernels` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# Queries from which computing in float32 pays for the copies.
MANY: Final = 192
# The most bytes of copies, which no budget counts: of more keys than fit attention stays in bfloat16.
MOST_COPIED: Final = 256 << 20


class Attention(Protocol):
    """Returns attention, [rows, kv heads, queries, head_dim].

    The queries of a row that share a key head stand side by side: query is [rows, kv heads, queries, head_dim], key and
    value are [rows, kv heads, keys, head_dim]. `mask` is added to the scores: [rows, 1, 1, keys], or None.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor: ...


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernel, the queries of a key head as its positions: keys are read once for all of them."""
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def by_head(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernel, each query a head of its own: more pieces of work, each of which reads the keys."""
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    apart = query.reshape(len(query), -1, 1, query.shape[-1])
    out = F.scaled_dot_product_attention(apart, key, value, attn_mask=mask, enable_gqa=apart.shape[1] != key.shape[1])
    return out.view(query.shape)


def in_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernel in float32, in which some processors are faster, once the keys are copied."""
    wide = None if mask is None else mask.float()
    return grouped(query.float(), key.float(), value.float(), wide).to(query.dtype)


def pays_in_float32(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """True if there are queries enough to pay for copies in float32, and the copies are small enough."""
    numbers = query.numel() + 2 * key.numel() + (0 if mask is None else mask.numel())
    return query.shape[2] >= MANY and 4 * numbers <= MOST_COPIED


# Of few queries, in decode steps: the first is what is taken unless another is faster.
DECODE_ATTENTION: Final[dict[str, Attention]] = {"grouped": grouped, "by-head": by_head}
# Of many queries, as those of prompts and pictures.
PROMPT_ATTENTION: Final[dict[str, Attention]] = {"grouped": grouped, "float32": in_float32}
