"""Makes the engine's record of a request: prompt, grammar, rules about tokens, and what turns tokens into text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from qvl.backends.local.engine_request import EngineRequest
from qvl.backends.local.scheduling.sequence import Sequence
from qvl.backends.local.scheduling.token_rules import PromptScores, ThoughtLimit, TokenRules
from qvl.backends.local.text.detokenizer import Detokenizer
from qvl.backends.local.text.prompt import PromptLimit
from qvl.backends.local.text.template_options import thinking_budget
from qvl.types import PromptFacts

if TYPE_CHECKING:
    import asyncio

    from qvl.backends.local.model.device import Device
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.backends.local.text.detokenizer import Vocabulary
    from qvl.backends.local.text.grammar import Grammars
    from qvl.backends.local.text.processor import Processor
    from qvl.types import ChatRequest


@dataclass(slots=True)
class RequestMaker:
    """Makes requests for the engine of one loaded model; thread-safe."""

    checkpoint: Checkpoint
    device: Device
    processor: Processor
    grammars: Grammars
    vocabulary: Vocabulary
    vocab_size: int
    max_model_len: int
    _arrivals: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def make(
        self, request: ChatRequest, loop: asyncio.AbstractEventLoop, abandoned: Callable[[], bool]
    ) -> EngineRequest:
        """Return the request prepared for the engine. Blocking, CPU-bound; raises as `Processor.prepare`."""
        matcher = self.grammars.matcher(request)
        sampling = request.sampling
        rules = TokenRules.of(sampling, self._encode, self.checkpoint.eos_token_ids, self.vocab_size)
        limit = PromptLimit(self.max_model_len, sampling.max_tokens)
        prepared = self.processor.prepare(request, limit, abandoned)
        sampling = replace(sampling, max_tokens=limit.answer_tokens(len(prepared.tokens)))
        outputs = [
            Detokenizer.of(request, self.vocabulary, index, reasoning=prepared.starts_thinking, marked_calls=True)
            for index in range(sampling.n)
        ]
        made = EngineRequest(prepared, outputs, loop, request.request_id)
        if sampling.return_token_ids or sampling.prompt_logprobs is not None:
            made.facts = partial(_prompt_facts, self.vocabulary)
        budget = thinking_budget(request, sampling.max_tokens or 0)
        closing = () if budget is None else self._closing(guided=matcher is not None)
        seed = self.device.random_seed() if sampling.seed is None else sampling.seed
        for index in range(sampling.n):
            scored = sampling.prompt_logprobs is not None and not index
            made.sequences.append(
                Sequence(
                    group=made,
                    index=index,
                    prepared=prepared,
                    sampling=sampling,
                    arrival=next(self._arrivals),
                    seed=(seed + index * 0x632BE59BD9B4E019) % (1 << 64),
                    leader=made.sequences[0] if index else None,
                    matcher=matcher.deep_copy() if matcher is not None and index else matcher,
                    priority=request.priority,
                    rules=rules,
                    thought=None if budget is None else ThoughtLimit(budget, closing),
                    scores=PromptScores(sampling.prompt_logprobs or 0) if scored else None,
                )
            )
        return made

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.checkpoint.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _closing(self, *, guided: bool) -> tuple[int, ...]:
        """Return the tokens that end a thought; behind it a grammar, if there is one, writes the answer itself."""
        return tuple(self._encode("\n</think>" if guided else "\n</think>\n\n"))


def _prompt_facts(vocabulary: Vocabulary, request: EngineRequest) -> PromptFacts:
    """Return a computed prompt's tokens, and their scores where those are wanted."""
    tokens = request.prepared.tokens
    scores = request.sequences[0].scores
    if scores is None:
        return PromptFacts(tuple(tokens), vocabulary.text(tokens))
    scored = [vocabulary.scored(token, score) for token, score in zip(tokens[1:], scores.found, strict=True)]
    return PromptFacts(tuple(tokens), vocabulary.text(tokens), (None, *scored))
