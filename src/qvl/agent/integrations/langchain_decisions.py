"""`QvlDecisionModel`: the decisions of any Pipeline as a decision model of LangChain (langchain-core 1.8 or later).

model = QvlDecisionModel(pipeline=Pipeline("Qwen/Qwen3-VL-4B-Instruct"))
picture = {"type": "image", "url": "https://…"}
model.invoke({"state": [picture], "questions": {"new": Noul(instructions="Is it new?")}}).nouls["new"].noul
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, cast

from langchain_core.messages import BaseMessage
from langchain_core.messages.ai import UsageMetadata
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from structlog.contextvars import get_contextvars

from qvl.agent.integrations.langchain_messages import part_of, to_qvl
from qvl.caches.policy import CacheMode
from qvl.decisions.answers import Decision, Decisions
from qvl.decisions.questions import Option, Question
from qvl.decisions.rubrics import one_of, scale, yes_or_no
from qvl.errors import ConfigError, MissingDependencyError, RequestError, UnsupportedInputError
from qvl.ids import new_request_id
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.parse_fields import type_of
from qvl.pipeline.parse_parts import PictureLike, UnreadPicture
from qvl.pipeline.sync_pipeline import Pipeline
from qvl.types import JsonObject, TextPart

try:
    from langchain_core.decisions import (
        Answer,
        BaseDecisionModel,
        Box,
        Choice,
        ChoiceAnswer,
        ClassifierResponse,
        Noul,
        NoulAnswer,
        Score,
        ScoreAnswer,
        State,
    )
    from langchain_core.decisions import Question as Asked
except ModuleNotFoundError as exc:
    what = "decision models need langchain-core 1.8 or later"
    raise MissingDependencyError(what, hint="pip install -U 'langchain-core>=1.8'") from exc

# Blocks of LangChain that hold something to see or hear, if they have one of these fields too.
_MEDIA: Final = frozenset({"image", "image_url", "audio", "input_audio", "video", "file", "text-plain"})
_SOURCES: Final = ("url", "base64", "data", "source", "file_id", "image_url", "input_audio")
_ASKED: Final = TypeAdapter[Asked](Annotated[Asked, Field(discriminator="type")])


class QvlDecisionModel(BaseDecisionModel):
    """A LangChain decision model over a Pipeline (all methods) or an AsyncPipeline (async methods only).

    The state is text, messages, or JSON with pictures anywhere in it, as LangChain's content blocks with a URL or
    base64; instructions may have pictures too, descriptions may not. `confidence` is the probability of the answer.
    A question that the model declines has no answer in the response, nor has one whose calibrated confidence is less
    than `abstain`, for which the pipeline needs a calibration. `model` is the pipeline's, as `backend:model`.

    Raises:
        RequestError: a question cannot be asked, such as a Box; the error names it.
        BackendError: the model could not answer.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    pipeline: Pipeline | AsyncPipeline = Field(default_factory=Pipeline, exclude=True)
    model: str = ""
    cache: CacheMode | None = None
    abstain: float | dict[str, float] | None = None

    @model_validator(mode="after")
    def _named(self) -> QvlDecisionModel:
        inner = self.pipeline.pipeline if isinstance(self.pipeline, Pipeline) else self.pipeline
        name = f"{inner.backend.name}:{inner.backend.model}"
        if self.model not in ("", name):
            raise ValueError(f"model {self.model!r} is not the pipeline's, {name!r}: leave it out")
        self.model = name
        return self

    @property
    def _provider(self) -> str:
        return f"qvl-{self.model.partition(':')[0]}"

    def _classify(self, state: State, questions: dict[str, Asked]) -> ClassifierResponse:
        if not isinstance(self.pipeline, Pipeline):
            raise ConfigError("an AsyncPipeline has only async methods", hint="call ainvoke(), or pass a Pipeline")
        shown, context, asked = _request(state, questions)
        request_id = _request_id()
        told = self.pipeline.decide(
            shown, asked, context, cache=self.cache, abstain=self.abstain, request_id=request_id
        )
        return self._response(told, questions, request_id)

    async def _aclassify(self, state: State, questions: dict[str, Asked]) -> ClassifierResponse:
        if isinstance(self.pipeline, Pipeline):
            # It lives in a loop of its own.
            return await asyncio.to_thread(self._classify, state, questions)
        shown, context, asked = _request(state, questions)
        request_id = _request_id()
        told = await self.pipeline.decide(
            shown, asked, context, cache=self.cache, abstain=self.abstain, request_id=request_id
        )
        return self._response(told, questions, request_id)

    def _response(self, told: Decisions, questions: Mapping[str, Asked], request_id: str) -> ClassifierResponse:
        answers: dict[str, Answer] = {
            name: _answer(answer, _checked(name, questions[name]), name)
            for name, answer in zip(questions, told, strict=True)
            if not answer.refused and answer.abstained is None
        }
        usage = UsageMetadata(
            input_tokens=told.usage.prompt_tokens,
            output_tokens=told.usage.completion_tokens,
            total_tokens=told.usage.total_tokens,
            input_token_details={"cache_read": told.usage.cached_tokens},
        )
        return ClassifierResponse(model=self.model, answers=answers, usage=usage, request_id=request_id)


def _request_id() -> str:
    return str(get_contextvars().get("request_id") or new_request_id())


def _request(
    state: State, questions: Mapping[str, Asked]
) -> tuple[list[PictureLike], list[JsonObject], list[Question]]:
    """Return what is shown in the last turn, the messages before it, and the questions."""
    asked = [_question(name, _checked(name, question)) for name, question in questions.items()]
    messages = [state] if isinstance(state, BaseMessage) else state
    if isinstance(messages, Sequence) and messages and all(isinstance(one, BaseMessage) for one in messages):
        turns = to_qvl([one for one in messages if isinstance(one, BaseMessage)])
        if turns[-1]["role"] != "user":
            return [], turns, asked
        content = turns.pop()["content"]
        return _spaced([content] if isinstance(content, str) else content), turns, asked
    return _spaced(_parts(state, "state")), [], asked


def _spaced(parts: Sequence[object]) -> list[PictureLike]:
    """Return parts as `decide` takes them, with room before the question."""
    texts = [part.text if isinstance(part, TextPart) else part for part in (*parts, "\n\n")]
    return [{"type": "text", "text": part} if isinstance(part, str) else cast("UnreadPicture", part) for part in texts]


def _checked(name: str, question: object) -> Asked:
    try:
        return _ASKED.validate_python(question)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(["questions", name[:80], *map(str, first["loc"])])
        raise RequestError(f"{where}: {' '.join(first['msg'].split())[:200]}", param=where) from exc


def _question(name: str, asked: Asked) -> Question:
    where = f"questions.{name[:80]}"
    if isinstance(asked, Box):
        raise UnsupportedInputError(f"{where}: boxes are no decision here", hint="pipeline.locate()", param=where)
    parts = _parts(asked.instructions, f"{where}.instructions")
    at = f"{where}.criteria"
    try:
        if isinstance(asked, Noul):
            means = asked.criteria
            return yes_or_no(parts, *(("", "") if means is None else (_text(means.true, at), _text(means.false, at))))
        if isinstance(asked, Choice):
            return one_of(parts, [Option(option, _text(text, at)) for option, text in asked.criteria.items()])
        return scale(parts, [_text(text, at) for text in asked.criteria])
    except RequestError as exc:
        if exc.param is None or not exc.param.startswith(where):
            exc.param = f"{where}.{'instructions' if exc.param == 'instructions' else 'criteria'}"
            exc.message = f"{exc.param}: {exc.message}"
        raise


def _text(value: object, where: str) -> str:
    """Return a description as text; "" for None."""
    if value is None:
        return ""
    parts = _parts(value, where)
    if not all(isinstance(part, str) for part in parts):
        what = f"{where}: a picture stands in a description, where none can be shown"
        raise UnsupportedInputError(what, hint="put it into the instructions", param=where)
    return " ".join(map(str, parts))


def _parts(value: object, where: str) -> list[object]:
    """Return texts and pictures: of a list of both as they stand, else of JSON with pictures in their places."""
    if isinstance(value, str):
        return [value]
    seen: list[object] = []
    if isinstance(value, list) and all(isinstance(item, str) or _is_block(item) for item in value):
        parts = [item if isinstance(item, str) else part_of(item, where) for item in value]
        return [part.text if isinstance(part, TextPart) else part for part in parts]
    if not isinstance(value, Mapping | Sequence | BaseMessage) or isinstance(value, bytes | bytearray):
        raise RequestError(f"{where} must be text, messages, an object or a list, not {type_of(value)}", param=where)
    # Nobody can have written this in a text of theirs.
    mark = uuid.uuid4().hex
    try:
        plain = _plain(value, seen, mark, where)
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except RequestError:
        raise
    except RecursionError as exc:
        raise RequestError(f"{where} is nested too deep", param=where) from exc
    except ValueError as exc:
        raise RequestError(f"{where} has NaN or Infinity, which JSON does not know", param=where) from exc
    pieces = re.split(f'"{mark}-([0-9]+)"', text)
    return [seen[int(piece)] if number % 2 else piece for number, piece in enumerate(pieces) if piece]


def _plain(value: object, seen: list[object], mark: str, where: str) -> object:
    """Return `value` as JSON values, with a mark for each picture, which is added to `seen`."""
    if isinstance(value, BaseMessage):
        fields = to_qvl([value])[0]
        if not isinstance(fields["content"], str):
            fields["content"] = [
                part.text if isinstance(part, TextPart) else _marked(part, seen, mark) for part in fields["content"]
            ]
        return fields
    if isinstance(value, Mapping):
        if value.get("type") in _MEDIA and any(name in value for name in _SOURCES):
            return _marked(part_of(value, where), seen, mark)
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where}: the keys of an object must be text", param=where)
        return {key: _plain(item, seen, mark, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item, seen, mark, where) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise RequestError(f"{where}: {type_of(value)} is not JSON", hint="pictures as content blocks", param=where)


def _marked(part: object, seen: list[object], mark: str) -> str:
    seen.append(part)
    return f"{mark}-{len(seen) - 1}"


def _is_block(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return (value.get("type") == "text" and isinstance(value.get("text"), str)) or (
        value.get("type") in _MEDIA and any(name in value for name in _SOURCES)
    )


def _answer(answer: Decision, asked: Asked, name: str) -> NoulAnswer | ChoiceAnswer | ScoreAnswer:
    shares = answer.probabilities
    if shares is None:
        what = f"questions.{name[:80]}: {answer.notes[-1]}, which a decision model must have"
        raise UnsupportedInputError(what, hint="a local model, vLLM, or an endpoint with logprobs", param="model")
    if isinstance(asked, Noul):
        return NoulAnswer(type="noul", noul=shares[True])
    sure = max(shares.values()) if answer.confidence is None else answer.confidence
    if isinstance(asked, Choice):
        named = {str(value): share for value, share in shares.items()}
        return ChoiceAnswer(
            type="choice", choice=max(named, key=named.__getitem__), probabilities=named, confidence=sure
        )
    assert isinstance(asked, Score)
    return ScoreAnswer(
        type="score",
        score=answer.score or 0.0,
        legend=dict(enumerate(asked.criteria)),
        probabilities={int(level): share for level, share in shares.items()},
        confidence=sure,
    )
