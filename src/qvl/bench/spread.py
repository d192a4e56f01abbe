"""One load spread over several endpoints: each request goes to the one with the fewest in flight."""

from __future__ import annotations

from collections.abc import Sequence

from qvl.bench.exchange import LoadedEndpoint
from qvl.bench.timed_answer import TimedAnswer
from qvl.errors import ConfigError


class SpreadEndpoint(LoadedEndpoint):
    """Several endpoints that count as one; each answer has the `url` of its own. Retries may go to another.

    Args:
        members: the endpoints; closed with this one.
    """

    def __init__(self, members: Sequence[LoadedEndpoint]) -> None:
        self.members = tuple(members)
        self.url = " + ".join(member.url for member in self.members)
        self.model = self.members[0].model
        self._in_flight = [0] * len(self.members)
        self._turn = 0

    def close(self) -> None:
        for member in self.members:
            member.close()

    async def find_model(self) -> str:
        """Return the name of the model that all members serve.

        Raises:
            AttemptFailedError: a member does not answer, or lists no models.
            ConfigError: the members list different models first.
        """
        names = [await member.find_model() for member in self.members]
        if len(set(names)) > 1:
            raise ConfigError(f"the endpoints serve different models: {', '.join(names)}", hint="name one with --model")
        self.model = names[0]
        return self.model

    async def find_route(self) -> None:
        for member in self.members:
            await member.find_route()

    async def ask(self, body: bytes, request_id: str) -> TimedAnswer:
        """Ask the member with the fewest requests in flight, by turns among equals."""
        count = len(self.members)
        order = [(self._turn + step) % count for step in range(count)]
        chosen = min(order, key=lambda number: self._in_flight[number])
        self._turn = (chosen + 1) % count
        self._in_flight[chosen] += 1
        try:
            answer = await self.members[chosen].ask(body, request_id)
        finally:
            self._in_flight[chosen] -= 1
        answer.url = self.members[chosen].url
        return answer
