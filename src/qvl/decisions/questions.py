"""Questions with a fixed set of answers: is it true, which of these, how much on a scale.

The answers that a question has are its labels: texts that differ, in an order that does not depend on how the caller
ordered the options, so that the same set of options is the same question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from qvl.errors import RequestError
from qvl.types import JsonMapping, JsonObject, Part, TextPart, map_parts

MIN_CHOICES: Final = 2
MAX_CHOICES: Final = 255
MAX_QUESTIONS: Final = 400
MAX_ORDERS: Final = 8
"""With so many options or fewer each stands at every place once; with more, at this many places spread evenly."""
APART: Final = "\n\n"
"""Stands between what the questions are about and each of them."""
YES: Final = "yes"
NO: Final = "no"
Value: TypeAlias = str | bool
Instructions: TypeAlias = "str | Sequence[object]"
"""What is asked: text, or a list of texts and picture parts as in a message."""


@dataclass(frozen=True, slots=True)
class Option:
    """One answer of a Choice: its value, and what it means if that says more."""

    value: Value
    description: str = ""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a Score: its label, and what it means if that says more."""

    label: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """One possible answer as the model writes it: the value that stands for it, its text, and its description."""

    value: Value
    text: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Predicate:
    """Is it true? `instructions` are a statement or a question about the pictures; the answer is yes or no.

    Raises:
        RequestError: the instructions are empty.
    """

    instructions: Instructions
    name: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def type(self) -> Literal["predicate"]:
        return "predicate"

    @property
    def labels(self) -> tuple[Label, ...]:
        return Label(True, YES), Label(False, NO)


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """Which of these? 2 to 255 options, given as values (text, True or False) or as Options, all different.

    Raises:
        RequestError: too few, too many or equal options, or empty instructions.
    """

    instructions: Instructions
    choices: tuple[Option, ...]
    name: str | None = None

    def __init__(
        self, instructions: Instructions, choices: Iterable[Option | Value | JsonMapping], name: str | None = None
    ) -> None:
        object.__setattr__(self, "instructions", instructions)
        object.__setattr__(self, "name", name)
        if isinstance(choices, str | Mapping) or not isinstance(choices, Iterable):
            raise _fault(self, "choices must be a list", '["red", "blue"]')
        object.__setattr__(self, "choices", tuple(_option(self, item) for item in choices))
        _check(self)
        _check_number(self, len(self.choices), "choice")
        values = [(type(option.value), option.value) for option in self.choices]
        _check_different(self, [str(value) for _, value in values], len(set(values)), "choice")

    @property
    def type(self) -> Literal["choice"]:
        return "choice"

    @property
    def labels(self) -> tuple[Label, ...]:
        texts = {option.value.strip() for option in self.choices if isinstance(option.value, str)}
        found = []
        for option in self.choices:
            if isinstance(option.value, bool):
                text = str(option.value).lower()
                # Text and boolean of the same spelling are two options.
                text = f"{text} (boolean)" if text in texts else text
            else:
                text = option.value.strip()
            found.append(Label(option.value, text, option.description))
        return tuple(sorted(found, key=lambda label: label.text))


@dataclass(frozen=True, slots=True)
class Score:
    """A question for a place on a scale: 2 to 255 levels, the lowest first, given as labels or as Levels.

    Raises:
        RequestError: too few, too many or equal levels, or empty instructions.
    """

    instructions: Instructions
    levels: tuple[Level, ...]
    name: str | None = None

    def __init__(
        self, instructions: Instructions, levels: Iterable[Level | str | JsonMapping], name: str | None = None
    ) -> None:
        object.__setattr__(self, "instructions", instructions)
        object.__setattr__(self, "name", name)
        if isinstance(levels, str | Mapping) or not isinstance(levels, Iterable):
            raise _fault(self, "levels must be a list, the lowest first", '["poor", "fair", "good"]')
        object.__setattr__(self, "levels", tuple(_level(self, item) for item in levels))
        _check(self)
        _check_number(self, len(self.levels), "level")
        labels = [level.label for level in self.levels]
        _check_different(self, labels, len(set(labels)), "level")

    @property
    def type(self) -> Literal["score"]:
        return "score"

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(Label(level.label, level.label.strip(), level.description) for level in self.levels)


Question: TypeAlias = Predicate | ChoiceQuestion | Score
QuestionLike: TypeAlias = "Question | str | JsonMapping"
Choice = ChoiceQuestion


def read_questions(questions: Iterable[QuestionLike] | QuestionLike) -> tuple[Question, ...]:
    """Return `questions` as Questions: each one, a text (a Predicate), or a mapping in OpenAI's form; one, or several.

    Raises:
        RequestError: no question, more than 400, two of the same name, or one that cannot be asked, such as a Box.
    """
    if shape := _shape_of(questions):
        raise _no_decision(f"a {shape} is not a decision", "questions")
    if isinstance(questions, Predicate | ChoiceQuestion | Score | str | Mapping):
        questions = [questions]
    if not isinstance(questions, Iterable):
        raise RequestError("questions must be a list", hint='decide(picture, ["Is it new?"])', param="questions")
    read = tuple(_question(item, f"questions[{number}]") for number, item in enumerate(questions))
    if not 1 <= len(read) <= MAX_QUESTIONS:
        what = f"{len(read)} questions" if read else "no question"
        raise RequestError(what, hint=f"1 to {MAX_QUESTIONS} of them", param="questions", code="invalid_value")
    names = [question.name for question in read if question.name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"two questions have the name {twice!r}", hint="rename one of them", param="questions")
    return read


def _question(item: object, where: str) -> Question:
    if isinstance(item, Predicate | ChoiceQuestion | Score):
        return item
    if isinstance(item, str):
        item = {"type": "predicate", "instructions": item}
    if shape := _shape_of(item):
        raise _no_decision(f"{where}: a {shape} is not a decision", where)
    if not isinstance(item, Mapping):
        what = f"{where} must be a question, not {type(item).__name__}"
        raise RequestError(what, hint="a text, Predicate, Choice or Score", param=where, code="invalid_type")
    kinds = {"predicate": (), "choice": ("choices",), "score": ("levels",)}
    kind = item.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        what = f"{where}.type: unknown value {str(kind)[:80]!r}" if kind is not None else f"{where}.type is missing"
        raise RequestError(what, hint=f"one of {', '.join(kinds)}", param=f"{where}.type", code="invalid_value")
    known = {"type", "instructions", "name", *kinds[kind]}
    if other := next((name for name in item if name not in known), None):
        what = f"{where}: a {kind} has no field {str(other)[:80]!r}"
        raise RequestError(what, hint=f"known: {', '.join(sorted(known))}", param=f"{where}.{other}")
    if missing := next((name for name in ("instructions", *kinds[kind]) if item.get(name) is None), None):
        param = f"{where}.{missing}"
        raise RequestError(f"{param} is missing", param=param, code="missing_required_parameter")
    if not isinstance(item.get("name"), str | None):
        raise RequestError(f"{where}.name must be text", param=f"{where}.name", code="invalid_type")
    try:
        if kind == "predicate":
            return Predicate(item["instructions"], item.get("name"))
        if kind == "choice":
            return ChoiceQuestion(item["instructions"], item["choices"], item.get("name"))
        return Score(item["instructions"], item["levels"], item.get("name"))
    except RequestError as exc:
        exc.param = f"{where}.{exc.param or 'instructions'}"
        exc.message = f"{where}: {exc.message}"
        raise


def _shape_of(item: object) -> str | None:
    """Return "box" or "point" if that is asked for, or given as an answer: the class, one of it, or its name."""
    form = item.get("type") if isinstance(item, Mapping) else getattr(item, "form", None)
    return form if isinstance(form, str) and form in ("box", "point") else None


def _no_decision(what: str, param: str) -> RequestError:
    return RequestError(what, hint='locate(picture, "the brand") finds it', param=param, code="invalid_value")


def orders(question: Question) -> list[tuple[Label, ...]]:
    """Return the orders in which the labels of a question are shown, to be averaged.

    A Choice is rotated: each of at most MAX_ORDERS options stands at each place once. Yes and no, and the levels of a
    Score, stand forwards and backwards.
    """
    labels = question.labels
    if not isinstance(question, ChoiceQuestion):
        return [labels, labels[::-1]]
    count = min(len(labels), MAX_ORDERS)
    starts = [number * len(labels) // count for number in range(count)]
    return [labels[start:] + labels[:start] for start in starts]


def options_text(question: Question, labels: Sequence[Label], marks: Sequence[str] = ()) -> str:
    """Return the text that stands behind the instructions: what can be answered, in the order of `labels`.

    `marks`: the letter of each label, for a model that is to answer with letters.
    """
    if isinstance(question, Predicate):
        return f"\n\nAnswer {labels[0].text} or {labels[1].text}, with nothing else."
    lines = []
    for number, label in enumerate(labels):
        mark = f"{marks[number]}. " if marks else ""
        lines.append(f"{mark}{label.text}{': ' + label.description if label.description else ''}")
    what = "the letter of one" if marks else "one"
    return f"\n\nAnswer with {what} of these, with nothing else:\n" + "\n".join(lines)


def question_form(question: Question, parts: Sequence[Part], labels: Sequence[Label]) -> JsonObject:
    """Return the question in OpenAI's form, its options in the order of `labels`; `parts` are its instructions."""
    instructions: object = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if not all(isinstance(part, TextPart) for part in parts):
        # As text where it is nothing else, since some read no parts.
        told: list[list[JsonObject]] = map_parts(
            parts,
            lambda part: [{"type": "input_text", "text": part.text}],
            lambda media: [{"type": "input_image", "image_url": shown.data_url()} for shown in media.pictures],
        )
        instructions = [item for items in told for item in items]
    form: JsonObject = {"type": question.type, "instructions": instructions}
    described = [(label.value, {"description": label.description} if label.description else {}) for label in labels]
    if isinstance(question, ChoiceQuestion):
        form["choices"] = [{"value": value, **more} for value, more in described]
    elif isinstance(question, Score):
        form["levels"] = [{"label": value, **more} for value, more in described]
    return form


def asked_text(instructions: Instructions) -> str:
    """Return the text of instructions, with "[picture]" for each part that is not text."""
    if isinstance(instructions, str):
        return instructions
    texts = []
    for part in instructions:
        text = part.get("text") if isinstance(part, Mapping) else getattr(part, "text", part)
        texts.append(text if isinstance(text, str) else "[picture]")
    return " ".join(texts)


def question_json(question: Question) -> JsonObject:
    """Return what of a question, beside its instructions, changes its answer."""
    labels = [[label.text, isinstance(label.value, bool), label.description] for label in question.labels]
    return {"type": question.type, "labels": labels}


def _option(question: ChoiceQuestion, item: object) -> Option:
    if isinstance(item, Mapping):
        item = Option(_field(question, item, "value", "choices"), item.get("description") or "")
    option = item if isinstance(item, Option) else Option(item)  # type: ignore[arg-type]
    value = option.value
    if shape := _shape_of(value):
        raise _no_decision(f"a choice is a {shape}, which is not a decision", "choices")
    if isinstance(value, float) and math.isnan(value):
        raise _fault(question, "a choice is NaN", "text, true or false")
    if not isinstance(value, str | bool):
        raise _fault(question, f"a choice is {type(value).__name__} {str(value)[:40]}", "text, true or false")
    if isinstance(value, str) and not value.strip():
        raise _fault(question, "a choice is empty", "text, true or false")
    _check_unicode(question, value)
    _check_description(question, option.description)
    return option


def _level(question: Score, item: object) -> Level:
    if isinstance(item, Mapping):
        item = Level(_field(question, item, "label", "levels"), item.get("description") or "")
    level = item if isinstance(item, Level) else Level(item)  # type: ignore[arg-type]
    if not isinstance(level.label, str) or not level.label.strip():
        raise _fault(question, f"a level has the label {str(level.label)[:40]!r}", "a text that is not empty")
    _check_unicode(question, level.label)
    _check_description(question, level.description)
    return level


def _check_unicode(question: ChoiceQuestion | Score, value: Value) -> None:
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise _fault(question, f"{value[:40]!r} is not valid Unicode", "text without half of a surrogate pair")


def _check_description(question: ChoiceQuestion | Score, description: object) -> None:
    if not isinstance(description, str):
        raise _fault(question, f"a description is {type(description).__name__}", "text")


def _field(question: ChoiceQuestion | Score, item: JsonMapping, name: str, of: str) -> str:
    if other := next((key for key in item if key not in (name, "description")), None):
        raise _fault(question, f"{of}: unknown field {str(other)[:80]!r}", f"{name} and description")
    if name not in item:
        raise _fault(question, f"{of}: an item has no {name}", f"{name} and description")
    value: str = item[name]
    return value


def _check(question: Question) -> None:
    if not isinstance(question.name, str | None):
        raise RequestError(f"a question's name is {type(question.name).__name__}, not text", param="name")
    asked = question.instructions
    if isinstance(asked, str):
        if not asked.strip():
            raise _fault(question, "the instructions are empty", "say what is to be decided", "instructions")
    elif isinstance(asked, Mapping) or not isinstance(asked, Sequence) or not asked:
        what = "must be text or a list of parts" if asked else "are empty"
        raise _fault(question, f"the instructions {what}", "say what is to be decided", "instructions")
    elif not asked_text(asked).strip():
        raise _fault(question, "the instructions are empty", "say what is to be decided", "instructions")


def _check_number(question: ChoiceQuestion | Score, number: int, what: str) -> None:
    if not MIN_CHOICES <= number <= MAX_CHOICES:
        said = f"{number} {what}{'' if number == 1 else 's'}"
        raise _fault(question, said, f"{MIN_CHOICES} to {MAX_CHOICES} of them")


def _check_different(question: ChoiceQuestion | Score, values: Sequence[str], different: int, what: str) -> None:
    texts = [label.text for label in question.labels]
    if different < len(values) or len(set(texts)) < len(texts):
        seen = [*values] if different < len(values) else texts
        twice = next(value for value in seen if seen.count(value) > 1)
        raise _fault(question, f"the {what} {twice[:80]!r} stands twice", "each must be different")


def _fault(question: Question, what: str, hint: str, field: str | None = None) -> RequestError:
    name = f"question {question.name!r}: " if getattr(question, "name", None) else ""
    if field is None:
        field = "choices" if isinstance(question, ChoiceQuestion) else "levels"
    return RequestError(f"{name}{what}", hint=hint, param=field, code="invalid_value")
