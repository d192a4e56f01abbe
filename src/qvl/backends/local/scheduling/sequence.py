"""One answer in the making: its tokens and how far they are computed. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from qvl.backends.local.scheduling.prefix_cache import BlockHashes

if TYPE_CHECKING:
    from qvl.backends.local.scheduling.kv_cache import Slot
    from qvl.backends.local.text.grammar import Matcher
    from qvl.backends.local.text.processor import PreparedRequest
    from qvl.types import SamplingParams


class SequenceStatus(Enum):
    """WAITING has no row (new or preempted); RUNNING has one; FINISHED has given it back."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Choice `index` of a request.

    Args:
        group: whatever the engine keeps of the request; sequences of one request share it.
        prepared: the prompt.
        sampling: as asked for, with max_tokens filled in.
        arrival: order of arrival; smaller came earlier.
        leader: another choice of the same request whose prompt KV can be copied.
        tokens: prompt and answer so far.
        num_computed: how many of `tokens` have their KV in `slot`.
        num_cached: of the prompt, how many came from the prefix cache when it first ran.
        seed: of its random numbers, which depend on nothing but this and the position.
        max_chunk: bound on a prefill chunk, lowered after the device ran out of memory.
    """

    group: object
    index: int
    prepared: PreparedRequest
    sampling: SamplingParams
    arrival: int
    seed: int
    leader: Sequence | None = None
    matcher: Matcher | None = None
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: Slot | None = None
    num_computed: int = 0
    num_cached: int = 0
    num_preempted: int = 0
    memory_errors: int = 0
    max_chunk: int = 1 << 30
    hashes: BlockHashes = field(init=False)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.tokens = list(self.prepared.tokens)
        self.num_prompt = len(self.tokens)
        self.hashes = BlockHashes(self.prepared.pictures, self.prepared.salt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Return the tokens that may still be generated."""
        return (self.sampling.max_tokens or 0) - self.num_output

    @property
    def prefilling(self) -> bool:
        """True if more than the last token still waits for its KV."""
        return self.num_computed < len(self.tokens) - 1 or self.num_output == 0

    @property
    def ready(self) -> int:
        """Return the index before which tokens can be computed now: a picture still being encoded ends them."""
        for picture in self.prepared.pictures:
            if picture.encoding is not None:
                return picture.start
        return len(self.tokens)

    def append(self, token: int) -> None:
        """Append a sampled token."""
        self.tokens.append(token)
        self.counts[token] += 1
