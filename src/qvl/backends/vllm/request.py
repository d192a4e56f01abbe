"""Converts one request to vLLM's prompt and sampling parameters, and vLLM's outputs to Chunks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from qvl.backends.local.scheduling.token_rules import TokenScore
from qvl.backends.token_engine import TokenEngineRequest
from qvl.backends.vllm.engine import crossing
from qvl.backends.vllm.videos import placeholders, rendered, shown_videos, video_of
from qvl.errors import BackendError
from qvl.sampling import PARAMETERS
from qvl.types import ChatRequest, Chunk, FinishReason, JsonObject, PromptFacts, TokenLogprob

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from qvl.backends.local.model.sampler import Sampled
    from qvl.backends.local.text.detokenizer import Detokenizer, Vocabulary
    from qvl.backends.local.text.processor import Processor


class VllmLogprob(Protocol):
    """vLLM's Logprob: the natural logarithm of a token's probability, and its rank among all, 1 being the likeliest."""

    logprob: float
    rank: int


class VllmCompletion(Protocol):
    """vLLM's CompletionOutput: the new output of one choice."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, VllmLogprob]] | None
    finish_reason: FinishReason | None


class VllmOutput(Protocol):
    """vLLM's RequestOutput, of which these fields are read: new output by choice, and prompt tokens from its cache."""

    outputs: Sequence[VllmCompletion]
    num_cached_tokens: int | None
    prompt_logprobs: Sequence[Mapping[int, VllmLogprob] | None] | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model loaded in vLLM, with the processor for its requests. `facts` are part of the identity.

    `by_priority`: True if the engine schedules by the priority of requests. `ends`: the tokens that end an answer.
    `names_tokens`: True if it tells the logprobs of named tokens. `adapters`: what vLLM calls a
    LoRARequest, by name. `takes_videos`: True if vLLM's renderer can be asked.
    """

    engine: AsyncLLM
    processor: Processor
    vocabulary: Vocabulary
    max_model_len: int
    max_logprobs: int
    facts: JsonObject
    by_priority: bool = False
    ends: tuple[int, ...] = ()
    names_tokens: bool = False
    adapters: Mapping[str, LoRARequest] = field(default_factory=dict)
    takes_videos: bool = False


class VllmRequest(TokenEngineRequest):
    """One request in vLLM: its prompt, its sampling parameters, and the parsing of its outputs."""

    def __init__(self, loaded: Loaded, request: ChatRequest, abandoned: Callable[[], bool]) -> None:
        from qvl.backends.local.text.template_options import refuse_efforts

        refuse_efforts(request)
        super().__init__(request, loaded.processor, loaded.vocabulary, loaded.max_model_len, abandoned)
        self._loaded = loaded
        self._request = request
        self._told = False
        self._scores: Sequence[Mapping[int, VllmLogprob] | None] = ()
        self.videos = shown_videos(self.prepared, request)
        self.prompt = self._prompt()
        self.params = self._params()

    async def engine_input(self) -> JsonObject:
        """Return what the engine takes: the prompt as it is, or with videos as vLLM renders those.

        Raises:
            BackendError: vLLM cannot render them.
        """
        if not self.videos:
            return self.prompt
        with crossing():
            return await rendered(self._loaded.engine, self.prompt, self.prepared, self.videos)

    def read(self, result: VllmOutput) -> Iterator[Chunk]:
        """Yield the chunks of one of vLLM's outputs."""
        self.cached_tokens = result.num_cached_tokens or self.cached_tokens
        self._scores = result.prompt_logprobs or self._scores
        for part in result.outputs:
            if self.ended(part.index):
                continue
            if part.finish_reason not in (None, "stop", "length"):
                raise BackendError(f"vLLM ended the answer early, with finish_reason {part.finish_reason!r}")
            yield from self.push(part.index, self._sampled(part), part.finish_reason)

    def _push(self, output: Detokenizer, tokens: Sequence[Sampled], reason: FinishReason | None) -> Iterator[Chunk]:
        for chunk in super()._push(output, tokens, reason):
            yield self._with_prompt(chunk)

    def _with_prompt(self, chunk: Chunk) -> Chunk:
        """Return the chunk, the first one with what is told of the prompt where that is asked for."""
        sampling, vocabulary, tokens = self._request.sampling, self._loaded.vocabulary, self.prepared.tokens
        if self._told or not (sampling.return_token_ids or sampling.prompt_logprobs is not None):
            return chunk
        self._told = True
        scored: list[TokenLogprob | None] = []
        for token, note in zip(tokens, self._scores, strict=False):
            if note is None:
                scored.append(None)
                continue
            logprob, top = _alternatives(note, token, sampling.prompt_logprobs or 0)
            scored.append(vocabulary.scored(token, TokenScore(logprob, note[token].rank, top)))
        return replace(chunk, prompt=PromptFacts(tuple(tokens), vocabulary.text(tokens), tuple(scored)))

    def _sampled(self, part: VllmCompletion) -> list[Sampled]:
        from qvl.backends.local.model.sampler import Sampled

        if not part.logprobs:
            return [Sampled(token) for token in part.token_ids]
        sampling = self._request.sampling
        count, named = sampling.logprobs or 0, frozenset(sampling.logprob_token_ids)
        return [
            Sampled(token, *(_named(note, token, named) if named else _alternatives(note, token, count)))
            for token, note in zip(part.token_ids, part.logprobs, strict=True)
        ]

    def _params(self) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._request.sampling
        defaults = {name: known.default for name, known in PARAMETERS.items() if not known.declared}
        own = defaults | sampling.changed()
        # Text ends where our own code finds a stop string, prompts are cut and tokens told by ours too.
        for name in ("stop", "truncate_prompt_tokens", "return_token_ids", "include_stop_str_in_output"):
            own.pop(name, None)
        own |= {name: list(value) for name, value in own.items() if isinstance(value, tuple)}
        if sampling.logprob_token_ids:
            # vLLM takes one or the other, and so do we.
            own["logprobs"] = None
        own["stop_token_ids"] = list(sampling.stop_token_ids)
        with crossing():
            return SamplingParams(
                **own | {"n": self.num_sequences, "max_tokens": self.max_tokens},
                # Text is made from tokens by the same code as in the local backend.
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                structured_outputs=_structured(self._request),
            )

    def _prompt(self) -> JsonObject:
        """Return vLLM's token prompt, the pictures, and the videos."""
        tokens = placeholders(self.prepared, self.videos) if self.videos else self.tokens
        prompt: JsonObject = {"prompt_token_ids": tokens}
        if self.prepared.salt:
            prompt["cache_salt"] = self.prepared.salt
        if self.prepared.pictures:
            from PIL import Image

            stills = [shown.pixels for shown in self.prepared.pictures if not shown.video and shown.pixels is not None]
            data = {"image": [Image.fromarray(array) for array in stills], "video": list(map(video_of, self.videos))}
            prompt["multi_modal_data"] = {name: shown for name, shown in data.items() if shown}
            # Near the limits of a checkpoint a second resizing would change a size that the first one gave.
            prompt["mm_processor_kwargs"] = {"do_resize": False}
        return prompt


def _structured(request: ChatRequest) -> StructuredOutputsParams | None:
    from vllm.sampling_params import StructuredOutputsParams

    from qvl.backends.grammar_schema import call_schema, enforceable
    from qvl.backends.local.text.grammar import SPACING, calls_within_text, lark_of
    from qvl.backends.schema_bounds import check_format

    form = request.response_format
    check_format(form)
    rules: JsonObject = {"disable_any_whitespace": True}
    schema: JsonObject | None = None
    if request.forced_tools:
        schema = call_schema(request.forced_tools)
    elif form.kind == "json_schema":
        schema = enforceable(form.schema or {}, "response_format")
    elif form.kind == "json_object":
        schema = {"type": "object"}
    if schema is not None:
        # Spaces where json.dumps puts them, as in the local backend: a model that may not write them loses its thread.
        rules["json"] = {**schema, "x-guidance": SPACING}
    elif form.kind == "regex":
        rules["regex"] = form.pattern
    elif form.kind == "grammar":
        rules["grammar"] = lark_of(form.pattern or "")
    elif form.kind == "choice":
        rules["choice"] = list(form.choices)
    elif request.holds_calls:
        rules["grammar"] = calls_within_text(request, json.dumps("<tool_call>"), json.dumps("</tool_call>"))
    else:
        return None
    return StructuredOutputsParams(**rules)


def _alternatives(
    note: Mapping[int, VllmLogprob], token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return (logprob of `token`, the `count` best (token, logprob)) from vLLM's logprobs of one position."""
    ranked = sorted(note.items(), key=lambda item: item[1].rank)
    return note[token].logprob, tuple((other, entry.logprob) for other, entry in ranked[:count])


def _named(
    note: Mapping[int, VllmLogprob], token: int, named: frozenset[int]
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return (logprob of `token`, the (token, logprob) of `named`, the likeliest first)."""
    told = [(other, entry.logprob) for other, entry in note.items() if other in named]
    return note[token].logprob, tuple(sorted(told, key=lambda pair: -pair[1]))
