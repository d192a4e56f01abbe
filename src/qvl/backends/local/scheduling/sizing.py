"""How much the engine may hold and run at once, from the memory that is free after loading. No torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from qvl.backends.local.scheduling.kv_cache import SMALLEST, KvCache
from qvl.backends.local.scheduling.prefix_cache import BLOCK, PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.backends.local.model.model_runner import Runner

# Share of the memory that is free after loading. On the CPU other programs live in the same memory.
KV_SHARE: Final = {"cpu": 0.3, "mps": 0.5, "cuda": 0.8, "npu": 0.8}
NUM_SEQS: Final = {"cpu": 32, "mps": 32, "cuda": 256, "npu": 128}
BATCHED_TOKENS: Final = {"cpu": 512, "mps": 1024, "cuda": 8192, "npu": 8192}
PREFIX_PART: Final = 0.25


def make_scheduler(
    runner: Runner,
    checkpoint: Checkpoint,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    kv_memory_share: float | None,
    kv_cache_bytes: int | None,
    prefix_cache: bool,
) -> tuple[Scheduler, int]:
    """Return the scheduler with its KV memory, and the tokens of context; arguments as of LocalBackend.

    Raises:
        ConfigError: the context is beyond the model's, or the memory holds not even one request.
    """
    kind = runner.device.type
    share = kv_memory_share or KV_SHARE[kind]
    layout = runner.storage.layout
    # Of several cards, the one with the least memory for the layers that it has decides.
    parts = Counter(device.index for device in layout.devices)
    free = min(runner.device.memory(card)[0] * len(layout.devices) // part for card, part in parts.items())
    room = kv_cache_bytes or int(free * share)
    per_token = layout.bytes_per_token
    tokens = int(room * (1 - PREFIX_PART if prefix_cache else 1)) // per_token
    longest = int(checkpoint.model.config.text_config.max_position_embeddings)
    context = max_model_len or min(longest, tokens // SMALLEST * SMALLEST)
    if context > longest:
        raise ConfigError(f"max_model_len={context} is more than the model's {longest}", param="max_model_len")
    if context < 1 or context > tokens:
        need = (max_model_len or SMALLEST) * per_token >> 20
        raise ConfigError(
            f"{room >> 20} MiB of KV memory hold {tokens} tokens, fewer than one request may have",
            hint=f"lower max_model_len or give kv_cache_bytes more than {need} MiB",
            param="kv_cache_bytes",
        )
    seqs = max_num_seqs or NUM_SEQS[kind]
    batched = max(max_num_batched_tokens or BATCHED_TOKENS[kind], seqs + 1)
    blocks = int(room * PREFIX_PART) // per_token // BLOCK if prefix_cache else 0
    return Scheduler(KvCache(tokens, context), PrefixIndex(blocks), seqs, batched), context
