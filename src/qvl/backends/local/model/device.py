"""The only module that knows the kinds of device and their differences.

`auto` is npu, else cuda, else mps, else cpu. An NPU that is present but unusable is reported with the reason, since a
silent fallback to the CPU is the first problem of most Ascend users.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from qvl.backends.local.model.kernel_times import faster_dtype, known_dtype
from qvl.errors import ConfigError, MissingDependencyError, first_line
from qvl.suggest import install_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from qvl.backends.local.model.kernels import Kernels

KINDS: Final = ("npu", "cuda", "mps", "cpu")
DTYPES: Final = ("bfloat16", "float16", "float32")
SHORT_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
# Chips whose matrix units have no bfloat16 (300I Duo, 310 series).
NPU_WITHOUT_BF16: Final = re.compile(r"310", re.ASCII)


class Graph(Protocol):
    """A recorded graph of device operations (torch.cuda.CUDAGraph, torch.npu.NPUGraph)."""

    def replay(self) -> None: ...
    def pool(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Device:
    """A usable device, with everything that the engine needs to know about its kind.

    Args:
        type: one of `KINDS`.
        index: number of the card; None for cpu and mps.
        dtype: of weights, activations and KV.
        name: the product's, such as "Ascend910B3".
        notes: why better devices were not chosen.
    """

    type: str
    index: int | None
    dtype: torch.dtype
    name: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(self.type) if self.index is None else torch.device(self.type, self.index)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def asynchronous(self) -> bool:
        """True if an operator may return before it has run."""
        return self.type != "cpu"

    def describe(self) -> str:
        """Return one line: the device, its dtype, and why no better device was chosen."""
        index = "" if self.index is None else f":{self.index}"
        name = f" ({self.name})" if self.name else ""
        return "; ".join([f"{self.type}{index}{name}, {self.dtype_name}", *self.notes])

    def _module(self) -> ModuleType:
        import torch

        module: ModuleType = getattr(torch, self.type)
        return module

    def kernels(self) -> Kernels:
        """Return the operators that a forward pass uses: fused ones of the device's package, the measured of a CPU."""
        from qvl.backends.local.model.kernels import CpuKernels, Kernels, NpuKernels

        if self.type != "npu":
            return CpuKernels() if self.type == "cpu" else Kernels()
        return NpuKernels(importlib.import_module("torch_npu"), self.torch, self.dtype)

    @property
    def has_graphs(self) -> bool:
        """True if this kind of device supports `record`."""
        return self.type in ("cuda", "npu") and hasattr(self._module(), f"{self.type.upper()}Graph")

    @property
    def graphs_pay(self) -> bool:
        """True if recorded decode steps are known to be faster on this kind of device."""
        return self.type == "cuda" and self.has_graphs

    def record(self, run: Callable[[], Tensor], pool: object = None) -> tuple[Graph, Tensor]:
        """Record the operations that `run` queues on the device.

        Args:
            pool: memory pool of an earlier graph, to share; its results must not be needed when this graph runs.

        Returns:
            the graph, and the tensor that `run` returned, which each `replay` overwrites.
        """
        module = self._module()
        graph: Graph = getattr(module, f"{self.type.upper()}Graph")()
        # Other threads of the program may use the device meanwhile.
        with module.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
        return graph, out

    def select(self) -> None:
        """Make this the calling thread's current device (a new thread starts on device 0)."""
        if self.index is not None:
            self._module().set_device(self.index)

    def synchronize(self) -> None:
        """Wait until everything queued on the device has run."""
        if self.type != "cpu":
            self._module().synchronize()

    def empty_cache(self) -> None:
        """Release the allocator's unused memory. Slow: for use after an out-of-memory error, not in every request."""
        if self.type != "cpu":
            self._module().empty_cache()

    def memory(self, index: int | None = None) -> tuple[int, int]:
        """Return (free, total) bytes of card `index`, by default this; for cpu, of the host within its cgroup limit."""
        if self.type in ("npu", "cuda"):
            free, total = self._module().mem_get_info(self.index if index is None else index)
            return int(free), int(total)
        free, total = host_memory()
        if self.type == "mps":
            with suppress(AttributeError, RuntimeError):
                limit = int(self._module().recommended_max_memory())
                used = int(self._module().driver_allocated_memory())
                return max(0, limit - used), limit
        return free, total

    def is_out_of_memory(self, error: BaseException) -> bool:
        """True if `error` is an out-of-memory error of this kind of device."""
        import torch

        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        text = str(error).lower()
        return isinstance(error, RuntimeError) and any(
            words in text for words in ("out of memory", "can't allocate memory", "npu oom", "207018")
        )

    def random_seed(self) -> int:
        return int.from_bytes(os.urandom(8), "little")


def open_device(device: str = "auto", dtype: str = "auto") -> Device:
    """Return the device that `device` names, with the dtype to use there.

    Args:
        device: "auto", or `npu`, `cuda`, `mps`, `cpu` with an optional `:index`. "auto" honours QVL_DEVICE and DEVICE.
        dtype: "auto", "bfloat16", "float16" or "float32" (or bf16, fp16, fp32).

    Raises:
        ConfigError: the device or dtype is unknown, or cannot be used on this host (with the reason).
        MissingDependencyError: `device` is an NPU and torch_npu is not installed.
    """
    request, kind, number = named_device(device)
    named_dtype(dtype)
    notes: list[str] = []
    if kind == "auto":
        for candidate in KINDS:
            why = _unusable(candidate)
            if why is None:
                kind = candidate
                break
            if why and candidate == "npu" and _npu_expected():
                notes.append(f"the NPU is not used: {why}")
    else:
        why = _unusable(kind)
        if why is not None:
            if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
                raise MissingDependencyError(
                    "device npu needs torch_npu, which is not installed", hint=install_line("npu")
                )
            raise ConfigError(f"device {request!r} cannot be used: {why}", hint="qvl doctor examines the host")
    index = _index(kind, int(number) if number else None, request)
    return Device(kind, index, _dtype(dtype, kind, index), _name(kind, index), tuple(notes))


def named_device(device: str) -> tuple[str, str, str]:
    """Return (what is asked for, its kind or "auto", the digits of its index) without importing torch.

    Raises:
        ConfigError: no device has such a name.
    """
    if device == "auto":
        device = os.environ.get("QVL_DEVICE") or os.environ.get("DEVICE") or "auto"
    kind, _, number = device.strip().lower().partition(":")
    kind = {"gpu": "cuda", "ascend": "npu"}.get(kind, kind)
    if kind not in (*KINDS, "auto") or (number and not number.isdigit()):
        raise ConfigError(f"unknown device {device!r}", hint=f"auto, {', '.join(KINDS)}, or such as npu:1")
    return device, kind, number


def named_dtype(dtype: str) -> str:
    """Return the whole name of a dtype, or "auto", without importing torch.

    Raises:
        ConfigError: no dtype has such a name.
    """
    name = SHORT_DTYPES.get(dtype.removeprefix("torch."), dtype.removeprefix("torch."))
    if name not in (*DTYPES, "auto"):
        raise ConfigError(f"unknown dtype {name!r}", hint="auto, bfloat16, float16 or float32")
    return name


def peek_dtype(device: str = "auto", dtype: str = "auto") -> str | None:
    """Return the name of the dtype that `open_device` would choose, without importing torch; None if unknown.

    Only the CPU's is known: by `device`, or on a Linux host that has no accelerator's device node.
    """
    if device == "auto":
        device = os.environ.get("QVL_DEVICE") or os.environ.get("DEVICE") or "auto"
    if device.strip().lower() == "auto":
        nodes = ("davinci[0-9]*", "nvidia*", "kfd", "dxg")
        if sys.platform != "linux" or any(True for node in nodes for _ in Path("/dev").glob(node)):
            return None
    elif device.strip().lower() != "cpu":
        return None
    name = SHORT_DTYPES.get(dtype.removeprefix("torch."), dtype.removeprefix("torch."))
    if name == "auto":
        return known_dtype()
    return name if name in DTYPES else None


def _npu_expected() -> bool:
    return (
        importlib.util.find_spec("torch_npu") is not None
        or any(Path("/dev").glob("davinci[0-9]*"))
        or bool(os.environ.get("ASCEND_RT_VISIBLE_DEVICES"))
    )


def _unusable(kind: str) -> str | None:
    """Return the reason why `kind` cannot be used on this host, or None if it can."""
    import torch

    if kind == "cpu":
        return None
    if kind == "mps":
        return None if torch.backends.mps.is_available() else "torch sees no Apple GPU"
    if kind == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return f"torch_npu is not installed ({install_line('npu')})"
    try:
        importlib.import_module("torch_npu")
        module = getattr(torch, "npu", None)
        if module is None:
            return "torch_npu did not register itself with this torch"
        if module.is_available() and module.device_count() > 0:
            return None
    except Exception as exc:  # noqa: BLE001 - torch_npu raises whatever its driver libraries raise
        return f"torch_npu does not import: {first_line(exc)}"
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    ids = [int(part) for part in visible.split(",") if part.strip().isdigit()]
    if ids != sorted(ids):
        return f"ASCEND_RT_VISIBLE_DEVICES={visible} is not in ascending order, which hides every NPU"
    if visible:
        return f"torch_npu sees no NPU with ASCEND_RT_VISIBLE_DEVICES={visible}"
    return "torch_npu sees no NPU (driver, permissions of /dev/davinci*, or the container's devices)"


def _index(kind: str, number: int | None, request: str) -> int | None:
    import torch

    if kind in ("cpu", "mps"):
        if number:
            raise ConfigError(f"unknown device {request!r}", hint=f"'{kind}' has no index above 0")
        return None
    count = int(getattr(torch, kind).device_count())
    if (number or 0) >= count:
        raise ConfigError(f"device {request!r} does not exist", hint=f"visible {kind} devices: {count}")
    return number or 0


def _name(kind: str, index: int | None) -> str:
    import torch

    if kind not in ("npu", "cuda"):
        return ""
    return str(getattr(torch, kind).get_device_name(index))


def _dtype(name: str, kind: str, index: int | None) -> torch.dtype:
    import torch

    name = named_dtype(name)
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if kind == "cpu":
        return torch.bfloat16 if faster_dtype() == "bfloat16" else torch.float32
    if kind == "mps":
        return torch.float16
    if kind == "npu" and NPU_WITHOUT_BF16.search(_name(kind, index)):
        return torch.float16
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return `array` as a tensor on `device`, without waiting for the copy where that is safe.

    A GPU copies from pinned memory while the host goes on. On MPS a copy that returns early would read memory that is
    free by then (pytorch/pytorch#189690). On a CPU the tensor is the array.
    """
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def host_memory() -> tuple[int, int]:
    free = total = 8 << 30
    with suppress(OSError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        total = int(lines["MemTotal"].split()[0]) << 10
        free = int(lines["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        total, free = min(total, limit), min(free, max(0, limit - used))
    return free, total
