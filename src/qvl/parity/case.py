"""Cases: what both sides are asked, each a question, an analysis, or questions with a fixed set of answers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from qvl.decisions.questions import question_json, read_questions
from qvl.errors import ConfigError, QvlError
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.types import JsonObject, canonical_json

if TYPE_CHECKING:
    from qvl.analysis.parse_answer import SchemaLike
    from qvl.decisions.questions import Question
    from qvl.pipeline.parse_parts import PictureLike

_FORM: Final = '"What is it?" or {"question": "What is it?"} or {"type": "choice", …}'


@dataclass(frozen=True, slots=True)
class Case:
    """One request that both sides are asked.

    Args:
        id: its name in reports; each case needs its own.
        pictures: in their order; paths, URLs, bytes or images.
        question: answered in words.
        questions: with a fixed set of answers, instead of `question`; with neither, the pictures are analysed.
        schema: of the analysis; None is ProductAnalysis.

    Raises:
        ConfigError: both kinds of questions, or neither a question nor a picture.
    """

    id: str
    pictures: tuple[PictureLike, ...] = ()
    question: str | None = None
    questions: tuple[Question, ...] = ()
    schema: SchemaLike | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.question is not None and self.questions:
            raise ConfigError(f"{self.id}: question and questions exclude each other", hint="make two cases")
        if self.question is None and not self.questions and not self.pictures:
            raise ConfigError(f"{self.id}: neither a question nor a picture", hint="Case(id, pictures, question=…)")

    @property
    def kind(self) -> Literal["text", "decisions", "analysis"]:
        if self.question is not None:
            return "text"
        return "decisions" if self.questions else "analysis"

    def facts(self) -> JsonObject:
        """Return what is asked, without the pictures, as JSON."""
        if self.kind == "text":
            return {"question": self.question}
        if self.kind == "decisions":
            return {"questions": [question_json(question) for question in self.questions]}
        from qvl.analysis import generation_schema
        from qvl.analysis.product import ProductAnalysis
        from qvl.analysis.schema_types import schema_type

        if self.schema is None:
            return {"analysis": "ProductAnalysis"}
        model = schema_type(ProductAnalysis if self.schema is None else self.schema).model
        return {"analysis": generation_schema(model)}


def digest(cases: Sequence[Case]) -> str:
    """Return the hash of what the cases ask, in their order, and of the content of their pictures. Blocking.

    Files count by what is in them, URLs by their text: what they give is not known before it is fetched.
    """
    known: dict[str, str] = {}
    facts = [[case.id, case.facts(), [_content(source, known) for source in case.pictures]] for case in cases]
    # File names and questions may have surrogates that stand for nothing.
    return hashlib.sha256(canonical_json(facts).encode("utf-8", "surrogatepass")).hexdigest()


def _content(source: object, known: dict[str, str]) -> object:
    """Return a picture as JSON values that are equal for equal content; `known` has the hashes of files."""
    from qvl.media import gate

    if isinstance(source, bytes | bytearray | memoryview):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name not in known:
            known[name] = _hash_of_file(name) or name
        return known[name]
    if isinstance(source, Mapping):
        return {str(name): _content(value, known) for name, value in source.items()}
    if isinstance(source, list | tuple):
        return [_content(value, known) for value in source]
    if source is None or isinstance(source, bool | int | float):
        return source
    if isinstance(source, UnreadPicture):
        rest = repr(replace(source, source=b""))
        return [_content(source.source, known), rest]
    try:
        return getattr(source, "sha256", None) or gate.load(source, decode=False).sha256  # type: ignore[arg-type]
    except QvlError:
        return repr(source)


def _hash_of_file(name: str) -> str | None:
    """Return the sha256 of a file; None for what is none that can be read."""
    try:
        with Path(name).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, RuntimeError):
        return None


def make_cases(
    pictures: Sequence[tuple[str, tuple[PictureLike, ...]]],
    *,
    texts: Sequence[str] = (),
    questions: Sequence[Question] = (),
    analyze: bool = False,
    schema: SchemaLike | None = None,
) -> list[Case]:
    """Return the cases of all `pictures`, each given as (label, pictures of one request).

    Of each: one for every text, one for all questions together, and one for the analysis, which is also asked for where
    there is nothing else.
    """
    whole = analyze or schema is not None or not (texts or questions)
    cases = []
    for label, shown in pictures:
        for number, text in enumerate(texts, start=1):
            cases.append(Case(f"{label}#q{number}" if len(texts) > 1 else f"{label}#q", shown, question=text))
        if questions:
            cases.append(Case(f"{label}#decide", shown, questions=tuple(questions)))
        if whole:
            cases.append(Case(f"{label}#analyze", shown, schema=schema))
    return cases


def check_ids(cases: Sequence[Case]) -> None:
    """Raise ConfigError for no case at all, or two with one id."""
    if not cases:
        raise ConfigError("nothing to compare: no case", hint="name pictures: --pictures 'shop/*.jpg'")
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ConfigError(f"two cases have the id {case.id!r}", hint="each needs its own")
        seen.add(case.id)


def read_question_file(path: Path) -> tuple[list[str], tuple[Question, ...]]:
    """Return (questions answered in words, questions with a fixed set of answers) of a file of JSON lines.

    Raises:
        ConfigError: it cannot be read, or a line is not a question; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--questions {path} cannot be read: {reason}", hint="a file of JSON lines") from exc
    texts: list[str] = []
    asked: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as exc:
            raise ConfigError(f"{where} is not JSON", hint=_FORM) from exc
        text = value.get("question") if isinstance(value, dict) else value
        if isinstance(text, str) and text.strip() and (not isinstance(value, dict) or value.keys() == {"question"}):
            texts.append(text)
        elif isinstance(value, dict) and "type" in value:
            try:
                asked += read_questions(value)
            except QvlError as exc:
                raise ConfigError(f"{where}: {exc.message}", hint=exc.hint) from exc
        else:
            raise ConfigError(f"{where} is not a question", hint=_FORM)
    if not texts and not asked:
        raise ConfigError(f"--questions {path} has no question", hint=_FORM)
    return texts, read_questions(asked) if asked else ()
