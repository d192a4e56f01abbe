"""Checks of a checkpoint folder: the model type, and that every shard of the index exists with the right size."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from qvl.ascend import matrix
from qvl.ascend.report import Finding
from qvl.backends.local.model.checkpoint_files import image_settings, quantisation
from qvl.backends.local.model.weight_form import readable
from qvl.errors import ConfigError

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read: {error}"
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        word = "cut off" if size < expected else "too long"
        return f"is {word}: {size} bytes, expected {expected} by its header"
    return None


def check(folder: Path) -> Iterator[Finding]:
    """Yield findings about the checkpoint in `folder`."""
    again = f"download it again: hf download MODEL --local-dir {folder}"
    if not folder.is_dir():
        yield Finding.fail("weights", f"{folder} is not a folder", "give the folder that holds config.json")
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Finding.fail("weights", f"{folder}/config.json cannot be read: {error}", again)
        return
    yield _model_type(config, folder)
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
    settings = config if isinstance(config, dict) else {}
    kind = quantisation(folder, settings)
    if kind is not None and readable(folder, settings):
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


def _model_type(config: object, folder: Path) -> Finding:
    known = matrix.load().model_types
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in known:
        return Finding.ok("model-type", f"model_type {kind}", {"transformers": known[str(kind)]})
    return Finding.fail(
        "model-type",
        f"{folder}/config.json has model_type {kind!r}; qvl supports {', '.join(sorted(known))}",
        "give the folder of a Qwen3-VL checkpoint",
    )


def _shards(folder: Path) -> tuple[list[str], str | None]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return ["model.safetensors"], None
        return [], f"{folder} has neither model.safetensors nor model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [], f"{index.name} cannot be read: {error}"
    return (names, None) if names else ([], f"{index.name} lists no files")
