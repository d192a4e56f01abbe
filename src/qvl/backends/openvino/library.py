"""OpenVINO GenAI itself: importing it, its devices and precisions, its exceptions, its folders of a model."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.backends.token_engine import translated
from qvl.errors import BackendError, ConfigError, DeviceMemoryError, MissingDependencyError, QvlError
from qvl.suggest import install_line

if TYPE_CHECKING:
    from types import ModuleType

    from qvl.types import JsonObject

LANGUAGE_MODEL: Final = "openvino_language_model.xml"
# What an exported model is made of, and what of it decides the answers by its mere bytes.
FILES: Final = ["*.json", "*.jinja", "*.txt", "*.xml", "*.bin"]
WEIGHTS: Final = (".xml", ".bin")
SIZES: Final = "preprocessor_config.json"
LARGEST: Final = 1 << 30
EXPORT: Final = "optimum-cli export openvino --model {} --task image-text-to-text --weight-format int8 FOLDER"
# Our names of number types, in OpenVINO's spelling.
PRECISIONS: Final = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CACHE_PRECISIONS: Final = {**PRECISIONS, "int8": "u8"}


def import_genai() -> tuple[ModuleType, ModuleType]:
    """Return the modules openvino and openvino_genai.

    Raises:
        MissingDependencyError: they are not installed, or not for this platform.
    """
    try:
        import openvino
        import openvino_genai
    except (ImportError, OSError) as exc:
        absent = isinstance(exc, ModuleNotFoundError) and exc.name in ("openvino", "openvino_genai")
        reason = "is not installed" if absent else f"cannot be imported: {one_line(exc)}"
        raise MissingDependencyError(f"OpenVINO GenAI {reason}", hint=install_line("openvino")) from exc
    return openvino, openvino_genai


def precision(name: str, known: dict[str, str], param: str) -> str | None:
    """Return OpenVINO's name of a number type; None for "auto".

    Raises:
        ConfigError: `known` does not have it.
    """
    if name == "auto":
        return None
    if name not in known:
        raise ConfigError(f"{param}={name!r} is unknown", hint=f"auto, {', '.join(known)}", param=param)
    return known[name]


def device_facts(device: str, properties: dict[str, str]) -> JsonObject:
    """Return the facts of `device` that change an answer, with `properties` set: its kind, and the number types.

    Raises:
        ConfigError: there is no such device.
    """
    openvino, _ = import_genai()
    core = openvino.Core()
    known = core.available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in known}:
        raise ConfigError(f"OpenVINO has no device {device!r}", hint=f"known: {', '.join(known)}", param="device")
    facts: JsonObject = {"library": openvino.__version__, "device": device}
    for fact, key in (("dtype", "INFERENCE_PRECISION_HINT"), ("kv_cache_dtype", "KV_CACHE_PRECISION")):
        with crossing(opening=True):
            kind = core.get_property(device, key)
        facts[fact] = properties.get(key) or kind.to_string()
    return facts


def refuse_unconverted(folder: Path, name: str) -> None:
    """Refuse a folder that holds a checkpoint as it was published, not a model in OpenVINO's form.

    Raises:
        ConfigError: with the command that converts it.
    """
    if not (folder / LANGUAGE_MODEL).is_file():
        raise ConfigError(
            f"{name} is not in OpenVINO's form: it has no {LANGUAGE_MODEL}", hint=EXPORT.format(name), param="model"
        )


@contextmanager
def with_any_size(folder: Path, name: str) -> Iterator[Path]:
    """Yield a folder of links to the model's files that says of no picture that it is too small or too large.

    Pictures have their final size when they are handed over, which the library would change near its own limits.
    """
    from qvl.backends.local.model.checkpoint_files import image_settings

    settings = image_settings(folder, name)
    limits = {"min_pixels": 1, "max_pixels": LARGEST}
    settings |= {**limits, "size": {"shortest_edge": 1, "longest_edge": LARGEST}}
    # A weights file that is mapped cannot be removed on every system.
    with tempfile.TemporaryDirectory(prefix="qvl-openvino-", ignore_cleanup_errors=True) as made:
        view = Path(made)
        for path in folder.iterdir():
            if path.is_file() and path.name != SIZES:
                _link(path.resolve(), view / path.name)
        (view / SIZES).write_text(json.dumps(settings), encoding="utf-8")
        yield view


def _link(path: Path, place: Path) -> None:
    try:
        place.symlink_to(path)
    except OSError:
        # Windows allows symbolic links to few; hard ones need the same drive.
        try:
            place.hardlink_to(path)
        except OSError as exc:
            raise ConfigError(
                f"{path} cannot be linked to in {place.parent}: {exc.strerror}", hint="set TMP to a folder on its drive"
            ) from exc


def quantisation(folder: Path, name: str) -> str | None:
    """Return how the language model's weights were packed when it was exported, as "int4"; None where they were not.

    Raises:
        ConfigError: openvino_config.json cannot be read.
    """
    settings = folder / "openvino_config.json"
    if not settings.is_file():
        return None
    from qvl.backends.local.model.checkpoint_files import read_json

    saved = read_json(settings, name)
    packed = saved.get("quantization_config") or {}
    bits = packed.get("bits") if isinstance(packed, dict) else None
    return f"int{bits}" if bits else str(saved.get("dtype") or "") or None


def crossing(*, opening: bool = False) -> AbstractContextManager[None]:
    """Raise OpenVINO's exceptions as ours; `opening` says that the model is being loaded."""
    return translated(lambda exc: _ours(exc, opening))


def _ours(exc: Exception, opening: bool) -> QvlError:
    text = one_line(exc)
    if isinstance(exc, MemoryError) or "alloc" in text.lower() or "out of memory" in text.lower():
        return DeviceMemoryError(f"the memory does not suffice: {text}", hint="a smaller model, or int4")
    if opening:
        return ConfigError(f"OpenVINO did not load the model: {text}", hint="are all its files there?")
    return BackendError(f"OpenVINO failed: {text}")


def one_line(exc: BaseException) -> str:
    """Return what an exception of OpenVINO says: its last line, without the place in its source that comes first."""
    lines = [" ".join(line.split()) for line in str(exc).splitlines() if line.strip()]
    said = re.sub(r"^.*?\.(?:cc|cpp|hpp|h):\d+:\s*", "", lines[-1]) if lines else ""
    return said[:300] or type(exc).__name__
