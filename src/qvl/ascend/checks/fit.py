"""An estimate of what a checkpoint takes on an NPU: weights, keys and values of one full context, a large picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.ascend import chips, devices, npu_smi
from qvl.ascend.host import Host
from qvl.ascend.report import Finding
from qvl.backends.local.model.checkpoint_files import image_settings, read_json
from qvl.backends.local.model.model_size import PUBLISHED_CONFIGS, published_name, size_of
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.backends.local.model.model_size import ModelSize
    from qvl.types import JsonObject

GIB: Final = 2**30
# Tokens of context below which a model is of no use: a picture, a question and an answer.
SHORTEST_CONTEXT: Final = 4096
# What a request is reckoned to keep at once: a picture of one megapixel (1024), a question and an answer.
REQUEST_TOKENS: Final = 1280
_BYTES: Final = 2
_PARALLEL: Final = (1, 2, 4, 8, 16)
_PUBLISHED_PIXELS: Final = 16_777_216
# An estimate, not measured on an NPU: the tower keeps the input, the output and the widened numbers of a layer at a
# time, and a step keeps eight rows of the hidden size for each of its tokens.
_STEP_COPIES: Final = 8
_TOWER_COPIES: Final = 3


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The bytes that a model takes: its files of weights, keys and values of a token, and the largest picture allowed.

    `tokens` is the context that is reckoned with.
    """

    weights: int
    per_token: int
    picture: int
    tokens: int

    @property
    def context(self) -> int:
        """The bytes of one context of `tokens`."""
        return self.per_token * self.tokens

    def on_each(self, npus: int) -> float:
        """Return the bytes on each of `npus` that share weights and context; the picture's part is not shared."""
        return (self.weights + self.context) / npus + self.picture

    def tokens_in(self, npus: int, room: float) -> int:
        """Return the tokens whose keys and values `npus` hold at once beside all else, each with `room` bytes."""
        return max(0, int((npus * (room - self.picture) - self.weights) / self.per_token))

    def __str__(self) -> str:
        return (
            f"about {self.on_each(1) / GIB:.1f} GiB: weights {self.weights / GIB:.1f}, a context of {self.tokens} "
            f"tokens {self.context / GIB:.1f}, pictures {self.picture / GIB:.1f}"
        )


def room_in(memory_mb: int) -> float:
    """Return the bytes that vllm takes of an NPU with `memory_mb` MiB, by the recipe's share."""
    return memory_mb * 2**20 * chips.MEMORY_SHARE


def given(npus: int, room: float) -> str:
    """Return a clause that says how much room there is: `one NPU gives 19.1 GiB`."""
    return f"{'one NPU gives' if npus == 1 else f'each of {npus} NPUs gives'} {room / GIB:.1f} GiB"


def need_of(model: Path | str, tokens: int) -> MemoryNeed | None:
    """Return an estimate for a checkpoint's folder or a hub id, with a context of `tokens`; None if it is not known.

    Known are folders whose config.json has sizes, and the ids of published Qwen3-VL and Qwen3.5.
    """
    config = config_of(model)
    if config is None:
        return None
    try:
        size = size_of(config, str(model))
        if isinstance(model, str):
            known = published_name(model)
            packed = size.layers if known and known[1] else 0
            return _need(config, size, size.parameters * _BYTES - packed, _PUBLISHED_PIXELS, tokens)
        stored = sum(path.stat().st_size for path in model.glob("*.safetensors") if path.is_file())
        return _need(config, size, stored, _largest_pixels(model), tokens) if stored else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, ConfigError):
        return None


def config_of(model: Path | str) -> JsonObject | None:
    """Return config.json of a checkpoint's folder, or what it has of sizes for a published hub id; None if unknown."""
    if isinstance(model, str):
        known = published_name(model)
        return PUBLISHED_CONFIGS[known[0]] if known else None
    try:
        return read_json(model / "config.json", model.name)
    except ConfigError:
        return None


def heads_of(model: Path | str) -> int | None:
    """Return the number of attention heads, which tensor parallel workers divide among them; None if unknown."""
    text = (config_of(model) or {}).get("text_config")
    heads = text.get("num_attention_heads") if isinstance(text, dict) else None
    return heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else None


def _need(config: JsonObject, size: ModelSize, weights: int, pixels: int, tokens: int) -> MemoryNeed:
    vision, hidden = config["vision_config"], int(config["text_config"]["hidden_size"])
    wide, patch = int(vision["intermediate_size"]) + 4 * int(vision["hidden_size"]), int(vision["patch_size"])
    patches = pixels // (patch * patch)
    return MemoryNeed(
        weights=weights,
        per_token=size.kv_per_token * _BYTES,
        picture=patches * wide * _BYTES * _TOWER_COPIES + chips.STEP_TOKENS * hidden * _BYTES * _STEP_COPIES,
        tokens=min(tokens, size.longest),
    )


def check(host: Host, folder: Path) -> Iterator[Finding]:
    """Check that weights, a full context and the largest picture fit the memory that npu-smi shows."""
    table = devices.query(host)
    chip = devices.chip_of(host, table) or chips.DEFAULT
    npus = [npu for npu in _visible(host, table) if npu.memory_total_mb]
    need = need_of(folder, chip.max_model_len) if npus else None
    if need is None:
        return
    room = room_in(min(npu.memory_total_mb or 0 for npu in npus))
    free = sorted((npu.memory_free_mb or 0 for npu in npus), reverse=True)
    fitting = next((count for count in _PARALLEL if count <= len(npus) and need.on_each(count) <= room), None)
    text = str(need)
    detail = {
        "weights": need.weights,
        "context": need.context,
        "picture": need.picture,
        "tokens": need.tokens,
        "room_per_npu": int(room),
        "npus": len(npus),
    }
    smaller = "--max-model-len 8192, smaller pictures (QVL_MAX_PIXELS), or quantised weights"
    if fitting is None:
        over = need.weights / max(count for count in _PARALLEL if count <= len(npus)) > room
        yield Finding(
            "fit",
            "fail" if over else "warn",
            f"{text}; {given(len(npus), room)}",
            detail,
            f"use more NPUs, {'a smaller model or quantised weights' if over else smaller}",
        )
        return
    # qvl's own engine uses one NPU; several share a model in vllm only.
    with_engine = "it" if fitting == 1 else "with --engine vllm it"
    where = "on one NPU" if fitting == 1 else f"on {fitting} NPUs together (tensor parallel {fitting})"
    if need.on_each(fitting) > free[fitting - 1] * 2**20:
        text += f"; {with_engine} fits {where}, but {free[fitting - 1] / 1024:.1f} GiB are free"
        yield Finding.warn("fit", text, f"stop what holds the memory, or {smaller}", detail)
    else:
        yield Finding.ok("fit", f"{text}; {with_engine} fits {where}", detail)


def _visible(host: Host, table: npu_smi.NpuSmi | None) -> list[npu_smi.Npu]:
    npus = list(table.npus) if table else []
    text = host.environ.get(devices.VISIBLE_DEVICES)
    return npus if text is None else [npus[number] for number in devices.parse_visible(text).read if number < len(npus)]


def _largest_pixels(folder: Path) -> int:
    try:
        settings = image_settings(folder, folder.name)
    except ConfigError:
        return _PUBLISHED_PIXELS
    size = settings.get("size")
    pixels = settings.get("max_pixels") or (size.get("longest_edge") if isinstance(size, dict) else None)
    if isinstance(pixels, int | float) and math.isfinite(pixels) and pixels > 0:
        return int(pixels)
    return _PUBLISHED_PIXELS
