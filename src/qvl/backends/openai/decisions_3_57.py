"""An endpoint's own `/v1/decisions`, in OpenAI's form as of openai-python 3.57: whether it has one, and what it says.

The server's side of the same wire is `server/openai_decisions_3_57`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qvl.backends.base import OwnDecisions
from qvl.backends.openai.probe import small_picture
from qvl.errors import (
    BackendResponseError,
    DeviceMemoryError,
    QvlError,
    RequestError,
    UnknownNameError,
    UnsupportedInputError,
)
from qvl.types import JsonMapping, JsonObject, Message, Usage, map_parts

if TYPE_CHECKING:
    from qvl.backends.openai.fleet import Fleet
    from qvl.types import ChatRequest

PATH: Final = "/v1/decisions"
# Behind these there is an endpoint that has read the request.
_SAID_NO: Final = (RequestError, UnknownNameError, BackendResponseError, DeviceMemoryError)
_QUESTION: Final = {"type": "predicate", "instructions": "Is there anything?"}


class EndpointDecisions(OwnDecisions):
    """Asks one of the endpoints at a time."""

    def __init__(self, fleet: Fleet, timeout: float) -> None:
        super().__init__()
        self._fleet, self._timeout = fleet, timeout

    async def ask(
        self, request: ChatRequest, questions: Sequence[JsonMapping]
    ) -> tuple[Sequence[Mapping[str | bool, float] | None], Usage]:
        if request.extra or request.chat_template_kwargs:
            raise UnsupportedInputError("fields of a chat request have no place in it", param="extra")

        def written() -> list[JsonObject]:
            return input_of(request.messages, request.max_pixels)

        # Encoding megapixels would hold up every other stream.
        items = await asyncio.to_thread(written) if request.pictures else written()
        answer = await self.post(items, questions, salt=request.cache_salt)
        return _shares(answer, questions), _usage(answer)

    async def post(self, items: list[JsonObject], questions: Sequence[JsonMapping], *, salt: str = "") -> JsonObject:
        fields: JsonObject = {"model": self._fleet.model, "input": items, "questions": list(questions)}
        if salt:
            fields["prompt_cache_key"] = salt
        return await self._fleet.ask(PATH, fields, timeout=self._timeout)


class DecisionsProbe:
    """Finds out, once, whether the endpoints of a fleet have decisions of their own."""

    def __init__(self, fleet: Fleet, timeout: float) -> None:
        self._fleet, self._timeout = fleet, timeout
        self._own: EndpointDecisions | None = None
        self._known = not fleet.probes
        self._probing = asyncio.Lock()

    async def found(self) -> EndpointDecisions | None:
        """Return what there is, after one or two small questions at first; None too while nobody answers those."""
        async with self._probing:
            if not self._known:
                own = EndpointDecisions(self._fleet, self._timeout)
                try:
                    own.images = await _sees(own)
                    self._own = own
                    self._known = True
                except QvlError as exc:
                    self._known = isinstance(exc, _SAID_NO)
        return self._own


async def _sees(own: EndpointDecisions) -> bool:
    """Return True if a picture is accepted and lengthens the input.

    Raises:
        QvlError: there are no decisions.
    """
    plain = await own.post([{"type": "message", "role": "user", "content": "A canary."}], [_QUESTION])
    _shares(plain, [_QUESTION])
    shown = [{"type": "input_text", "text": "A canary."}, {"type": "input_image", "image_url": small_picture()}]
    try:
        seen = await own.post([{"type": "message", "role": "user", "content": shown}], [_QUESTION])
    except _SAID_NO:
        return False
    return _usage(seen).prompt_tokens > _usage(plain).prompt_tokens > 0


def input_of(messages: Sequence[Message], max_pixels: int | None) -> list[JsonObject]:
    """Return messages as input items: texts as text where nothing else is with them, since some read no parts."""
    items: list[JsonObject] = []
    for message in messages:
        kind = "output_text" if message.role == "assistant" else "input_text"

        def parts(message: Message = message, kind: str = kind) -> str | list[JsonObject]:
            if not message.pictures:
                return message.text
            shown: list[list[JsonObject]] = map_parts(
                message.parts,
                lambda part: [{"type": kind, "text": part.text}],
                lambda media: [
                    {
                        "type": "input_image",
                        "image_url": (picture if max_pixels is None else picture.fit(max_pixels)).data_url(),
                    }
                    for picture in media.pictures
                ],
            )
            return [item for items in shown for item in items]

        if message.role == "tool":
            items.append({"type": "function_call_output", "call_id": message.tool_call_id, "output": parts()})
            continue
        if message.parts:
            items.append({"type": "message", "role": message.role, "content": parts()})
        items += [
            {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ]
    return items


def _shares(answer: JsonObject, questions: Sequence[JsonMapping]) -> list[Mapping[str | bool, float] | None]:
    """Return the probability of each value by question; None where the endpoint declined to answer.

    Raises:
        BackendResponseError: an answer does not fit its question.
    """
    told = answer.get("answers")
    if not isinstance(told, list) or len(told) != len(questions):
        raise _unfit("its answers are not as many as the questions")
    return [_share(one, question) for one, question in zip(told, questions, strict=True)]


def _share(answer: object, question: JsonMapping) -> Mapping[str | bool, float] | None:
    if not isinstance(answer, Mapping):
        raise _unfit("an answer is not an object")
    if answer.get("type") == "refusal":
        return None
    if question["type"] == "predicate":
        true = _number(answer.get("probability"))
        return {True: true, False: 1.0 - true}
    name, wanted = {
        "choice": ("value", [option["value"] for option in question.get("choices", ())]),
        "score": ("label", [level["label"] for level in question.get("levels", ())]),
    }[question["type"]]
    told = answer.get("probabilities")
    rows = [row for row in told if isinstance(row, Mapping)] if isinstance(told, list) else []
    rows = [row for row in rows if isinstance(row.get(name), str | bool)]
    # By type too, since True is not "true"; and True == 1 must not stand for another.
    found = {(type(row.get(name)), row.get(name)): _number(row.get("probability")) for row in rows}
    if len(rows) != len(wanted) or found.keys() != {(type(value), value) for value in wanted}:
        raise _unfit("the values of an answer are not those of its question")
    return {value: found[type(value), value] for value in wanted}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise _unfit("a probability is not from 0 to 1")
    return float(value)


def _usage(answer: JsonObject) -> Usage:
    usage = answer.get("usage")
    told = usage if isinstance(usage, Mapping) else {}
    details = told.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else 0
    details = told.get("output_tokens_details")
    reasoned = details.get("reasoning_tokens") if isinstance(details, Mapping) else 0
    count: Callable[[object], int] = lambda value: value if isinstance(value, int) and value > 0 else 0  # noqa: E731
    said = count(told.get("output_tokens"))
    return Usage(count(told.get("input_tokens")), said, cached_tokens=count(cached), reasoning_tokens=count(reasoned))


def _unfit(what: str) -> BackendResponseError:
    return BackendResponseError(f"{PATH} of the endpoint is another one: {what}")
