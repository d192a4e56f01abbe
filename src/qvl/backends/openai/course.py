"""The course of one request over the attempts at it: what was tried, and what of its answer was delivered."""

from __future__ import annotations

from dataclasses import replace

from qvl.backends.endless import EndlessWatch
from qvl.backends.openai.endpoint import Times
from qvl.backends.openai.failures import Failed, Impact, Repeat
from qvl.backends.openai.fleet import Attempts, ProbedEndpoint
from qvl.backends.openai.pool import Ticket
from qvl.backends.openai.request_traits import picture_tokens, repeatable
from qvl.backends.resume import Continuation
from qvl.errors import BackendResponseError
from qvl.types import ChatRequest, Chunk


class Course:
    """The course of `request`, until `deadline` (monotonic), and its `times`.

    `key` is the hash of its picture, where equal ones go to one endpoint; `tries_others`: an answer that breaks off may
    go on at another endpoint. `cost` are its estimated prompt tokens. `begun` is True once an answer has begun, and
    `cut` the failure of one that broke off then. `taken` are endpoints at which other suspects are, `suspect` whether
    the attempt under way is one.
    """

    def __init__(
        self, request: ChatRequest, *, times: Times, deadline: float, key: str | None, tries_others: bool
    ) -> None:
        self.request, self.times, self.deadline, self.key = request, times, deadline, key
        self.cost = picture_tokens(request)
        self.repeatable = repeatable(request)
        resumable = self.repeatable and request.sampling.deterministic and tries_others
        self.continuation = Continuation() if resumable else None
        self.attempts, self.rounds = Attempts(), 0
        self.taken: set[str] = set()
        self.suspect = False
        self.begun = False
        self.cut: Failed | None = None

    def begin(self, notes: tuple[str, ...]) -> None:
        """Begin another attempt, whose answer is to have `notes`."""
        self._answering, self._notes = False, notes
        self._watch = EndlessWatch(self.request)

    def rest(self, chunk: Chunk, ticket: Ticket[ProbedEndpoint]) -> Chunk | None:
        """Return what of the attempt's chunk is still to be delivered; None for nothing.

        Raises:
            Failed: the answer repeats itself endlessly.
            Diverged: it is not the answer that broke off.
        """
        try:
            self._watch.read(chunk)
        except BackendResponseError as exc:
            raise Failed(exc, Repeat.NEVER, Impact.NONE) from None
        if not self._answering:
            self._answering = self.begun = True
            ticket.first_token()
            if self._notes:
                chunk = replace(chunk, notes=self._notes + chunk.notes)
        return chunk if self.continuation is None else self.continuation.rest(chunk)
