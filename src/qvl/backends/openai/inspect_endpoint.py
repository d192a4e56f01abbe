"""Inspects endpoints for `qvl endpoints`: reachability, models, capabilities and speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from qvl.backends.base import Capabilities
from qvl.backends.openai.backend import OpenAIBackend
from qvl.backends.openai.endpoint import Endpoint, Timeouts
from qvl.backends.openai.endpoint_list import Listed
from qvl.backends.openai.failures import Failed, Impact
from qvl.errors import AuthError, QvlError
from qvl.types import ChatRequest, Message, SamplingParams, TextPart


@dataclass(frozen=True, slots=True)
class Examined:
    """The findings on one endpoint. Times are in seconds: GET /models, first token of a short answer; 0 if unknown.

    `reachable`: it answered at all; `error`: the problem, if any, which need not be the connection.
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
    """Return the models, capabilities of `model` (by default the only one) and timings of every endpoint.

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
        if failed.impact is Impact.DOWN or isinstance(failed.error, AuthError):
            return Examined(one.name, failed.impact is not Impact.DOWN, error=str(failed.error))
        # Many endpoints have no such list; what else fails, the probe tells as well.
    finally:
        await endpoint.aclose()
    if not model and len(models) != 1:
        summary = f"serves {', '.join(models[:8])}" if models else "lists no models"
        return Examined(
            one.name, True, models, models_seconds=took, error=f"{summary}: name a model to probe its capabilities"
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
