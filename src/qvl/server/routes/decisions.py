"""`POST /v1/decisions` in OpenAI's form and `/v1/systemone` in System One's: questions with a fixed set of answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from qvl.decisions.questions import Question, read_questions
from qvl.pipeline.decide import decide
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.server import openai_decisions_3_57, systemone_0_2
from qvl.server.responses_input import item_texts
from qvl.server.serving import ServedRequest, cache_policy, read_request
from qvl.types import ChatRequest, JsonMapping, Message

if TYPE_CHECKING:
    from qvl.decisions.answers import Decisions
    from qvl.pipeline.decide_call import DecideParams
    from qvl.server.exchange import Exchange

T = TypeVar("T")
FEW: Final = 32
_NO_CHAT = ChatRequest((Message("user"),))


async def decisions(exchange: Exchange) -> None:
    """Answer each question with the probability of every answer that it may have."""
    wire = openai_decisions_3_57
    body = await read_request(exchange, wire.DecisionRequest, lambda body: item_texts(body.input))

    async def answer() -> None:
        name = exchange.core.served(body.model)
        questions = await _aside(len(body.questions), lambda: read_questions(wire.questions_from(body.questions)))
        messages, paths = wire.messages_from(body.input, exchange.as_sent), wire.picture_paths(body)
        salt = body.prompt_cache_key or ""
        await _answer(exchange, name, questions, messages, paths, lambda told: wire.answers_from(told, name), salt=salt)

    await exchange.until_done(answer)


async def system_one(exchange: Exchange) -> None:
    """Answer each question, by its name, with the probability of every answer that it may have."""
    wire = systemone_0_2
    body = await read_request(exchange, wire.SystemOneRequest, wire.asset_texts)

    async def answer() -> None:
        name = exchange.core.served(body.model)
        read = await _aside(len(body.questions), lambda: wire.input_of(body, exchange.as_sent))
        await _answer(
            exchange, name, read.questions, read.messages, read.paths, lambda told: wire.answers_of(body, told, name)
        )

    await exchange.until_done(answer)


async def _aside(number: int, read: Callable[[], T]) -> T:
    """Return what `read` returns; of more than a few questions, read where nobody else waits for it."""
    return read() if number <= FEW else await asyncio.to_thread(read)


async def _answer(
    exchange: Exchange,
    name: str,
    questions: Sequence[Question],
    messages: Sequence[JsonMapping],
    paths: Sequence[str],
    written: Callable[[Decisions], object],
    *,
    salt: str = "",
) -> None:
    core = exchange.core
    exchange.picture_params = lambda: paths
    parts = [part for message in messages for part in message["content"] or ()]
    videos = sum(isinstance(part, UnreadPicture) and part.video for part in parts)
    core.refuse_many_images(range(len(paths) - videos))
    params: DecideParams = {"request_id": exchange.request_id, "adapter": core.adapter_of(name)}
    if salt:
        params["cache_salt"] = salt
    policy = cache_policy(exchange, deterministic=True)
    answers, results = await decide(
        core.executor,
        messages,
        questions,
        policy,
        params,
        namespace=core.namespace(exchange.tenant),
        policy=core.settings.media,
    )
    told = written(answers)
    worst = next((result for result in results if result.cache != "hit"), results[0])
    whole = dataclasses.replace(worst, usage=answers.usage, pictures=answers.pictures)
    headers = ServedRequest(exchange, _NO_CHAT, name, core.fingerprint(name), policy).headers(whole)
    await exchange.respond_json(told, headers)
