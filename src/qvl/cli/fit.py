"""What fits in this machine's memory, in which form, and how fast: `qvl models --fit`, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypedDict

from qvl.backends.local.model.bandwidth import READ_SECONDS, best_pass, host_bandwidth
from qvl.backends.local.model.cpu import has_bfloat16
from qvl.backends.local.model.kernel_report import one_row
from qvl.backends.local.model.kernel_times import known_bandwidth

if TYPE_CHECKING:
    from qvl.backends.local.model.device import Device
    from qvl.backends.local.model.model_size import ModelSize

# What the program takes beside weights and KV: libraries, features of pictures, intermediate results.
OVERHEAD: Final = 2e9
# Tokens of context below which a model is of no use here: a picture, a question and an answer.
SHORTEST_CONTEXT: Final = 4096
# Tokens of KV that a decode step reads in the estimate of speed.
USUAL_CONTEXT: Final = 1000
# What a decode step of one answer reaches of the memory's speed: 0.57 on two idle cores of a Xeon, float16.
USUAL_SHARE: Final = 0.6


@dataclass(frozen=True, slots=True)
class Form:
    """A way of having weights in memory; bytes are those of a weight, or of a number of KV.

    Args:
        backend: that has it.
        name: of the form.
        layers: bytes of a weight of the text layers and of a head of its own.
        others: bytes of a weight of the embedding and the pictures' tower.
        kv: bytes of a number of KV.
        kv_share: of the memory that is free after loading, for the KV of running answers.
        mixtures: whether the backend has mixtures of experts in it.
        share: of the memory's speed that a decode step reaches.
        measured: whether `share` is that of kernels measured on this processor, not an assumption.
    """

    backend: str
    name: str
    layers: float
    others: float
    kv: float
    kv_share: float
    mixtures: bool = True
    share: float = USUAL_SHARE
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A memory in which a model can be.

    Args:
        device: its kind, such as "cpu" or "cuda".
        name: for people.
        free: bytes at present.
        total: bytes in all.
        bandwidth: bytes read in a second.
        forms: in which the backends that are there run a model.
    """

    device: str
    name: str
    free: int
    total: int
    bandwidth: float
    forms: tuple[Form, ...]


class Fit(TypedDict):
    """A model in a form in a place; gigabytes are 1e9 bytes. Speeds are those of one answer at a time."""

    model: str
    device: str
    backend: str
    form: str
    fits: bool
    weights_gb: float
    memory_gb: float
    context: int
    tokens_per_second: float
    tokens_per_second_at_most: float


def fit_all(models: Mapping[str, ModelSize], memories: Sequence[Place]) -> list[Fit]:
    """Return a row for each model in each form of each place that has it, in their order."""
    return [
        fit(model, size, form, place)
        for model, size in models.items()
        for place in memories
        for form in place.forms
        if form.mixtures or not size.mixture
    ]


def fit(model: str, size: ModelSize, form: Form, place: Place) -> Fit:
    """Return whether and how fast the model runs; `memory_gb` must be free, `context` tokens have KV memory then."""
    shared = _shares_head(size, form, place.device)
    weights, memory = memory_of(size, form, place.device)
    kv = size.kv_per_token * form.kv
    context = int(min(max(0.0, place.free - weights - OVERHEAD) * form.kv_share / kv, size.longest))
    read = size.active * form.layers + size.embedding * (form.others if shared else form.layers)
    if (form.backend, form.name) == ("local", "float32") and _has_halves(size, place, weights):
        read /= 2
    at_most = place.bandwidth / (read + USUAL_CONTEXT * kv)
    return {
        "model": model,
        "device": place.device,
        "backend": form.backend,
        "form": form.name,
        "fits": place.free >= memory,
        "weights_gb": round(weights / 1e9, 1),
        "memory_gb": round(memory / 1e9, 1),
        "context": context,
        "tokens_per_second": _two_digits(at_most * form.share),
        "tokens_per_second_at_most": _two_digits(at_most),
    }


def memory_of(size: ModelSize, form: Form, device: str) -> tuple[float, float]:
    """Return bytes: of the weights, and in all with the program and the memory that holds SHORTEST_CONTEXT of KV."""
    head = 0 if _shares_head(size, form, device) else size.embedding
    weights = (size.layers + head) * form.layers + (size.embedding + size.tower) * form.others
    return weights, weights + OVERHEAD + SHORTEST_CONTEXT * size.kv_per_token * form.kv / form.kv_share


def _shares_head(size: ModelSize, form: Form, device: str) -> bool:
    """Return True if head and embedding are one: on a CPU the local engine lays the head out anew beside it."""
    return size.tied and (form.backend, device) != ("local", "cpu")


def _has_halves(size: ModelSize, place: Place, weights: float) -> bool:
    """Return True if decode steps read float16 copies of float32 weights, made where a quarter of memory remains."""
    return place.device == "cpu" and place.free - weights - (size.layers + size.embedding) * 2 >= place.total / 4


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def places() -> list[Place]:
    """Return the host's memory and that of the device which "auto" takes, each read for a fraction of a second."""
    from qvl.backends.local.model.device import host_memory

    device = _accelerator()
    free, total = host_memory()
    memories = [Place("cpu", "this machine", free, total, host_bandwidth(), host_forms())]
    if device is not None:
        free, total = device.memory()
        form = _local(device.type, device.dtype_name, 2.0)
        name = device.name or device.type
        memories.insert(0, Place(device.type, name, free, total, device_bandwidth(device), (form,)))
    return memories


def size_named(model: str) -> ModelSize:
    """Return the size of a folder, a published model, or a hub id, of which config.json alone is downloaded.

    Raises:
        ConfigError: no such folder or model, or it is not of a family that the local backend knows.
        BackendUnavailableError: the hub cannot be reached.
    """
    from qvl.backends.local.model.checkpoint_files import read_json
    from qvl.backends.local.model.family import family_of
    from qvl.backends.local.model.model_size import PUBLISHED, published_name, size_of

    known = published_name(model) if model.startswith("Qwen/") else None
    if known is not None:
        return PUBLISHED[known[0]]
    from qvl.backends.local.model.model_folder import find_folder

    config = read_json(find_folder(model, None, ["config.json"]) / "config.json", model)
    family_of(config.get("model_type"), model)
    return size_of(config, model)


def _accelerator() -> Device | None:
    from qvl.backends.local.model.device import open_device
    from qvl.errors import QvlError

    try:
        device = open_device("auto")
    except (ImportError, QvlError):
        return None
    return device if device.type != "cpu" else None


def _local(device: str, name: str, layers: float, others: float | None = None) -> Form:
    from qvl.backends.local.scheduling.sizing import KV_SHARE, PREFIX_PART

    others = layers if others is None else others
    form = Form("local", name, layers, others, others, KV_SHARE[device] * (1 - PREFIX_PART))
    measured, bandwidth = one_row(name), known_bandwidth()
    if device != "cpu" or measured is None or bandwidth is None:
        return form
    return replace(form, share=min(1.0, measured[1] / bandwidth), measured=True)


def in_16_bits() -> Form:
    """Return the form of the local engine with two bytes a weight, on a CPU."""
    return _local("cpu", "bfloat16", 2.0)


def host_forms() -> tuple[Form, ...]:
    """Return the forms that run on the processor, of the backends that this version has.

    bfloat16 is left out where the processor has no instructions for it: emulated, it is several times slower.
    """
    import inspect

    from qvl.backends.local.backend import LocalBackend
    from qvl.plugins.host import PluginHost

    forms = [_local("cpu", "float32", 4.0)]
    if has_bfloat16():
        forms.append(_local("cpu", "bfloat16", 2.0))
    if "quantize" in inspect.signature(LocalBackend).parameters:
        forms.append(replace(_local("cpu", "int8", 1.0, 2.0), mixtures=False))
    if "openvino" in PluginHost().backends.owners:
        # Groups of 128 weights have a scale and a zero point; KV is in 8 bits, and may take what is free.
        forms += [
            Form("openvino", "int8", 1.0, 1.0, 1.0, 1.0, mixtures=False),
            Form("openvino", "int4", 0.53, 1.0, 1.0, 1.0, mixtures=False),
        ]
    return tuple(forms)


def device_bandwidth(device: Device, seconds: float = READ_SECONDS) -> float:
    """Return the bytes a second at which the device reads its own memory."""
    import torch

    block = torch.ones(min(512 << 20, device.memory()[0] // 4) // 4, device=device.torch)

    def read() -> None:
        block.sum()
        device.synchronize()

    read()
    return best_pass(read, block.nbytes, seconds)
