"""Attention to KV rows that several sequences share: read once for all of them, then merged with that to their own.

Attention to all keys of a sequence is the mean of the attentions to its parts, weighted by the sums of their
exponentials. So the queries of all who share a row pass it together, as one matrix product for each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.backends.local.model.attention_kernels import pays_in_float32

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class SharedRow:
    """The first `tokens` keys of a KV row, which the tokens `where` of the batch all see: a slice, or int64 [n]."""

    capacity: int
    row: int
    tokens: int
    where: slice | Tensor


def attention_with_sums(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False, widens: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (attention as `scaled_dot_product_attention`, float32 log-sum-exp of the scores [batch, heads, queries]).

    All are [batch, heads, tokens, head_dim]; key and value may have fewer heads. With `widens`
    many queries are computed in float32.
    """
    import torch

    dtype = query.dtype
    if widens and pays_in_float32(query, key, mask):
        query, key, value = query.float(), key.float(), value.float()
        mask = None if mask is None else mask.float()
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask
    )
    return out.to(dtype), sums


def add_shared(
    out: Tensor,
    sums: Tensor,
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    where: slice | Tensor,
    *,
    widens: bool = False,
) -> None:
    """Merge the attention of some tokens to a row's keys into `out`, in place.

    Args:
        out: [tokens, heads * head_dim], attention to other keys, and the log-sum-exps `sums`, float32 [tokens, heads].
        queries: [tokens, heads, head_dim].
        key, value: [kv heads, keys, head_dim], seen whole by the tokens `where`.
        widens: see `attention_with_sums`; the queries of a key head count together.
    """
    import torch

    query = queries[where]
    count, heads, dim = query.shape
    # The queries of a key head stand one behind the other as its positions.
    joint = query.view(count, key.shape[0], -1, dim).transpose(0, 1).reshape(1, key.shape[0], -1, dim)
    found, found_sums = attention_with_sums(joint, key[None], value[None], widens=widens)
    found = found.view(key.shape[0], count, -1, dim).transpose(0, 1).reshape(count, heads, dim)
    found_sums = found_sums.view(key.shape[0], count, -1).transpose(0, 1).reshape(count, heads)
    here = sums[where]
    weight = torch.sigmoid(found_sums - here).unsqueeze(-1)
    before = out[where].view(count, heads, dim)
    out[where] = torch.lerp(before.float(), found.float(), weight).to(out.dtype).view(count, -1)
    sums[where] = torch.logaddexp(here, found_sums)


def can_share(device: torch.device, dtype: torch.dtype) -> bool:
    """True if this torch has on `device` what rows are shared by, and its results are those of one attention."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own convention

    if device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return False
    dice = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((5, heads, 32), generator=dice).to(dtype) for heads in (4, 2, 2))
    key, value = (torch.cat((side[:4], side)).transpose(0, 1) for side in (key, value))
    whole = F.scaled_dot_product_attention(query.transpose(0, 1)[None, :, 4:], key[None], value[None], enable_gqa=True)
    try:
        own, sums = attention_with_sums(query.transpose(0, 1)[None], key[None, :, 4:], value[None, :, 4:], causal=True)
        out, sums = own[0].transpose(0, 1).reshape(5, -1), sums[0].t().contiguous()
        add_shared(out, sums, query, key[:, :4], value[:, :4], slice(0, 5))
    except (RuntimeError, NotImplementedError):
        return False
    return torch.allclose(out[4], whole.reshape(-1), atol=3e-2, rtol=3e-2)
