"""Reads LoRA adapters in PEFT's form, as far as that needs no torch; what would be half applied is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qvl.backends.local.model.checkpoint_files import LARGEST_HEADER, PLAIN_TYPES, named, read_json
from qvl.backends.local.model.model_folder import from_hub, sampled
from qvl.config import in_home
from qvl.errors import ConfigError, first_line

if TYPE_CHECKING:
    from qvl.types import JsonObject

SETTINGS: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_TENSOR: Final = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# What is honoured, and what says how the adapter was trained and nothing about what is computed with it.
_HONOURED: Final = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
_CHOOSE: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TOLD: Final = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode")
_TRAINED: Final = ("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
_IDLE: Final = ("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "fan_in_fan_out")
_TRAINERS: Final = ("unsloth_fixed", "lora_dtype")
_KNOWN: Final = frozenset((*_HONOURED, *_CHOOSE, *_TOLD, *_TRAINED, *_IDLE, *_TRAINERS))
# Ways to begin the training that change the base model's weights too, which the adapter's files do not bring.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class AdapterTarget(NamedTuple):
    """The two weights of one module: names and shapes ([rank, inputs] and [outputs, rank]), and their product's factor.

    Added to the module's output is `scale * (x @ down.T) @ up.T`.
    """

    down: str
    up: str
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A LoRA adapter on disk.

    Args:
        title: how it is called in errors.
        folder: where its two files are.
        digest: sha256 of what decides the answers; the same for equal copies.
        settings: of `adapter_config.json`.
        targets: by the path of the module.
    """

    title: str
    folder: Path
    digest: str
    settings: JsonObject
    targets: Mapping[str, AdapterTarget]

    @property
    def base(self) -> str:
        """Return the model that it was trained on, as its files name it."""
        return str(self.settings.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """Return the largest rank of its weights."""
        return max(target.rank for target in self.targets.values())

    @property
    def shows(self) -> tuple[str, ...]:
        """Return the paths of its targets in the picture tower."""
        return tuple(path for path in self.targets if "visual." in path)

    def refused(self, what: str, hint: str) -> ConfigError:
        """Return the error that says what is wrong with it."""
        return ConfigError(f"{self.title} {what}", hint=hint, param="adapter")

    def of_base(self) -> str:
        """Return in words which model it was trained on, for the hint of an error."""
        return f"it was trained on {self.base}" if self.base else "it was trained on another model"

    def refuse_base(self, model: str | None) -> None:
        """Raise ConfigError if it and `model` are of a hub, under names of which neither begins with the other."""
        if model is None or any(in_home(name).exists() or name.count("/") != 1 for name in (model, self.base)):
            return
        trained, loaded = (name.partition("/")[2].lower() for name in (self.base, model))
        if not trained.startswith(loaded) and not loaded.startswith(trained):
            raise self.refused(f"was trained on {self.base}, not on {model}", f"--model {self.base}")

    def expects(self, path: str) -> bool:
        """True if its settings have it change the module at `path`."""
        chosen, excluded = self.settings.get("target_modules"), self.settings.get("exclude_modules")
        return _matches(chosen, path) and not _matches(excluded, path) and self._of_layers(path)

    def _of_layers(self, path: str) -> bool:
        """True unless its settings choose layers, and `path` is in none of them."""
        layers, names = self.settings.get("layers_to_transform"), self.settings.get("layers_pattern")
        if layers is None or layers == []:
            return True
        chosen = layers if isinstance(layers, list) else [layers]
        patterns = [names] if isinstance(names, str) else names or [r"[^.]*"]
        found = next((match for name in patterns if (match := re.match(rf".*\.{name}\.(\d+)\.", path))), None)
        return found is not None and int(found[1]) in chosen


def named_adapters(adapter: object) -> dict[str, str]:
    """Return the paths of adapters by name, of a path ("" is then the name, of every request) or a mapping of them.

    Raises:
        ConfigError: it is neither.
    """
    if adapter is None or adapter == {}:
        return {}
    if isinstance(adapter, str | os.PathLike) and str(adapter):
        return {"": str(adapter)}
    if not isinstance(adapter, Mapping) or not all(
        isinstance(name, str) and name and isinstance(path, str | os.PathLike) and str(path)
        for name, path in adapter.items()
    ):
        hint = 'the folder of one, or several by name: {"shelf": "adapters/shelf"}'
        raise ConfigError(f"invalid adapter={adapter!r}", hint=hint, param="adapter")
    return {name: str(path) for name, path in adapter.items()}


def adapter_folder(path: str) -> Path | None:
    """Return the folder of an adapter; None for what can only be a hub id.

    Raises:
        ConfigError: there is no such folder.
    """
    folder = in_home(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(f"adapter {path!r} not found", hint="a folder with adapter_config.json", param="adapter")
    return None


def read_adapter(name: str, path: str) -> AdapterFiles:
    """Return the adapter at `path`, a folder or a hub id, without its weights.

    Raises:
        ConfigError: no such folder, a file that is missing or broken, or a setting that is not honoured.
        BackendUnavailableError: the hub cannot be reached.
    """
    title = f"adapter {name!r} ({path})" if name else f"adapter {path}"
    folder = adapter_folder(path) or from_hub(path, None, [SETTINGS, WEIGHTS])
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"{title} lacks {SETTINGS}", hint="name the folder that PEFT saved", param="adapter")
    settings = read_json(folder / SETTINGS, title)
    refuse_settings(title, settings)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "has its weights in adapter_model.bin, not in safetensors" if pickled else f"lacks {WEIGHTS}"
        hint = "load it with PEFT, then save_pretrained(folder)" if pickled else "name the folder that PEFT saved"
        raise ConfigError(f"{title} {what}", hint=hint, param="adapter")
    targets = _targets(title, settings, _shapes(weights, title))
    digest = hashlib.sha256((folder / SETTINGS).read_bytes() + sampled(weights)).hexdigest()
    return AdapterFiles(title, folder, f"sha256:{digest}", settings, targets)


def refuse_settings(title: str, settings: JsonObject) -> None:
    """Raise ConfigError for the first setting that changes what is computed and is not honoured."""
    hint = "train it without, or merge it into the model with PEFT's merge_and_unload()"
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{title} is {kind or 'of no named kind'}, not LORA", hint=hint, param="adapter")
    for name in ("modules_to_save", *sorted(settings)):
        value = settings.get(name)
        if name not in _KNOWN and value:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
            raise ConfigError(f"{title} has {name} ({shown[:80]}), which is not supported", hint=hint, param="adapter")
    if settings.get("bias") not in (None, "none"):
        raise ConfigError(f"{title} has bias={settings['bias']}, which is not supported", hint=hint, param="adapter")
    begun = str(settings.get("init_lora_weights") or "").lower()
    if begun.startswith(_CHANGES_BASE):
        convert = "convert it to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=...)"
        what = f"has init_lora_weights={begun}, which changed the base model's weights too"
        raise ConfigError(f"{title} {what}", hint=convert, param="adapter")


def _targets(title: str, settings: JsonObject, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AdapterTarget]:
    found: dict[str, dict[str, str]] = {}
    others = []
    for tensor in shapes:
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            others.append(tensor)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    if others or not found:
        what = (
            f"has weights that are no LoRA's of a linear layer ({named(set(others))})" if others else "has no weights"
        )
        raise ConfigError(f"{title} {what}", hint="train it on linear layers alone", param="adapter")
    targets = {}
    for path, both in found.items():
        pair = [shapes[both[half]] for half in "AB" if half in both]
        if len(pair) < 2 or any(len(shape) != 2 for shape in pair) or pair[0][0] != pair[1][1]:
            what = f"has no pair of lora_A [rank, inputs] and lora_B [outputs, rank] for {path}"
            raise ConfigError(f"{title} {what}", hint="save it again", param="adapter")
        rank = pair[0][0]
        targets[path] = AdapterTarget(both["A"], both["B"], rank, pair[0][1], pair[1][0], _scale(title, settings, path))
        if rank != _of_pattern(settings, "rank_pattern", path, settings.get("r")):
            what = f"has rank {rank} at {path}, and another in {SETTINGS}"
            raise ConfigError(f"{title} {what}", hint="save it again", param="adapter")
    return targets


def _scale(title: str, settings: JsonObject, path: str) -> float:
    rank = _of_pattern(settings, "rank_pattern", path, settings.get("r"))
    alpha = _of_pattern(settings, "alpha_pattern", path, settings.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        what = f"has r={rank!r} and lora_alpha={alpha!r} for {path}"
        raise ConfigError(f"{title} {what}", hint="both are numbers, r above 0", param="adapter")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _of_pattern(settings: JsonObject, name: str, path: str, otherwise: object) -> object:
    """Return the value of the first pattern of `name` that `path` matches, as PEFT finds it."""
    patterns: Mapping[str, object] = settings.get(name) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _matches(chosen: object, path: str) -> bool:
    if isinstance(chosen, str):
        return re.fullmatch(chosen, path) is not None
    names: Iterable[object] = chosen if isinstance(chosen, list) else ()
    return any(path == name or path.endswith(f".{name}") for name in names)


def _shapes(path: Path, title: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < LARGEST_HEADER else None
        size = path.stat().st_size - 8 - length
        shapes = {name: facts for name, facts in dict(header or {}).items() if name != "__metadata__"}
        if not shapes or any(facts["data_offsets"][1] > size for facts in shapes.values()):
            raise ValueError("it is cut short")
        odd = sorted(name for name, facts in shapes.items() if facts["dtype"] not in PLAIN_TYPES)
        found = {name: tuple(facts["shape"]) for name, facts in shapes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        reason = first_line(exc)
        raise ConfigError(
            f"{title}: {WEIGHTS} cannot be read: {reason}", hint="copy it again", param="adapter"
        ) from exc
    if odd:
        raise ConfigError(f"{title} has quantised weights ({odd[0]})", hint="save it in bfloat16", param="adapter")
    return found
