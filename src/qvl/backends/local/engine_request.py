"""The engine's record of a request. No torch."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qvl.types import Chunk, PromptFacts, Timing, Usage

if TYPE_CHECKING:
    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.text.detokenizer import Detokenizer
    from qvl.backends.local.text.processor import PreparedRequest
    from qvl.errors import QvlError


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request in the engine, with its sequences and the queue for its chunks.

    Args:
        prepared: the prompt.
        outputs: the detokenizer of each choice.
        loop: the event loop of the caller.
        request_id: for logs.
        pieces: the chunks of each choice in the current step; they are joined and sent at its end.
        facts: returns what is told of the prompt; None if nobody asked for it.
        begun: True once a chunk was sent.
    """

    prepared: PreparedRequest
    outputs: list[Detokenizer]
    loop: asyncio.AbstractEventLoop
    request_id: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    inbox: asyncio.Queue[Chunk | QvlError] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.perf_counter)
    scheduled: float = 0.0
    first_token: float = 0.0
    num_finished: int = 0
    facts: Callable[[EngineRequest], PromptFacts] | None = None
    begun: bool = False
    pieces: defaultdict[int, list[Chunk]] = field(default_factory=lambda: defaultdict(list))

    @property
    def done(self) -> bool:
        return self.num_finished >= len(self.sequences)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prepared.tokens),
            completion_tokens=sum(sequence.num_output for sequence in self.sequences),
            image_tokens=self.prepared.image_tokens,
            video_tokens=self.prepared.video_tokens,
            cached_tokens=self.sequences[0].num_cached,
            reasoning_tokens=sum(output.reasoning_tokens for output in self.outputs),
        )

    def timing(self, now: float) -> Timing:
        return Timing(
            queue=max(0.0, self.scheduled - self.submitted),
            first_token=max(0.0, self.first_token - self.submitted),
            total=now - self.submitted,
        )


def request_of(sequence: Sequence) -> EngineRequest:
    """Return the request to which `sequence` belongs."""
    assert isinstance(sequence.group, EngineRequest)
    return sequence.group


@dataclass(slots=True)
class Counters:
    """The engine's counters since its start; `generated_tokens` include the forced and the accepted ones."""

    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    aborted: int = 0
    failed: int = 0
    memory_errors: int = 0
