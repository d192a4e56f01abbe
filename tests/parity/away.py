"""An endpoint that is away for some questions."""

from __future__ import annotations

from qvl.errors import BackendUnavailableError
from qvl.types import ChatRequest
from tests.server.echo_backend import EchoBackend


class AwayBackend(EchoBackend):
    """Cannot be reached for questions with a word of `away` in them."""

    away: tuple[str, ...] = ()

    def refuse_unsupported(self, request: ChatRequest) -> None:
        super().refuse_unsupported(request)
        if any(word in request.messages[-1].text for word in self.away):
            raise BackendUnavailableError("the endpoint is away")
