"""Converts one request to vLLM's prompt and sampling parameters, and vLLM's outputs to Chunks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from qvl.backends.local.scheduling.token_rules import Score
from qvl.backends.vllm.engine import crossing
from qvl.errors import BackendError
from qvl.sampling import PARAMETERS
from qvl.types import ChatRequest, Chunk, FinishReason, JsonObject, PromptFacts, TokenLogprob, Usage

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from qvl.backends.local.text.detokenizer import Detokenizer, Vocabulary
    from qvl.backends.local.text.processor import PreparedRequest, Processor


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

    `by_priority`: True if the engine schedules by the priority of requests.
    """

    engine: AsyncLLM
    processor: Processor
    vocabulary: Vocabulary
    max_model_len: int
    max_logprobs: int
    facts: JsonObject
    by_priority: bool = False


class VllmRequest:
    """One request in vLLM: its prompt, its sampling parameters, and the parsing of its outputs."""

    def __init__(self, loaded: Loaded, request: ChatRequest, abandoned: Callable[[], bool]) -> None:
        from qvl.backends.local.text.detokenizer import Detokenizer
        from qvl.backends.local.text.prompt import PromptLimit
        from qvl.backends.local.text.template_options import refuse_efforts

        self._loaded = loaded
        self._request = request
        refuse_efforts(request)
        limit = PromptLimit(loaded.max_model_len, request.sampling.max_tokens)
        prepared = loaded.processor.prepare(request, limit, abandoned)
        self.prompt = _prompt(prepared, loaded.processor.image_token_id)
        self.params = self._params(limit.answer_tokens(len(prepared.tokens)))
        self._outputs: list[Detokenizer] = [
            Detokenizer.of(request, loaded.vocabulary, index, reasoning=prepared.starts_thinking, marked_calls=False)
            for index in range(request.sampling.n)
        ]
        self._ended: set[int] = set()
        self._last: Chunk | None = None
        self._completion = 0
        self._cached = 0
        self._prepared = prepared
        self._told = False
        self._scores: Sequence[Mapping[int, VllmLogprob] | None] = ()

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
        """Return the last chunk of the choice that ended last."""
        assert self._last is not None
        return self._last

    def read(self, result: VllmOutput) -> Iterator[Chunk]:
        """Yield the chunks of one of vLLM's outputs."""
        self._cached = result.num_cached_tokens or self._cached
        self._scores = result.prompt_logprobs or self._scores
        for index, part in self._parts(result):
            if index not in self._ended:
                for made in self._part(index, part):
                    chunk = self._with_prompt(made)
                    if self._last is not None:
                        yield self._last
                        self._last = None
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        self._last = chunk

    def _with_prompt(self, chunk: Chunk) -> Chunk:
        """Return the chunk, the first one with what is told of the prompt where that is asked for."""
        sampling, vocabulary, tokens = self._request.sampling, self._loaded.vocabulary, self._prepared.tokens
        if self._told or not (sampling.return_token_ids or sampling.prompt_logprobs is not None):
            return chunk
        self._told = True
        scored: list[TokenLogprob | None] = []
        for token, note in zip(tokens, self._scores, strict=False):
            if note is None:
                scored.append(None)
                continue
            logprob, top = _alternatives(note, token, sampling.prompt_logprobs)
            scored.append(vocabulary.scored(token, Score(logprob, note[token].rank, top)))
        return replace(chunk, prompt=PromptFacts(tuple(tokens), vocabulary.text(tokens), tuple(scored)))

    def _parts(self, result: VllmOutput) -> Iterator[tuple[int, VllmCompletion]]:
        """Yield (choice index, output). Greedy choices are equal, so vLLM computes only one, yielded for each."""
        for part in result.outputs:
            for index in range(len(self._outputs)) if self.params.n == 1 else (part.index,):
                yield index, part

    def _part(self, index: int, part: VllmCompletion) -> Iterator[Chunk]:
        from qvl.backends.local.model.sampler import Sampled

        output = self._outputs[index]
        tokens = list(part.token_ids)
        notes = list(part.logprobs or ())
        self._completion += len(tokens)
        # The token that ends an answer is a part of it only where that is asked for.
        ending = [tokens.pop()] if part.finish_reason == "stop" and tokens else []
        for number, token in enumerate(tokens):
            told = _told(notes[number : number + 1], token, self._request.sampling.logprobs)
            chunk = output.push(Sampled(token, *told))
            if chunk is not None:
                yield chunk
            if output.stopped:
                self._completion -= len(tokens) - number - 1
                yield self._finished(output, "stop")
                return
        for token in ending:
            chunk = output.end(Sampled(token, *_told(notes[-1:], token, self._request.sampling.logprobs)))
            if chunk is not None:
                yield chunk
        if part.finish_reason is not None:
            if part.finish_reason not in ("stop", "length"):
                raise BackendError(f"vLLM ended the answer early, with finish_reason {part.finish_reason!r}")
            yield self._finished(output, part.finish_reason)

    def _finished(self, output: Detokenizer, reason: FinishReason) -> Chunk:
        self._ended.add(output.index)
        return output.finish(reason)

    def _params(self, max_tokens: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._request.sampling
        defaults = {name: known.default for name, known in PARAMETERS.items() if not known.declared}
        own = defaults | sampling.changed()
        # Text ends where our own code finds a stop string, prompts are cut and tokens told by ours too.
        for name in ("stop", "truncate_prompt_tokens", "return_token_ids", "include_stop_str_in_output"):
            own.pop(name, None)
        own |= {name: list(value) for name, value in own.items() if isinstance(value, tuple)}
        own["stop_token_ids"] = list(sampling.stop_token_ids)
        with crossing():
            return SamplingParams(
                **own | {"n": sampling.n if sampling.temperature > 0 else 1, "max_tokens": max_tokens},
                # Text is made from tokens by the same code as in the local backend.
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                structured_outputs=_structured(self._request),
            )


def _prompt(prepared: PreparedRequest, image_token: int) -> JsonObject:
    """Return vLLM's token prompt: one placeholder a picture, and the pictures, already of their final size."""
    tokens: list[int] = []
    done = 0
    for picture in prepared.pictures:
        tokens += prepared.tokens[done : picture.start]
        tokens.append(image_token)
        done = picture.end
    tokens += prepared.tokens[done:]
    prompt: JsonObject = {"prompt_token_ids": tokens}
    if prepared.salt:
        prompt["cache_salt"] = prepared.salt
    if prepared.pictures:
        from PIL import Image

        pixels = [picture.pixels for picture in prepared.pictures if picture.pixels is not None]
        prompt["multi_modal_data"] = {"image": [Image.fromarray(array) for array in pixels]}
        # Near the limits of a checkpoint a second resizing would change a size that the first one gave.
        prompt["mm_processor_kwargs"] = {"do_resize": False}
    return prompt


def _structured(request: ChatRequest) -> StructuredOutputsParams | None:
    from vllm.sampling_params import StructuredOutputsParams

    from qvl.backends.grammar_schema import call_schema, enforceable
    from qvl.backends.local.text.grammar import SPACING, calls_within_text, held_calls, lark_of
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
    elif held_calls(request):
        rules["grammar"] = calls_within_text(request, json.dumps("<tool_call>"), json.dumps("</tool_call>"))
    else:
        return None
    return StructuredOutputsParams(**rules)


def _told(
    note: Sequence[Mapping[int, VllmLogprob]], token: int, count: int | None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the logprob and the alternatives of a token from the note about its place, if there is one."""
    return _alternatives(note[0], token, count) if note else (0.0, ())


def _alternatives(
    note: Mapping[int, VllmLogprob], token: int, count: int | None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return (logprob of `token`, the `count` best (token, logprob)) from vLLM's logprobs of one position."""
    ranked = sorted(note.items(), key=lambda item: item[1].rank)
    return note[token].logprob, tuple((other, entry.logprob) for other, entry in ranked[: count or 0])
