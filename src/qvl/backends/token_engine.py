"""What backends share whose engine, a library of others, takes tokens and gives tokens: vllm and openvino.

Prompts and pictures are prepared, and answers are read, by the code of the local backend, so that all behave the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qvl.errors import QvlError
from qvl.types import Chunk, Usage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qvl.backends.local.model.sampler import Sampled
    from qvl.backends.local.text.detokenizer import Detokenizer, Vocabulary
    from qvl.backends.local.text.processor import Processor
    from qvl.types import ChatRequest, FinishReason


class TokenEngineRequest:
    """One request: its prompt in tokens, and its choices, read from their tokens into Chunks.

    Args:
        max_model_len: most tokens of prompt and answer.
        abandoned: True as soon as nobody waits for the preparation any more.

    Raises:
        ContextLengthError: the prompt does not fit.
    """

    def __init__(
        self,
        request: ChatRequest,
        processor: Processor,
        vocabulary: Vocabulary,
        max_model_len: int,
        abandoned: Callable[[], bool],
    ) -> None:
        from qvl.backends.local.text.detokenizer import Detokenizer
        from qvl.backends.local.text.prompt import PromptLimit

        limit = PromptLimit(max_model_len, request.sampling.max_tokens)
        self.prepared = processor.prepare(request, limit, abandoned)
        self.max_tokens = limit.answer_tokens(len(self.prepared.tokens))
        self._image_token = processor.image_token_id
        # Greedy choices are all the same, so the engine is asked for one of them.
        self.num_sequences = request.sampling.n if request.sampling.temperature > 0 else 1
        self._outputs: list[Detokenizer] = [
            Detokenizer.of(request, vocabulary, index, reasoning=self.prepared.starts_thinking, marked_calls=False)
            for index in range(request.sampling.n)
        ]
        self._ended: set[int] = set()
        self._last: Chunk | None = None
        self._completion_tokens = 0
        self._has_begun = False
        self.cached_tokens = 0

    @property
    def tokens(self) -> list[int]:
        """The prompt with one placeholder a picture."""
        tokens: list[int] = []
        done = 0
        for picture in self.prepared.pictures:
            tokens += [*self.prepared.tokens[done : picture.start], self._image_token]
            done = picture.end
        return tokens + self.prepared.tokens[done:]

    @property
    def pixels(self) -> list[NDArray[np.uint8]]:
        """The pictures, uint8 [height, width, 3], already of their final size."""
        return [picture.pixels for picture in self.prepared.pictures if picture.pixels is not None]

    @property
    def done(self) -> bool:
        return len(self._ended) == len(self._outputs)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prepared.tokens),
            completion_tokens=self._completion_tokens,
            image_tokens=self.prepared.image_tokens,
            video_tokens=self.prepared.video_tokens,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=sum(output.reasoning_tokens for output in self._outputs),
        )

    def last(self) -> Chunk:
        """Return the last chunk of the choice that ended last."""
        assert self._last is not None
        return self._last

    def ended(self, number: int) -> bool:
        """True if nobody reads what the engine's sequence `number` makes any more."""
        return self.done if self.num_sequences == 1 else number in self._ended

    def push(self, number: int, tokens: Sequence[Sampled], reason: FinishReason | None) -> Iterator[Chunk]:
        """Yield the chunks of new tokens of the engine's sequence `number`; `reason` if it ended with them."""
        for index in range(len(self._outputs)) if self.num_sequences == 1 else (number,):
            if index not in self._ended:
                for chunk in map(self._begun, self._push(self._outputs[index], tokens, reason)):
                    if self._last is not None:
                        yield self._last
                        self._last = None
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        self._last = chunk

    def _begun(self, chunk: Chunk) -> Chunk:
        if self._has_begun:
            return chunk
        self._has_begun = True
        return replace(chunk, prompt_usage=self.usage.of_prompt)

    def _push(self, output: Detokenizer, tokens: Sequence[Sampled], reason: FinishReason | None) -> Iterator[Chunk]:
        self._completion_tokens += len(tokens)
        # The token that ends an answer is part of it only where that is asked for.
        text = tokens[:-1] if reason == "stop" else tokens
        for number, token in enumerate(text):
            chunk = output.push(token)
            if chunk is not None:
                yield chunk
            if output.stopped:
                self._completion_tokens -= len(text) - number - 1
                reason = "stop"
                break
        else:
            for token in tokens[len(text) :]:
                chunk = output.end(token)
                if chunk is not None:
                    yield chunk
        if reason is not None:
            self._ended.add(output.index)
            yield output.finish(reason)


@contextmanager
def translated(translate: Callable[[Exception], QvlError]) -> Iterator[None]:
    """Raise what a library raises as what `translate` makes of it; our own errors pass."""
    try:
        yield
    except QvlError:
        raise
    except Exception as exc:
        raise translate(exc) from exc
