"""The check of weights that msModelSlim quantised: their description must name every weight for vllm-ascend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.ascend.report import Finding
from qvl.backends.local.model.checkpoint_files import read_json
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.ascend.chips import Chip

_WEIGHT = ".weight"


def check(folder: Path, chip: Chip | None = None) -> Iterator[Finding]:
    """Check that `quant_model_description.json` and the index of weights name the same weights.

    Without that file, check that the recipe for `chip` serves plain weights.
    """
    described = next(iter(sorted(folder.glob("quant_model_description*.json"))), None)
    index = next(iter(sorted(folder.glob("quant_model_weight*.safetensors.index.json"))), None)
    index = index or folder / "model.safetensors.index.json"
    if described is None and chip is not None and folder.is_dir() and (text := chip.on_other_weights(folder.name)):
        yield Finding.warn(
            "quantisation", text, "download those, or see with `qvl bench` that these are right and fast enough"
        )
    if described is None or not index.exists():
        return
    again = (
        "take the published quantised weights of this model, or quantise it again with the msModelSlim that fits this "
        "vllm-ascend"
    )
    try:
        kinds = read_json(described, folder.name)
        stored = read_json(index, folder.name)["weight_map"]
        names = {name for name in kinds if name.endswith(_WEIGHT)}
        weights = {name for name in stored if name.endswith(_WEIGHT)}
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        yield Finding.fail("quantisation", f"{described.name} or {index.name} cannot be read: {error!r}", again)
        return
    unnamed, absent = sorted(weights - names), sorted(names - weights)
    detail = {"description": described.name, "index": index.name, "unnamed": unnamed[:20], "absent": absent[:20]}
    if unnamed:
        text = f"{described.name} does not name {unnamed[0]}{_others(unnamed)}: vllm-ascend stops with a KeyError"
        yield Finding.fail("quantisation", text, again, detail)
    if absent:
        text = f"{described.name} names {absent[0]}{_others(absent)}, which is in no file"
        yield Finding.fail("quantisation", text, again, detail)
    if not unnamed and not absent:
        kind = kinds.get("model_quant_type", "quantised")
        yield Finding.ok("quantisation", f"{described.name} ({kind}) names all {len(weights)} weights", detail)


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
