"""The flow of one question of `decide()`: its request, the probabilities of its answers, and what is kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypedDict

from qvl.calibration.calibrator import check_abstain, check_adapter
from qvl.decisions.answers import Decision
from qvl.decisions.ask_labels import LabelAsker
from qvl.decisions.questions import APART, MAX_ORDERS, Question, options_text, question_json
from qvl.errors import AnalysisError, ConfigError, RefusalError
from qvl.pipeline.call import Call, Generate
from qvl.pipeline.job import Outcome
from qvl.pipeline.parse_parts import PARTS, UnreadPicture, read_part
from qvl.pipeline.parse_request import draft_request, listed
from qvl.pipeline.single_flight import Written
from qvl.types import Choice, JsonObject, Part, Result, canonical_json

if TYPE_CHECKING:
    from qvl.backends.base import Capabilities
    from qvl.caches.policy import CacheMode, CachePolicy
    from qvl.calibration.abstain import AbstainLike
    from qvl.media.page_choice import PagesLike
    from qvl.media.policy import MediaPolicy
    from qvl.media.video import Medium
    from qvl.media.video_sampling import VideoSampling
    from qvl.pipeline.executor import Executor
    from qvl.pipeline.job import Job
    from qvl.pipeline.parse_message import MessageLike
    from qvl.pipeline.parse_parts import Pictures
    from qvl.types import ChatRequest, JsonMapping

# Raised with every change of the wording or of how probabilities are read, since kept answers no longer hold.
DECIDE_VERSION: Final = "2"
PROMPT_VERSION: Final = f"decide-{DECIDE_VERSION}-{MAX_ORDERS}"
PROBABILITY: Final = "label_probability"


class DecideParams(TypedDict, total=False):
    """Keyword arguments of `decide()`."""

    max_pixels: int | None
    min_pixels: int | None
    video: VideoSampling | JsonMapping | None
    pages: PagesLike | None
    cache_salt: str
    request_id: str | None
    extra: JsonMapping | None
    chat_template_kwargs: JsonMapping | None
    priority: int
    adapter: str
    abstain: AbstainLike | None


class DecideCall(Call[tuple[Decision, Result]]):
    """The call of one question behind `messages`, the last of which is the user's; `params` as of `decide`.

    `parts` are the question's instructions, its pictures loaded.
    """

    task = "decide"
    needs_capabilities = True

    def __init__(
        self,
        messages: Sequence[MessageLike],
        question: Question,
        parts: Sequence[Part],
        executor: Executor,
        cache: CacheMode | CachePolicy | None,
        params: DecideParams,
        *,
        namespace: str | None = None,
        policy: MediaPolicy | None = None,
    ) -> None:
        params = params.copy()
        super().__init__(cache, namespace=namespace, policy=policy)
        self.question = question
        self._executor = executor
        self._parts = len(parts)
        self.prompt_version = f"{PROMPT_VERSION}-{canonical_json(question_json(question))}"
        self._calibrator = executor.calibrator
        self._abstain = params.pop("abstain", None)
        check_abstain(self._abstain, self._calibrator)
        check_adapter(params.get("adapter", ""), self._calibrator)
        self._draft = draft_request(_with_question(messages, question, parts), **params)
        self.pictures = self._draft.pictures

    def request(self, pictures: Sequence[Medium], have: Capabilities | None) -> ChatRequest:
        assert have is not None
        if self._calibrator is not None:
            # Before an answer is paid for.
            self._calibrator.check_question(self.question, PROMPT_VERSION, self._abstain)
        request = self._draft.finished(pictures)
        if "reasoning_effort" in have.fields:
            # The first token of the answer is read, so nothing may stand before it.
            request = request.replace(reasoning_effort="none")
        return request

    async def run(self, generate: Generate, job: Job, emit: Written) -> Outcome:
        async def send(request: ChatRequest) -> Result:
            return (await generate(dataclasses.replace(job, request=request), Written())).result

        job.stages.loading += await self._executor.open()
        backend = self._executor.backend
        asker = LabelAsker(
            self.question,
            job.request,
            self._parts,
            backend.capabilities,
            await backend.token_table(),
            await backend.own_decisions(),
            send,
        )
        shares: list[float] | None = None
        best: int | None = None
        mass: float | None = None
        try:
            shares, best, mass = await asker.ask()
        except RefusalError as exc:
            asker.notes.append(f"the model declined: {exc.message}")
        labels = self.question.labels
        answer: JsonObject = {
            "probabilities": shares,
            "best": best,
            "label_mass": mass,
            "method": asker.method,
            "refused": best is None,
        }
        result = Result(
            choices=(Choice(text="" if best is None else labels[best].text),),
            usage=asker.usage,
            model=backend.model,
            backend=backend.name,
            created_at=time.time(),
            notes=tuple(asker.notes),
        )
        return Outcome(result, analysis=answer)

    def value(self, outcome: Outcome, finish: Callable[[], Result]) -> tuple[Decision, Result]:
        labels, kept = self.question.labels, outcome.analysis
        shares = None if kept is None else kept.get("probabilities")
        if kept is None or (shares is not None and len(shares) != len(labels)):
            raise AnalysisError("the kept answer does not fit the question", raw=outcome.result.text)
        result = finish()
        best = kept["best"]
        probabilities = None
        if shares is not None:
            by_value = {(type(label.value), label.value): share for label, share in zip(labels, shares, strict=True)}
            probabilities = {value: by_value[type(value), value] for value in _values(self.question)}
        decision = Decision(
            self.question,
            probabilities,
            None if best is None else labels[best].value,
            None if shares is None or best is None else shares[best],
            kept["label_mass"],
            kept["method"],
            cache=result.cache,
            usage=result.usage,
            notes=result.notes,
            refused=bool(kept["refused"]),
            raw_confidence=None if shares is None or best is None else shares[best],
            confidence_method=None if shares is None else PROBABILITY,
        )
        if self._calibrator is not None:
            decision = self._calibrator.decided(decision, PROMPT_VERSION, self._abstain)
        return decision, result


def _values(question: Question) -> list[str | bool]:
    """Return the values of a question in the caller's order."""
    options = getattr(question, "choices", None)
    return [label.value for label in question.labels] if options is None else [option.value for option in options]


def shared_messages(pictures: Pictures, context: str | Sequence[MessageLike] | None) -> list[MessageLike]:
    """Return the messages that all questions share: the context's, and a user turn with pictures and text.

    Raises:
        ConfigError: the context is neither text nor messages.
        RequestError: a part that is none.
    """
    if context is not None and (isinstance(context, bytes | Mapping) or not isinstance(context, Sequence)):
        raise ConfigError(f"the context is a {type(context).__name__}", hint="text, or a list of messages")
    content: list[object] = [
        read_part(picture, f"pictures[{number}]") if isinstance(picture, PARTS) else UnreadPicture(picture)
        for number, picture in enumerate(listed(pictures))
    ]
    if isinstance(context, str):
        if context.strip():
            content.append({"type": "text", "text": context.strip() + APART})
        return [{"role": "user", "content": content}]
    return [*(context or ()), {"role": "user", "content": content}]


def _with_question(messages: Sequence[MessageLike], question: Question, parts: Sequence[Part]) -> list[MessageLike]:
    """Return `messages`, whose last is a mapping, with the question at the end of it, its options last of all."""
    *before, last = messages
    assert isinstance(last, Mapping)
    options = {"type": "text", "text": options_text(question, question.labels)}
    return [*before, {**last, "content": [*last["content"], *parts, options]}]
