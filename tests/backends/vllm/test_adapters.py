"""LoRA adapters in vLLM answer as in the local engine, several by name beside the model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qvl import media
from qvl.backends.local.backend import LocalBackend
from qvl.backends.vllm.backend import VllmBackend
from qvl.errors import ConfigError, UnsupportedInputError
from qvl.testing.asking import ask
from qvl.tiny import render
from tests.backends.lora_files import pair, random_adapter, saved
from tests.backends.token_engines import QUESTIONS, Loop
from tests.backends.vllm.conftest import SETTINGS


def test_named_adapters_answer_as_in_the_local_engine(tmp_path: Path, loop: Loop) -> None:
    adapters = {name: str(random_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate(("shelf", "bill"))}
    pictures = [media.load(render.sample(seed)[1]) for seed in range(6000, 6006)]
    requests = [
        ask(QUESTIONS[number % 4], picture, max_tokens=24).replace(adapter=name)
        for number, picture in enumerate(pictures)
        for name in ("", *adapters)
    ]

    async def answers(backend: LocalBackend | VllmBackend) -> list[str]:
        async with backend:
            assert set(backend.adapters()) == set(adapters)
            with pytest.raises(UnsupportedInputError, match="has no adapter 'other'"):
                await backend.generate(requests[0].replace(adapter="other"))
            return [result.text for result in await asyncio.gather(*map(backend.generate, requests))]

    ours = loop.run_until_complete(answers(LocalBackend(device="cpu", dtype="float32", adapter=adapters)))
    its = loop.run_until_complete(answers(VllmBackend(**SETTINGS, adapter=adapters)))
    assert its == ours
    assert len({tuple(ours[start::3]) for start in range(3)}) == 3


def test_what_vllm_would_pass_over_is_refused(tmp_path: Path) -> None:
    path = "base_model.model.model.visual.blocks.0.attn.qkv"
    folder = saved(tmp_path / "tower", pair(path, 8, 24), target_modules=["attn.qkv"])
    with pytest.raises(ConfigError, match=r"changes 1 modules of the picture tower.*which vLLM passes over"):
        asyncio.run(VllmBackend(**SETTINGS, adapter=str(folder)).open())
