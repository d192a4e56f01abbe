"""The `vllm` backend: vLLM's engine in this process, on GPUs, on CPUs, and through vllm-ascend on NPUs.

Prompts and pictures are prepared, and answers are parsed, by the code of the local backend, so that both behave the
same. vLLM schedules, runs and samples.

On Ascend: `pip install vllm vllm-ascend`, `VLLM_USE_MODELSCOPE=True` to load weights from ModelScope, and
`PYTORCH_NPU_ALLOC_CONF=expandable_segments:True` against fragmented device memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import anyio

from qvl.backends.base import Backend, Capabilities
from qvl.backends.grammar_schema import RESPONSE_FORMATS
from qvl.backends.load_aside import load_aside
from qvl.backends.local.adapters import Adapters
from qvl.backends.vllm.engine import crossing, import_vllm, names_tokens, read_engine_args
from qvl.backends.vllm.logprob_turns import Kind, LogprobTurns
from qvl.backends.vllm.lora import lora_requests, lora_settings
from qvl.backends.vllm.request import Loaded, VllmRequest
from qvl.errors import BackendError, BackendUnavailableError
from qvl.log import logger
from qvl.types import PROMPT_FIELDS, ChatRequest, Chunk, JsonObject, SamplingParams, Timing

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from qvl.backends.token_table import TokenTable

log = logger("qvl.backends.vllm")
DEFAULT_IMAGES: Final = 8
DEFAULT_VIDEOS: Final = 2
# What needs more of the engine: logprobs of named tokens a sampler that has them, a bound of the reasoning its
# configuration.
SAMPLING: Final = SamplingParams.names() - {"logprob_token_ids", "thinking_token_budget"}
FIELDS: Final = frozenset(name for name, _ in PROMPT_FIELDS) | {"prefill", "cache_salt"}


class VllmBackend(Backend):
    """Runs a model in vLLM's engine.

    Args:
        model: a folder or a hub id; None for the small bundled model.
        adapter: a LoRA adapter in PEFT's form that every request is answered with, or several by name, as of
            `LocalBackend`; vLLM applies it. One that changes the picture tower needs `enable_tower_connector_lora`.
        limit_mm_per_prompt: most pictures and videos of a request, such as `{"image": 8, "video": 2}`. vLLM reserves
            memory for a video of the longest kind; `{"video": 0}` does without, and shows frames as pictures.
        engine_args: any argument of vLLM's engine (`max_model_len`, `gpu_memory_utilization`, `tensor_parallel_size`,
            `quantization`, …), checked by vLLM itself; strings are read as on vLLM's command line.

    Raises:
        ConfigError: (from `open`) an argument that vLLM does not know or does not accept.
        MissingDependencyError: (from `open`) vLLM is not installed.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        adapter: str | Mapping[str, str] | None = None,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        **engine_args: object,
    ) -> None:
        self.model = model or "bundled"
        self._path = model or None
        self._revision = revision
        self._adapters = Adapters(adapter)
        self._limits = {"image": DEFAULT_IMAGES, "video": DEFAULT_VIDEOS, **(limit_mm_per_prompt or {})}
        self._engine_args = engine_args
        self._loaded: Loaded | None = None
        self._closed = False
        self._opening = asyncio.Lock()
        self._scopes: set[anyio.CancelScope] = set()
        self._running = 0
        self._waiting = 0
        self._turns = LogprobTurns()

    @property
    def capabilities(self) -> Capabilities:
        have = self._loaded
        return Capabilities(
            images=self._limits["image"],
            # Before it is loaded as newer versions of vLLM do it, which render what the engine takes.
            videos=self._limits["video"] if have is None or have.takes_videos else 0,
            max_context=have.max_model_len if have else None,
            sampling=SAMPLING | {"logprob_token_ids"} if have is not None and have.names_tokens else SAMPLING,
            response_formats=RESPONSE_FORMATS,
            tools=True,
            top_logprobs=min(20, have.max_logprobs) if have else 20,
            fields=FIELDS | {"priority"} if have is not None and have.by_priority else FIELDS,
        )

    def peek_capabilities(self) -> Capabilities:
        return self.capabilities

    def refuse_missing(self) -> None:
        from qvl.backends.local.model.checkpoint_files import named_folder

        if self._path is not None:
            named_folder(self._path)
        self._adapters.refuse_missing()
        if find_spec("vllm") is None:
            import_vllm()

    async def open(self) -> None:
        """Load the model; seconds to minutes.

        Raises:
            MissingDependencyError: vLLM is not installed.
            ConfigError: an engine argument is invalid, or the model does not exist.
            DeviceMemoryError: the model does not fit.
        """
        async with self._opening:
            if self._loaded is None:
                if self._closed:
                    raise BackendUnavailableError("this backend was closed", hint="make a new one")
                loaded = await load_aside(self._load)
                try:
                    for lora in loaded.adapters.values():
                        with crossing(opening=True):
                            await loaded.engine.add_lora(lora)
                except BaseException:
                    await asyncio.to_thread(_shut_down, loaded.engine)
                    raise
                self._loaded = loaded
                log.info("vllm_ready", model=self.model, context=self._loaded.max_model_len)

    async def aclose(self) -> None:
        self._closed = True
        for scope in tuple(self._scopes):
            scope.cancel()
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            # Let the aborted streams tell the engine before it goes.
            await asyncio.sleep(0)
            await asyncio.to_thread(_shut_down, loaded.engine)
            del loaded
            # vLLM's objects refer to each other; left to the interpreter's end they complain that it is gone.
            gc.collect()

    async def token_table(self) -> TokenTable:
        loaded = self._loaded
        if loaded is None:
            raise BackendUnavailableError("vLLM is not loaded", hint="await backend.open() first")
        return await asyncio.to_thread(loaded.vocabulary.table, loaded.ends)

    def identity(self) -> JsonObject:
        facts: JsonObject = {"backend": self.name, "model": self.model, "revision": self._revision}
        if adapter := self._adapters.digests().get(""):
            facts["adapter"] = adapter
        return facts | dict(self._loaded.facts) if self._loaded else facts

    def adapters(self) -> Mapping[str, str]:
        return self._adapters.named()

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
        abandoned = threading.Event()
        sampling = request.sampling
        kind: Kind | None = "named" if sampling.logprob_token_ids else "likeliest" if sampling.wants_logprobs else None
        try:
            answer = await asyncio.to_thread(VllmRequest, loaded, request, abandoned.is_set)
            with self._guard():
                prompt = await answer.engine_input()
            first = 0.0
            ident = f"{request.request_id or 'qvl'}-{uuid.uuid4().hex}"
            order: JsonObject = {"priority": request.priority} if request.priority else {}
            if lora := loaded.adapters.get(request.adapter):
                order["lora_request"] = lora
            async with (
                self._turns.turn(kind),
                aclosing(loaded.engine.generate(prompt, answer.params, ident, **order)) as results,
            ):
                while not answer.done:
                    with self._guard():
                        result = await anext(results, None)
                    if waiting:
                        self._waiting -= 1
                        waiting = False
                        first = time.perf_counter() - started
                    if result is None:
                        raise BackendError("vLLM ended the answer without a finish_reason")
                    for chunk in answer.read(result):
                        yield chunk
            timing = Timing(first_token=first, total=time.perf_counter() - started)
            yield dataclasses.replace(answer.last(), usage=answer.usage, timing=timing)
        finally:
            abandoned.set()
            self._running -= 1
            self._waiting -= waiting

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Wrap one wait for the engine: translates vLLM's errors, and `aclose` ends the wait."""
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope, crossing():
                yield
        finally:
            self._scopes.discard(scope)
        if scope.cancelled_caught or self._closed:
            raise BackendUnavailableError("vLLM was closed while a request was running")

    def _load(self) -> Loaded:
        self.refuse_missing()
        async_llm, engine_args = import_vllm()
        from qvl.backends.local.model import loader, model_folder
        from qvl.backends.local.model.checkpoint_files import image_settings, read_json, video_settings
        from qvl.backends.local.model.family import takes_videos
        from qvl.backends.local.text.detokenizer import Vocabulary
        from qvl.backends.local.text.processor import ImageRules, Processor

        folder = model_folder.find_folder(self._path, self._revision)
        self._adapters.read(self._path)
        settings = {
            "model": str(folder),
            **lora_settings(self._adapters.files, self._engine_args),
            "limit_mm_per_prompt": self._limits,
            # As the local backend does it: llguidance, and no endless white space that passes for JSON.
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            **self._engine_args,
        }
        arguments = read_engine_args(engine_args, settings)
        with crossing(opening=True):
            engine = async_llm.from_engine_args(arguments)
        tokenizer = loader.load_tokenizer(folder, self.model)
        rules = ImageRules.read(image_settings(folder, self.model))
        video_rules = ImageRules.read(video_settings(folder, self.model))
        form = read_json(folder / "config.json", self.model)
        config = engine.model_config if hasattr(engine, "model_config") else engine.vllm_config.model_config
        facts = {
            "weights": model_folder.fingerprint(folder),
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantisation": config.quantization,
            "processor": dataclasses.asdict(rules),
        }
        return Loaded(
            engine,
            Processor(
                tokenizer,
                rules,
                form["image_token_id"],
                video_rules=video_rules,
                video_token_id=form.get("video_token_id"),
            ),
            Vocabulary(tokenizer),
            int(config.max_model_len),
            int(config.max_logprobs),
            facts,
            getattr(engine.vllm_config.scheduler_config, "policy", "fcfs") == "priority",
            (int(tokenizer.eos_token_id),),
            names_tokens(),
            lora_requests(self._adapters.files),
            takes_videos=hasattr(engine, "renderer") and takes_videos(form.get("model_type")),
        )


def _shut_down(engine: AsyncLLM) -> None:
    with crossing():
        engine.shutdown()
