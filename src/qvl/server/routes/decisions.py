"""`POST /v1/decisions`: questions with a fixed set of answers, in OpenAI's form."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qvl.decisions.questions import read_questions
from qvl.pipeline.decide import decide
from qvl.server.openai_decisions_3_57 import DecisionRequest, answers_from, messages_from, picture_paths, questions_from
from qvl.server.serving import ServedRequest, cache_policy, validated
from qvl.types import ChatRequest, Message

if TYPE_CHECKING:
    from qvl.pipeline.decide_call import DecideParams
    from qvl.server.exchange import Exchange

_NO_CHAT = ChatRequest((Message("user"),))


async def decisions(exchange: Exchange) -> None:
    """Answer each question with the probability of every answer that it may have."""
    body = validated(DecisionRequest, await exchange.body())
    await exchange.until_done(lambda: _answer(exchange, body))


async def _answer(exchange: Exchange, body: DecisionRequest) -> None:
    core = exchange.core
    name = core.served(body.model)
    questions = read_questions(questions_from(body.questions))
    messages = messages_from(body.input)
    exchange.picture_params = lambda: picture_paths(body)
    core.refuse_many_images(len(picture_paths(body)))
    params: DecideParams = {"request_id": exchange.request_id}
    if body.prompt_cache_key:
        params["cache_salt"] = body.prompt_cache_key
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
    told = answers_from(answers, name)
    worst = next((result for result in results if result.cache != "hit"), results[0])
    whole = dataclasses.replace(worst, usage=answers.usage, pictures=answers.pictures)
    headers = ServedRequest(exchange, _NO_CHAT, name, core.fingerprint, policy).headers(whole)
    await exchange.respond_json(told, headers)
