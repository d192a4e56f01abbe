"""The mask of a later chunk of a prompt, as CUDA takes it and as the others do."""

from __future__ import annotations

import pytest
import torch

from qvl.backends.local.model.kernels import Kernels


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (64, 300), (2, 3)])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["heads", "grouped"])
def test_the_mask_that_cuda_takes_means_what_the_others_add(queries: int, keys: int, key_heads: int) -> None:
    """On the CPU torch writes it out; on CUDA its flash kernel takes it for what it is."""
    kernels, dtype = Kernels(), torch.bfloat16
    dice = torch.Generator().manual_seed(0)
    query = torch.randn((1, 4, queries, 64), generator=dice).to(dtype)
    key, value = torch.randn((2, 1, key_heads, keys, 64), generator=dice).to(dtype)
    added = kernels.causal_mask(queries, keys, dtype, torch.device("cpu"))
    named = kernels.causal_mask(queries, keys, dtype, torch.device("cuda"))
    assert added is not None
    assert (added == 0).equal(torch.ones(queries, keys).tril(keys - queries).bool())
    torch.testing.assert_close(
        kernels.causal_attention(query, key, value, named), kernels.causal_attention(query, key, value, added)
    )
