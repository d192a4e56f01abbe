"""Where a model's files are: the bundled one, a folder, a hub's; and what tells two copies apart. No torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qvl.backends.local.model.checkpoint_files import named_folder
from qvl.errors import BackendUnavailableError, ConfigError, MissingDependencyError, QvlError, first_line

FILES: Final = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def bundled_folder() -> Path:
    """Return the folder of the checkpoint that comes with the package."""
    import qvl

    return Path(str(qvl.__file__)).parent / "tiny" / "weights"


def find_folder(model: str | None, revision: str | None, files: list[str] = FILES) -> Path:
    """Return the folder of `model` (None: the bundled one); of a hub id, `files` (name patterns) are downloaded."""
    if model is None:
        folder = bundled_folder()
        if not (folder / "config.json").is_file():
            raise ConfigError("the bundled model is not installed", hint="name a model, or install again")
        return folder
    return named_folder(model) or from_hub(model, revision, files)


def from_hub(model: str, revision: str | None, files: list[str]) -> Path:
    """Return the folder with those `files` (name patterns) of the hub id `model`, downloaded unless they are there."""
    hub = os.environ.get("QVL_HUB", "huggingface").strip().lower()
    if hub not in ("huggingface", "hf", "modelscope"):
        raise ConfigError(f"unknown QVL_HUB {hub!r}", hint="huggingface or modelscope")
    if hub == "modelscope":
        need("modelscope", "QVL_HUB=modelscope", "pip install modelscope")
        from modelscope import snapshot_download as download  # type: ignore[import-not-found,unused-ignore]
    else:
        from huggingface_hub import snapshot_download as download
    try:
        # Each hub has a default of its own for the revision.
        where = download(model, allow_patterns=files, **({"revision": revision} if revision else {}))
    except Exception as exc:
        raise _hub_error(model, revision, exc) from exc
    return Path(where)


def _reason(exc: Exception) -> str:
    """Return what went wrong on the way to the hub, without the words that its client puts around that."""
    text = first_line(exc).removeprefix("Got: ")
    return re.sub(r"^\w+(Error|Exception|Timeout): ", "", text) or type(exc).__name__


def _hub_error(model: str, revision: str | None, exc: Exception) -> QvlError:
    kind = type(exc).__name__
    at = f" at revision {revision}" if revision else ""
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError", "NotExistError"):
        return ConfigError(f"model {model!r}{at} not found on the hub, or private", hint="check the name; log in")
    if kind == "GatedRepoError":
        return ConfigError(f"{model} is gated", hint="accept its terms on the hub and log in")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return ConfigError(f"{model}{at} is not in the local cache", hint="HF_HUB_OFFLINE is set: unset it once")
    return BackendUnavailableError(
        f"{model} cannot be downloaded: {_reason(exc)}",
        hint="name a local folder, set HF_ENDPOINT to a mirror, or QVL_HUB=modelscope",
    )


def need(module: str, what: str, line: str) -> None:
    """Raise MissingDependencyError if `module`, which `what` needs, is not installed; `line` installs it."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(f"{what} needs {module}", hint=line)


def fingerprint(folder: Path, weights: Sequence[str] = (".safetensors",)) -> str:
    """Return a sha256 over the small files and, of each file of `weights`, its header, size, and samples of its bytes.

    Hashing 17 GB would delay every start by a minute; headers, sizes and 64 samples of 4 KiB tell two checkpoints
    apart.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt") and path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        elif path.suffix in weights:
            digest.update(path.name.encode() + b"\0" + sampled(path))
    return f"sha256:{digest.hexdigest()}"


def sampled(path: Path, samples: int = 64, width: int = 4096) -> bytes:
    """Return a sha256 of a safetensors file: of its header, its size, and of all bytes or `samples` of `width`."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header = file.read(8)
        digest.update(header + file.read(min(int.from_bytes(header, "little"), 16 << 20)))
        if size <= 16 << 20:
            digest.update(file.read())
            return digest.digest()
        for step in range(samples):
            file.seek(step * (size - width) // (samples - 1))
            digest.update(file.read(width))
    return digest.digest()
