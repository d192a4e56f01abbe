"""The bundled model with one thing changed, as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qvl.tiny import WEIGHTS

Weights = dict[str, torch.Tensor]


def copied(folder: Path) -> Path:
    shutil.copytree(WEIGHTS, folder)
    return folder


def _edit(path: Path, change: Callable[[dict], None]) -> None:
    whole = json.loads(path.read_text(encoding="utf-8"))
    change(whole)
    path.write_text(json.dumps(whole), encoding="utf-8")


def _weights(folder: Path, change: Callable[[Weights], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_template(folder: Path, change: Callable[[str], str]) -> Path:
    """A folder whose chat template is changed."""
    copied(folder)
    for name in ("chat_template.json", "tokenizer_config.json"):
        _edit(folder / name, lambda whole: whole.update(chat_template=change(whole["chat_template"])))
    return folder


def with_patches_of_14(folder: Path) -> Path:
    """A folder whose vision tower cuts pictures into patches of 14 pixels; its kernel is resampled to that size."""
    copied(folder)
    _edit(folder / "config.json", lambda whole: whole["vision_config"].update(patch_size=14))
    _edit(folder / "preprocessor_config.json", lambda whole: whole.update(patch_size=14))

    def resample(tensors: Weights) -> None:
        (name,) = [name for name in tensors if name.endswith("patch_embed.proj.weight")]
        kernel = tensors[name].float()
        size = (kernel.shape[2], 14, 14)
        tensors[name] = torch.nn.functional.interpolate(kernel, size=size, mode="trilinear").to(tensors[name].dtype)

    _weights(folder, resample)
    return folder


def with_another_layer(folder: Path) -> Path:
    """A folder with one layer of other weights, as an adapter that one side lacks leaves them."""
    copied(folder)

    def change(tensors: Weights) -> None:
        (name,) = [name for name in tensors if name.endswith("language_model.layers.2.mlp.down_proj.weight")]
        dice = torch.Generator().manual_seed(0)
        low, high = (torch.randn(size, 4, generator=dice) for size in tensors[name].shape)
        update = (low @ high.T) * tensors[name].float().std() * 0.3
        tensors[name] = (tensors[name].float() + update).to(tensors[name].dtype)

    _weights(folder, change)
    return folder


def with_another_tokenizer(folder: Path) -> Path:
    """A folder with an earlier revision of the tokenizer: its last merges are not there yet, the vocabulary is."""
    copied(folder)
    _edit(folder / "tokenizer.json", lambda whole: whole["model"].update(merges=whole["model"]["merges"][:300]))
    return folder


def with_another_budget(folder: Path) -> Path:
    """A folder whose processor gives pictures at most a third of the pixels."""
    copied(folder)
    budget = {"min_pixels": 4096, "max_pixels": 5120, "size": {"shortest_edge": 4096, "longest_edge": 5120}}
    _edit(folder / "preprocessor_config.json", lambda whole: whole.update(budget))
    return folder


def with_another_end(folder: Path, token: int) -> Path:
    """A folder whose generation_config.json has answers end at `token` too."""
    copied(folder)
    _edit(folder / "generation_config.json", lambda whole: whole["eos_token_id"].append(token))
    return folder
