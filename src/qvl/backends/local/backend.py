"""The Backend that runs the local engine."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from qvl.backends.base import Backend, Capabilities, Tokens
from qvl.backends.grammar_schema import RESPONSE_FORMATS
from qvl.backends.load_aside import load_aside
from qvl.backends.local.adapters import Adapters
from qvl.backends.local.model.linear_kernels import KERNELS
from qvl.backends.local.scheduling.step_budget import StepBudget
from qvl.backends.local.scheduling.step_costs import StepCosts
from qvl.errors import BackendUnavailableError, ConfigError, MissingDependencyError, QvlError, RateLimitError
from qvl.log import logger
from qvl.suggest import install_line
from qvl.types import PROMPT_FIELDS, SamplingParams

if TYPE_CHECKING:
    from qvl.backends.local.engine import Engine
    from qvl.backends.local.engine_request import EngineRequest
    from qvl.backends.local.make_request import RequestMaker
    from qvl.backends.local.model.device import Device
    from qvl.backends.local.model.loader import Checkpoint, DeviceMap
    from qvl.backends.local.model.model_runner import Runner
    from qvl.backends.local.model.vision import FeatureCache
    from qvl.backends.local.text.grammar import Grammars
    from qvl.backends.local.text.processor import ImageRules, Processor
    from qvl.backends.token_table import TokenTable
    from qvl.evidence.coordinates import Coordinates
    from qvl.types import ChatRequest, Chunk, JsonObject

log = logger(__name__)

MAX_IMAGES: Final = 64
FIELDS: Final = frozenset(name for name, _ in PROMPT_FIELDS) | {"priority", "prefill", "cache_salt"}
VISION_CACHE_BYTES: Final = 512 << 20
# Characters from which a prompt is prepared on a thread for such alone, so that nobody else waits behind it.
LONG_PROMPT: Final = 1 << 17


@dataclass(frozen=True, slots=True)
class _Loaded:
    device: Device
    checkpoint: Checkpoint
    processor: Processor
    grammars: Grammars
    engine: Engine
    max_model_len: int
    maker: RequestMaker


class LocalBackend(Backend):
    """Runs a checkpoint of Qwen3-VL, Qwen3.5 or Qwen2.5-VL in this process.

    Args:
        model: a folder or a hub id; None is the small bundled model.
        device: "auto" (npu, cuda, mps, cpu in this order), or one of these names, optionally with `:index`.
        dtype: "auto", "bfloat16", "float16" or "float32".
        revision: revision of the hub's repository.
        trust_remote_code: run code that comes with the checkpoint.
        max_model_len: most tokens of prompt plus answer; by default as the model and the KV memory allow.
        max_num_seqs: most sequences in a batch.
        max_num_batched_tokens: most tokens of one step; a longer prompt is computed in several.
        goal: "throughput" makes steps as long as the waiting prompts and pictures need, "latency" at most 4 decode
            steps long, so that the time between tokens is bounded while others wait for their first.
        max_step_ms: bound of a step in milliseconds, with either goal, instead of the 4 decode steps.
        max_queue: most waiting requests; more are refused with RateLimitError.
        kv_memory_share: fraction of the memory free after loading, for KV rows and the prefix cache.
        kv_cache_bytes: bytes for KV rows and the prefix cache; overrides `kv_memory_share`.
        prefix_cache: keep the KV of computed prefixes for later requests.
        vision_cache_bytes: size of the cache of picture features; 0 disables it.
        decode_graphs: "auto" records decode steps and replays them where that is known to pay (CUDA graphs), "on"
            wherever the device can (NPU too), "off" never.
        decode_kernel: "auto" takes the kernels for matrix products that were measured to be fastest on this CPU;
            "plain", "onednn" or "fbgemm" uses only that one in steps of few rows.
        quantize: "int8" quantises the text model's weights while loading, and its activations row by row, on a CPU;
            None computes with the weights as they are.
        batch_invariant: compute every answer exactly as if it were the only one in the batch, in any dtype; slower.
        speculate: guess the next tokens from where the last ones stood before (prompt lookup), or from the schema,
            keeping what the model would write anyway: "auto" on a CPU while few answers run, "on" on every device,
            "off" never.
        adapter: a LoRA adapter in PEFT's form (a folder or a hub id) that every request is answered with; or several
            by name, of which a request names one, or none for the model itself.
        device_map: "auto" spreads a checkpoint over several cards, a dict names the device of each module (as in
            accelerate, which it needs). Offloading to the host or disk is not supported.
        watchdog_s: seconds without a token after which the backend reports that it hangs.

        `max_tokens=None` of a request means the rest of the context, at most 2048.
    """

    name = "local"

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        goal: str = "throughput",
        max_step_ms: float | None = None,
        max_queue: int = 1024,
        kv_memory_share: float | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache: bool = True,
        vision_cache_bytes: int = VISION_CACHE_BYTES,
        decode_graphs: str = "auto",
        decode_kernel: str = "auto",
        quantize: str | None = None,
        batch_invariant: bool = False,
        speculate: str = "auto",
        adapter: str | Mapping[str, str] | None = None,
        device_map: DeviceMap | None = None,
        watchdog_s: float = 120.0,
    ) -> None:
        self.model = model or "bundled"
        self._path = model
        self._device = device
        self._dtype = dtype
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._peeked: JsonObject | None = None
        self._coordinates: Coordinates | None = None
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_queue = max_queue
        self._kv_memory_share = kv_memory_share
        self._kv_cache_bytes = kv_cache_bytes
        self._prefix_cache = prefix_cache
        self._vision_cache_bytes = vision_cache_bytes
        self._decode_graphs = decode_graphs
        self._batch_invariant = batch_invariant
        self._decode_kernel = decode_kernel
        self._quantize = quantize
        self._speculate = speculate
        self._adapters = Adapters(adapter)
        self._device_map = device_map
        self._watchdog_s = watchdog_s
        self._check_arguments()
        if batch_invariant:
            self._decode_graphs = "off"
        self._budget = StepBudget(StepCosts(), goal, max_step_ms)
        self._loaded: _Loaded | None = None
        self._closed = False
        self._opening = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._long_pool: ThreadPoolExecutor | None = None
        self._num_preparing = 0

    def _check_arguments(self) -> None:
        for name, value in (
            ("max_model_len", self._max_model_len),
            ("max_num_seqs", self._max_num_seqs),
            ("max_num_batched_tokens", self._max_num_batched_tokens),
            ("max_queue", self._max_queue),
            ("kv_cache_bytes", self._kv_cache_bytes),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is out of range", hint="1 or more", param=name)
        share, kernel = self._kv_memory_share, self._decode_kernel
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"kv_memory_share={share} is out of range", hint="above 0, at most 1")
        if self._vision_cache_bytes < 0 or self._watchdog_s <= 0:
            raise ConfigError("vision_cache_bytes must be 0 or more, and watchdog_s above 0")
        for name, switch in (("decode_graphs", self._decode_graphs), ("speculate", self._speculate)):
            if switch not in ("auto", "on", "off"):
                raise ConfigError(f"invalid {name}={switch!r}", hint="auto, on or off", param=name)
        if kernel not in (kernels := ("auto", *KERNELS)):
            raise ConfigError(f"unknown decode_kernel {kernel!r}", hint=", ".join(kernels))
        if self._quantize not in (None, "int8"):
            raise ConfigError(f"unknown quantize {self._quantize!r}", hint="int8, or leave it out", param="quantize")
        if self._quantize and kernel != "auto":
            raise ConfigError("quantize excludes decode_kernel", hint="leave one of them out", param="decode_kernel")
        if self._batch_invariant and self._decode_graphs == "on":
            raise ConfigError("batch_invariant excludes decode_graphs='on'", hint="use 'off'", param="decode_graphs")

    @property
    def coordinates(self) -> Coordinates:
        return self._coordinates or super().coordinates

    @property
    def capabilities(self) -> Capabilities:
        context = self._loaded.max_model_len if self._loaded else self._max_model_len
        return replace(self.peek_capabilities(), max_context=context)

    def refuse_missing(self) -> None:
        from qvl.backends.local.model.checkpoint_files import named_folder
        from qvl.backends.local.model.device import named_device, named_dtype

        named_device(self._device)
        named_dtype(self._dtype)
        if self._path is not None:
            named_folder(self._path)
        self._adapters.refuse_missing()
        for package in ("torch", "transformers"):
            if find_spec(package) is None:
                raise MissingDependencyError(f"a local model needs {package}", hint=install_line("local"))

    async def open(self) -> None:
        await load_aside(self._open)

    def _open(self) -> None:
        with self._opening:
            if self._loaded is not None:
                return
            if self._closed:
                raise BackendUnavailableError("this backend was closed", hint="make a new one")
            try:
                from qvl.backends.local.model.device import open_device

                device = open_device(self._device, self._dtype)
            except ImportError as exc:
                if isinstance(exc, MissingDependencyError):
                    raise
                raise MissingDependencyError(f"a local model needs {exc.name}", hint=install_line("local")) from exc
            built = self._build(device)
            if self._closed:
                raise BackendUnavailableError("this backend was closed while it loaded", hint="make a new one")
            self._loaded = built
            self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="qvl-prepare")
            self._long_pool = ThreadPoolExecutor(1, thread_name_prefix="qvl-prepare-long")
            self._loaded.engine.start()
            report = log.warning if device.notes else log.info
            report("local_model_ready", model=self.model, device=self.describe(), context=self._loaded.max_model_len)

    def _build(self, device: Device) -> _Loaded:
        from qvl.backends.local.engine import Engine
        from qvl.backends.local.make_request import RequestMaker
        from qvl.backends.local.model.int8_store import again_if_damaged
        from qvl.backends.local.model.vision import FeatureCache
        from qvl.backends.local.scheduling.sizing import make_scheduler
        from qvl.backends.local.text.detokenizer import Vocabulary
        from qvl.backends.local.text.grammar import Grammars
        from qvl.backends.local.text.processor import Processor

        name = "quantize" if self._quantize else "decode_kernel" if self._decode_kernel != "auto" else None
        if device.type != "cpu" and name is not None:
            raise ConfigError(f"{name} works on a CPU, not on {device.type}", hint="leave it out", param=name)
        # Before the weights, which take minutes.
        self._adapters.read(self._path)
        features = FeatureCache(self._vision_cache_bytes)
        checkpoint, rules, runner = again_if_damaged(lambda: self._load(device, features))
        scheduler, max_model_len = make_scheduler(
            runner,
            checkpoint,
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            kv_memory_share=self._kv_memory_share,
            kv_cache_bytes=self._kv_cache_bytes,
            prefix_cache=self._prefix_cache,
            budget=self._budget,
            speculate=self._speculate,
        )
        grammars = Grammars(checkpoint.tokenizer, runner.vocab_size, checkpoint.eos_token_ids)
        engine = Engine(
            runner, scheduler, grammars, checkpoint.eos_token_ids, max_queue=self._max_queue, watchdog=self._watchdog_s
        )
        image_token = checkpoint.model.config.image_token_id
        processor = Processor(
            checkpoint.tokenizer,
            rules,
            image_token,
            features.get,
            runner.picture_cost,
            self._adapters.places(),
            checkpoint.family.rules(checkpoint.video_config),
            getattr(checkpoint.model.config, "video_token_id", None),
        )
        vocabulary = Vocabulary(checkpoint.tokenizer)
        maker = RequestMaker(checkpoint, device, processor, grammars, vocabulary, runner.vocab_size, max_model_len)
        return _Loaded(device, checkpoint, processor, grammars, engine, max_model_len, maker)

    def _load(self, device: Device, features: FeatureCache) -> tuple[Checkpoint, ImageRules, Runner]:
        from qvl.backends.local.model.loader import load

        checkpoint = load(
            self._path,
            device,
            revision=self._revision,
            trust_remote_code=self._trust_remote_code,
            device_map=self._device_map,
            quantize=self._quantize,
        )
        rules = checkpoint.family.rules(checkpoint.image_config)
        self._coordinates = checkpoint.family.coordinates(rules)
        with checkpoint.int8 or nullcontext():
            runner = self._runner(checkpoint, device, rules, features)
        self._adapters.attach(checkpoint.model, runner.plan)
        return checkpoint, rules, runner

    def _runner(self, checkpoint: Checkpoint, device: Device, rules: ImageRules, features: FeatureCache) -> Runner:
        """Return the runner; tests override it to inject failures."""
        from qvl.backends.local.model.linear import LinearPlan
        from qvl.backends.local.model.model_runner import Runner

        plan = LinearPlan(self._decode_kernel, checkpoint.int8)
        return Runner(checkpoint, device, rules, features, self._records(device), self._batch_invariant, plan)

    def _records(self, device: Device) -> bool:
        """True if decode steps are to be recorded on this device."""
        if self._decode_graphs == "on" and not device.has_graphs:
            raise ConfigError(f"decode_graphs='on' is not supported on {device.type}", hint="decode_graphs='auto'")
        return self._decode_graphs == "on" or (self._decode_graphs == "auto" and device.graphs_pay)

    async def aclose(self) -> None:
        self._closed = True
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            try:
                await asyncio.get_running_loop().run_in_executor(None, loaded.engine.close)
            except RuntimeError:
                # At the interpreter's exit the executor takes nothing new, and waiting holds up nobody.
                loaded.engine.close()
        for pool in (self._pool, self._long_pool):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        loaded = self._ready()
        self.refuse_unsupported(request)
        if self._num_preparing >= self._max_queue:
            raise RateLimitError(f"queue is full: {self._max_queue} requests are waiting", hint="try again later")
        loop = asyncio.get_running_loop()
        self._num_preparing += 1
        abandoned = threading.Event()
        pool = self._pool_for(request)
        try:
            engine_request = await loop.run_in_executor(pool, self._engine_request, loaded, request, loop, abandoned)
        except RuntimeError as exc:
            if isinstance(exc, QvlError) or not self._closed:
                raise
            raise BackendUnavailableError("this backend was closed", hint="make a new one") from exc
        finally:
            abandoned.set()
            self._num_preparing -= 1
        try:
            loaded.engine.mailbox.submit(engine_request)
            while True:
                item = await engine_request.inbox.get()
                if isinstance(item, QvlError):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            loaded.engine.mailbox.abort(engine_request)

    def _ready(self) -> _Loaded:
        if self._loaded is None or self._pool is None:
            raise BackendUnavailableError("the local model is not loaded", hint="await backend.open() first")
        return self._loaded

    def _pool_for(self, prompt: ChatRequest | str) -> ThreadPoolExecutor | None:
        size = len(prompt) if isinstance(prompt, str) else sum(len(message.text) for message in prompt.messages)
        return self._long_pool if size > LONG_PROMPT else self._pool

    async def tokenize(self, prompt: ChatRequest | str, *, texts: bool = False) -> Tokens:
        work = self._ready().processor.tokens
        return await asyncio.get_running_loop().run_in_executor(self._pool_for(prompt), work, prompt, texts)

    async def detokenize(self, ids: Sequence[int]) -> str:
        work = self._ready().processor.text
        return await asyncio.get_running_loop().run_in_executor(self._long_pool, work, ids)

    def _engine_request(
        self, loaded: _Loaded, request: ChatRequest, loop: asyncio.AbstractEventLoop, abandoned: threading.Event
    ) -> EngineRequest:
        """Return the request prepared for the engine; blocking. Tests override it to look at what is made."""
        return loaded.maker.make(request, loop, abandoned.is_set)

    async def token_table(self) -> TokenTable:
        loaded = self._ready()
        work = partial(loaded.maker.vocabulary.table, loaded.checkpoint.eos_token_ids)
        return await asyncio.get_running_loop().run_in_executor(self._long_pool, work)

    def identity(self) -> JsonObject:
        loaded = self._loaded
        if loaded is None:
            return super().identity()
        checkpoint = loaded.checkpoint
        return self._identity(
            checkpoint.fingerprint, loaded.device.dtype_name, loaded.processor.rules, checkpoint.quantisation
        )

    def peek_identity(self) -> JsonObject | None:
        from qvl.backends.local.model.device import peek_dtype
        from qvl.backends.local.model.loader import peek

        if self._peeked is None:
            dtype = peek_dtype(self._device, self._dtype)
            peeked = peek(self._path) if dtype is not None and self._adapters.peek() else None
            if dtype is None or peeked is None:
                return None
            digest, rules, form, family = peeked
            self._peeked = self._identity(digest, dtype, rules, form)
            self._coordinates = family.coordinates(rules)
        return self._peeked

    def _identity(self, fingerprint: str, dtype: str, rules: ImageRules, quantisation: str | None) -> JsonObject:
        return {
            "backend": self.name,
            "model": self.model,
            "revision": self._revision,
            "weights": fingerprint,
            "dtype": dtype,
            "processor": asdict(rules),
            "adapter": self._adapters.digests().get(""),
            "quantisation": ", then ".join(filter(None, (quantisation, self._quantize))) or None,
            # Under a grammar, text without an alternative is spelt by the tokenizer and not by the model.
            "forced_tokens": True,
            **({"batch_invariant": True} if self._batch_invariant else {}),
            # Which one a measurement chose is not named: it changes last bits alone, as the company of a batch does.
            **({"decode_kernel": self._decode_kernel} if self._decode_kernel != "auto" else {}),
        }

    def adapters(self) -> Mapping[str, str]:
        return self._adapters.named()

    def peek_capabilities(self) -> Capabilities:
        """Return the capabilities without `max_context`, which depends on the weights and the memory."""
        from qvl.backends.local.model.loader import peek_family

        family = self._loaded.checkpoint.family if self._loaded else peek_family(self._path)
        return Capabilities(
            images=MAX_IMAGES,
            videos=MAX_IMAGES if family is None or family.videos else 0,
            sampling=SamplingParams.names(),
            response_formats=RESPONSE_FORMATS,
            tools=True,
            fields=FIELDS,
        )

    def describe(self) -> str:
        """Return one line: device, dtype, why no better device is used, form of weights, kernels, bounds of steps."""
        if self._loaded is None:
            return "not loaded"
        device, quantisation = self._loaded.device, self._loaded.checkpoint.quantisation
        unpacked = f"weights unpacked from {quantisation} to {device.dtype_name}" if quantisation else None
        runner, budget = self._loaded.engine.runner, self._budget.describe()
        kernels = runner.plan.describe(), runner.kernels.describe()
        return "; ".join(filter(None, (device.describe(), unpacked, self._quantize, *kernels, budget)))

    def unready(self) -> str | None:
        if self._closed:
            return "closed"
        return "loading" if self._loaded is None else self._loaded.engine.unready()

    def stats(self) -> Mapping[str, float]:
        numbers = self._loaded.engine.stats() if self._loaded else {}
        return numbers and {**numbers, "num_waiting": numbers["num_waiting"] + self._num_preparing}
