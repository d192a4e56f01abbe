"""Attaches LoRA adapters to the matrix products of a loaded model: beside the weights, which stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl.backends.local.model.adapter_files import WEIGHTS, AdapterFiles
from qvl.backends.local.model.checkpoint_files import named
from qvl.backends.local.model.linear import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qvl.backends.local.model.linear import Linear, LinearPlan

# Where transformers keeps what other versions, and text models trained for themselves, call otherwise.
RENAMED = (
    ("", ""),
    ("model.", "model.language_model."),
    ("model.language_model.model.", "model.language_model."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("visual.", "model.visual."),
)


def attach(adapter: AdapterFiles, number: int, model: PreTrainedModel, plan: LinearPlan) -> None:
    """Have the Linears of `plan` apply the adapter to the rows of `number`, in the dtype and on the device of each.

    Raises:
        ConfigError: it was trained on another model, or has a target that is no Linear of `plan`; nothing is applied.
    """
    import torch
    from safetensors import safe_open

    _refuse_class(adapter, model)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    places = _places(adapter, modules, plan)
    linears: dict[Linear, list[tuple[Tensor, Tensor, int, int]]] = {}
    with safe_open(str(adapter.folder / WEIGHTS), framework="pt") as file:
        for path, module in places.items():
            target = adapter.targets[path]
            device, dtype = module.weight.device, module.weight.dtype
            down = file.get_tensor(target.down).to(device, dtype)
            up = (file.get_tensor(target.up).float() * target.scale).to(device, dtype)
            for part in plan.parts[module]:
                some = up if part.rows is None else up.index_select(0, part.rows.to(device))
                linears.setdefault(part.linear, []).append((down, some, part.first, part.count))
    for linear, parts in linears.items():
        linear.adapters[number] = _joined(parts, linear.outputs)


def _refuse_class(adapter: AdapterFiles, model: PreTrainedModel) -> None:
    trained = (adapter.settings.get("auto_mapping") or {}).get("base_model_class")
    if isinstance(trained, str) and trained != type(model).__name__ and trained.endswith("ForConditionalGeneration"):
        raise adapter.refused(f"is for a {trained}, and the model is a {type(model).__name__}", adapter.of_base())


def _places(adapter: AdapterFiles, modules: Mapping[str, nn.Linear], plan: LinearPlan) -> dict[str, nn.Linear]:
    """Return the module of each target, by the path that the adapter's files have for it."""
    old, new = next(
        (pair for pair in RENAMED if all(_renamed(path, *pair) in modules for path in adapter.targets)), RENAMED[0]
    )
    places = {path: modules[known] for path in adapter.targets if (known := _renamed(path, old, new)) in modules}
    if absent := adapter.targets.keys() - places.keys():
        what = f"changes {len(absent)} modules that are no linear layers of this model ({named(absent)})"
        raise adapter.refused(what, adapter.of_base())
    if others := {path for path, module in places.items() if module not in plan.parts}:
        what = f"changes {len(others)} modules that this engine does not adapt ({named(others)})"
        raise adapter.refused(what, "train it on the projections of attention and MLP, or take vllm:NAME")
    for path, module in places.items():
        target = adapter.targets[path]
        if (target.inputs, target.outputs) != (module.in_features, module.out_features):
            what = f"is {target.inputs} to {target.outputs} wide at {path}, where the model is"
            raise adapter.refused(f"{what} {module.in_features} to {module.out_features}", adapter.of_base())
    expected = {
        path for known in modules if known.startswith(new) and adapter.expects(path := old + known.removeprefix(new))
    }
    if lacking := expected - adapter.targets.keys():
        what = f"lacks the weights of {len(lacking)} of its target modules ({named(lacking)})"
        raise adapter.refused(what, f"copy it again, or {adapter.of_base()}")
    return places


def _renamed(path: str, old: str, new: str) -> str:
    return new + path.removeprefix(old) if path.startswith(old) else path


def _joined(parts: list[tuple[Tensor, Tensor, int, int]], outputs: int) -> LowRank:
    """Return one pair of weights for what the modules of a Linear add to their own outputs."""
    import torch

    if len(parts) == 1 and parts[0][3] == outputs:
        return LowRank(parts[0][0], parts[0][1].contiguous())
    down = torch.cat([part[0] for part in parts])
    up = down.new_zeros((outputs, len(down)))
    begin = 0
    for _, some, first, count in parts:
        up[first : first + count, begin : begin + some.shape[1]] = some
        begin += some.shape[1]
    return LowRank(down, up)
