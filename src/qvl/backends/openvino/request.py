"""One request in OpenVINO's terms: its prompt, its pictures, its settings, and its tokens as Chunks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qvl.backends.openvino.library import crossing, import_genai
from qvl.backends.token_engine import TokenEngineRequest
from qvl.errors import RequestError, UnsupportedInputError
from qvl.types import ChatRequest, Chunk, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qvl.backends.local.text.detokenizer import Vocabulary
    from qvl.backends.local.text.processor import Processor
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


class OpenVinoRequest(TokenEngineRequest):
    """One request on its way through OpenVINO: what the pipeline is handed, and the reading of what it makes."""

    def __init__(self, loaded: LoadedModel, request: ChatRequest, abandoned: Callable[[], bool]) -> None:
        from qvl.backends.local.text.template_options import refuse_efforts

        openvino, _ = import_genai()
        refuse_efforts(request)
        structured = loaded.grammars.config(request)
        super().__init__(request, loaded.processor, loaded.vocabulary, loaded.max_model_len, abandoned)
        self._loaded = loaded
        self._request = request
        self.prompt = self._prompt()
        self.images = [openvino.Tensor(array[None]) for array in self.pixels]
        self.configs = self._configs(structured)

    def read(self, number: int, piece: Piece) -> Iterator[Chunk]:
        """Yield the chunks of what the request's config `number` made in a step."""
        from qvl.backends.local.model.sampler import Sampled

        logprobs = piece.logprobs or [0.0] * len(piece.tokens)
        sampled = [Sampled(token, min(value, 0.0)) for token, value in zip(piece.tokens, logprobs, strict=True)]
        yield from self.push(number, sampled, piece.finish_reason)

    def _prompt(self) -> str:
        """Return the prompt as text, since the library takes pictures with no other, one placeholder a picture.

        Raises:
            UnsupportedInputError: the library would read other tokens there than ours: somebody typed a control token.
        """
        tokens = self.tokens
        decoded = self._loaded.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = str(decoded)
        with crossing():
            same = self._loaded.encode(text) == tokens
        if not same or any(word in text for word in RESERVED):
            raise UnsupportedInputError(
                "the messages hold a control token of the model as text, which openvino would take for the token",
                hint="leave out what looks like <|im_end|>",
                param="messages",
            )
        return text

    def _configs(self, structured: object | None) -> list[object]:
        """Return a GenerationConfig for each choice; one for all where they are the same."""
        _, genai = import_genai()
        sampling = self._request.sampling
        own: JsonObject = {
            "max_new_tokens": self.max_tokens,
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
        try:
            return [
                genai.GenerationConfig(**own, rng_seed=(seed + index) % SEEDS) for index in range(self.num_sequences)
            ]
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
