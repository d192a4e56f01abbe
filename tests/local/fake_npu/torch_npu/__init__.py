"""A make-believe torch_npu: device `npu` whose memory is the host's and whose every operator is the CPU's.

Built on torch's PrivateUse1 hook for Python backends. Mixing devices is an error, as on real hardware, so a tensor made
in the wrong place is found here. FAKE_NPU chooses what to play: "" works, "count0" sees no device, "broken" does not
import, "310P3" and others are the chip's name. One process can have it once, so tests run it in processes of their own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PLAYS = os.environ.get("FAKE_NPU", "")
if PLAYS == "broken":
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")


def _visible() -> int:
    ids = [part for part in os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "").split(",") if part.strip()]
    # The driver hides everything from the first id that is out of order.
    return 0 if PLAYS == "count0" or ids != sorted(ids, key=int) else len(ids) or 2


class Module(SimpleNamespace):
    """What `torch.npu` offers of it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return _visible() > 0

    def device_count(self) -> int:
        return _visible()

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def mem_get_info(self) -> tuple[int, int]:
        return 1 << 30, 2 << 30

    def get_device_name(self, index: int | None = None) -> str:
        return f"Ascend{PLAYS or '910B3'}"

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("npu", backend_module=Module())


class NpuTensor(torch.Tensor):
    """Shape and dtype on the fake device, numbers in `raw` on the CPU."""

    raw: torch.Tensor
    # Results are what the operators make them; the default would turn what comes back to the host into NpuTensors.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> NpuTensor:
        # A view of a normal tensor must be a normal tensor, also while the caller is in inference mode.
        with torch.inference_mode(False):
            made = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
        made.__class__ = NpuTensor
        return made

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw


# Operators that may see both devices: transfers, and indexing by host tensors, which real NPUs allow too.
MIXED = {"_copy_from", "copy_", "_to_copy", "_index_put_impl_", "index_put_", "index"}


def _wrap(value: Any) -> Any:
    return NpuTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, NpuTensor) else value


def _is_npu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "npu"


def everything(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs `op` on the CPU tensors inside."""
    name = op._schema.name.split("::")[1]
    flat, spec = tree_flatten((args, kwargs))
    inside = [value for value in flat if isinstance(value, NpuTensor)]
    outside = [
        value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, NpuTensor) and value.dim()
    ]
    if inside and outside and name not in MIXED:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found npu:0 and cpu")
    target = kwargs.get("device")
    by_raw = {id(value.raw): value for value in inside}
    raw_args, raw_kwargs = tree_unflatten(
        [value.raw if isinstance(value, NpuTensor) else value for value in flat], spec
    )
    if "device" in raw_kwargs:
        raw_kwargs["device"] = torch.device("cpu")
    # Numbers arrive where the schema says Tensor, when torch had wrapped them on the way.
    raw_args = [
        torch.tensor(value) if isinstance(value, (bool, int, float)) and str(argument.type) == "Tensor" else value
        for value, argument in zip(raw_args, op._schema.arguments, strict=False)
    ]
    out = op(*raw_args, **raw_kwargs)
    for value in inside:
        # An `out=` that the operator resized: the wrapper must say so too.
        if value.shape != value.raw.shape:
            with torch.inference_mode(False):
                value.data = torch._C._acc.create_empty_tensor(value.raw.shape, value.raw.dtype)
    if name in ("_to_copy", "to") and target is not None and not _is_npu(target):
        return out

    def back(value: Any) -> Any:
        # In-place operators give back the tensor they were given.
        return by_raw.get(id(value)) if id(value) in by_raw else _wrap(value)

    return tree_map(back, out)


_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(everything, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")


def _register(name: str, function: Any) -> None:
    _aten.impl(name, function, "PrivateUse1")


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, NpuTensor) else value


def _to_copy(tensor: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    out = torch.ops.aten._to_copy(_raw(tensor), dtype=dtype, device="cpu")
    if device is None:
        device = "npu" if isinstance(tensor, NpuTensor) else "cpu"
    return NpuTensor(out) if _is_npu(device) else out


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    _raw(target).copy_(_raw(source))
    return target


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    given = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    if not all(isinstance(tensor, NpuTensor) for tensor in given):
        raise RuntimeError("scaled_dot_product_attention: expected all tensors to be on the same device")
    return NpuTensor(
        torch.nn.functional.scaled_dot_product_attention(
            *(tensor.raw for tensor in given[:3]),
            attn_mask=_raw(attn_mask),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    )


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    return NpuTensor(torch.empty(tuple(size), dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    return NpuTensor(torch.empty_strided(tuple(size), tuple(stride), dtype=dtype or torch.get_default_dtype()))


_register("_to_copy", _to_copy)
_register("_copy_from", _copy_from)
_register("copy_", lambda target, source, non_blocking=False: _copy_from(source, target))
_register("scaled_dot_product_attention", _attention)
_register("empty.memory_format", _empty)
_register("empty_strided", _empty_strided)
_register("detach", lambda tensor: NpuTensor(tensor.raw.detach()))
_register("alias", lambda tensor: NpuTensor(tensor.raw))


def _arange(*numbers: Any, dtype: Any = None, **more: Any) -> Any:
    return NpuTensor(torch.arange(*numbers, dtype=dtype))


# torch's own would resize an empty tensor, which a wrapper cannot follow.
for _name in ("arange", "arange.start", "arange.start_step"):
    _register(_name, _arange)
# Wrappers look contiguous, what is inside need not be: then the caller meant reshape, which copies.
_register("view", lambda tensor, size: NpuTensor(tensor.raw.reshape(tuple(size))))
_register("_reshape_alias", lambda tensor, size, stride: NpuTensor(tensor.raw.reshape(tuple(size))))


def _view(overload: Any) -> Any:
    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tree_map(_wrap, overload(tensor.raw, *args, **kwargs))

    return run


# torch's own would compute strides from the wrapper's, which are not those inside.
for _name, _overload in (
    ("permute", "default"), ("transpose", "int"), ("slice", "Tensor"), ("select", "int"), ("unsqueeze", "default"),
    ("squeeze", "default"), ("squeeze", "dim"), ("squeeze", "dims"), ("expand", "default"), ("t", "default"),
    ("split", "Tensor"), ("split_with_sizes", "default"), ("unbind", "int"), ("diagonal", "default"),
):  # fmt: skip
    _register(
        _name if _overload == "default" else f"{_name}.{_overload}",
        _view(getattr(getattr(torch.ops.aten, _name), _overload)),
    )
_register("_local_scalar_dense", lambda tensor: tensor.raw.item())


def npu_fusion_attention(*args: Any, **kwargs: Any) -> Any:
    """transformers imports it; nothing here may call it."""
    raise RuntimeError("npu_fusion_attention is not played")


def npu_rotary_mul(*args: Any, **kwargs: Any) -> Any:
    """As above."""
    raise RuntimeError("npu_rotary_mul is not played")
