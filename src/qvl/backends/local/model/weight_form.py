"""Recognises the quantised checkpoints that the local backend can read, by their settings alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.backends.local.model.checkpoint_files import quantisation, quantisation_settings
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.types import JsonObject

METHODS: Final = ("awq", "gptq", "compressed-tensors", "fp8")
COMPRESSED_FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# Bits of a code that fill a 32 bit word without a rest.
WORD_BITS: Final = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class WeightForm:
    """The quantised form of a checkpoint's weights.

    Args:
        name: the form's name in descriptions and in the identity, such as "awq, 4 bit".
        method: one of METHODS.
        bits: bits of a packed code; 0 if the dtype of the tensors decides.
        block: rows and columns that share one scale; None if the shape of the scales decides.
        zero_offset: the number to add to a stored zero point.
    """

    name: str
    method: str
    bits: int = 0
    block: tuple[int, int] | None = None
    zero_offset: int = 0


def weight_form(folder: Path, config: JsonObject, name: str) -> WeightForm | None:
    """Return how the weights of the checkpoint `name` are quantised; None where they are plain numbers.

    Raises:
        ConfigError: they are quantised in a form that the local backend does not read.
    """
    how = quantisation(folder, config)
    if how is None:
        return None
    settings = quantisation_settings(config)
    form = _form(how, settings) if isinstance(settings, dict) else "its config.json does not say in which form"
    if isinstance(form, WeightForm):
        return form
    raise ConfigError(
        f"{name} is quantised ({how}), which the local backend cannot run" + (f": {form}" if form else ""),
        hint="model 'vllm:…' runs it, or an endpoint that serves it (--base-url); or take its bfloat16, FP8, AWQ, GPTQ"
        " or compressed-tensors form",
        param="model",
    )


def readable(folder: Path, config: JsonObject) -> bool:
    """Return True if the local backend reads the checkpoint's weights, quantised or not."""
    try:
        weight_form(folder, config, folder.name)
    except ConfigError:
        return False
    return True


def _form(how: str, settings: JsonObject) -> WeightForm | str:
    """Return the form that the settings describe, or why it cannot be read ("" where the method says enough)."""
    method = settings.get("quant_method")
    if method == "awq":
        bits = settings.get("bits", settings.get("w_bit", 4))
        layout = str(settings.get("version", settings.get("checkpoint_format", "gemm"))).lower()
        if bits != 4 or layout != "gemm":
            return f"of awq, 4 bit in the layout 'gemm' is read, not {bits} bit in {layout!r}"
        return WeightForm(how, "awq", 4)
    if method == "gptq":
        bits, layout = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
        if bits not in WORD_BITS or layout not in ("gptq", "gptq_v2"):
            return f"of gptq, 2, 4 and 8 bit in the layouts 'gptq' and 'gptq_v2' are read, not {bits} bit in {layout!r}"
        # The first layout stores zero points less 1.
        return WeightForm(how, "gptq", int(bits), zero_offset=1 if layout == "gptq" else 0)
    if method == "fp8":
        return WeightForm(how, "fp8", block=_block(settings.get("weight_block_size")))
    if method == "compressed-tensors":
        return _compressed(how, settings)
    return ""


def _compressed(how: str, settings: JsonObject) -> WeightForm | str:
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense" or settings.get("transform_config"):
        return "sparse and transformed weights are not read"
    block = None
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not weights:
            continue
        layout = group.get("format") or settings.get("format")
        kind, bits = weights.get("type", "int"), weights.get("num_bits")
        if layout not in COMPRESSED_FORMATS or bits not in (WORD_BITS if kind == "int" else (8,)):
            return f"{layout} with {bits} bit is not read; {', '.join(COMPRESSED_FORMATS)} with 4 or 8 bit are"
        block = _block(weights.get("block_structure")) or block
    return WeightForm(how, "compressed-tensors", block=block)


def _block(sizes: object) -> tuple[int, int] | None:
    if (
        isinstance(sizes, list | tuple)
        and len(sizes) == 2
        and all(isinstance(size, int) and size > 0 for size in sizes)
    ):
        return int(sizes[0]), int(sizes[1])
    return None
