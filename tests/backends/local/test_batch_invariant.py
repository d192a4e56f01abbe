"""In the batch-invariant mode an answer is the same to the last bit, whatever else runs beside it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.linear import TILE, LinearPlan
from qvl.errors import ConfigError
from qvl.types import ChatRequest, Result
from tests.backends.local.checkpoints import random_mixture
from tests.backends.local.requests import ask


def questions(count: int, dice: random.Random) -> list[ChatRequest]:
    """Greedy and seeded in turn, of all lengths, a third with a picture."""
    made = []
    for place in range(count):
        chosen: dict[str, Any] = {"temperature": 0.7, "seed": place} if place % 2 else {}
        parts = [place] if place % 3 == 0 else []
        words = "word " * dice.randrange(1, 70) + f"what is {place}?"
        made.append(ask(*parts, words, max_tokens=dice.randrange(8, 20), ignore_eos=True, logprobs=1, **chosen))
    return made


def bits(result: Result) -> list[tuple[str, float]]:
    assert result.logprobs is not None
    return [(token.token, token.logprob) for token in result.logprobs]


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "max_num_batched_tokens": 48, "max_num_seqs": 20},
        {"dtype": "float32"},
    ],
    ids=["bfloat16", "small steps", "float32"],
)
def test_an_answer_is_the_same_alone_and_among_60(random_folder: Path, settings: dict[str, Any]) -> None:
    dice = random.Random(5)
    asked, others = questions(10, dice), questions(50, dice)
    mixed = [*asked, *others]
    dice.shuffle(mixed)

    async def run() -> None:
        async with LocalBackend(
            str(random_folder), device="cpu", kv_cache_bytes=64 << 20, batch_invariant=True, **settings
        ) as backend:
            alone = [bits(await backend.generate(request)) for request in asked]
            together = await asyncio.gather(*(backend.generate(request) for request in mixed))
            assert backend.identity()["batch_invariant"] is True
        for request, expected in zip(asked, alone, strict=True):
            assert bits(together[mixed.index(request)]) == expected

    asyncio.run(run())


@pytest.mark.slow
def test_a_mixture_of_experts_is_invariant_too(tmp_path: Path) -> None:
    folder = random_mixture(tmp_path)
    asked = questions(12, random.Random(6))

    async def run() -> None:
        async with LocalBackend(
            str(folder), device="cpu", dtype="bfloat16", kv_cache_bytes=32 << 20, batch_invariant=True
        ) as backend:
            alone = [bits(await backend.generate(request)) for request in asked]
            together = await asyncio.gather(*(backend.generate(request) for request in asked))
        assert [bits(result) for result in together] == alone

    asyncio.run(run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_of_a_tiled_product_depends_on_no_other_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * TILE + 5, 96, generator=generator).to(dtype)
    linear = LinearPlan().linear(torch.randn(64, 96, generator=generator).to(dtype), name="head", tiled=True)
    whole = linear(x)
    assert whole.shape == (len(x), 64)
    assert all(torch.equal(linear(x[place : place + 1])[0], whole[place]) for place in range(len(x)))


def test_the_mode_is_part_of_the_identity_only_where_it_is_on() -> None:
    assert "batch_invariant" not in (LocalBackend(device="cpu", dtype="float32").peek_identity() or {})
    on = LocalBackend(device="cpu", dtype="float32", batch_invariant=True).peek_identity()
    assert on is not None
    assert on["batch_invariant"] is True
    with pytest.raises(ConfigError, match="excludes decode_graphs"):
        LocalBackend(batch_invariant=True, decode_graphs="on")
