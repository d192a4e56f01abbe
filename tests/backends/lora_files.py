"""LoRA adapters written as PEFT writes them, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Of the bundled model's first layer.
QUERY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def saved(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pair(path: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, torch.Tensor]:
    both = {"A": torch.zeros(rank, inputs), "B": torch.zeros(outputs, rank)}
    return {f"{path}.lora_{half}.weight": tensor for half, tensor in both.items()}


def random_adapter(folder: Path, *, seed: int, rank: int = 4) -> Path:
    """Writes an adapter of random weights for all projections of the bundled model's text; returns `folder`."""
    from qvl.backends.local.model.model_folder import bundled_folder

    text = json.loads((bundled_folder() / "config.json").read_text())["text_config"]
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    queries, keys = (text[f"num_{kind}_heads"] * text["head_dim"] for kind in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    torch.manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(text["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            tensors |= pair(f"base_model.model.model.language_model.layers.{layer}.{name}", inputs, outputs, rank)
    tensors = {name: torch.randn_like(tensor) * 0.4 * tensor.shape[1] ** -0.5 for name, tensor in tensors.items()}
    targets = sorted(name.rpartition(".")[2] for name in shapes)
    return saved(folder, tensors, r=rank, lora_alpha=2 * rank, target_modules=targets)
