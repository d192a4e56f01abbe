"""A make-believe torch_npu: device `npu` whose memory is the host's and whose every operator is the CPU's.

Built on torch's PrivateUse1 hook for Python backends. Mixing devices is an error, as on real hardware, so a tensor made
in the wrong place is found here; so is mixing npu:0 and npu:1. FAKE_NPU chooses what to play: "" works, "count0" sees
no device, "broken" does not import, "unfused" has fused operators that this chip does not know, "wrong" has some that
give wrong numbers, "310P3" and others are the chip's name. FAKE_NPU_BYTES is the largest tensor that its memory holds.
One process can have it once, so tests run it in processes of their own.
"""

from __future__ import annotations

import os
from collections import Counter
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
        return CURRENT[0]

    def set_device(self, index: int) -> None:
        CURRENT[0] = torch.device(index).index or 0 if isinstance(index, (str, torch.device)) else index

    def synchronize(self) -> None:
        return None

    def empty_cache(self) -> None:
        PLAYED["empty_cache"] += 1

    def mem_get_info(self, index: Any = None) -> tuple[int, int]:
        return 1 << 30, 2 << 30

    def get_device_name(self, index: int | None = None) -> str:
        return f"Ascend{PLAYS or '910B3'}"

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class NPUGraph:
    """A recording: replaying runs the same operators on the same memory with the same numbers from the host."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        PLAYED["replay"] += 1
        for function, args, kwargs, outs in self.calls:
            fresh = tree_flatten(function(*args, **kwargs))[0]
            for old, new in zip(tree_flatten(outs)[0], fresh, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class graph:  # noqa: N801 - torch_npu's name
    """Records into a graph; whatever would wait for the device is an error meanwhile."""

    def __init__(self, npu_graph: NPUGraph, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._graph = npu_graph

    def __enter__(self) -> None:
        RECORDING.append(self._graph)

    def __exit__(self, *error: object) -> None:
        RECORDING.pop()


# The largest tensor that this device can hold; 0 for any.
LARGEST = int(os.environ.get("FAKE_NPU_BYTES", "0"))
RECORDING: list[NPUGraph] = []
PLAYED: Counter[str] = Counter()
CURRENT = [0]


def _run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """On tensors of the CPU; recorded while a graph is."""
    out = function(*args, **kwargs)
    if LARGEST and any(isinstance(value, torch.Tensor) and value.nbytes > LARGEST for value in tree_flatten(out)[0]):
        raise torch.OutOfMemoryError(f"NPU out of memory. Tried to allocate more than {LARGEST} bytes (NPU 0)")
    if RECORDING:
        RECORDING[-1].calls.append((function, args, kwargs, out))
    return out


def _no_waiting(what: str) -> None:
    if RECORDING:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


_setup_privateuseone_for_python_backend("npu", backend_module=Module(NPUGraph=NPUGraph, graph=graph))


class NpuTensor(torch.Tensor):
    """Shape and dtype on the fake device, numbers in `raw` on the CPU."""

    raw: torch.Tensor
    index: int
    # Results are what the operators make them; the default would turn what comes back to the host into NpuTensors.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int | None = None, **more: Any) -> NpuTensor:
        # A view of a normal tensor must be a normal tensor, also while the caller is in inference mode.
        with torch.inference_mode(False):
            made = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
        made.__class__ = NpuTensor
        return made

    def __init__(self, raw: torch.Tensor, index: int | None = None, **more: Any) -> None:
        # accelerate makes parameters anew by calling their class.
        self.raw = _raw(raw)
        self.index = raw.index if isinstance(raw, NpuTensor) else CURRENT[0] if index is None else index

    @property
    def device(self) -> torch.device:
        return torch.device("npu", self.index)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        # torch knows of npu:0 alone and would take a move from npu:1 to npu:0 for none.
        place, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if place is not None and place.type == "npu" and _index(place) != self.index:
            moved = NpuTensor(self.raw.clone(), _index(place))
            return moved if dtype is None else moved.to(dtype)
        return super().to(*args, **kwargs)


# Operators that may see both devices: transfers, and indexing by host tensors, which real NPUs allow too.
MIXED = {"_copy_from", "copy_", "_to_copy", "_index_put_impl_", "index_put_", "index"}


def _wrap(value: Any, index: int | None = None) -> Any:
    return NpuTensor(value, index) if isinstance(value, torch.Tensor) and not isinstance(value, NpuTensor) else value


def _index(device: Any) -> int:
    index = None if device is None else torch.device(device).index
    return CURRENT[0] if index is None else index


def _one_place(name: str, tensors: Any) -> int | None:
    """The device on which all of them are."""
    places = {tensor.index for tensor in tensors if isinstance(tensor, NpuTensor) and tensor.dim()}
    if len(places) > 1 and name not in MIXED:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found npu:0 and npu:1")
    return min(places or {tensor.index for tensor in tensors if isinstance(tensor, NpuTensor)}, default=None)


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
    # Results that torch allocated itself are on no particular card yet.
    results = [kwargs[given.name] for given in op._schema.arguments if given.is_out and given.name in kwargs]
    place = _one_place(name, [value for value in inside if not any(value is result for result in results)])
    if place is None:
        place = _index(target)
    for result in results:
        if isinstance(result, NpuTensor):
            result.index = place
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
    out = _run(op, *raw_args, **raw_kwargs)
    for value in inside:
        # An `out=` that the operator resized: the wrapper must say so too.
        if value.shape != value.raw.shape:
            with torch.inference_mode(False):
                value.data = torch._C._acc.create_empty_tensor(value.raw.shape, value.raw.dtype)
    if name in ("_to_copy", "to") and target is not None and not _is_npu(target):
        return out

    def back(value: Any) -> Any:
        # In-place operators give back the tensor they were given.
        return by_raw.get(id(value)) if id(value) in by_raw else _wrap(value, place)

    return tree_map(back, out)


_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(everything, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")


def _register(name: str, function: Any) -> None:
    _aten.impl(name, function, "PrivateUse1")


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, NpuTensor) else value


def _to_copy(tensor: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    here = isinstance(tensor, NpuTensor)
    if device is None:
        device = tensor.device if here else "cpu"
    if _is_npu(device) and here:
        return NpuTensor(_run(lambda raw: torch.ops.aten._to_copy(raw, dtype=dtype), tensor.raw), _index(device))
    _no_waiting("copy between host and device")
    out = torch.ops.aten._to_copy(_raw(tensor), dtype=dtype, device="cpu")
    return NpuTensor(out, _index(device)) if _is_npu(device) else out


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    if isinstance(source, NpuTensor) and isinstance(target, NpuTensor):
        _run(lambda here, there: here.copy_(there), target.raw, source.raw)
    else:
        _no_waiting("copy between host and device")
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
    out = _run(
        torch.nn.functional.scaled_dot_product_attention,
        *(tensor.raw for tensor in given[:3]),
        attn_mask=_raw(attn_mask),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return NpuTensor(out, _one_place("scaled_dot_product_attention", given))


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    return NpuTensor(torch.empty(tuple(size), dtype=dtype or torch.get_default_dtype()), _index(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    made = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype or torch.get_default_dtype())
    return NpuTensor(made, _index(device))


_register("_to_copy", _to_copy)
_register("_copy_from", _copy_from)
_register("copy_", lambda target, source, non_blocking=False: _copy_from(source, target))
_register("scaled_dot_product_attention", _attention)
_register("empty.memory_format", _empty)
_register("empty_strided", _empty_strided)


def _like(overload: Any) -> Any:
    def run(tensor: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        made = _run(overload, tensor.raw, *args, **kwargs, device="cpu")
        return NpuTensor(made, tensor.index if device is None else _index(device)) if _is_npu(device or "npu") else made

    return run


# torch's own would make it on the card that it takes the tensor to be on, which is always npu:0.
for _name in ("empty_like", "zeros_like", "ones_like", "rand_like", "full_like",
              "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"):  # fmt: skip
    _register(_name, _like(getattr(torch.ops.aten, _name).default))
_register("detach", lambda tensor: NpuTensor(tensor.raw.detach(), tensor.index))
_register("alias", lambda tensor: NpuTensor(tensor.raw, tensor.index))


def _arange(*numbers: Any, dtype: Any = None, device: Any = None, **more: Any) -> Any:
    return NpuTensor(torch.arange(*numbers, dtype=dtype), _index(device))


# torch's own would resize an empty tensor, which a wrapper cannot follow.
for _name in ("arange", "arange.start", "arange.start_step"):
    _register(_name, _arange)


def _reshape(tensor: Any, size: Any, stride: Any = None) -> Any:
    # Wrappers look contiguous, what is inside need not be: then the caller meant reshape, which copies.
    return NpuTensor(_run(lambda raw: raw.reshape(tuple(size)), tensor.raw), tensor.index)


_register("view", _reshape)
_register("_reshape_alias", _reshape)


def _view(overload: Any) -> Any:
    def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda value: _wrap(value, tensor.index), overload(tensor.raw, *args, **kwargs))

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


def _item(tensor: Any) -> Any:
    _no_waiting("item")
    return tensor.raw.item()


_register("_local_scalar_dense", _item)


# Fused operators, as torch_npu's API reference describes them, in plain torch; PLAYED counts them.


def _fused(name: str, function: Any, *tensors: Any) -> Any:
    if PLAYS == "unfused":
        raise RuntimeError(f"call {name} failed, error code 161002: the operator does not support this chip")
    if not all(isinstance(tensor, NpuTensor) for tensor in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the NPU")
    place = _one_place(name, tensors)
    PLAYED[name] += 1
    out = NpuTensor(_run(function, *(tensor.raw for tensor in tensors)), place)
    return out * 1.5 if PLAYS == "wrong" else out


def npu_rms_norm(self: Any, gamma: Any, epsilon: float = 1e-6) -> tuple[Any, Any]:
    """(normalised, reciprocal of the standard deviation)."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)

    return _fused("npu_rms_norm", norm, self, gamma), None


def npu_rotary_mul(input: Any, r1: Any, r2: Any, rotary_mode: str = "half") -> Any:
    """All of four dimensions: r1 * input + r2 * (second half negated, first half)."""

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        assert x.dim() == cos.dim() == sin.dim() == 4
        first, second = x.chunk(2, -1)
        return cos * x + sin * torch.cat((-second, first), -1)

    return _fused("npu_rotary_mul", turn, input, r1, r2)


def npu_swiglu(self: Any, dim: int = -1) -> Any:
    """silu(first half) * second half."""

    def swiglu(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim)
        return torch.nn.functional.silu(first) * second

    return _fused("npu_swiglu", swiglu, self)


def npu_fusion_attention(
    query: Any,
    key: Any,
    value: Any,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Any = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    sparse_mode: int = 0,
    **more: Any,
) -> tuple[Any, ...]:
    """Layout BNSD; with sparse_mode 3 the mask is a 2048 x 2048 upper triangle and the last query sees all keys."""
    assert input_layout == "BNSD"
    assert head_num == query.shape[1]
    assert (atten_mask is not None) == (sparse_mode == 3)
    if atten_mask is not None:
        assert atten_mask.shape == (2048, 2048)
        assert atten_mask.dtype is torch.bool
        assert atten_mask.index == query.index

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool)
        if sparse_mode == 3:
            seen = seen.tril(k.shape[2] - q.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)

    return (_fused("npu_fusion_attention", attend, query, key, value), None, None)
