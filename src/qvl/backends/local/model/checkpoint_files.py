"""Reads the JSON files and safetensors headers of a checkpoint, without torch and without transformers.

A checkpoint is published with preprocessor_config.json and chat_template.json. transformers 4 saves the template as
chat_template.jinja; transformers 5 saves a processor as processor_config.json with the image processor inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.config import in_home
from qvl.errors import ConfigError, first_line

if TYPE_CHECKING:
    from qvl.types import JsonObject

# Names of what stands beside a quantised weight: scales, zero points, packed integers.
QUANTISED_SUFFIXES: Final = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".input_scale",
    ".SCB",
    ".absmax",
    ".quant_map",
)
PLAIN_TYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})
# What counts or masks is not a weight; whole numbers and bits anywhere else are codes of one.
COUNTS: Final = ("position_ids", "token_type_ids", "causal_mask", "num_batches_tracked")
# The lists of equal parts that a Qwen3-VL is made of, by their names in its files.
_PART: Final = re.compile(
    r"(?:^|\.)(?:(?:language_model|model)\.(layers)|visual\.(blocks|deepstack_merger_list))\.(\d+)\."
)
LARGEST_HEADER: Final = 100 << 20
LARGEST_NAMED: Final = 3
# Of all frames together, as published with Qwen3-VL.
VIDEO_SIZE: Final = {"shortest_edge": 4096, "longest_edge": 25_165_824}


def named_folder(model: str) -> Path | None:
    """Return the folder of the checkpoint `model`; None for what can only be a hub id.

    Raises:
        ConfigError: there is no such folder, or it has no config.json.
    """
    path = in_home(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json", hint="name the folder of a Qwen3-VL checkpoint")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ConfigError(f"model {model!r} not found", hint="a folder, or a hub id such as Qwen/Qwen3-VL-2B-Instruct")
    return None


def read_json(path: Path, name: str) -> JsonObject:
    """Return the JSON object in the file `path` of the checkpoint `name`.

    Raises:
        ConfigError: the file is absent, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{name} lacks {path.name}", hint="download the whole checkpoint") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{name}: {path.name} cannot be read: {first_line(exc)}") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: {path.name} is not a JSON object", hint="download the whole checkpoint")
    return content


def image_settings(folder: Path, name: str) -> JsonObject:
    """Return the image processor's settings, from processor_config.json or else preprocessor_config.json.

    Raises:
        ConfigError: neither file has them.
    """
    whole = folder / "processor_config.json"
    if whole.is_file():
        settings = read_json(whole, name).get("image_processor")
        if isinstance(settings, dict):
            return settings
    own = folder / "preprocessor_config.json"
    if not own.is_file():
        raise ConfigError(
            f"{name} has no image processor settings: neither preprocessor_config.json nor processor_config.json with"
            " an image_processor",
            hint="download the whole checkpoint, or save the processor beside the model",
        )
    return read_json(own, name)


def video_settings(folder: Path, name: str) -> JsonObject:
    """Return the video processor's settings; where the checkpoint has none, the image processor's with other limits."""
    whole, own = folder / "processor_config.json", folder / "video_preprocessor_config.json"
    settings = read_json(whole, name).get("video_processor") if whole.is_file() else None
    if isinstance(settings, dict):
        return settings
    if own.is_file():
        return read_json(own, name)
    limits = {"min_pixels": None, "max_pixels": None, "size": VIDEO_SIZE}
    return {**image_settings(folder, name), **limits}


def chat_template(folder: Path, name: str) -> str:
    """Return the chat template from chat_template.jinja or chat_template.json.

    Raises:
        ConfigError: the folder has no chat template.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for path in (folder / "chat_template.json", folder / "processor_config.json"):
        template = read_json(path, name).get("chat_template") if path.is_file() else None
        if isinstance(template, str):
            return template
    raise ConfigError(
        f"{name} has no chat template: neither chat_template.jinja nor chat_template.json",
        hint="download the whole checkpoint, or save the processor beside the model",
    )


def quantisation(folder: Path, config: JsonObject) -> str | None:
    """Return how the weights are quantised, such as "fp8" or "bitsandbytes (4 bit)"; None if they are not.

    Reads config.json, and the headers of the weights' files too, since conversions lose the settings.
    """
    settings = quantisation_settings(config)
    if settings:
        return _method(settings)
    if (folder / "hf_quant_config.json").is_file():
        return "modelopt"
    for name, kind in _tensors(folder):
        if name.endswith(QUANTISED_SUFFIXES) or not (kind in PLAIN_TYPES or name.endswith(COUNTS)):
            return f"{name} is {kind}"
    return None


def quantisation_settings(config: JsonObject) -> object:
    """Return the quantisation settings in a config.json, its parts for text and vision included; None without any."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config"):
                if part.get(key):
                    return part[key]
    return None


def refuse_pickled(folder: Path, name: str) -> None:
    """Raise ConfigError for weights in pytorch_model.bin, since reading a pickle runs the code in it."""
    if any((folder / f"model.safetensors{index}").is_file() for index in ("", ".index.json")):
        return
    if any((folder / f"pytorch_model.bin{index}").is_file() for index in ("", ".index.json")):
        raise ConfigError(
            f"the weights of {name} are in pytorch_model.bin, not in safetensors files",
            hint="save it as safetensors: transformers' from_pretrained(folder), then save_pretrained(folder)",
            param="model",
        )


def refuse_incomplete(name: str, missing: set[str], mismatched: set[str]) -> None:
    """Raise ConfigError if the files lack weights of the model, or have them in another shape."""
    faults = [
        f"{len(keys)} {what} ({named(keys)})"
        for keys, what in ((missing, "weights are missing"), (mismatched, "weights have another shape"))
        if keys
    ]
    if faults:
        raise ConfigError(
            f"{name} lacks weights that its config.json names: {', '.join(faults)}",
            hint="download the whole checkpoint; config.json must be the one that it was saved with",
            param="model",
        )


def refuse_surplus(name: str, unused: set[str], sizes: Mapping[str, int]) -> None:
    """Raise ConfigError if the files have layers, or weights in a layer, that the model lacks.

    `sizes` are the numbers of `layers`, `blocks` and `deepstack_merger_list` of the model.
    """
    surplus = set()
    for key in unused:
        part = _PART.search(key)
        if part is None:
            continue
        kind, number = part[1] or part[2], int(part[3])
        if number >= sizes.get(kind, 0) or key.endswith((".weight", ".bias")):
            surplus.add(key)
    if surplus:
        raise ConfigError(
            f"{name} has {len(surplus)} weights that its config.json does not name ({named(surplus)})",
            hint="config.json must be the one that it was saved with",
            param="model",
        )


def named(keys: set[str]) -> str:
    """Return the first of `keys` in words, and how many more there are."""
    shown = sorted(keys)[:LARGEST_NAMED]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _method(settings: object) -> str:
    if not isinstance(settings, dict):
        return str(settings)
    parts = [str(settings.get("quant_method") or settings.get("quant_algo") or "by an unnamed method")]
    if isinstance(settings.get("format"), str):
        parts.append(settings["format"])
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
    if isinstance(bits, int):
        parts.append(f"{bits} bit")
    return ", ".join(parts)


def _tensors(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, dtype) of every tensor by the safetensors headers; skips broken files (the loader reports them)."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > LARGEST_HEADER:
                    continue
                header = json.loads(file.read(length))
            for name, facts in header.items():
                if name != "__metadata__":
                    yield str(name), str(facts["dtype"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
