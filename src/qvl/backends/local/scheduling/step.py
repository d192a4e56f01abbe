"""What one step of the engine computes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvl.backends.local.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """A chunk: tokens start:start+count of a sequence; one that ends with the newest token samples the next.

    `draft` are guesses of what follows the newest token: computed with it, and kept as far as the sampler agrees.
    """

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def of_prompt(self) -> bool:
        """True if the chunk is, or begins with, a part of a prompt."""
        return self.start < self.sequence.num_prompt

    @property
    def samples(self) -> bool:
        """True if this chunk ends the prompt, so that a token is sampled after it."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledPictures:
    """About `units` of work on the pictures that a waiting sequence needs before its prompt can be computed."""

    sequence: Sequence
    units: float


@dataclass(slots=True)
class Step:
    """Slices of pictures, and one forward pass: one token of each of `decode`, and the chunks of `prefill`.

    Chunks belong to prompts, and to answers of which several tokens have no KV yet. Those who `joined` read what others
    compute in this very step.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[ScheduledTokens] = field(default_factory=list)
    pictures: list[ScheduledPictures] = field(default_factory=list)
    joined: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.pictures)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.count + len(chunk.draft) for chunk in self.prefill)

    @property
    def num_rows(self) -> int:
        """Return how many of the tokens belong to running answers."""
        runs = (chunk for chunk in self.prefill if not chunk.of_prompt)
        return len(self.decode) + sum(chunk.count + len(chunk.draft) for chunk in runs)

    @property
    def has_prompt(self) -> bool:
        return any(chunk.of_prompt for chunk in self.prefill)
