"""`decide()`: several questions about the same pictures, asked together behind one reading of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qvl.decisions.answers import Decision, Decisions
from qvl.decisions.read_labels import together
from qvl.errors import ContextLengthError
from qvl.ids import new_request_id
from qvl.media.video import pictures_of
from qvl.pipeline.check_names import check_names
from qvl.pipeline.decide_call import DecideCall, DecideParams
from qvl.pipeline.load_pictures import load_pictures
from qvl.pipeline.parse_parts import UnreadPicture, read_part
from qvl.pipeline.parse_request import draft_request, request_limits, request_pages, request_sampling, with_loaded
from qvl.types import Result, TextPart

if TYPE_CHECKING:
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.decisions.questions import Question
    from qvl.media.policy import MediaPolicy
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import ContentPart

# Questions of one request at a time: each is several requests to the backend, whose queue is everybody's.
AT_ONCE: Final = 32


async def decide(
    executor: Executor,
    messages: Sequence[MessageLike],
    questions: Sequence[Question],
    cache: CacheMode | CachePolicy | None,
    params: DecideParams,
    *,
    namespace: str | None = None,
    policy: MediaPolicy | None = None,
) -> tuple[Decisions, list[Result]]:
    """Return the answers, and the Result of each; pictures of `messages` and questions are read once, together.

    The last of `messages` is the user's, behind which the questions are asked. The first question that cannot be
    answered ends the others.

    Raises:
        ConfigError: a parameter that `decide` does not have.
        RequestError: a question, a message or a picture cannot be used.
        BackendError: the model could not answer.
    """
    check_names("decide", params, DecideParams.__annotations__, "context", "cache")
    params = {**params, "request_id": params.get("request_id") or new_request_id()}
    abstain = params.pop("abstain", None)
    draft = draft_request(messages, **params)
    sampling = request_sampling(params.pop("video", None), {})
    limits = request_limits(params.pop("max_pixels", None), params.pop("min_pixels", None), {})
    common = UnreadPicture("", limits, sampling, pages=request_pages(params.pop("pages", None)))
    asked = [_parts(question, f"questions[{number}].instructions") for number, question in enumerate(questions)]
    shown = [part for parts in asked for part in parts if isinstance(part, UnreadPicture)]
    unread = [*draft.pictures, *(part.over(common) for part in shown)]
    loaded = await load_pictures(unread, policy or executor.media, digests=executor.digests)
    shared = draft.finished(loaded[: len(draft.pictures)]).messages
    last: MessageLike = {"role": shared[-1].role, "content": list(shared[-1].parts)}
    rest = iter(loaded[len(draft.pictures) :])
    turn = asyncio.Semaphore(AT_ONCE)
    params["abstain"] = abstain

    async def answer(number: int, call: DecideCall) -> tuple[Decision, Result]:
        async with turn:
            try:
                return await executor.execute(call)
            except ContextLengthError as exc:
                where = f"questions[{number}]"
                raise ContextLengthError(f"{where}: {exc.message}", hint=exc.hint, param=where) from None

    calls = []
    for question, parts in zip(questions, asked, strict=True):
        # Hundreds of questions with hundreds of options are not made ready in one go.
        await asyncio.sleep(0)
        whole = with_loaded(parts, rest)
        before = [*shared[:-1], last]
        calls.append(DecideCall(before, question, whole, executor, cache, params, namespace=namespace, policy=policy))
    answered = await together(answer(number, call) for number, call in enumerate(calls))
    first = answered[0][1]
    told = tuple([decision for decision, _ in answered])
    decisions = Decisions(told, first.model, first.backend, pictures_of(loaded))
    return decisions, [result for _, result in answered]


def _parts(question: Question, where: str) -> list[ContentPart]:
    asked = question.instructions
    if isinstance(asked, str):
        return [TextPart(asked.strip())]
    return [read_part(part, f"{where}[{number}]") for number, part in enumerate(asked)]
