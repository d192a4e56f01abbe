"""Checks of a checkpoint folder: the model type, and that every shard of the index exists with the right size.

Besides the names that transformers writes, those of ModelSlim are known (quant_model_weights.safetensors.index.json and
quant_model_description.json), the vendor's quantisation for NPUs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qvl.ascend import matrix
from qvl.ascend.report import Finding
from qvl.backends.local.model.checkpoint_files import image_settings, quantisation, read_json
from qvl.backends.local.model.family import FAMILIES
from qvl.backends.local.model.weight_form import readable
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.types import JsonObject

_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 2**28


def shard_problem(path: Path) -> str | None:
    """Return the fault of one safetensors file as text; None if its size matches its header.

    The header is 8 bytes of length (little-endian), then JSON with the byte range of each tensor
    (the safetensors format).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) == 8 and head == _POINTER[:8]:
                return "is a git-lfs pointer, not the weights"
            if len(head) < 8:
                return "is empty" if size == 0 else f"has only {size} bytes"
            length = struct.unpack("<Q", head)[0]
            if length > min(_LARGEST_HEADER, size - 8):
                return "has no safetensors header (cut off, or another format)"
            header = json.loads(file.read(length))
        ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"cannot be read: {error}"
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        word = "cut off" if size < expected else "too long"
        return f"is {word}: {size} bytes, expected {expected} by its header"
    return None


def model_slim(folder: Path) -> str | None:
    """Return the form of weights that ModelSlim quantised, such as "W8A8"; None for all others."""
    for path in sorted(folder.glob("quant_model_description*.json")):
        try:
            kind = read_json(path, folder.name).get("model_quant_type")
        except ConfigError:
            kind = None
        return str(kind or "by ModelSlim")
    return None


def is_sparse(folder: Path) -> bool:
    """Return whether the checkpoint is a mixture of experts, by its config.json."""
    try:
        config = read_json(folder / "config.json", folder.name)
    except ConfigError:
        return False
    return str(config.get("model_type", "")).endswith("_moe")


def check(folder: Path, *, engine: str = "", transformers: str | None = None) -> Iterator[Finding]:
    """Yield findings about the checkpoint in `folder`.

    `engine` is the one that is to serve it, `qvl` or `vllm`; "" judges both. `transformers` is the version that this
    host has, which must know the model type.
    """
    again = f"download it again: hf download MODEL --local-dir {folder}"
    if not folder.is_dir():
        yield Finding.fail("weights", f"{folder} is not a folder", "give the folder that holds config.json")
        return
    try:
        config = read_json(folder / "config.json", str(folder))
    except ConfigError as error:
        yield Finding.fail("weights", error.message, again)
        return
    yield _model_type(config, folder, engine, transformers)
    shards, problem = _shards(folder)
    if problem:
        yield Finding.fail("weights", problem, again)
        return
    broken = False
    total = 0
    for name in shards:
        path = folder / name
        trouble = "is missing" if not path.exists() else shard_problem(path)
        if trouble:
            broken = True
            yield Finding.fail("weights", f"{name} {trouble}", again, {"shard": name})
        else:
            total += path.stat().st_size
    if not (folder / "tokenizer_config.json").exists():
        yield Finding.warn("weights", "tokenizer_config.json is missing beside the weights", again)
    try:
        image_settings(folder, "the checkpoint")
    except ConfigError as error:
        yield Finding.warn("weights", error.message, again)
    slim = model_slim(folder)
    kind = slim or quantisation(folder, config)
    if slim is not None and engine == "vllm":
        text = f"the weights are quantised by ModelSlim ({slim}); vllm-ascend needs --quantization ascend for them"
        yield Finding.ok("weights", text, {"quantisation": slim})
    elif slim is None and kind is not None and readable(folder, config):
        text = (
            f"the weights are quantised ({kind}); the local backend unpacks them, which takes the memory of plain ones"
        )
        yield Finding.ok("weights", text, {"quantisation": kind})
    elif kind is not None:
        yield Finding.warn(
            "weights",
            f"the weights are quantised ({kind}), which the local backend cannot run",
            "use 'vllm:…' or an endpoint, or a checkpoint in bfloat16, FP8, AWQ, GPTQ or compressed-tensors",
            {"quantisation": kind},
        )
    partial = sorted(path.name for path in folder.rglob("*.incomplete"))
    if partial:
        yield Finding.warn("weights", f"a download is incomplete: {partial[0]}", again, {"files": partial})
    if not broken:
        text = f"{len(shards)} weight files, {total / 2**30:.2f} GiB, all of the size in their headers"
        yield Finding.ok("weights", text, {"shards": shards, "bytes": total})


def _model_type(config: JsonObject, folder: Path, engine: str, transformers: str | None) -> Finding:
    table = matrix.load()
    kind = str(config.get("model_type"))
    local = [name for family in FAMILIES for name in family.model_types]
    takes = {"qvl": kind in local, "vllm": kind in table.model_types}
    oldest = table.model_types.get(kind)
    detail = {"local": takes["qvl"], "vllm": takes["vllm"], "transformers": oldest}
    if transformers and oldest and matrix.key(transformers) < matrix.key(oldest):
        text = f"model_type {kind} is in transformers {oldest} and newer, but {transformers} is installed"
        fix = f"pip install 'transformers>={oldest},<{table.transformers['max']}'"
        return Finding.fail("model-type", text, fix, detail)
    if takes["qvl"] and takes["vllm"]:
        return Finding.ok("model-type", f"model_type {kind}, for the local engine and for vllm", detail)
    if engine == "vllm" and not takes["vllm"]:
        # vllm itself knows more than a hundred types; only those of the matrix were looked up for an NPU.
        text = (
            f"model_type {kind} is not in the matrix of {table.date}: whether vllm-ascend serves it is not known here"
        )
        return Finding.warn("model-type", text, "see vllm-ascend's list of supported models", detail)
    if takes.get(engine) or (not engine and takes["qvl"]):
        return Finding.ok("model-type", f"model_type {kind}", detail)
    if takes["vllm"]:
        text = f"model_type {kind} is served by vllm only; the local engine (qvl-serve FOLDER) runs {', '.join(local)}"
        fix = f"use 'vllm:{folder}', or qvl launch --engine vllm"
        return (
            Finding.fail("model-type", text, fix, detail) if engine else Finding.warn("model-type", text, fix, detail)
        )
    known = ", ".join(sorted(table.model_types))
    return Finding.fail(
        "model-type",
        f"{folder}/config.json has model_type {kind!r}; the local engine runs {', '.join(local)}, and vllm-ascend is "
        f"known to serve {known}",
        "give the folder of a Qwen3-VL checkpoint",
        detail,
    )


def _shards(folder: Path) -> tuple[list[str], str | None]:
    """Return the names of the files with weights, and what is wrong with the list of them."""
    names = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    index = next((folder / name for name in ("model.safetensors.index.json", *names) if name in names), None)
    if index is None:
        single = sorted(path.name for path in folder.glob("*.safetensors"))
        if "model.safetensors" in single:
            return ["model.safetensors"], None
        if single and (len(single) == 1 or model_slim(folder) is not None):
            return single, None
        if single:
            return [], f"{folder} has {len(single)} files of weights and no index (*.safetensors.index.json)"
        return [], f"{folder} has neither model.safetensors nor an index of weights (*.safetensors.index.json)"
    try:
        listed = sorted(set(read_json(index, folder.name)["weight_map"].values()))
    except ConfigError as error:
        return [], error.message
    except (KeyError, AttributeError, TypeError) as error:
        return [], f"{index.name} cannot be read: {error}"
    return (listed, None) if listed else ([], f"{index.name} lists no files")
