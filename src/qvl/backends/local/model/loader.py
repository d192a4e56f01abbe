"""Loads a checkpoint into memory; every failure is an error of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from qvl.backends.local.model.checkpoint_files import (
    chat_template,
    image_settings,
    read_json,
    refuse_incomplete,
    refuse_pickled,
    refuse_surplus,
    video_settings,
)
from qvl.backends.local.model.family import ModelFamily, family_of
from qvl.backends.local.model.int8_store import Int8Store
from qvl.backends.local.model.model_folder import bundled_folder, find_folder, fingerprint, need
from qvl.backends.local.model.unpack_weights import unpacked_weights, weights_beside
from qvl.backends.local.model.weight_form import WeightForm, weight_form
from qvl.config import in_home
from qvl.errors import ConfigError, MissingDependencyError, QvlError, first_line
from qvl.log import logger
from qvl.suggest import install_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from qvl.backends.local.model.device import Device
    from qvl.backends.local.text.processor import ImageRules
    from qvl.types import JsonObject

log = logger(__name__)

DeviceMap: TypeAlias = str | dict[str, int | str]
"""accelerate's: "auto", or the device of each module by name."""


class LoadingInfo(TypedDict):
    """The `loading_info` of transformers' `from_pretrained`: missing, unexpected and mismatched weights."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[str | tuple[str, object, object]]
    error_msgs: list[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory.

    Args:
        family: the family of the model, which builds its parts.
        model: in eval mode, on its device(s).
        tokenizer: with its chat template.
        image_config: the image processor's settings.
        video_config: the video processor's settings.
        eos_token_ids: the tokens that end an answer.
        fingerprint: sha256 of the files that decide the answers; the same for equal copies in different folders.
        quantisation: the form of the weights in the files, such as "awq, 4 bit"; None if they are not quantised.
        int8: where the weights of the text model in 8 bits are kept, or None to compute with the weights as they are.
    """

    family: ModelFamily
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_config: JsonObject
    video_config: JsonObject
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    quantisation: str | None
    int8: Int8Store | None = None


def load(
    model: str | None,
    device: Device,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    quantize: str | None = None,
) -> Checkpoint:
    """Return the weights, tokenizer and settings of `model` (None: the bundled one). Blocks for seconds to minutes.

    Raises:
        ConfigError: no such folder or model, another model type, incomplete files, a quantisation that is not read.
        BackendUnavailableError: the hub cannot be reached.
        MissingDependencyError: torch, transformers, modelscope or accelerate is not installed.
    """
    try:
        import torch
        import transformers  # noqa: F401 - told apart here if it is absent
    except ImportError as exc:
        raise MissingDependencyError(f"a local model needs {exc.name}", hint=install_line("local")) from exc
    folder = find_folder(model, revision)
    name = model or "the bundled model"
    config = read_json(folder / "config.json", name)
    family = family_of(config.get("model_type"), name)
    form = weight_form(folder, config, name)
    refuse_pickled(folder, name)
    digest = fingerprint(folder)
    if quantize and {"num_experts", "num_local_experts"} & (config.get("text_config") or {}).keys():
        raise ConfigError(f"quantize={quantize!r} takes no mixture of experts", hint="leave it out", param="quantize")
    int8 = Int8Store(digest) if quantize else None
    if device_map is not None:
        need("accelerate", "device_map", "pip install accelerate")
    with _one_line(name, device), _quiet():
        model_config = _model_config(folder, config, trust_remote_code)
        settings: JsonObject = {
            "config": model_config,
            "dtype": device.dtype,
            "attn_implementation": "sdpa",
            # Weights of another shape are then told with their names, and refused below.
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
            **({"device_map": device_map} if device_map else {}),
        }
        loaded, report = _read_weights(folder, name, form, device, int8, settings, trust_remote_code)
        _check_weights(name, loaded, report)
        if device_map is None:
            loaded = loaded.to(device.torch)
    if any(tensor.device == torch.device("meta") for tensor in (*loaded.parameters(), *loaded.buffers())):
        raise ConfigError(f"{name} does not fit into the devices' memory", hint="more devices, or a smaller model")
    tokenizer = load_tokenizer(folder, name, device, trust_remote_code=trust_remote_code)
    loaded.eval().requires_grad_(False)
    return Checkpoint(
        family=family,
        model=loaded,
        tokenizer=tokenizer,
        image_config=image_settings(folder, name),
        video_config=video_settings(folder, name),
        eos_token_ids=_eos(loaded, tokenizer),
        fingerprint=digest,
        int8=int8,
        quantisation=form.name if form is not None else None,
    )


def _read_weights(
    folder: Path,
    name: str,
    form: WeightForm | None,
    device: Device,
    int8: Int8Store | None,
    settings: JsonObject,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return the model with its weights, unpacked if they have a `form`, without those that `int8` keeps; a report."""
    import transformers

    if form is not None:
        newer = int(transformers.__version__.split(".")[0]) >= 5
        return _from_weights(folder, unpacked_weights(folder, form, name, device.dtype, model_layout=newer), settings)
    if int8 is not None and int8.complete:
        tied = bool(settings["config"].tie_word_embeddings)
        return _from_weights(folder, weights_beside(int8, folder, name, device.dtype, tied=tied), settings)
    loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **settings
    )
    return loaded, report


def _from_weights(
    folder: Path, weights: dict[str, Tensor], settings: JsonObject
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return the model with these weights, taken as they are, so that nothing is in memory twice, and the report."""
    import transformers

    config = settings["config"]
    for part in (config, config.text_config, config.vision_config):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    loaded, report = kind.from_pretrained(None, state_dict=weights, **settings)
    if (folder / "generation_config.json").is_file():
        loaded.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return loaded, report


def load_tokenizer(
    folder: Path, name: str, device: Device | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """Return transformers' fast tokenizer of the checkpoint, with its chat template.

    Raises:
        ConfigError: the tokenizer's files are absent or broken.
    """
    import transformers

    settings = folder / "tokenizer_config.json"
    saved = read_json(settings, name) if settings.is_file() else {}
    with _one_line(name, device), _quiet():
        if _newer(saved) and (folder / "tokenizer.json").is_file():
            texts = {key: saved[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if saved.get(key)}
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **texts)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = saved.get("chat_template") or chat_template(folder, name)
    return tokenizer


def _newer(tokenizer_config: JsonObject) -> bool:
    """True if transformers 5 saved the tokenizer and the installed transformers is older, which cannot read it."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return False
    return "backend" in tokenizer_config or tokenizer_config.get("tokenizer_class") == "TokenizersBackend"


def _model_config(folder: Path, saved: JsonObject, trust_remote_code: bool) -> PretrainedConfig:
    """Return the model's configuration; for transformers 4, `rope_parameters` of transformers 5 are translated."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    rope = (saved.get("text_config") or {}).get("rope_parameters")
    if rope and int(transformers.__version__.split(".")[0]) < 5:
        config.text_config.rope_scaling = rope
        config.text_config.rope_theta = rope.get("rope_theta", config.text_config.rope_theta)
    return config


def _check_weights(name: str, loaded: PreTrainedModel, report: LoadingInfo) -> None:
    missing = set(report["missing_keys"])
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    if head.weight is embedding.weight:
        missing.discard("lm_head.weight")
    # transformers 5 tells both shapes beside a name, 4 the name alone.
    reshaped = {entry if isinstance(entry, str) else str(entry[0]) for entry in report["mismatched_keys"]}
    refuse_incomplete(name, missing, reshaped)
    if report["error_msgs"]:
        reason = report["error_msgs"][0].splitlines()[0]
        raise ConfigError(f"{name} cannot be loaded: {reason}", hint="download the whole checkpoint", param="model")
    unused = sorted(report["unexpected_keys"])
    config = loaded.config
    sizes = {
        "layers": config.text_config.num_hidden_layers,
        "blocks": config.vision_config.depth,
        "deepstack_merger_list": len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
    }
    refuse_surplus(name, set(unused), sizes)
    if unused:
        log.warning("weights_not_used", model=name, count=len(unused), first=unused[:3])


def peek(model: str | None) -> tuple[str, ImageRules, str | None, ModelFamily] | None:
    """Return (fingerprint, picture rules, quantisation, family) of a checkpoint in a folder, read without torch.

    None for anything else, and for what `load` would refuse.

    Raises:
        ConfigError: the image processor's settings cannot be read.
    """
    folder = bundled_folder() if model is None else in_home(model)
    if not (folder / "config.json").is_file():
        return None
    try:
        refuse_pickled(folder, str(model))
        config = read_json(folder / "config.json", str(model))
        form = weight_form(folder, config, str(model))
        family = family_of(config.get("model_type"), str(model))
        digest, settings = fingerprint(folder), image_settings(folder, str(model))
    except (OSError, QvlError):
        return None
    return digest, family.rules(settings), form.name if form is not None else None, family


def peek_family(model: str | None) -> ModelFamily | None:
    """Return the family of a checkpoint in a folder, read without torch; None for anything else."""
    folder = bundled_folder() if model is None else in_home(model)
    try:
        if not (folder / "config.json").is_file():
            return None
        return family_of(read_json(folder / "config.json", str(model)).get("model_type"), str(model))
    except (OSError, QvlError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing progress and reports to stdout and stderr, which belong to the program."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_line(name: str, device: Device | None) -> Iterator[None]:
    """Turn exceptions of transformers, safetensors and tokenizers about broken files into one-line ConfigErrors."""
    try:
        yield
    except QvlError:
        raise
    except Exception as exc:
        if device is not None and device.is_out_of_memory(exc):
            raise ConfigError(
                f"{name} does not fit the memory of {device.type}", hint="a smaller model, or device_map='auto'"
            ) from exc
        raise ConfigError(f"{name} cannot be loaded: {first_line(exc)}", hint="download the whole checkpoint") from exc


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    tokens: list[int] = []
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        tokens += [] if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(dict.fromkeys(tokens))
