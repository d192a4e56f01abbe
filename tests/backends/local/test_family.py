"""A family of models is a row in one table, which needs no torch to be asked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("torch")

from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model import family
from qvl.errors import ConfigError
from qvl.testing.asking import ask


class Noted(family.ModelFamily):
    """A second family that says what it was asked for."""

    name = "Noted-VL"
    model_types = ("qwen3_vl",)

    def __init__(self) -> None:
        self.parts: list[str] = []

    def rules(self, settings: dict[str, Any]) -> Any:
        self.parts.append("rules")
        return super().rules(settings)

    def decoder(self, *args: Any, **kwargs: Any) -> Any:
        self.parts.append("decoder")
        return super().decoder(*args, **kwargs)

    def tower(self, *args: Any) -> Any:
        self.parts.append("tower")
        return super().tower(*args)


def test_a_model_is_built_of_the_parts_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted()
    monkeypatch.setattr(family, "FAMILIES", (noted,))

    async def answer() -> str:
        async with LocalBackend(device="cpu", dtype="float32", kv_cache_bytes=16 << 20) as backend:
            return (await backend.generate(ask("Describe the product.", max_tokens=4))).text

    assert asyncio.run(answer())
    assert noted.parts[:3] == ["rules", "decoder", "tower"]


def test_an_unknown_model_type_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert family.family_of("qwen3_vl_moe", "m").name == "Qwen3-VL"
    monkeypatch.setattr(family, "FAMILIES", (*family.FAMILIES, Noted()))
    with pytest.raises(ConfigError) as caught:
        family.family_of("llama", "m")
    assert str(caught.value) == (
        "unsupported model_type 'llama' of m: not a Qwen3-VL or Qwen3.5 or Qwen2.5-VL or Noted-VL (the local engine "
        "runs qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, qwen2_5_vl, qwen3_vl; 'vllm:…' and 'openvino:…' run what "
        "these libraries know, and an endpoint ('openai:…') what it serves)"
    )


def test_the_table_is_asked_without_torch() -> None:
    code = "import sys; from qvl.backends.local.model.family import family_of; family_of('qwen3_vl', 'm'); " + (
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
