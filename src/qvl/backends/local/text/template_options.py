"""What a request says to the model's chat template: its variables, and whether the model is to think."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qvl.errors import UnsupportedInputError
from qvl.suggest import nearest

if TYPE_CHECKING:
    from qvl.types import ChatRequest, JsonObject

# Given by transformers itself, or by other fields of a request.
RESERVED: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"namespace", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner"}
)
SWITCHES: Final = ("enable_thinking", "thinking")
# Tokens of reasoning; of the answer's tokens a quarter stays for the answer itself.
BUDGETS: Final[dict[str, int]] = {"minimal": 512, "low": 1024, "medium": 4096, "high": 16384}
NO_THOUGHT: Final = "\n\n</think>\n\n"


def thinking_budget(request: ChatRequest, answer_tokens: int) -> int | None:
    """Return the most tokens of reasoning in an answer of at most `answer_tokens`; None for no limit of its own."""
    if request.sampling.thinking_token_budget is not None:
        return request.sampling.thinking_token_budget
    budget = BUDGETS.get(request.reasoning_effort or "")
    return None if budget is None else min(budget, answer_tokens * 3 // 4)


def refuse_efforts(request: ChatRequest) -> None:
    """Refuse a bound of the reasoning, for an engine that cannot end a thought.

    Raises:
        UnsupportedInputError: the request has an effort other than none.
    """
    if request.reasoning_effort not in (None, "none"):
        what = f"reasoning_effort={request.reasoning_effort!r}: this engine cannot bound the reasoning"
        raise UnsupportedInputError(what, hint='"none", or chat_template_kwargs', param="reasoning_effort")


class TemplateOptions:
    """The variables that a chat template, Jinja's text, reads, so that those of requests can be checked."""

    def __init__(self, template: str) -> None:
        self.thinks = "<think>" in template
        self._known = _variables(template)

    def read(self, request: ChatRequest) -> tuple[JsonObject, bool | None]:
        """Return (variables for the template, whether the model is to think; None if the request does not say).

        Raises:
            UnsupportedInputError: the template has no such variable, or the model cannot think.
        """
        given = {name: value for name, value in request.chat_template_kwargs.items() if value is not None}
        told = [given[name] for name in SWITCHES if isinstance(given.get(name), bool)]
        wanted: bool | None = told[0] if told else None
        if wanted is None and request.reasoning_effort is not None:
            wanted = request.reasoning_effort != "none"
            self._refuse_thought("reasoning_effort", wanted)
            for name, value in (("enable_thinking", wanted), ("reasoning_effort", request.reasoning_effort)):
                if name in (self._known or ()):
                    given[name] = value
        for name in [*given]:
            self._check(name, given)
        return given, wanted

    def _refuse_thought(self, param: str, wanted: object) -> None:
        if wanted and not self.thinks:
            what = f"{param}: the model cannot think: its chat template has no <think>"
            raise UnsupportedInputError(what, hint="leave it out, or use a Thinking model", param=param)

    def _check(self, name: str, given: JsonObject) -> None:
        param = f"chat_template_kwargs.{name[:100]}"
        if name in RESERVED or name.endswith("_token"):
            what = f"{param}: this variable is not for requests to set"
            raise UnsupportedInputError(what, hint="leave it out", param=param)
        if self._known is None or name in self._known:
            return
        if name in SWITCHES or given[name] is False:
            # What the template never asks for is off anyway; whether the answer begins with a thought, the prompt says.
            self._refuse_thought(param, given[name])
            del given[name]
            return
        known = self._known - RESERVED
        hint = f"known: {', '.join(sorted(known)) or 'none'}"
        near = nearest(name, known) if known else None
        raise UnsupportedInputError(
            f"{param}: the model's chat template has no such variable", hint=near or hint, param=param
        )


def _variables(template: str) -> frozenset[str] | None:
    """Return the names that a template reads from outside; None if it cannot be parsed without transformers' tags."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        # Nothing is rendered here, the text is only looked at.
        found = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))  # noqa: S701
    except TemplateSyntaxError:
        return None
    return frozenset(name for name in found if not name.endswith("_token"))
