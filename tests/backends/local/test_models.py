"""Every model type in every form that the local engine takes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from qvl.backends.local.backend import LocalBackend
from qvl.errors import ConfigError
from tests.backends.local import quantise
from tests.backends.local.checkpoints import random_checkpoint, random_hybrid, random_mixture, random_windowed
from tests.backends.local.requests import ask

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": random_checkpoint,
    "qwen3_vl_moe": random_mixture,
    "qwen3_5": random_hybrid,
    "qwen3_5_moe": lambda folder: random_hybrid(folder, mixture=True),
    "qwen2_5_vl": random_windowed,
}


def made(model: str, folder: Path) -> Path:
    """A checkpoint of this type; skips where the installed transformers has no such model."""
    pytest.importorskip(f"transformers.models.{model}", reason=f"this transformers does not know {model}")
    return MODELS[model](folder)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AWQ": (quantise.awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "GPTQ": (quantise.gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "FP8": (
        quantise.fp8_blocks(16, 16),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
    ),
    "compressed-tensors": (
        quantise.pack_quantized(4, 16, symmetric=True),
        quantise.compressed("pack-quantized", num_bits=4, group_size=16),
    ),
}


def answers(folder: Path, *, together: bool = False, **settings: Any) -> list[tuple[int, ...]]:
    asked = [
        ask(*parts, max_tokens=8, return_token_ids=True).replace(cache_salt=str(number))
        for number, parts in enumerate([("Hello",), (3, "What is it?"), (4, "And this?", 5)])
    ]

    async def run() -> list[tuple[int, ...]]:
        async with LocalBackend(str(folder), device="cpu", kv_cache_bytes=32 << 20, **settings) as backend:
            if together:
                results = await asyncio.gather(*map(backend.generate, asked))
            else:
                results = [await backend.generate(request) for request in asked]
            return [result.choices[0].token_ids for result in results]

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_quantised_weights_answer_as_the_numbers_that_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, form: str
) -> None:
    # The widths of the small models are multiples of it.
    monkeypatch.setattr(quantise, "GROUP", 16)
    plain = made(model, tmp_path / "plain")
    folder = quantise.write_pair(plain, tmp_path / "quantised", *FORMS[form])
    assert answers(folder, dtype="float32") == answers(plain, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_in_bfloat16_answers_are_the_same_alone_and_in_a_batch(tmp_path: Path, model: str) -> None:
    settings: dict[str, Any] = {"dtype": "bfloat16", "batch_invariant": True}
    folder = made(model, tmp_path / "model")
    assert answers(folder, **settings) == answers(folder, together=True, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_5", "qwen2_5_vl"])
def test_in_int8_answers_are_the_same_alone_and_in_a_batch(tmp_path: Path, model: str) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "quantize": "int8"}
    folder = made(model, tmp_path / "model")
    assert answers(folder, **settings) == answers(folder, together=True, **settings)


@pytest.mark.parametrize("model", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_int8_takes_no_mixture(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="takes no mixture of experts"):
        answers(made(model, tmp_path / "model"), quantize="int8")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_adapters_of_a_mixtures_attention_equal_peft(tmp_path: Path, model: str) -> None:
    pytest.importorskip("peft")
    from tests.backends.local.lora import LoraReference

    folder = made(model, tmp_path / "model")
    reference = LoraReference(folder)
    adapter = reference.add("shelf", tmp_path / "adapters", seed=1, target_modules=["q_proj", "v_proj", "o_proj"])
    request = ask(3, "What is it?", max_tokens=12, return_token_ids=True)

    async def run(name: str) -> list[int]:
        async with LocalBackend(
            str(folder), device="cpu", dtype="float32", kv_cache_bytes=32 << 20, adapter={"shelf": str(adapter)}
        ) as backend:
            return list((await backend.generate(request.replace(adapter=name))).choices[0].token_ids)

    for name in ("shelf", ""):
        assert asyncio.run(run(name)) == reference.answer(request, name or None)
