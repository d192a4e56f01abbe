"""The size of a model by its config.json: weights, those that a token reads, and what it keeps as KV. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.types import JsonObject

_SMALL_TOWER: Final = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24}
_LARGE_TOWER: Final = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27}
_TEXT_SIZES: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_VISION_SIZES: Final = ("hidden_size", "intermediate_size", "depth", "patch_size", "spatial_merge_size")
_LARGEST: Final = 2**31
_MOST_LAYERS: Final = 10_000


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The size of a model, in numbers: of the text layers, of the embedding and of the pictures' tower.

    Args:
        layers: weights of all text layers.
        active: weights of text layers that one token uses; of a mixture, the router and the selected experts.
        embedding: weights of the embedding; the head has as many, which every token reads.
        tied: the head is the embedding.
        tower: weights of the pictures' tower, with its mergers.
        kv_per_token: numbers that a token keeps as keys and values.
        state: numbers that a sequence keeps beside, whatever its length.
        longest: tokens of the longest context.
    """

    layers: int
    active: int
    embedding: int
    tied: bool
    tower: int
    kv_per_token: int
    longest: int
    state: int = 0

    @property
    def parameters(self) -> int:
        return self.layers + self.embedding * (1 if self.tied else 2) + self.tower

    @property
    def mixture(self) -> bool:
        return self.active < self.layers

    @property
    def read_per_token(self) -> int:
        return self.active + self.embedding


def size_of(config: JsonObject, name: str) -> ModelSize:
    """Return the size of the checkpoint `name`.

    Raises:
        ConfigError: a size is missing in its config.json.
    """
    try:
        # Qwen2.5-VL is published with the text's sizes beside the tower's.
        text, vision = config.get("text_config") or config, _tower_sizes(config["vision_config"])
        _check_sizes(text, _TEXT_SIZES)
        _check_sizes(vision, _VISION_SIZES)
        return _size(text, vision, bool(config.get("tie_word_embeddings")))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise ConfigError(f"{name}: config.json does not say how large the model is: {exc!r}", param="model") from exc


def _check_sizes(body: JsonObject, names: tuple[str, ...]) -> None:
    """Raise ValueError for a size that is not a whole number of a model: a file may say anything."""
    for name in names:
        size, most = body[name], _MOST_LAYERS if name in ("num_hidden_layers", "depth") else _LARGEST
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most:
            raise ValueError(f"{name} is {str(size)[:40]}")


def _size(text: JsonObject, vision: JsonObject, tied: bool) -> ModelSize:
    hidden, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head = text.get("head_dim") or hidden // heads
    # Qwen3.5 has a gate for each query.
    gated = "linear_num_value_heads" in text or "linear_attention" in (text.get("layer_types") or ())
    queries = 3 * heads if gated else 2 * heads
    attention = hidden * head * (queries + 2 * kv_heads) + 2 * hidden + 2 * head
    layers = active = state = with_keys = 0
    for layer in range(text["num_hidden_layers"]):
        mixing, kept = (attention, 0) if _attends(text, layer) else _recalling(text)
        state, with_keys = state + kept, with_keys + (not kept)
        # transformers 5 saves the number under the second name.
        experts = text.get("num_experts") or text.get("num_local_experts") or 0
        if (
            experts
            and layer not in text.get("mlp_only_layers", ())
            and not ((layer + 1) % text.get("decoder_sparse_step", 1))
        ):
            expert, router = 3 * hidden * text["moe_intermediate_size"], hidden * experts
            always = mixing + router + 3 * hidden * (text.get("shared_expert_intermediate_size") or 0)
            layers += always + experts * expert
            active += always + text["num_experts_per_tok"] * expert
        else:
            layers += mixing + 3 * hidden * text["intermediate_size"]
            active += mixing + 3 * hidden * text["intermediate_size"]
    return ModelSize(
        layers=layers,
        active=active,
        embedding=text["vocab_size"] * hidden,
        tied=tied,
        tower=_tower(vision, text["hidden_size"]),
        kv_per_token=2 * with_keys * kv_heads * head,
        longest=text["max_position_embeddings"],
        state=state,
    )


def _attends(text: JsonObject, layer: int) -> bool:
    """Return True if a layer is attention, which keeps keys and values; False if it keeps a state (Qwen3.5)."""
    if "linear_num_value_heads" not in text:
        return True
    kinds = text.get("layer_types")
    if kinds:
        return bool(kinds[layer] == "full_attention")
    return (layer + 1) % int(text.get("full_attention_interval") or 4) == 0


def _recalling(text: JsonObject) -> tuple[int, int]:
    """Return the weights of a gated delta rule, and the numbers of a sequence's state in it."""
    hidden, heads, taps = text["hidden_size"], text["linear_num_value_heads"], text.get("linear_conv_kernel_dim", 4)
    values = heads * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    weights = hidden * (channels + 2 * values + 2 * heads) + channels * taps + 2 * heads + 2 * hidden
    return weights, values * text["linear_key_head_dim"] + channels * (taps - 1)


def _tower_sizes(vision: JsonObject) -> JsonObject:
    """Return the tower's sizes, with those that Qwen2.5-VL does not have or leaves to transformers' defaults."""
    if "window_size" not in vision:
        return vision
    named = {"in_channels": vision.get("in_chans", 3), "num_position_embeddings": 1, "temporal_patch_size": 2}
    return {**named, **vision}


def _tower(vision: JsonObject, out: int) -> int:
    wide, merged = vision["hidden_size"], vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    block = 4 * wide * wide + 2 * wide * vision["intermediate_size"] + 9 * wide + vision["intermediate_size"]
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    merger = merged * merged + merged * out + merged + out
    if "window_size" in vision:
        # Qwen2.5-VL's second half of a block has a gate.
        block += wide * vision["intermediate_size"]
    mergers = 1 + len(vision.get("deepstack_visual_indexes", ()))
    return int(vision["depth"] * block + (patch + vision["num_position_embeddings"]) * wide + mergers * merger)


def _config(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, experts: int = 0) -> JsonObject:
    small = hidden < 4096 and not experts
    text = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
        **({"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": mlp} if experts else {}),
        "intermediate_size": mlp,
    }
    vision = {
        **(_SMALL_TOWER if small else _LARGE_TOWER),
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 0, 0],
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": small}


def _hybrid(
    layers: int, hidden: int, heads: int, kv_heads: int, values: int, mlp: int, experts: tuple[int, int] = (0, 0)
) -> JsonObject:
    """Return the sizes of a Qwen3.5; `values` are the heads of its gated delta rules, `experts` all and those used."""
    tower = {"hidden_size": 768, "intermediate_size": 3072, "depth": 12} if hidden == 1024 else _SMALL_TOWER
    tied = not experts[0] and hidden < 4096
    config = _config(layers, hidden, heads, kv_heads, mlp)
    text = {
        **config["text_config"],
        "head_dim": 256,
        "vocab_size": 248_320,
        "linear_num_value_heads": values,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "linear_key_head_dim": 128,
    }
    if experts[0]:
        text |= {
            "num_experts": experts[0],
            "num_experts_per_tok": experts[1],
            "moe_intermediate_size": mlp,
            "shared_expert_intermediate_size": mlp,
        }
    vision = {**config["vision_config"], **(tower if tied else _LARGE_TOWER), "deepstack_visual_indexes": []}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


# The sizes in the config.json of each published model, by its name without what it was tuned for.
PUBLISHED_CONFIGS: Final = {
    "Qwen3-VL-2B": _config(28, 2048, 16, 8, 6144),
    "Qwen3-VL-4B": _config(36, 2560, 32, 8, 9728),
    "Qwen3-VL-8B": _config(36, 4096, 32, 8, 12288),
    "Qwen3-VL-32B": _config(64, 5120, 64, 8, 25600),
    "Qwen3-VL-30B-A3B": _config(48, 2048, 32, 4, 768, experts=128),
    "Qwen3-VL-235B-A22B": _config(94, 4096, 64, 4, 1536, experts=128),
    "Qwen3.5-0.8B": _hybrid(24, 1024, 8, 2, 16, 3584),
    "Qwen3.5-2B": _hybrid(24, 2048, 8, 2, 16, 6144),
    "Qwen3.5-4B": _hybrid(32, 2560, 16, 4, 32, 9216),
    "Qwen3.5-9B": _hybrid(32, 4096, 16, 4, 32, 12288),
    "Qwen3.5-27B": _hybrid(64, 5120, 24, 4, 48, 17408),
    "Qwen3.5-35B-A3B": _hybrid(40, 2048, 16, 2, 32, 512, experts=(256, 8)),
    "Qwen3.5-122B-A10B": _hybrid(48, 3072, 32, 2, 64, 1024, experts=(256, 8)),
    "Qwen3.5-397B-A17B": _hybrid(60, 4096, 32, 2, 64, 1024, experts=(512, 10)),
}
PUBLISHED: Final = {name: size_of(config, name) for name, config in PUBLISHED_CONFIGS.items()}
# Qwen3-VL was published as Instruct and Thinking; a Qwen3.5 is told to think by its template.
_PUBLISHED_NAME: Final = re.compile(
    r"(?:.*/)?(?P<name>qwen3-vl-[^/]+?(?=-(?:instruct|thinking))|qwen3\.5-[0-9][^/-]*(?:-a[0-9]+b)?)"
    r"(?:-instruct|-thinking)?(?P<one_byte>-fp8|-w8a8(?:-mxfp8)?)?",
    re.IGNORECASE,
)


def published_name(model: str) -> tuple[str, bool] | None:
    """Return (name in PUBLISHED, True if its weights are kept in a byte each) of a hub id; None if it is not there."""
    match = _PUBLISHED_NAME.fullmatch(model)
    if match is None:
        return None
    known = {name.lower(): name for name in PUBLISHED}
    name = known.get(match["name"].lower())
    return None if name is None else (name, match["one_byte"] is not None)


def published_id(name: str) -> str:
    """Return the hub id of a name in PUBLISHED, as it is asked for first."""
    return f"Qwen/{name}-Instruct" if name.startswith("Qwen3-VL") else f"Qwen/{name}"
