"""LoRA adapters as vLLM wants them: settings of its engine, and a request for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.checkpoint_files import named

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from qvl.backends.local.model.adapter_files import AdapterFiles
    from qvl.types import JsonObject

# Largest ranks that vLLM reserves memory for.
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
TOWER: Final = "enable_tower_connector_lora"


def lora_settings(adapters: Mapping[str, AdapterFiles], engine_args: Mapping[str, object]) -> JsonObject:
    """Return the arguments of vLLM's engine for `adapters`; none without any.

    Raises:
        ConfigError: one changes the picture tower, which vLLM would pass over unless `engine_args` have it adapted.
    """
    if not adapters:
        return {}
    for adapter in adapters.values():
        if adapter.shows and not engine_args.get(TOWER):
            what = f"changes {len(adapter.shows)} modules of the picture tower ({named(set(adapter.shows))})"
            raise adapter.refused(f"{what}, which vLLM passes over", f"-O {TOWER}=true, where this vLLM has it")
    rank = max(adapter.rank for adapter in adapters.values())
    fitting = next((known for known in RANKS if known >= rank), rank)
    # One place more: vLLM's operators for CPUs add what the last one has to requests without an adapter.
    return {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": fitting}


def lora_requests(adapters: Mapping[str, AdapterFiles]) -> dict[str, LoRARequest]:
    """Return vLLM's request for each of `adapters`, by its name."""
    if not adapters:
        return {}
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(lora_name=name or "adapter", lora_int_id=number, lora_path=str(adapter.folder))
        for number, (name, adapter) in enumerate(adapters.items(), 1)
    }
