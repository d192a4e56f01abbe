"""Checkpoints in the forms that others publish, made by the definitions of those forms, and the numbers they stand for.

Nothing of qvl is used: words are packed by numpy, column by column, as the packages that write them do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors of a layer by the ends of their names, and its weight as plain numbers [out, in], float32."""
Packer = Callable[[torch.Tensor], Packed]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], zero points and scales [out, groups] of an asymmetric quantisation."""
    parts = weight.double().numpy().reshape(weight.shape[0], -1, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    top = 2**bits - 1
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, top).astype(np.int64)
    codes = np.clip(np.rint(parts / scales[..., None].astype(np.float64)) + zeros[..., None], 0, top)
    return codes.astype(np.int64).reshape(weight.shape), zeros, scales


def plain(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray) -> torch.Tensor:
    """The product in float64, which holds it exactly."""
    numbers = (codes - zeros[:, index]).astype(np.float64) * scales[:, index].astype(np.float64)
    return torch.from_numpy(numbers).float()


def words(codes: np.ndarray, bits: int, order: Iterator[int] | tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [rows, n] in 32 bit words along the last axis; column `order[i]` is the i-th from below."""
    count = 32 // bits
    places = tuple(range(count)) if order is None else tuple(order)
    out = np.zeros((codes.shape[0], -(-codes.shape[1] // count)), dtype=np.uint32)
    for word in range(out.shape[1]):
        for at, column in enumerate(places):
            if word * count + column < codes.shape[1]:
                out[:, word] |= codes[:, word * count + column].astype(np.uint32) << np.uint32(bits * at)
    return torch.from_numpy(out.view(np.int32))


def awq(weight: torch.Tensor) -> Packed:
    codes, zeros, scales = rounded(weight, 4, GROUP)
    index = np.arange(weight.shape[1]) // GROUP
    tensors = {
        "qweight": words(np.ascontiguousarray(codes.T), 4, AWQ_ORDER),
        "qzeros": words(np.ascontiguousarray(zeros.T), 4, AWQ_ORDER),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    return tensors, plain(codes, zeros, scales, index)


def gptq(bits: int, *, shuffled: bool = False, less_one: bool = True) -> Packer:
    """`shuffled`: columns belong to groups out of order (desc_act)."""

    def pack(weight: torch.Tensor) -> Packed:
        columns = weight.shape[1]
        order = np.random.default_rng(columns).permutation(columns) if shuffled else np.arange(columns)
        index = np.empty(columns, dtype=np.int64)
        index[order] = np.arange(columns) // GROUP
        some, zeros, scales = rounded(weight[:, order.copy()], bits, GROUP)
        codes = np.empty_like(some)
        codes[:, order] = some
        stored = np.ascontiguousarray(zeros.T) - (1 if less_one else 0)
        tensors = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(stored, bits),
            "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return tensors, plain(codes, zeros, scales, index)

    return pack


def pack_quantized(bits: int, group: int | None, *, symmetric: bool) -> Packer:
    def pack(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        codes, zeros, scales = rounded(weight, bits, group or columns)
        half = 2 ** (bits - 1)
        if symmetric:
            zeros = np.full_like(zeros, half)
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": torch.from_numpy(scales).bfloat16(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(np.ascontiguousarray(zeros.T), bits).T.contiguous()
        read = tensors["weight_scale"].float().numpy()
        return tensors, plain(codes, zeros, read, np.arange(columns) // (group or columns))

    return pack


def int_quantized(weight: torch.Tensor) -> Packed:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-6).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, (codes.double() * scale.double()).float()


def float_quantized(weight: torch.Tensor) -> Packed:
    scale = (weight.abs().amax(1, keepdim=True) / 448).clamp(min=1e-6).float()
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_blocks(high: int, wide: int) -> Packer:
    """As Qwen publishes it: one scale for a block, float32."""

    def pack(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        read = torch.empty(rows, columns)
        scales = torch.empty(-(-rows // high), -(-columns // wide))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                area = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
                scales[i, j] = weight[area].abs().max().clamp(min=1e-6) / 448
                codes[area] = (weight[area] / scales[i, j]).to(torch.float8_e4m3fn)
                read[area] = codes[area].float() * scales[i, j]
        return {"weight": codes, "weight_scale_inv": scales}, read

    return pack


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """The settings of a compressed-tensors checkpoint of one group."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def linears(names: Any) -> list[str]:
    """The matrices of the text layers: what these forms quantise, and all that the pictures' tower is spared.

    The two narrow ones of a gated delta rule, of a row for each head, are left as they are.
    """
    kept = ("in_proj_a.weight", "in_proj_b.weight")
    return [n for n in names if ".layers." in n and "_proj" in n and n.endswith(".weight") and not n.endswith(kept)]


def write_pair(plain_folder: Path, folder: Path, pack: Packer, settings: dict[str, Any]) -> Path:
    """Quantise the checkpoint in `plain_folder` into `folder`; what it stands for replaces the former's weights."""
    tensors = load_file(plain_folder / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    stored = dict(tensors)
    for name in linears(tensors):
        layer, tensors[name] = pack(stored.pop(name))
        stored |= {f"{name.removesuffix('weight')}{end}": tensor.contiguous() for end, tensor in layer.items()}
    shutil.copytree(plain_folder, folder)
    save_file(tensors, plain_folder / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
