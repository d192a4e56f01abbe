"""The state of one sequence (a choice of a request): its tokens and how many of them are computed. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import numpy as np

from qvl.backends.local.scheduling.lookup import PromptLookup, can_guess
from qvl.backends.local.scheduling.prefix_cache import BlockHashes
from qvl.backends.local.scheduling.token_rules import PromptScores, ThoughtLimit, TokenRules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from qvl.backends.local.scheduling.kv_cache import Part, Slot
    from qvl.backends.local.scheduling.prefix_cache import Prefix
    from qvl.backends.local.scheduling.states import SequenceStates
    from qvl.backends.local.text.grammar import Matcher
    from qvl.backends.local.text.processor import PreparedRequest
    from qvl.types import FinishReason, SamplingParams


# Of each the logits of the whole vocabulary are there at once, 0.6 MB.
SCORED_AT_ONCE: Final = 128


class SequenceStatus(Enum):
    """WAITING has no KV row (new or preempted); RUNNING has one; FINISHED has freed it."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class TokenOccurrences:
    """The distinct tokens of a prompt and its answer, each with its count in the answer.

    A penalty needs them at every step, and they grow by one token; to build them anew takes as long as the text is.
    """

    __slots__ = ("_counts", "_places", "_tokens")

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = array("q", self._places)
        self._counts = array("q", bytes(8 * len(self._tokens)))

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens and their counts in the answer, as copies."""
        return np.array(self._tokens), np.array(self._counts)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """Choice `index` of a request.

    Args:
        group: the engine's object for the request (an EngineRequest); sequences of one request share it.
        prepared: the prompt.
        sampling: the request's parameters, with max_tokens filled in.
        arrival: order of arrival; smaller came earlier.
        leader: another choice of the same request whose prompt KV can be copied.
        tokens: prompt and answer so far.
        slot: the KV row that it writes.
        shared: parts of others' rows that hold the KV of its first tokens; `slot` has what follows.
        states: where the model has states; None while it waits.
        num_computed: how many of `tokens` have their KV.
        num_ready: how many have it before the step that is being scheduled; fewer than `num_computed` where the rest is
            another's work of that step.
        num_scheduled: how many have it after that step.
        num_cached: prompt tokens that came from the prefix cache when the sequence first ran.
        seed: seed of the sequence's random numbers, which depend only on the seed and the position.
        max_chunk: most tokens of a prefill chunk, lowered after the device ran out of memory.
        priority: sequences with a smaller one come first, whenever they arrived.
        rules: what the request says about single tokens.
        thought: the bound of the reasoning, until that has ended by it.
        scores: of the prompt's tokens, if they are wanted of this sequence.
        ending: why the answer ends, if that is known before the prompt is computed.
        expected: guesses of the next tokens, from the grammar.
        compared: while it waits, how many tokens it has in common with others, with both lengths then; `found` likewise
            with what is kept, as of which change of that. A queue is looked through at every step, and little changes.
    """

    group: object
    index: int
    prepared: PreparedRequest
    sampling: SamplingParams
    arrival: int
    seed: int
    leader: Sequence | None = None
    matcher: Matcher | None = None
    priority: int = 0
    rules: TokenRules | None = None
    thought: ThoughtLimit | None = None
    scores: PromptScores | None = None
    ending: FinishReason | None = None
    expected: tuple[int, ...] = ()
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: Slot | None = None
    shared: tuple[Part, ...] = ()
    states: SequenceStates | None = None
    num_computed: int = 0
    num_ready: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    num_preempted: int = 0
    memory_errors: int = 0
    max_chunk: int = 1 << 30
    hashes: BlockHashes = field(init=False)
    compared: WeakKeyDictionary[Sequence, tuple[tuple[int, int], int]] = field(default_factory=WeakKeyDictionary)
    found: tuple[int, int, Prefix | None, int] | None = None
    _counts: TokenOccurrences | None = None
    lookup: PromptLookup | None = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prepared.tokens)
        self.num_prompt = len(self.tokens)
        free = self.matcher is None and self.rules is None and self.thought is None
        self.lookup = PromptLookup() if free and can_guess(self.sampling) else None
        if self.scores is not None:
            self.max_chunk = SCORED_AT_ONCE
        self.hashes = BlockHashes(self.prepared.pictures, self.prepared.salt)

    @property
    def order(self) -> tuple[int, int]:
        """Return what says who comes first: the smaller one."""
        return self.priority, self.arrival

    @property
    def base(self) -> int:
        """Return the index of the token whose KV is the first in `slot`."""
        return sum(part.tokens for part in self.shared)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Return how many more tokens may be generated."""
        return (self.sampling.max_tokens or 0) - self.num_output

    @property
    def prefilling(self) -> bool:
        """True if the KV of part of the prompt is still to be computed."""
        return self.num_computed < self.num_prompt

    @property
    def num_pending(self) -> int:
        """The number of tokens without KV; in decoding, the newest one and those that were forced behind it."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        """Append a token that was sampled or forced."""
        self.tokens.append(token)
        self.expected = ()
        if self._counts is not None:
            self._counts.add(token)

    def count_tokens(self) -> TokenOccurrences:
        """Return the counts of prompt and answer, from now on kept up with every token."""
        if self._counts is None:
            self._counts = TokenOccurrences(self.tokens[: self.num_prompt])
            for token in self.tokens[self.num_prompt :]:
                self._counts.add(token)
        return self._counts
