"""Sizes the KV memory and the batch by the memory that is free after loading. No torch."""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import TYPE_CHECKING, Final

from qvl.backends.local.scheduling.kv_cache import SMALLEST, STATES_EACH, KvCache
from qvl.backends.local.scheduling.prefix_cache import PrefixIndex
from qvl.backends.local.scheduling.scheduler import Scheduler
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.scheduling.step_budget import StepBudget

# Share of the memory that is free after loading. On the CPU other programs live in the same memory.
KV_SHARE: Final = {"cpu": 0.3, "mps": 0.5, "cuda": 0.8, "npu": 0.8}
NUM_SEQS: Final = {"cpu": 32, "mps": 32, "cuda": 256, "npu": 128}
BATCHED_TOKENS: Final = {"cpu": 512, "mps": 1024, "cuda": 8192, "npu": 8192}
# Steps of fewer tokens are filled up with guesses. A CPU reads weights in about the same time for 8 rows as for one;
# where steps are recorded, one with guesses is not.
DRAFT_ROWS: Final = {"cpu": 8, "mps": 0, "cuda": 0, "npu": 0}
ALL_DRAFT_ROWS: Final = 32
# Of the KV memory, what rows of kept prefixes may take; running sequences take it back when they need it.
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
    budget: StepBudget,
    speculate: str,
) -> tuple[Scheduler, int]:
    """Return (scheduler with its KV cache, context length in tokens); arguments as in LocalBackend.

    Raises:
        ConfigError: max_model_len exceeds the model's context, or the KV memory is too small for one request.
    """
    kind = runner.device.type
    share = kv_memory_share or KV_SHARE[kind]
    layout = runner.storage.layout
    # Of several cards, the one with the least memory for the layers that it has decides.
    parts = Counter(device.index for device in layout.devices)
    free = min(runner.device.memory(card)[0] * len(layout.devices) // part for card, part in parts.items())
    room = kv_cache_bytes or int(free * share)
    per_token = layout.bytes_per_token
    state_tokens = ceil(layout.bytes_per_state / per_token)
    of_states = STATES_EACH * state_tokens
    tokens = room // per_token - of_states
    longest = int(checkpoint.model.config.text_config.max_position_embeddings)
    context = max_model_len or min(longest, tokens // SMALLEST * SMALLEST)
    if context > longest:
        raise ConfigError(f"max_model_len={context} is more than the model's {longest} tokens", param="max_model_len")
    if context < 1 or context > tokens:
        need = max_model_len or SMALLEST
        raise ConfigError(
            f"not enough KV memory: {room} bytes hold {tokens} tokens, but one request may have {need}",
            hint=f"lower max_model_len, or set kv_cache_bytes to {(need + of_states) * per_token} bytes or more",
            param="kv_cache_bytes",
        )
    seqs = max_num_seqs or NUM_SEQS[kind]
    batched = max(max_num_batched_tokens or BATCHED_TOKENS[kind], seqs + 1)
    kept = int(tokens * PREFIX_PART) if prefix_cache else 0
    guesses = {"auto": DRAFT_ROWS[kind], "on": ALL_DRAFT_ROWS, "off": 0}[speculate]
    key_cost = runner.decoder.key_cost / runner.decoder.cost
    kv = KvCache(room // per_token, context, state_tokens=state_tokens)
    prefixes = PrefixIndex(kv, kept)
    return Scheduler(kv, prefixes, seqs, batched, budget, key_cost, guesses, shares=runner.shares_rows), context
