"""The ways in which torch computes attention on a CPU, behind one call: the same numbers, but for the last bits.

Which is fastest depends on the processor, the dtype, the heads, and how many queries and keys there are, so
`kernel_times` measures them and `kernels` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from torch import Tensor


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


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Two matrix products with a softmax between them."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores += mask
    weights: Tensor = scores.softmax(-1)
    return weights @ value


def widened(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused kernel in float32, in which some processors are faster, once the keys are copied."""
    wide = (None if part is None else part.float() for part in (query, key, value, mask))
    return grouped(*wide).to(query.dtype)  # type: ignore[arg-type]


# Of few queries, in decode steps: the first is what is taken unless another is faster.
DECODE_ATTENTION: Final[dict[str, Attention]] = {"grouped": grouped, "by-head": by_head, "products": products}
# Of many queries, as those of prompts and pictures.
PROMPT_ATTENTION: Final[dict[str, Attention]] = {"grouped": grouped, "float32": widened}
