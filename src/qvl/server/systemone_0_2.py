"""The wire of System One, as of its API 0.2: requests to messages and questions, decisions to answers and errors.

The same questions as those of `/v1/decisions` in another form: a yes or no is a "noul", a scale a list of what its
levels mean, and a picture an asset, whose name stands in the state or in instructions where the picture belongs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from qvl.decisions.answers import Decision, Decisions
from qvl.decisions.questions import APART, MAX_QUESTIONS, ChoiceQuestion, Option, Predicate, Question
from qvl.decisions.rubrics import one_of, scale, yes_or_no
from qvl.errors import QvlError, RequestError, UnsupportedInputError
from qvl.pipeline.parse_fields import refuse_others, type_of, unknown, wrong
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.server.errors import ErrorForm, status_of
from qvl.server.schemas import CONTENT, read_by_hand
from qvl.types import JsonMapping, JsonObject

KINDS: Final = ("noul", "choice", "score")
INVALID: Final = 422
MAX_ASSETS: Final = 64
MAX_PLACES: Final = 1024
_FIELDS: Final = ("type", "instructions", "criteria")
_ERRORS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
State: TypeAlias = str | JsonObject | list[object]
Questions: TypeAlias = Annotated[
    dict[
        str,
        Annotated[
            JsonObject, read_by_hand(type={"enum": list(KINDS)}, instructions=CONTENT, criteria={"type": "object"})
        ],
    ],
    Field(min_length=1, max_length=MAX_QUESTIONS),
]


class Asset(BaseModel):
    """A picture. The bytes say what it is, whatever `format` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image"] | None = None
    format: Literal["png", "jpg", "jpeg"] | None = None
    data_base64: str


class SystemOneRequest(BaseModel):
    """`POST /v1/systemone`: questions by name about one state."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "state": {"title": "A mug", "text": "Red, scratched at the handle."},
                    "questions": {
                        "new": {"type": "noul", "instructions": "Is it new?"},
                        "colour": {
                            "type": "choice",
                            "instructions": "Colour?",
                            "criteria": {"red": None, "blue": None},
                        },
                    },
                }
            ]
        },
    )

    model: str | None = None
    state: State
    questions: Questions
    assets: Annotated[dict[Annotated[str, Field(min_length=1)], Asset], Field(max_length=MAX_ASSETS)] | None = None


class SystemOneUsage(TypedDict):
    input_tokens: int
    output_tokens: int


class SystemOneAnswers(TypedDict):
    """The answers by the names of the questions, with `x_label_mass` and `x_method` beside System One's fields."""

    model: str
    answers: dict[str, JsonObject]
    usage: SystemOneUsage


class SystemOneError(TypedDict):
    """An error: a list of what is invalid, or an object with `error_type` and `message`."""

    detail: list[JsonObject] | JsonObject


@dataclass(slots=True)
class SystemOneInput:
    """The messages and the questions of a request, and where each of its pictures is."""

    messages: list[JsonObject]
    questions: list[Question]
    paths: list[str]


def asset_texts(body: SystemOneRequest) -> list[str]:
    """Return the texts of a body that are read as base64 of pictures."""
    # Whatever has a comma is no base64.
    return [asset.data_base64 for asset in (body.assets or {}).values() if "," not in asset.data_base64]


def input_of(
    body: SystemOneRequest, shown: Callable[[UnreadPicture], UnreadPicture] = lambda picture: picture
) -> SystemOneInput:
    """Return what is to be asked; `shown` returns a picture as it was sent.

    Raises:
        RequestError: an invalid question or asset; the error names it.
    """
    assets = _Assets(body.assets or {}, shown)
    if isinstance(body.state, str) and not body.state.strip():
        raise wrong("state", "is empty")
    content = [*assets.parts(body.state, "state"), {"type": "text", "text": APART}]
    questions = [_question(asked, f"questions.{name[:80]}", assets) for name, asked in body.questions.items()]
    unused = next((name for name in assets.known if f"assets.{name}" not in assets.paths), None)
    if unused is not None:
        raise wrong(f"assets.{unused[:80]}", "is named neither in the state nor in instructions")
    return SystemOneInput([{"role": "user", "content": content}], questions, assets.paths)


@dataclass(slots=True)
class _Assets:
    """The pictures by the names that stand for them in texts; `paths` has one for each place that they stand at."""

    known: Mapping[str, Asset]
    shown: Callable[[UnreadPicture], UnreadPicture]
    paths: list[str] = field(default_factory=list)

    def parts(self, value: object, where: str) -> list[JsonObject]:
        """Return a text, or an object or a list as JSON, with pictures in the place of their names."""
        parts: list[JsonObject] = []
        for number, piece in enumerate(self._split(value, where)):
            if number % 2:
                asset = self.known[piece]
                self.paths.append(f"assets.{piece}")
                picture = UnreadPicture(f"data:image/{asset.format or 'png'};base64,{asset.data_base64}")
                parts.append({"type": "image", "image": self.shown(picture).source})
            elif piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def text(self, value: object, where: str) -> str:
        """Return a text without pictures; "" for None."""
        if value is None:
            return ""
        text, *others = self._split(value, where)
        if others:
            what = f"{where}: the asset {others[0][:80]!r} stands in a description, where no picture can be shown"
            raise UnsupportedInputError(what, hint="name it in the instructions", param=where)
        return text

    def _split(self, value: object, where: str) -> list[str]:
        """Return text and names of assets in turn."""
        if not isinstance(value, str | Mapping | list):
            raise wrong(where, f"must be text, an object or a list, not {type_of(value)}")
        try:
            text = value if isinstance(value, str) else _written(value)
            names = [name for name in self.known if name in text or json.dumps(name, ensure_ascii=False)[1:-1] in text]
            if not names:
                return [text]
            # Nobody can have written this in a text of theirs.
            mark = f"\x00{os.urandom(16).hex()}-"
            marked = self._marked(value, names, mark)
            # As JSON writes it, where the value is no text.
            cut = mark if isinstance(marked, str) else json.dumps(mark)[1:-1]
            first, *rest = (marked if isinstance(marked, str) else _written(marked)).split(cut)
        except RequestError:
            raise
        except ValueError as exc:
            raise wrong(where, "has NaN or Infinity, which JSON does not know") from exc
        pieces = [first]
        for piece in rest:
            number, _, behind = piece.partition(";")
            pieces += (names[int(number)], behind)
        return pieces

    def _marked(self, value: object, names: Sequence[str], mark: str) -> object:
        """Return `value` with a mark and a number for each name in one of its texts."""
        if isinstance(value, Mapping):
            return {key: self._marked(item, names, mark) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item, names, mark) for item in value]
        if not isinstance(value, str):
            return value
        found: list[tuple[int, int, int]] = []
        for number, name in enumerate(names):
            at = value.find(name)
            while at >= 0:
                found.append((at, -len(name), number))
                if len(found) + len(self.paths) > MAX_PLACES:
                    raise wrong("assets", f"stand at more than {MAX_PLACES} places")
                at = value.find(name, at + len(name))
        pieces: list[str] = []
        end = 0
        # The longest first, since one name may begin another.
        for at, size, number in sorted(found):
            if at >= end:
                pieces += (value[end:at], f"{mark}{number};")
                end = at - size
        return "".join((*pieces, value[end:]))


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _question(asked: JsonMapping, where: str, assets: _Assets) -> Question:
    kind = asked.get("type")
    if kind not in KINDS:
        raise wrong(f"{where}.type", "is missing") if kind is None else unknown(f"{where}.type", kind, KINDS)
    refuse_others(asked, _FIELDS, frozenset(), where)
    parts: list[object] = []
    if asked.get("instructions") is not None:
        parts += assets.parts(asked["instructions"], f"{where}.instructions")
    criteria = asked.get("criteria")
    at = f"{where}.criteria"
    try:
        if kind == "noul":
            if criteria is not None and (not isinstance(criteria, Mapping) or set(criteria) - {"true", "false"}):
                raise wrong(at, "must be an object with true, false or both")
            means = [assets.text((criteria or {}).get(key), at) for key in ("true", "false")]
            return yes_or_no(parts, *means)
        if kind == "choice":
            if not isinstance(criteria, Mapping):
                raise wrong(at, "is missing" if criteria is None else "must be an object, a description by each option")
            options = [Option(name, assets.text(text, f"{at}.{name[:80]}")) for name, text in criteria.items()]
            return one_of(parts, options)
        if not isinstance(criteria, list):
            raise wrong(at, "is missing" if criteria is None else "must be a list of levels, the lowest first")
        return scale(parts, [_described(text, f"{at}[{n}]", assets) for n, text in enumerate(criteria)])
    except RequestError as exc:
        if exc.param is None or not exc.param.startswith(where):
            exc.param = f"{where}.{'instructions' if exc.param == 'instructions' else 'criteria'}"
            exc.message = f"{exc.param}: {exc.message}"
        raise


def _described(text: object, where: str, assets: _Assets) -> str:
    if text is None:
        raise wrong(where, "is null: say what the level means")
    return assets.text(text, where)


def answers_of(body: SystemOneRequest, decisions: Decisions, model: str) -> SystemOneAnswers:
    """Return the body of the answer.

    Raises:
        UnsupportedInputError: the backend tells no probabilities, which the wire must have.
    """
    answers = {}
    for (name, asked), answer in zip(body.questions.items(), decisions, strict=True):
        answers[name] = _answer(answer, asked, f"questions.{name[:80]}")
    usage = decisions.usage
    return {
        "model": model,
        "answers": answers,
        "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens},
    }


def _answer(answer: Decision, asked: JsonMapping, where: str) -> JsonObject:
    told = {"x_label_mass": answer.label_mass, "x_method": answer.method}
    if answer.calibrated:
        # Its own `confidence` says how even the probabilities are.
        told["x_confidence"] = answer.confidence
    if answer.abstained is not None:
        return {"type": "refusal", "x_reason": answer.abstained, **told}
    if answer.refused:
        # Not one of System One's: its clients leave out answers of a type that they do not know.
        return {"type": "refusal", "x_reason": answer.notes[-1], **told}
    shares = answer.probabilities
    if shares is None:
        what = f"{where}: {answer.notes[-1]}, which this answer must have"
        raise UnsupportedInputError(what, hint="a local model, vLLM, or an endpoint with logprobs", param=where)
    if isinstance(answer.question, Predicate):
        return {"type": "noul", "noul": shares[True], **told}
    by_name = {str(value): share for value, share in shares.items()}
    if isinstance(answer.question, ChoiceQuestion):
        sure = _certainty(list(by_name.values()))
        return {"type": "choice", "choice": answer.value, "confidence": sure, "probabilities": by_name, **told}
    legend = {str(level): text for level, text in enumerate(asked["criteria"])}
    sure = _nearness(list(by_name.values()))
    return {
        "type": "score",
        "score": answer.score,
        "legend": legend,
        "confidence": sure,
        "probabilities": by_name,
        **told,
    }


def _certainty(shares: Sequence[float]) -> float:
    """Return 0 for equal shares and 1 for one that has all, as System One defines a choice's confidence."""
    even = 1 / len(shares)
    return min(1.0, max(0.0, (max(shares) - even) / (1 - even)))


def _nearness(shares: Sequence[float]) -> float:
    """Return 1 less the mean distance from the likeliest level, that of equal shares being 1, as for its scores."""
    best = shares.index(max(shares))
    middle = (len(shares) - 1) / 2
    even = sum(abs(level - middle) for level in range(len(shares))) / len(shares)
    return min(1.0, max(0.0, 1 - sum(share * abs(level - best) for level, share in enumerate(shares)) / even))


def _status(error: QvlError) -> int:
    return INVALID if (status := status_of(error)) == 400 else status


def _error(error: QvlError, request_id: str) -> SystemOneError:
    status = _status(error)
    if status == INVALID:
        where = [error.param] if error.param else []
        return {"detail": [{"loc": ["body", *where], "msg": str(error), "type": error.code}]}
    kind = _ERRORS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    return {"detail": {"error_type": kind, "message": str(error)}}


SYSTEM_ONE_ERRORS: Final = ErrorForm(_status, _error, SystemOneError, b"x-typesafe-request-id")
