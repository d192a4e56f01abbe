"""The sampling parameters, each declared once: a field of `SamplingParams` with a `Parameter` in its annotation.

Validation, cache keys, requests to endpoints and their probes, the fields of `qvl-serve`, and the contract tests of
backends are derived from these declarations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import compress
from types import MappingProxyType
from typing import Annotated, Final, Literal, get_args, get_origin, get_type_hints

from qvl.errors import ConfigError

MAX_STOP_CHARACTERS: Final = 1024
_NUMBERS: Final = (int, float)


@dataclass(frozen=True, slots=True)
class Parameter:
    """The facts of one sampling parameter.

    Attributes:
        allowed: the range in words, used as an error's hint.
        example: a value other than the default, for tests and probes.
        low, high: the least and the greatest number; with `above`, `low` itself is excluded.
        http_high: the greatest number that `qvl-serve` accepts, if it is less than `high`.
        most: most items of a list.
        off: another value that means the default, sent to endpoints in its place.
        neutral: values that have no effect, other than the default and `off`.
        sent: when a request to an endpoint contains it: "always"; "changed", only if it differs from the default; or
            "pinned", also at the default if the endpoint knows vLLM's fields and would else use generation_config.
        declared: True if a backend supports it only if its capabilities say so; the others are assumed.
        about: a line for the documentation of the HTTP API.
        kind, default: derived from the field.
    """

    allowed: str
    example: object
    low: float | None = None
    high: float | None = None
    above: bool = False
    http_high: float | None = None
    most: int = 0
    off: int | None = None
    neutral: tuple[object, ...] | None = None
    sent: Literal["always", "changed", "pinned"] = "changed"
    declared: bool = True
    about: str | None = None
    kind: type = object
    default: object = None

    @property
    def texts(self) -> bool:
        """True if the parameter's value is a list of strings, or one string."""
        return isinstance(self.example, tuple) and isinstance(self.example[0], str)

    @property
    def on_the_wire(self) -> object:
        """The example as JSON."""
        return list(self.example) if isinstance(self.example, tuple) else self.example

    def allows(self, value: object) -> bool:
        """True if `value`, of the parameter's type, is in the range; of a list or a mapping, every item."""
        if isinstance(value, _NUMBERS):
            return self._bounds(value)
        if isinstance(value, tuple):
            if self.texts:
                return len(value) <= self.most and all(0 < len(item) <= MAX_STOP_CHARACTERS for item in value)
            return len(value) <= self.most and (self.low is None or all(item >= self.low for item in value))
        if isinstance(value, Mapping):
            inside = all(token >= 0 and self._bounds(amount) for token, amount in value.items())
            return len(value) <= self.most and inside
        return True

    def _bounds(self, value: float) -> bool:
        if self.low is not None and not (value > self.low if self.above else value >= self.low):
            return False
        return self.high is None or value <= self.high


class _Compared:
    """What parameters know of themselves once they were asked for it, since they are asked three times a request."""

    __slots__ = ("_changed",)
    _changed: dict[str, object]


@dataclass(frozen=True, slots=True)
class SamplingParams(_Compared):
    """Parameters of sampling; vLLM's names and meanings.

    `temperature` 0 is greedy. `max_tokens` None means the rest of the context, at most the backend's default.
    `logprobs` is the number of alternatives for each chosen token (0 = the chosen alone), None for no logprobs.
    `top_k` 0 or -1 means all.

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: Annotated[
        float,
        Parameter(
            "from 0 (greedy) to 100", 0.5, 0.0, 100.0, http_high=2.0, sent="always", declared=False,
            about="0 is greedy, and the default.",
        ),
    ] = 0.0  # fmt: skip
    top_p: Annotated[
        float, Parameter("above 0, at most 1", 0.9, 0.0, 1.0, above=True, sent="always", declared=False)
    ] = 1.0
    top_k: Annotated[
        int, Parameter("0 (all) or more", 5, 0, off=-1, sent="pinned", declared=False, about="0 or -1: all.")
    ] = 0
    min_p: Annotated[float, Parameter("from 0 to 1", 0.1, 0.0, 1.0, sent="pinned", declared=False)] = 0.0
    max_tokens: Annotated[int | None, Parameter("1 or more", 5, 1, declared=False)] = None
    stop: Annotated[
        tuple[str, ...],
        Parameter(f"at most 16 strings of 1 to {MAX_STOP_CHARACTERS} characters", ("zq7",), most=16, declared=False),
    ] = ()
    stop_token_ids: Annotated[tuple[int, ...], Parameter("at most 1024 of them", (0,), most=1024, declared=False)] = ()
    ignore_eos: Annotated[bool, Parameter("true or false", True, declared=False)] = False
    repetition_penalty: Annotated[
        float, Parameter("above 0; 1 is neutral", 1.05, 0.0, 100.0, above=True, sent="pinned", declared=False)
    ] = 1.0
    presence_penalty: Annotated[float, Parameter("from -2 to 2", 0.1, -2.0, 2.0, declared=False)] = 0.0
    frequency_penalty: Annotated[float, Parameter("from -2 to 2", 0.1, -2.0, 2.0, declared=False)] = 0.0
    seed: Annotated[
        int | None, Parameter("a 64-bit integer", 7, -(2**63), 2**64 - 1, http_high=2**63 - 1, declared=False)
    ] = None
    logprobs: Annotated[int | None, Parameter("from 0 to 20", 2, 0, 20, neutral=(False, 0), declared=False)] = None
    n: Annotated[int, Parameter("from 1 to 128", 2, 1, 128, declared=False)] = 1
    min_tokens: Annotated[
        int, Parameter("0 or more, at most max_tokens", 2, 0, about="No end of the answer before so many tokens.")
    ] = 0
    bad_words: Annotated[
        tuple[str, ...],
        Parameter(
            "at most 256 texts", ("zq7",), most=256, about="Texts that do not come, as the tokenizer spells them."
        ),
    ] = ()
    allowed_token_ids: Annotated[
        tuple[int, ...],
        Parameter("ids from 0", (0, 1), 0, most=1 << 18, about="The answer is written with these tokens alone."),
    ] = ()
    logit_bias: Annotated[
        Mapping[int, float] | None,
        Parameter("token ids, each with a number from -100 to 100", {0: -1.0}, -100.0, 100.0, most=4096),
    ] = None
    include_stop_str_in_output: Annotated[
        bool, Parameter("true or false", True, about="The stop string that ended the answer is a part of it.")
    ] = False
    skip_special_tokens: Annotated[
        bool, Parameter("true or false", False, about="false: control tokens that the model writes are shown.")
    ] = True
    prompt_logprobs: Annotated[
        int | None,
        Parameter("from 0 to 20", 1, 0, 20, neutral=(False,), about="Alternatives for each token of the prompt."),
    ] = None
    logprob_token_ids: Annotated[
        tuple[int, ...],
        Parameter("at most 128 ids from 0", (0, 1), 0, most=128, about="With logprobs: of these tokens, not the best."),
    ] = ()
    return_token_ids: Annotated[
        bool, Parameter("true or false", True, about="The token ids of prompt and answer come with the answer.")
    ] = False
    truncate_prompt_tokens: Annotated[
        int | None,
        Parameter(
            "1 or more, or -1 for what fits", 4096, -1, about="Only so many tokens of the prompt's end are kept."
        ),
    ] = None
    thinking_token_budget: Annotated[
        int | None, Parameter("0 or more", 8, 0, about="Most tokens of reasoning before the answer begins.")
    ] = None

    def __post_init__(self) -> None:
        # Most of them are left alone.
        for name in compress(PARAMETERS, map(operator.is_not, _VALUES(self), _DEFAULTS)):
            known, given = PARAMETERS[name], getattr(self, name)
            if given is not None:
                value = _READERS[known.kind]((given,) if isinstance(given, str) and known.texts else given)
                if known.off is not None and value == known.off:
                    value = known.default
                if value is not given:
                    object.__setattr__(self, name, value)
                if value is not None and not known.allows(value):
                    shown = repr(value)
                    shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
                    raise ConfigError(f"{name}={shown} is out of range", hint=known.allowed, param=name)
            elif known.kind is tuple:
                object.__setattr__(self, name, ())
            elif known.default is not None:
                raise TypeError(f"{name} cannot be None")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            what = f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            raise ConfigError(what, hint="lower it, or leave one of them out", param="min_tokens")
        if self.truncate_prompt_tokens == 0:
            raise ConfigError("truncate_prompt_tokens=0 leaves no prompt", param="truncate_prompt_tokens")

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the names of all parameters."""
        return frozenset(PARAMETERS)

    @classmethod
    def assumed(cls) -> frozenset[str]:
        """Return the parameters that every backend supports, whatever its capabilities say."""
        return frozenset(name for name, known in PARAMETERS.items() if not known.declared)

    @property
    def deterministic(self) -> bool:
        """True if equal requests get equal answers: greedy, or sampled with a seed."""
        return self.temperature == 0.0 or self.seed is not None

    @property
    def wants_logprobs(self) -> bool:
        """True if the answer's tokens come with their log-probabilities."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    def changed(self) -> dict[str, object]:
        """Return the fields that differ from their defaults, by name."""
        try:
            return {**self._changed}
        except AttributeError:
            # Most of them are the very default.
            names = compress(PARAMETERS, map(operator.is_not, _VALUES(self), _DEFAULTS))
            changed = {name: value for name in names if (value := getattr(self, name)) != PARAMETERS[name].default}
            object.__setattr__(self, "_changed", changed)
            return {**changed}


def _real(value: float) -> float:
    return float(value + 0.0)


def _whole(value: int) -> int:
    return int(operator.index(value))


def _items(value: Iterable[str | int]) -> tuple[str | int, ...]:
    return tuple(value or ())


def _amounts(value: Mapping[int | str, float]) -> Mapping[int, float] | None:
    try:
        return {int(token): float(amount) for token, amount in value.items()} or None
    except (AttributeError, ValueError) as exc:
        raise ConfigError("logit_bias must map token ids to numbers", param="logit_bias") from exc


# One type for each, since 0 and 0.0 are one question, but two texts of JSON and so two keys.
_READERS: Final[Mapping[type, Callable[..., object]]] = {
    float: _real, int: _whole, tuple: _items, bool: lambda value: value, Mapping: _amounts,
}  # fmt: skip


def _parameters() -> Iterator[tuple[str, Parameter]]:
    hints = get_type_hints(SamplingParams, include_extras=True)
    for item in fields(SamplingParams):
        annotation, known = get_args(hints[item.name])
        kind = annotation if isinstance(annotation, type) else (get_origin(annotation) or annotation)
        if kind not in _READERS:
            members = [get_origin(member) or member for member in get_args(annotation)]
            kind = next(member for member in members if member in _READERS)
        yield item.name, replace(known, kind=kind, default=item.default)


PARAMETERS: Final[Mapping[str, Parameter]] = MappingProxyType(dict(_parameters()))
"""Every sampling parameter by its name, in the order of `SamplingParams`."""
_DEFAULTS: Final = tuple(known.default for known in PARAMETERS.values())
_VALUES: Final = operator.attrgetter(*PARAMETERS)
