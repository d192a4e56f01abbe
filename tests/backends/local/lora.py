"""LoRA adapters of random weights, as PEFT saves them, and PEFT's own answers with them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from tests.backends.local.reference import Reference

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.types import ChatRequest

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STATES = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
TOWER = ["attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"]


class LoraReference(Reference):
    """transformers' model with PEFT's adapters on it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._base = self.model
        self._peft: Any = None

    def add(self, name: str, folder: Path, *, seed: int, **config: Any) -> Path:
        """Save an adapter of random weights, strong enough that it changes answers; return its folder."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TEXT, **config})
        with warnings.catch_warnings():
            # PEFT asks transformers for what that has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            if self._peft is None:
                self._peft = get_peft_model(self.model, settings, adapter_name=name)
            else:
                self._peft.add_adapter(name, settings)
        torch.manual_seed(seed)
        for path, weight in self._peft.named_parameters():
            if f".{name}." in path:
                weight.data = torch.randn_like(weight) * weight.shape[1] ** -0.5
        self._peft.save_pretrained(str(folder), selected_adapters=[name])
        return folder / name

    def inputs(self, request: ChatRequest) -> dict[str, Any]:
        # Which of them the model takes is seen by its own signature, not by PEFT's.
        with_adapters, self.model = self.model, self._base
        try:
            return super().inputs(request)
        finally:
            self.model = with_adapters

    def answer(self, request: ChatRequest, name: str | None) -> list[int]:
        """Return the ids of the greedy answer with the adapter `name`; None: of the model itself."""
        self.model = self._peft
        if name is None:
            with self._peft.disable_adapter():
                return list(self.generate(request))
        self._peft.set_adapter(name)
        return list(self.generate(request))
