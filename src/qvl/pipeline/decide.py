"""`decide()`: several questions about the same pictures, asked together behind one reading of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qvl.decisions.answers import Decision, Decisions
from qvl.decisions.questions import QuestionLike, read_questions
from qvl.errors import ConfigError
from qvl.ids import new_request_id
from qvl.pipeline.decide_call import DecideCall, DecideParams, shared_messages
from qvl.pipeline.load_pictures import load_pictures
from qvl.pipeline.parse_request import draft_request
from qvl.types import Result

if TYPE_CHECKING:
    from qvl.caches.policy import CacheMode
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import Pictures


async def decide(
    executor: Executor,
    pictures: Pictures,
    questions: QuestionLike | Iterable[QuestionLike],
    context: str | Sequence[MessageLike] | None,
    cache: CacheMode | None,
    params: DecideParams,
) -> Decisions:
    """Return the answers of `AsyncPipeline.decide`."""
    for name in params:
        if name not in DecideParams.__annotations__:
            what = f"decide() has no parameter {name!r}"
            raise ConfigError(what, hint=f"known: {', '.join(sorted(DecideParams.__annotations__))}", param=name)
    asked = read_questions(questions)
    messages = shared_messages(pictures, context)
    params = {**params, "request_id": params.get("request_id") or new_request_id()}
    # Read once, not once a question.
    draft = draft_request(messages, **params)
    loaded = await load_pictures(draft.pictures, executor.media, digests=executor.digests)
    request = draft.finished(loaded)
    shared: list[MessageLike] = [*request.messages[:-1]]
    shared.append({"role": "user", "content": list(request.messages[-1].parts)})
    calls = [DecideCall(shared, question, executor, cache, params) for question in asked]
    answered = await run_all(executor, calls)
    return Decisions(
        tuple([decision for decision, _ in answered]),
        model=answered[0][1].model,
        backend=answered[0][1].backend,
        pictures=tuple(loaded),
    )


async def run_all(executor: Executor, calls: Sequence[DecideCall]) -> list[tuple[Decision, Result]]:
    """Return what each call gives, in their order; the first that fails ends the others.

    Raises:
        QvlError: a question could not be answered.
    """
    tasks = [asyncio.ensure_future(executor.execute(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
