"""Adapters that cannot be applied whole are refused in one line, before the model is loaded where that can be seen."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from qvl.backends.local.backend import LocalBackend
from qvl.errors import ConfigError
from tests.backends.local.checkpoints import random_hybrid
from tests.backends.lora_files import QUERY, pair, saved

if TYPE_CHECKING:
    from pathlib import Path


def refusal(adapter: object, model: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(LocalBackend(None if model is None else str(model), device="cpu", adapter=adapter).open())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def query() -> dict[str, torch.Tensor]:
    from qvl.backends.local.model.model_folder import bundled_folder

    text = json.loads((bundled_folder() / "config.json").read_text())["text_config"]
    return pair(QUERY, text["hidden_size"], text["num_attention_heads"] * text["head_dim"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "IA3"}, "is IA3, not LORA"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save (lm_head), which is not supported"),
        ({"use_dora": True}, "has use_dora (true), which is not supported"),
        ({"bias": "all"}, "has bias=all, which is not supported"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "has target_parameters (mlp.experts.gate_up_proj)"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights=pissa_niter_4, which changed the base"),
        ({"r": 4}, "has rank 2 at model.language_model.layers.0.self_attn.q_proj, and another in adapter_config.json"),
        ({"lora_alpha": None}, "has r=2 and lora_alpha=None"),
        ({"target_modules": ["q_proj"]}, "lacks the weights of"),
        ({"auto_mapping": {"base_model_class": "Qwen2VLForConditionalGeneration"}}, "is for a Qwen2VLForConditional"),
    ],
)
def test_settings_that_are_not_honoured(
    tmp_path: Path, query: dict[str, torch.Tensor], settings: dict[str, Any], told: str
) -> None:
    assert told in refusal(saved(tmp_path / "a", query, **settings))


def test_targets_that_are_not_applied_are_named(tmp_path: Path, query: dict[str, torch.Tensor]) -> None:
    head = {**query, **pair("base_model.model.lm_head", 8, 8)}
    assert "changes 1 modules that this engine does not adapt (lm_head)" in refusal(saved(tmp_path / "a", head))
    embedded = {**query, "base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.zeros(2, 8)}
    assert "embed_tokens.lora_embedding_A" in refusal(saved(tmp_path / "b", embedded))
    half = {name: tensor for name, tensor in query.items() if "lora_A" in name}
    assert "has no pair of lora_A [rank, inputs] and lora_B" in refusal(saved(tmp_path / "c", half))


def test_another_models_adapter(tmp_path: Path, query: dict[str, torch.Tensor]) -> None:
    deep = pair(QUERY.replace(".0.", ".99."), 8, 8)
    base = {"base_model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct"}
    told = refusal(saved(tmp_path / "a", deep, **base))
    assert "changes 1 modules that are no linear layers of this model (model.language_model.layers.99" in told
    assert "(it was trained on Qwen/Qwen3-VL-8B-Instruct)" in told
    assert "is 8 to 8 wide at model.language_model.layers.0" in refusal(saved(tmp_path / "b", pair(QUERY, 8, 8)))


def test_files_that_are_missing_pickled_or_broken(tmp_path: Path, query: dict[str, torch.Tensor]) -> None:
    assert "not found" in refusal(tmp_path / "absent")
    assert "adapter 'shelf' (" in refusal({"shelf": str(tmp_path)})
    assert "lacks adapter_config.json" in refusal(tmp_path)
    whole = saved(tmp_path / "a", query)
    weights = whole / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read: it is cut short" in refusal(whole)
    weights.write_bytes(b"no tensors")
    assert "adapter_model.safetensors cannot be read" in refusal(whole)
    weights.unlink()
    assert "lacks adapter_model.safetensors" in refusal(whole)
    (whole / "adapter_model.bin").write_bytes(b"")
    assert "has its weights in adapter_model.bin, not in safetensors" in refusal(whole)
    (whole / "adapter_config.json").write_text("[]")
    assert "is not a JSON object" in refusal(whole)


@pytest.mark.parametrize("adapter", ["", 3, {"": "a"}, {"a": ""}, ["a"]])
def test_what_is_no_adapter(adapter: object) -> None:
    with pytest.raises(ConfigError, match="invalid adapter="):
        LocalBackend(adapter=adapter)  # type: ignore[arg-type]


def test_an_adapter_of_another_model_of_the_hub(tmp_path: Path, query: dict[str, torch.Tensor]) -> None:
    from qvl.backends.local.model.adapter_files import read_adapter

    saved(tmp_path / "a", query, base_model_name_or_path="unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit")
    adapter = read_adapter("", str(tmp_path / "a"))
    adapter.refuse_base("Qwen/Qwen3-VL-8B-Instruct")
    adapter.refuse_base(None)
    with pytest.raises(ConfigError, match=r"was trained on unsloth/Qwen3-VL-8B.*, not on Qwen/Qwen3-VL-8B-Thinking"):
        adapter.refuse_base("Qwen/Qwen3-VL-8B-Thinking")


def test_experts_are_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.qwen3_5", reason="this transformers does not know Qwen3.5")
    folder = random_hybrid(tmp_path / "model", mixture=True)
    path = "base_model.model.model.language_model.layers.0.mlp.shared_expert.up_proj"
    told = refusal(saved(tmp_path / "a", pair(path, 96, 64)), folder)
    assert "does not adapt (model.language_model.layers.0.mlp.shared_expert.up_proj)" in told


def test_equal_copies_have_one_identity(tmp_path: Path, query: dict[str, torch.Tensor]) -> None:
    one, other = saved(tmp_path / "a", query), saved(tmp_path / "b", query)
    (other / "README.md").write_text("a card")
    identities = [LocalBackend(device="cpu", adapter=str(folder)).peek_identity() for folder in (one, other)]
    assert identities[0] == identities[1]
    changed = load_file(other / "adapter_model.safetensors")
    saved(other, {name: tensor + 1 for name, tensor in changed.items()})
    assert LocalBackend(device="cpu", adapter=str(other)).peek_identity() != identities[0]
    assert LocalBackend(device="cpu").peek_identity() != identities[0]
