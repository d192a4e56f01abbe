"""One request in OpenVINO's terms: its prompt, its pictures, its settings, and its tokens as Chunks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.backends.openvino.library import crossing, import_genai
from qvl.errors import RequestError, UnsupportedInputError
from qvl.types import ChatRequest, Chunk, JsonObject, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qvl.backends.local.text.detokenizer import Detokenizer, Vocabulary
    from qvl.backends.local.text.processor import PreparedRequest, Processor
    from qvl.backends.openvino.engine import Piece, StepLoop
    from qvl.backends.openvino.grammar import GrammarCheck

# Whatever the prompt's text, the library takes these words for a place of a picture.
RESERVED: Final = ("<ov_genai_image_", "<ov_genai_video_")
# The library seeds a 32-bit generator.
SEEDS: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in OpenVINO, and what its requests are prepared with. `facts` go into the identity."""

    engine: StepLoop
    tokenizer: PreTrainedTokenizerFast
    encode: Callable[[str], list[int]]
    processor: Processor
    vocabulary: Vocabulary
    grammars: GrammarCheck
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    facts: JsonObject


class OpenVinoRequest:
    """One request on its way through OpenVINO: what the pipeline is handed, and the reading of what it makes."""

    def __init__(self, loaded: LoadedModel, request: ChatRequest, abandoned: Callable[[], bool]) -> None:
        from qvl.backends.local.text.detokenizer import Detokenizer
        from qvl.backends.local.text.prompt import PromptLimit
        from qvl.backends.local.text.template_options import refuse_efforts

        openvino, _ = import_genai()
        self._loaded = loaded
        self._request = request
        refuse_efforts(request)
        structured = loaded.grammars.config(request)
        limit = PromptLimit(loaded.max_model_len, request.sampling.max_tokens)
        prepared = loaded.processor.prepare(request, limit, abandoned)
        self.prompt = self._prompt(prepared)
        pixels = [picture.pixels for picture in prepared.pictures if picture.pixels is not None]
        self.images = [openvino.Tensor(array[None]) for array in pixels]
        self.configs = self._configs(limit.answer_tokens(len(prepared.tokens)), structured)
        self._outputs: list[Detokenizer] = [
            Detokenizer.of(request, loaded.vocabulary, index, reasoning=prepared.starts_thinking, marked_calls=False)
            for index in range(request.sampling.n)
        ]
        self._ended: set[int] = set()
        self._last: Chunk | None = None
        self._completion = 0
        self._prepared = prepared

    @property
    def done(self) -> bool:
        return len(self._ended) == len(self._outputs)

    def last(self) -> Chunk:
        """Return the finish of the choice that ended last."""
        assert self._last is not None
        return self._last

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._prepared.tokens),
            completion_tokens=self._completion,
            image_tokens=self._prepared.image_tokens,
        )

    def ended(self, number: int) -> bool:
        """True if nobody reads what config `number` makes any more."""
        return self.done if len(self.configs) == 1 else number in self._ended

    def read(self, number: int, piece: Piece) -> Iterator[Chunk]:
        """Yield the chunks of what the request's config `number` made in a step."""
        # Greedy choices are all the same, so the library is asked for one of them.
        for index in range(len(self._outputs)) if len(self.configs) == 1 else (number,):
            if index not in self._ended:
                for chunk in self._part(self._outputs[index], piece):
                    if self._last is not None:
                        yield self._last
                        self._last = None
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        self._last = chunk

    def _part(self, output: Detokenizer, piece: Piece) -> Iterator[Chunk]:
        from qvl.backends.local.model.sampler import Sampled

        tokens = piece.tokens
        self._completion += len(tokens)
        ending = tokens[-1:] if piece.finish_reason == "stop" else []
        # The token that ends an answer is a part of it only where that is asked for.
        tokens = tokens[: len(tokens) - len(ending)]
        for number, token in enumerate(tokens):
            chunk = output.push(Sampled(token, min(piece.logprobs[number], 0.0) if piece.logprobs else 0.0))
            if chunk is not None:
                yield chunk
            if output.stopped:
                self._completion -= len(tokens) - number - 1
                self._ended.add(output.index)
                yield output.finish("stop")
                return
        for token in ending:
            chunk = output.end(Sampled(token))
            if chunk is not None:
                yield chunk
        if piece.finish_reason is not None:
            self._ended.add(output.index)
            yield output.finish(piece.finish_reason)

    def _prompt(self, prepared: PreparedRequest) -> str:
        """Return the prompt as text, since the library takes pictures with no other, one placeholder a picture.

        Raises:
            UnsupportedInputError: the library would read other tokens there than ours: somebody typed a control token.
        """
        loaded = self._loaded
        tokens: list[int] = []
        done = 0
        for picture in prepared.pictures:
            tokens += [*prepared.tokens[done : picture.start], loaded.processor.image_token_id]
            done = picture.end
        tokens += prepared.tokens[done:]
        text = str(loaded.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        with crossing():
            same = loaded.encode(text) == tokens
        if not same or any(word in text for word in RESERVED):
            raise UnsupportedInputError(
                "the messages hold a control token of the model as text, which openvino would take for the token",
                hint="leave out what looks like <|im_end|>",
                param="messages",
            )
        return text

    def _configs(self, max_tokens: int, structured: object | None) -> list[object]:
        """Return a GenerationConfig for each choice; one for all where they are the same."""
        _, genai = import_genai()
        sampling = self._request.sampling
        own: JsonObject = {
            "max_new_tokens": max_tokens,
            "apply_chat_template": False,
            "do_sample": sampling.temperature > 0,
            "logprobs": 0 if sampling.logprobs is None else 1,
            **self._ends(structured is not None),
        }
        if structured is not None:
            own["structured_output_config"] = structured
        if sampling.temperature > 0:
            own |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
            own |= {"top_k": sampling.top_k} if sampling.top_k else {}
        seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed
        # Choices of one request would share the state of a grammar: each is a request of its own.
        number = sampling.n if sampling.temperature > 0 else 1
        try:
            return [genai.GenerationConfig(**own, rng_seed=(seed + index) % SEEDS) for index in range(number)]
        except (RuntimeError, TypeError, ValueError) as exc:
            raise RequestError(f"OpenVINO refuses the request: {exc}") from exc

    def _ends(self, structured: bool) -> JsonObject:
        """Return what ends an answer: the model's own tokens and those of the request.

        The library's ignore_eos ignores both, and its own stop tokens fill an empty set.
        """
        sampling, eos = self._request.sampling, self._loaded.eos_token_ids
        if sampling.ignore_eos and not structured:
            stops = sampling.stop_token_ids
            return {"stop_token_ids": {*stops}, "eos_token_id": stops[0]} if stops else {"ignore_eos": True}
        return {"stop_token_ids": {*eos, *sampling.stop_token_ids}, "eos_token_id": eos[0]}
