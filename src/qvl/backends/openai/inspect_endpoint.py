"""The facts about an endpoint for a person: is it there, what does it serve, what can it do, how fast is it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qvl.backends.base import Capabilities
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.endpoint import Endpoint, Timeouts
from qvl.backends.openai.endpoint_list import Listed
from qvl.backends.openai.failures import Blame, Failed
from qvl.errors import AuthError, QvlError
from qvl.types import ChatRequest, Message, SamplingParams, TextPart


@dataclass(frozen=True, slots=True)
class Examined:
    """One endpoint. Times are seconds: of GET /models, and until the first token of a short answer; 0 where not known.

    `reachable` says that something answered; `error` what went wrong, also where that is not the connection.
    """

    url: str
    reachable: bool = False
    models: tuple[str, ...] = ()
    model: str = ""
    capabilities: Capabilities | None = None
    models_seconds: float = 0.0
    first_token_seconds: float = 0.0
    error: str | None = None


async def examine(
    endpoints: Sequence[Listed],
    *,
    model: str = "",
    api_key: str | None = None,
    timeout: float = 30.0,
    verify: bool = True,
) -> list[Examined]:
    """Asks every endpoint for its models, probes what it can do with `model` (the only one if not named), times it.

    Costs about a dozen requests of a few tokens for each endpoint.
    """
    return list(
        await asyncio.gather(
            *(_examine(one, model, api_key=api_key, timeout=timeout, verify=verify) for one in endpoints)
        )
    )


async def _examine(one: Listed, model: str, *, api_key: str | None, timeout: float, verify: bool) -> Examined:
    connect = min(5.0, timeout)
    endpoint = Endpoint(one.url, api_key=api_key, timeouts=Timeouts(connect, timeout, timeout, timeout), verify=verify)
    models: tuple[str, ...] = ()
    took = 0.0
    await endpoint.open()
    try:
        began = time.perf_counter()
        models = tuple(entry["id"] for entry in await endpoint.models())
        took = time.perf_counter() - began
    except Failed as failed:
        if failed.blame is Blame.DOWN or isinstance(failed.error, AuthError):
            return Examined(one.name, failed.blame is not Blame.DOWN, error=str(failed.error))
        # Many endpoints have no such list; what else fails, the probe tells as well.
    finally:
        await endpoint.aclose()
    if not model and len(models) != 1:
        summary = f"serves {', '.join(models[:8])}" if models else "lists no models"
        return Examined(
            one.name, True, models, models_seconds=took, error=f"{summary}: name a model to see what it can do"
        )
    backend = OpenAIBackend(
        model or models[0],
        base_url=one.url,
        api_key=api_key,
        connect_timeout=connect,
        first_token_timeout=timeout,
        total_timeout=timeout,
        max_retries=0,
        verify=verify,
    )
    question = ChatRequest(
        (Message("user", (TextPart("Answer with the single digit 1."),)),), SamplingParams(max_tokens=4)
    )
    have: Capabilities | None = None
    try:
        async with backend:
            have = backend.capabilities
            first = (await backend.generate(question)).timing.first_token
    except QvlError as exc:
        return Examined(one.name, True, models, backend.model, have, took, error=str(exc))
    return Examined(one.name, True, models, backend.model, have, took, first)
