"""The `openvino` backend: OpenVINO GenAI in this process, the field's fastest on Intel's processors and graphics.

Prompt and pictures are prepared exactly as by the local backend, and answers are read by the same code. OpenVINO
batches as requests come, runs, samples and guides. A model is a folder that optimum-intel wrote, or a hub id of one:

    optimum-cli export openvino --model Qwen/Qwen3-VL-2B-Instruct --task image-text-to-text --weight-format int8 FOLDER
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qvl.backends.base import Backend, Capabilities
from qvl.backends.grammar_schema import RESPONSE_FORMATS
from qvl.backends.load_aside import load_aside
from qvl.backends.openvino import library
from qvl.backends.openvino.engine import Deliver, Piece, StepLoop
from qvl.backends.openvino.request import LoadedModel, OpenVinoRequest
from qvl.errors import BackendUnavailableError, ConfigError, QvlError
from qvl.log import logger
from qvl.types import PROMPT_FIELDS, ChatRequest, Chunk, JsonObject, SamplingParams, Timing

if TYPE_CHECKING:
    from pathlib import Path

    from qvl.backends.local.text.processor import ImageRules

log = logger("qvl.backends.openvino")
MAX_IMAGES: Final = 64
# Of these penalties the library leaves out the prompt (repetition), or adds them to a negative logit instead of
# subtracting them, which makes the token likelier (presence, frequency).
SAMPLING: Final = (
    SamplingParams.assumed() - {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    # These our own code sees to.
    | {"include_stop_str_in_output", "skip_special_tokens", "truncate_prompt_tokens"}
)
FIELDS: Final = frozenset(name for name, _ in PROMPT_FIELDS)
GIB: Final = 1 << 30


class OpenVinoBackend(Backend):
    """Runs a model that was converted to OpenVINO's form.

    Args:
        model: a folder or a hub id.
        revision: of the hub's repository.
        device: "CPU", "GPU", "GPU.1", … as OpenVINO names them.
        dtype: what it computes in: "auto" (what the device prefers), "float32", "bfloat16" or "float16".
        kv_cache_dtype: of keys and values: "auto" (int8 on CPUs), "float32", "bfloat16", "float16" or "int8".
        max_model_len: tokens of prompt and answer; by default what the model allows.
        max_num_seqs: answers that run at once.
        max_num_batched_tokens: tokens of one step: a longer prompt is computed in several.
        kv_cache_bytes: for keys and values, in whole GiB; by default as much as the requests that run need.

    Prefixes are not kept from one request for another: the library cannot keep those of two tenants apart.

    Raises:
        ConfigError: (from `open`) no such model or device, or a model that is not in OpenVINO's form.
        MissingDependencyError: (from `open`) OpenVINO GenAI is not installed.
    """

    name = "openvino"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "CPU",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
    ) -> None:
        if not model:
            raise ConfigError("openvino: names no model", hint="openvino:FOLDER, or openvino:HUB_ID", param="model")
        bounds = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "kv_cache_bytes": kv_cache_bytes,
        }
        for name, value in bounds.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is out of range", hint="1 or more", param=name)
        self.model = model
        self._revision = revision
        self._device = device.upper()
        kinds = {
            "INFERENCE_PRECISION_HINT": library.precision(dtype, library.PRECISIONS, "dtype"),
            "KV_CACHE_PRECISION": library.precision(kv_cache_dtype, library.CACHE_PRECISIONS, "kv_cache_dtype"),
        }
        self._properties = {key: kind for key, kind in kinds.items() if kind is not None}
        self._bounds = bounds
        self._loaded: LoadedModel | None = None
        self._peeked: JsonObject | None = None
        self._closed = False
        self._opening = threading.Lock()
        # One, since the library takes one prompt at a time.
        self._adding: ThreadPoolExecutor | None = None
        self._num_preparing = 0

    @property
    def capabilities(self) -> Capabilities:
        have = self._loaded
        return Capabilities(
            images=MAX_IMAGES,
            max_context=have.max_model_len if have else self._bounds["max_model_len"],
            sampling=SAMPLING,
            response_formats=RESPONSE_FORMATS - {"grammar"},
            tools=True,
            # It tells the chosen token's logprob and no other.
            top_logprobs=0,
            fields=FIELDS,
        )

    def peek_capabilities(self) -> Capabilities:
        return self.capabilities

    def refuse_missing(self) -> None:
        from qvl.backends.local.model.checkpoint_files import named_folder

        folder = named_folder(self.model)
        if folder is not None:
            library.refuse_unconverted(folder, self.model)
        library.import_genai()

    async def open(self) -> None:
        """Load the model; seconds to minutes.

        Raises:
            MissingDependencyError: OpenVINO GenAI is not installed.
            ConfigError: no such model or device, or a model that is not in OpenVINO's form.
            DeviceMemoryError: the model does not fit.
        """
        await load_aside(self._open)

    def _open(self) -> None:
        with self._opening:
            if self._closed:
                raise BackendUnavailableError("this backend was closed", hint="make a new one")
            if self._loaded is None:
                self._loaded = self._load()
                self._adding = ThreadPoolExecutor(1, "qvl-openvino-add")
                log.info("openvino_ready", model=self.model, runs=self.describe())

    async def aclose(self) -> None:
        self._closed = True
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await asyncio.to_thread(loaded.engine.close)
        if self._adding is not None:
            self._adding.shutdown(wait=False)

    def identity(self) -> JsonObject:
        if self._loaded is None:
            return super().identity()
        return self._loaded.facts

    def peek_identity(self) -> JsonObject | None:
        """Return `identity()` of a model in a folder, from its files and the device, without loading it."""
        if self._peeked is None:
            from qvl.config import in_home

            folder = in_home(self.model)
            with suppress(QvlError, OSError):
                if (folder / library.LANGUAGE_MODEL).is_file():
                    self._peeked = self._facts(folder, self._rules(folder))
        return self._peeked

    def describe(self) -> str:
        """Return one line: device and number types. Valid after `open()`."""
        if self._loaded is None:
            return "not loaded"
        facts = self._loaded.facts
        return f"{facts['device']}, {facts['dtype']}, weights {facts['quantisation'] or 'as exported'}"

    def stats(self) -> Mapping[str, float]:
        running = self._loaded.engine.num_running if self._loaded else 0
        return {"num_running": running, "num_waiting": self._num_preparing}

    def unready(self) -> str | None:
        if self._closed:
            return "closed"
        if self._loaded is None:
            return "loading"
        return "the engine is dead" if self._loaded.engine.dead else None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        loaded, adding = self._loaded, self._adding
        if loaded is None or adding is None:
            raise BackendUnavailableError("OpenVINO is not loaded", hint="await backend.open() first")
        self.refuse_unsupported(request)
        started = time.perf_counter()
        flow = _Flow(loaded, request, asyncio.get_running_loop())
        try:
            answer = await self._start(flow, adding)
            first = 0.0
            while not answer.done:
                number, piece = await flow.pieces.get()
                if isinstance(piece, QvlError):
                    raise piece
                first = first or time.perf_counter() - started
                for chunk in answer.read(number, piece):
                    yield chunk
                if piece.finish_reason is None and answer.ended(number):
                    flow.cancel(number)
            timing = Timing(first_token=first, total=time.perf_counter() - started)
            yield dataclasses.replace(answer.last(), usage=answer.usage, timing=timing)
        finally:
            flow.abandon()

    async def _start(self, flow: _Flow, adding: ThreadPoolExecutor) -> OpenVinoRequest:
        self._num_preparing += 1
        try:
            try:
                preparing = asyncio.get_running_loop().run_in_executor(adding, flow.start)
            except RuntimeError as exc:
                raise BackendUnavailableError("OpenVINO was closed while a request waited") from exc
            return await preparing
        finally:
            self._num_preparing -= 1

    def _load(self) -> LoadedModel:
        self.refuse_missing()
        _, genai = library.import_genai()
        from qvl.backends.local.model import loader, model_folder
        from qvl.backends.local.model.checkpoint_files import read_json
        from qvl.backends.local.text.detokenizer import Vocabulary
        from qvl.backends.local.text.processor import Processor
        from qvl.backends.openvino.grammar import GrammarCheck

        folder = model_folder.find_folder(self.model, self._revision, library.FILES)
        library.refuse_unconverted(folder, self.model)
        rules = self._rules(folder)
        facts = self._facts(folder, rules)
        config = read_json(folder / "config.json", self.model)
        text = config["text_config"]
        tokenizer = loader.load_tokenizer(folder, self.model)
        with library.crossing(opening=True), library.with_any_size(folder, self.model) as view:
            pipeline = genai.ContinuousBatchingPipeline(str(view), self._scheduling(), self._device, self._properties)
        own = pipeline.get_tokenizer()
        limits = [text["max_position_embeddings"], *([given] if (given := self._bounds["max_model_len"]) else [])]
        return LoadedModel(
            StepLoop(pipeline),
            tokenizer,
            lambda prompt: own.encode(prompt, add_special_tokens=False).input_ids.data[0].tolist(),
            Processor(tokenizer, rules, config["image_token_id"]),
            Vocabulary(tokenizer),
            GrammarCheck(own, text["vocab_size"]),
            tuple(dict.fromkeys([own.get_eos_token_id(), *sorted(pipeline.get_config().stop_token_ids)])),
            min(limits),
            facts,
        )

    def _scheduling(self) -> object:
        _, genai = library.import_genai()
        config = genai.SchedulerConfig()
        config.enable_prefix_caching = False
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if (value := self._bounds[name]) is not None:
                setattr(config, name, value)
        if (size := self._bounds["kv_cache_bytes"]) is not None:
            config.cache_size = -(-size // GIB)
        return config

    def _rules(self, folder: Path) -> ImageRules:
        from qvl.backends.local.model.checkpoint_files import image_settings, read_json
        from qvl.backends.local.model.family import family_of

        family = family_of(read_json(folder / "config.json", self.model).get("model_type"), self.model)
        return family.rules(image_settings(folder, self.model))

    def _facts(self, folder: Path, rules: ImageRules) -> JsonObject:
        """Return every fact that changes an answer."""
        from qvl.backends.local.model import model_folder

        return {
            "backend": self.name,
            "model": self.model,
            "revision": self._revision,
            "weights": model_folder.fingerprint(folder, library.WEIGHTS),
            "quantisation": library.quantisation(folder, self.model),
            **library.device_facts(self._device, self._properties),
            "processor": dataclasses.asdict(rules),
        }


class _Flow:
    """One stream: its requests in the pipeline, started in a thread, and the pieces that come of them."""

    def __init__(self, loaded: LoadedModel, request: ChatRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.pieces: asyncio.Queue[tuple[int, Piece | QvlError]] = asyncio.Queue()
        self._loaded = loaded
        self._request = request
        self._loop = loop
        self._abandoned = False
        self._numbers: list[int] = []
        self._lock = threading.Lock()

    def start(self) -> OpenVinoRequest:
        """Prepare the request and hand it to the pipeline. Blocking."""
        answer = OpenVinoRequest(self._loaded, self._request, lambda: self._abandoned)
        for index, config in enumerate(answer.configs):
            if self._abandoned:
                break
            number = self._loaded.engine.add(answer.prompt, answer.images, config, self._deliver_to(index))
            with self._lock:
                self._numbers.append(number)
        if self._abandoned:
            self.abandon()
        return answer

    def cancel(self, index: int) -> None:
        self._loaded.engine.cancel(self._numbers[index])

    def abandon(self) -> None:
        """End all that was started, and let nothing more start."""
        self._abandoned = True
        with self._lock:
            numbers = list(self._numbers)
        for number in numbers:
            self._loaded.engine.cancel(number)

    def _deliver_to(self, index: int) -> Deliver:
        def deliver(piece: Piece | QvlError) -> None:
            # The loop may have ended meanwhile.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

        return deliver
