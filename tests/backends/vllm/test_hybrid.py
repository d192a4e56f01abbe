"""Qwen3.5 in vLLM: tokens are the local engine's, up to where two are nearly as likely.

vLLM's CPU build computes a gated delta rule in bfloat16 alone, and its convolution wants channels in multiples of 64;
the local engine computes in float32 here. So two tokens of about the same probability may change places, behind which
answers differ.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from qvl.backends.local.backend import LocalBackend
from qvl.backends.vllm.backend import VllmBackend
from qvl.types import Result, SamplingParams
from tests.backends.local.checkpoints import random_hybrid
from tests.backends.local.requests import mixed
from tests.backends.vllm.conftest import SETTINGS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.backends.token_engines import Loop

# By how much bfloat16 may move a log-probability of these weights: of first tokens it was seen to by 0.06.
NOISE = 0.3


def test_qwen3_5_answers_as_in_the_local_engine(tmp_path: Path, loop: Loop) -> None:
    folder = str(random_hybrid(tmp_path / "model", state_dims=(64, 64)))
    sampling = SamplingParams(max_tokens=16, logprobs=5, ignore_eos=True, return_token_ids=True)
    requests = [request.replace(sampling=sampling) for request in mixed(24, random.Random(3))]
    shown = max(len(request.pictures) for request in requests)

    async def answers(backend: LocalBackend | VllmBackend) -> list[Result]:
        async with backend:
            return list(await asyncio.gather(*map(backend.generate, requests)))

    ours = loop.run_until_complete(answers(LocalBackend(folder, device="cpu", dtype="float32")))
    settings = SETTINGS | {"dtype": "bfloat16", "limit_mm_per_prompt": {"image": shown}}
    its = loop.run_until_complete(answers(VllmBackend(folder, **settings)))
    alike = 0
    for our, other in zip(ours, its, strict=True):
        assert other.usage.prompt_tokens == our.usage.prompt_tokens
        wanted, found = our.choices[0].token_ids, other.choices[0].token_ids
        equal = next((n for n, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), len(wanted))
        alike += equal
        for ours_at, its_at in list(zip(our.logprobs or (), other.logprobs or (), strict=True))[:equal]:
            assert abs(ours_at.logprob - its_at.logprob) < NOISE
        if equal < len(wanted):
            told = (our.logprobs or ())[equal].top
            likely = {top.token for top in told if told[0].logprob - top.logprob < NOISE}
            assert (other.logprobs or ())[equal].token in likely, (equal, told)
    assert alike > 24 * 16 / 3
