"""An estimate of what a checkpoint takes on an NPU: weights, keys and values of one full context, a large picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.ascend import chips, devices, npu_smi
from qvl.ascend.host import Host
from qvl.ascend.report import Finding
from qvl.backends.local.model.checkpoint_files import image_settings
from qvl.backends.local.model.model_size import size_of
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.types import JsonObject

GIB: Final = 2**30
_BYTES: Final = 2
_PARALLEL: Final = (1, 2, 4, 8, 16)
_PUBLISHED_PIXELS: Final = 16_777_216
# An estimate, not measured on an NPU: the tower keeps the input, the output and the widened numbers of a layer at a
# time, and a step keeps eight rows of the hidden size for each of its tokens.
_STEP_COPIES: Final = 8
_TOWER_COPIES: Final = 3


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The bytes that a model takes: its files of weights, one context of `tokens`, and the largest picture allowed."""

    weights: int
    context: int
    picture: int
    tokens: int

    def on_each(self, npus: int) -> float:
        """Return the bytes on each of `npus` that share weights and context; the picture's part is not shared."""
        return (self.weights + self.context) / npus + self.picture


def need_of(folder: Path, tokens: int) -> MemoryNeed | None:
    """Return an estimate for the checkpoint in `folder` with a context of `tokens`; None if its config lacks sizes."""
    try:
        config: JsonObject = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = size_of(config, folder.name)
        vision, text = config["vision_config"], config["text_config"]
        wide, patch = int(vision["intermediate_size"]) + 4 * int(vision["hidden_size"]), int(vision["patch_size"])
        hidden = int(text["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    if not stored:
        return None
    patches = _largest_pixels(folder) // (patch * patch)
    context = min(tokens, size.longest)
    return MemoryNeed(
        weights=stored,
        context=size.kv_per_token * context * _BYTES,
        picture=patches * wide * _BYTES * _TOWER_COPIES + chips.STEP_TOKENS * hidden * _BYTES * _STEP_COPIES,
        tokens=context,
    )


def check(host: Host, folder: Path) -> Iterator[Finding]:
    """Check that weights, a full context and the largest picture fit the memory that npu-smi shows."""
    table = devices.query(host)
    chip = devices.chip_of(host, table) or chips.DEFAULT
    npus = [npu for npu in _visible(host, table) if npu.memory_total_mb]
    need = need_of(folder, chip.max_model_len) if npus else None
    if need is None:
        return
    room = min(npu.memory_total_mb or 0 for npu in npus) * 2**20 * chips.MEMORY_SHARE
    free = sorted((npu.memory_free_mb or 0 for npu in npus), reverse=True)
    fitting = next((count for count in _PARALLEL if count <= len(npus) and need.on_each(count) <= room), None)
    text = (
        f"about {need.on_each(1) / GIB:.1f} GiB: weights {need.weights / GIB:.1f}, a context of {need.tokens} tokens "
        f"{need.context / GIB:.1f}, pictures {need.picture / GIB:.1f}"
    )
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
            f"{text}; {'one NPU gives' if len(npus) == 1 else f'each of {len(npus)} NPUs gives'} {room / GIB:.1f} GiB",
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
    return int(pixels) if isinstance(pixels, int | float) and math.isfinite(pixels) else _PUBLISHED_PIXELS
