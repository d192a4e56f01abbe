"""Quantised checkpoints as plain weights: AWQ, GPTQ, compressed-tensors and FP8, unpacked while they are read.

transformers reads these forms with packages of their own (gptqmodel, optimum, compressed-tensors, accelerate), of which
some need a GPU. What is stored is simple: whole numbers of a few bits, or 8 bit floats, with a scale (and a zero point)
for a group of each row. A weight is (code - zero point) x scale, computed in float32 and rounded once to the dtype of
the device. Activations are not quantised, whatever the checkpoint says about them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qvl.backends.local.model.int8_store import Int8Store
    from qvl.backends.local.model.weight_form import WeightForm

# Where AutoAWQ puts the eight columns of a word: column 0 in the lowest four bits, column 1 in the fifth four, …
AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
# What stands beside the codes of a weight, and what is about activations alone.
_BESIDE: Final = re.compile(r"\.(qzeros|scales|g_idx|weight_g_idx|weight_shape|weight_zero_point)$|_scale(_inv)?$")
_ACTIVATIONS: Final = re.compile(r"\.(input|output|q|k|v)_(scale|zero_point|global_scale)$|activation_scale$")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class _Tensors:
    """The tensors of all weight files by name, read when they are asked for; `taken` are the names read so far."""

    def __init__(self, folder: Path, name: str) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        self.name = name
        self.taken: set[str] = set()
        self._of: dict[str, object] = {}
        for file in sorted(files):
            try:
                opened = safe_open(folder / file, "pt")
            except OSError as exc:
                raise self.error(f"{file} cannot be read: {first_line(exc)}") from exc
            self._of.update(dict.fromkeys(opened.keys(), opened))  # type: ignore[no-untyped-call] # safetensors

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def names(self) -> list[str]:
        return sorted(self._of)

    def take(self, *keys: str) -> Tensor:
        """Return the tensor of the first of `keys` that exists."""
        tensor = self.take_if(*keys)
        if tensor is None:
            raise self.error(f"{' or '.join(keys)} is missing")
        return tensor

    def take_if(self, *keys: str) -> Tensor | None:
        for key in keys:
            if key in self._of:
                self.taken.add(key)
                tensor: Tensor = self._of[key].get_tensor(key)  # type: ignore[attr-defined] # the same
                return tensor
        return None

    def shape(self, key: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        shape: list[int] = self._of[key].get_slice(key).get_shape()  # type: ignore[attr-defined] # the same
        return shape

    def error(self, fault: str) -> ConfigError:
        return ConfigError(
            f"{self.name}: {fault}",
            hint="download the whole checkpoint; config.json must be the one that it was saved with",
            param="model",
        )


def unpacked_weights(
    folder: Path, form: WeightForm, name: str, dtype: torch.dtype, *, model_layout: bool
) -> dict[str, Tensor]:
    """Return the weights of a quantised checkpoint by name, in `dtype` on the CPU, unpacked one after the other.

    `model_layout`: experts are laid out as transformers 5 has them in the model [experts, out, in], so that it copies
    none; else as they are published [experts, in, out].

    Raises:
        ConfigError: scales are missing, shapes do not fit each other, or a tensor is none of this form.
    """
    tensors = _Tensors(folder, name)
    weights = {}
    for key in tensors.names():
        if _BESIDE.search(key) or _ACTIVATIONS.search(key):
            continue
        target = re.sub(r"\.(qweight|weight_packed)$", ".weight", key)
        weights[target] = _weight(tensors, key, form, dtype)
    alone = [key for key in tensors.names() if key not in tensors.taken and not _ACTIVATIONS.search(key)]
    if alone:
        raise tensors.error(f"{alone[0]} stands beside no weight of the form {form.name}")
    _lay_out_experts(weights, tensors, model_layout=model_layout)
    return weights


def weights_beside(int8: Int8Store, folder: Path, name: str, dtype: torch.dtype, *, tied: bool) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, in `dtype`; those in `int8` are not read and take no memory.

    `tied`: the output layer is the embedding.
    """
    import torch

    tensors, weights = _Tensors(folder, name), {}
    for key in tensors.names():
        if int8.replaces(key, tied=tied):
            weights[key] = torch.zeros(1, dtype=dtype).expand(tensors.shape(key))
        else:
            stored = tensors.take(key)
            weights[key] = stored.to(dtype) if stored.is_floating_point() else stored
    return weights


def _weight(tensors: _Tensors, key: str, form: WeightForm, dtype: torch.dtype) -> Tensor:
    stored = tensors.take(key)
    words = str(stored.dtype) == "torch.int32"
    if words and key.endswith(".qweight") and form.method in ("awq", "gptq"):
        return _grouped_words(tensors, key.removesuffix(".qweight"), stored, form).to(dtype)
    if words and key.endswith(".weight_packed") and form.method == "compressed-tensors":
        return _packed(tensors, key.removesuffix("_packed"), stored).to(dtype)
    if stored.is_floating_point() and stored.element_size() > 1:
        return stored.to(dtype)
    if stored.is_floating_point() and form.method in ("fp8", "compressed-tensors"):
        return _scaled_codes(tensors, key, stored, form, dtype)
    if str(stored.dtype) == "torch.int8" and form.method == "compressed-tensors":
        return _scaled_codes(tensors, key, stored, form, dtype)
    if not stored.is_floating_point() and stored.ndim == 1:
        return stored  # a count, such as position_ids
    raise tensors.error(f"{key} is {str(stored.dtype).removeprefix('torch.')}, which {form.name} does not have")


def _grouped_words(tensors: _Tensors, stem: str, words: Tensor, form: WeightForm) -> Tensor:
    """Return a weight of AWQ or GPTQ [out, in], float32: scales and zero points are [groups, out]."""
    scales, packed_zeros = tensors.take(f"{stem}.scales"), tensors.take(f"{stem}.qzeros")
    index = tensors.take_if(f"{stem}.g_idx")
    places = AWQ_PLACES if form.method == "awq" else tuple(range(32 // form.bits))
    codes = _unpack(words, form.bits, places).T if form.method == "awq" else _unpack(words.T, form.bits, places)
    # Kernels let a stored zero point of all ones wrap around to 0.
    zeros = (_unpack(packed_zeros, form.bits, places) + form.zero_offset) & ((1 << form.bits) - 1)
    if zeros.shape != scales.shape or scales.ndim != 2:
        raise tensors.error(f"{stem}.qzeros hold {list(zeros.shape)} zero points for scales of {list(scales.shape)}")
    return _in_groups(tensors, stem, codes, scales.T, zeros.T, index)


def _packed(tensors: _Tensors, weight: str, words: Tensor) -> Tensor:
    """Return a weight of pack-quantized [out, in], float32: codes with an offset; zero points packed along the rows."""
    shape = tuple(tensors.take(f"{weight}_shape").tolist())
    scale, zero = tensors.take(f"{weight}_scale"), tensors.take_if(f"{weight}_zero_point")
    fitting = [bits for bits in (4, 8, 2) if words.shape == (shape[0], -(-shape[-1] * bits // 32))]
    if len(shape) != 2 or not fitting:
        raise tensors.error(f"{weight}_packed is {list(words.shape)}, which holds no weight of {list(shape)}")
    bits = fitting[0]
    places, offset = tuple(range(32 // bits)), 1 << (bits - 1)
    codes = _unpack(words, bits, places)[:, : shape[1]].short() - offset
    if zero is not None and str(zero.dtype) == "torch.int32":
        zero = (_unpack(zero.T, bits, places)[:, : shape[0]].short() - offset).T
    return _in_groups(tensors, weight, codes, scale, zero, tensors.take_if(f"{weight}_g_idx"))


def _scaled_codes(tensors: _Tensors, key: str, codes: Tensor, form: WeightForm, dtype: torch.dtype) -> Tensor:
    """Return a weight of 8 bit codes [.., out, in] in `dtype`: a scale for all, a row, groups of a row or a block."""
    import torch

    scale, zero = tensors.take(f"{key}_scale_inv", f"{key}_scale"), tensors.take_if(f"{key}_zero_point")
    if codes.ndim == 3 and scale.ndim == 3 and len(scale) == len(codes):
        out = torch.empty(codes.shape, dtype=dtype)
        for expert in range(len(codes)):
            out[expert] = _scaled(tensors, key, codes[expert], scale[expert], None, form)
        return out
    return _scaled(tensors, key, codes, scale, zero, form).to(dtype)


def _scaled(tensors: _Tensors, key: str, codes: Tensor, scale: Tensor, zero: Tensor | None, form: WeightForm) -> Tensor:
    if form.block is None or scale.numel() == 1 or codes.ndim != 2:
        return _in_groups(tensors, key, codes, scale, zero, None)
    (rows, columns), (high, wide) = codes.shape, form.block
    if scale.shape != (-(-rows // high), -(-columns // wide)):
        raise tensors.error(
            f"{key} has scales of {list(scale.shape)} for blocks of {high} x {wide} in {list(codes.shape)}"
        )
    spread = scale.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return spread.mul_(codes.float())


def _in_groups(
    tensors: _Tensors, key: str, codes: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None
) -> Tensor:
    """Return (codes - zero) x scale [out, in], float32; scale and zero are [out, groups], [out] or one number.

    `index` [in] names the group of each column; without it groups are as long as each other, in order.
    """
    fault = f"{key} has scales of {list(scale.shape)} for a weight of {list(codes.shape)}"
    if codes.ndim != 2 or not scale.numel():
        raise tensors.error(fault)
    rows, columns = codes.shape
    shape = (1, 1) if scale.numel() == 1 else (rows, scale.numel() // rows)
    if (scale.numel() > 1 and scale.shape not in (shape, (rows,))) or (index is None and columns % shape[1]):
        raise tensors.error(fault)
    if zero is not None and zero.numel() != scale.numel():
        raise tensors.error(f"{key} has zero points of {list(zero.shape)} for scales of {list(scale.shape)}")
    scale = scale.float().reshape(shape)
    zero = None if zero is None else zero.float().reshape(shape)
    values = codes.contiguous().float()  # a matrix turned round as bytes takes a fifth of the time
    if index is not None and shape[1] > 1:
        if index.shape != (columns,) or not 0 <= int(index.min()) <= int(index.max()) < shape[1]:
            raise tensors.error(f"{key} names groups of columns that its {shape[1]} groups of scales do not have")
        chosen = index.long()
        return (values if zero is None else values.sub_(zero[:, chosen])).mul_(scale[:, chosen])
    grouped = values.view(rows, shape[1], columns // shape[1])
    if zero is not None:
        grouped.sub_(zero.unsqueeze(-1))
    return grouped.mul_(scale.unsqueeze(-1)).view(rows, columns)


def _unpack(words: Tensor, bits: int, places: tuple[int, ...]) -> Tensor:
    """Return the codes in 32 bit words [.., n] as uint8 [.., n x 32/bits]; code `i` of a word is at `places[i]`."""
    import torch

    codes = torch.empty((*words.shape, len(places)), dtype=torch.uint8)
    for at, place in enumerate(places):
        codes[..., at] = (words >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(-2)


def _lay_out_experts(weights: dict[str, Tensor], tensors: _Tensors, *, model_layout: bool) -> None:
    """Put the matrices of single experts together, as the model has them; those together already are turned round."""
    import torch

    for key in [key for key, weight in weights.items() if weight.ndim == 3 and ".experts." in key and model_layout]:
        weights[key] = weights.pop(key).transpose(1, 2).contiguous()
    layers: defaultdict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for key in weights:
        part = _EXPERT.fullmatch(key)
        if part is not None:
            layers[part[1]][int(part[2]), part[3]] = key
    for prefix, keys in layers.items():
        count = len(keys) // 3
        for target, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            names = [[keys.get((expert, kind)) for kind in kinds] for expert in range(count)]
            parts = [[key for key in pair if key is not None] for pair in names]
            if parts != names:
                raise tensors.error(f"{prefix} lacks weights of some of its {count} experts")
            rows, columns = sum(weights[key].shape[0] for key in parts[0]), weights[parts[0][0]].shape[1]
            joined = torch.empty(count, rows, columns, dtype=weights[parts[0][0]].dtype)
            for expert, pair in enumerate(parts):
                torch.cat([weights.pop(key) for key in pair], out=joined[expert])
            weights[f"{prefix}.{target}"] = joined if model_layout else joined.transpose(1, 2)
