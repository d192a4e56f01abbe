"""Compares two observations of one case, and names the first layer at which they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from qvl.calibration.calibration_file import field_name
from qvl.evaluation.compare import overlap, rule_for
from qvl.parity.observation import Observation, TokenStep
from qvl.types import JsonMapping

Layer: TypeAlias = Literal[
    "answered", "pixels", "picture tokens", "template", "prompt", "log-probabilities", "text", "fields", "decisions"
]
LAYERS: Final[tuple[Layer, ...]] = (
    "answered", "pixels", "picture tokens", "template", "prompt", "log-probabilities", "text", "fields", "decisions",
)  # fmt: skip
INPUT_LAYERS: Final = ("pixels", "picture tokens", "template", "prompt")
TOLERANCE: Final = 1e-3
"""How far log-probabilities (nats) of equal deployments lie apart at most: the order of sums in float32 makes 1e-5."""
# Of a token that one side alone lists: less probable ones are missing at the list's end by chance.
LEAST_SHARE: Final = 1e-3
NEAR_TIE: Final = 0.05
# A probability that is not listed is at most that of the last that is; this stands for the rest of all others.
_FLOOR: Final = 1e-6


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The distributions of the first token that is not forced compared, and how far apart equal tokens are behind it.

    Attributes:
        overlap: the share of the shorter list's tokens that the other lists too.
        divergence: KL of B from A in nats, the least that both lists allow.
        deviation: the largest difference of a log-probability in nats: of that token's candidates, and of every token
            that both texts begin with.
        ranks: the place of A's token in B's list and of B's token in A's, 1 being the first; None: not listed.
    """

    overlap: float
    divergence: float
    deviation: float
    ranks: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where greedy texts part: the index of the token, both tokens, and how much each side prefers its own, in nats.

    A margin is None where a side does not list the other's token. `deviation` is how far the log-probabilities of the
    tokens before lie apart.
    """

    index: int
    tokens: tuple[str, str]
    margins: tuple[float | None, float | None]
    deviation: float
    tie: bool


@dataclass(frozen=True, slots=True)
class FieldPair:
    """One value of both analyses: exactly equal, equal as its kind is read (text, number, box), overlap of boxes."""

    path: str
    exact: bool
    equal: bool
    iou: float | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One case compared.

    Attributes:
        layer: the first that parts; None if none does.
        detail: what parts there, in a line.
        layers: whether each layer is the same; only those that both sides show.
        deviation: how far log-probabilities lie apart in nats, as of FirstStep; of an analysis those of its values.
        choices: by question, whether both gave the same answer; `distances`: the total variation of their
            distributions, `divergences`: their KL in nats.
        seconds, tokens: that each side took, and that each answer has.
        errors: why a side has no answer. What the other side alone answers agrees nowhere.
    """

    case: str
    layer: Layer | None
    detail: str
    layers: Mapping[Layer, bool]
    deviation: float | None = None
    first: FirstStep | None = None
    parting: Parting | None = None
    fields: Sequence[FieldPair] = ()
    choices: Mapping[str, bool] = field(default_factory=dict)
    distances: Mapping[str, float] = field(default_factory=dict)
    divergences: Mapping[str, float] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)
    tokens: tuple[int, int] = (0, 0)
    errors: tuple[str | None, str | None] = (None, None)

    @property
    def failed(self) -> tuple[bool, bool]:
        """True for A, and for B, if it has no answer."""
        a, b = self.errors
        return a is not None, b is not None

    @property
    def near_tie(self) -> bool:
        """True if only the text parts, at a token that neither side clearly prefers."""
        return self.layer in ("text", "fields") and self.parting is not None and self.parting.tie

    @property
    def weight(self) -> tuple[int, float]:
        """Return what orders cases by how far they part: the worst has the largest."""
        if self.layer is None:
            return -1, 0.0
        apart = self.first.divergence if self.first else max(self.distances.values(), default=0.0)
        answer = sum(not same for name, same in self.layers.items() if name in ("answered", "text", "fields"))
        answer += sum(not same for same in self.choices.values())
        return (0 if self.near_tie else 1 + answer), apart


def differ(a: Observation, b: Observation, tolerance: float = TOLERANCE) -> Difference:
    """Return the comparison of a case; log-probabilities within `tolerance` nats are the same."""
    if a.error is not None or b.error is not None:
        return _failed(a, b)
    layers: dict[Layer, bool] = {"answered": True}
    details: dict[Layer, str] = {}
    _inputs(a, b, layers, details)
    first = first_step(a.steps, b.steps)
    deviation = first.deviation if first is not None else _apart(a, b)
    if deviation is not None:
        layers["log-probabilities"] = deviation <= tolerance
        details["log-probabilities"] = f"{deviation:.3g} nats apart"
    if first is not None:
        details["log-probabilities"] = (
            f"log-probabilities {first.deviation:.3g} nats apart, KL {first.divergence:.3g}, "
            f"{first.overlap:.0%} of the likeliest tokens shared"
        )
    parting = _parting(a.steps, b.steps, tolerance)
    if a.choices is None and b.choices is None:
        layers["text"] = a.text == b.text
        details["text"] = "the texts differ" if parting is None else _told(parting)
    pairs = field_pairs(a.fields, b.fields) if a.fields is not None and b.fields is not None else ()
    if pairs:
        layers["fields"] = all(pair.equal for pair in pairs)
        details["fields"] = ", ".join(pair.path for pair in pairs if not pair.equal)
    choices, distances, divergences = _decisions(a, b)
    if choices or distances:
        # Probabilities, not their logarithms: what is improbable says nothing.
        far = {name for name, distance in distances.items() if distance > tolerance}
        layers["decisions"] = all(choices.values()) and not far
        told_far = [f"{name} by {distances[name]:.3g}" for name in sorted(far)]
        details["decisions"] = ", ".join(told_far or [name for name, same in choices.items() if not same])
    layer = next((name for name in LAYERS if layers.get(name) is False), None)
    return Difference(
        a.case, layer, details.get(layer, "") if layer else "", layers, deviation, first, parting, tuple(pairs),
        choices, distances, divergences, (a.seconds, b.seconds), (a.completion_tokens, b.completion_tokens),
    )  # fmt: skip


def _failed(a: Observation, b: Observation) -> Difference:
    """Return the comparison of a case that a side, or both, did not answer: neither layer parts where both did not."""
    errors = (a.error, b.error)
    told = "; ".join(f"{name}: {error}" for name, error in zip(("A", "B"), errors, strict=True) if error is not None)
    if None not in errors:
        return Difference(a.case, None, told, {"answered": True}, errors=errors)
    there = a if a.error is None else b
    layers: dict[Layer, bool] = {"answered": False}
    if any(len(step.top) > 1 for step in there.steps):
        layers["log-probabilities"] = False
    if there.choices is None:
        layers["text"] = False
    pairs = [FieldPair(path, exact=False, equal=False) for path in sorted(there.fields or {})]
    if pairs:
        layers["fields"] = False
    choices = dict.fromkeys(there.choices or {}, False)
    if choices:
        layers["decisions"] = False
    return Difference(a.case, "answered", told, layers, fields=pairs, choices=choices, errors=errors)


def _inputs(a: Observation, b: Observation, layers: dict[Layer, bool], details: dict[Layer, str]) -> None:
    if a.pixels or b.pixels:
        layers["pixels"] = a.pixels == b.pixels and a.sizes == b.sizes
        sizes = [", ".join(f"{width}x{height}" for width, height in one.sizes) for one in (a, b)]
        details["pixels"] = "the same size, other pixels" if sizes[0] == sizes[1] else f"{sizes[0]} and {sizes[1]}"
    if a.picture_tokens is not None and b.picture_tokens is not None:
        layers["picture tokens"] = a.picture_tokens == b.picture_tokens
        counts = ["+".join(map(str, one.picture_tokens or ())) for one in (a, b)]
        details["picture tokens"] = f"{counts[0]} and {counts[1]} tokens"
    if a.template is not None and b.template is not None:
        layers["template"] = a.template == b.template
        details["template"] = template_detail(a.template, b.template)
    if a.prompt_ids is not None and b.prompt_ids is not None:
        layers["prompt"] = a.prompt_ids == b.prompt_ids
        place = next(
            (n for n, (x, y) in enumerate(zip(a.prompt_ids, b.prompt_ids, strict=False)) if x != y),
            min(len(a.prompt_ids), len(b.prompt_ids)),
        )
        details["prompt"] = f"{len(a.prompt_ids)} and {len(b.prompt_ids)} tokens, the first other one at {place}"
    elif a.prompt_tokens and b.prompt_tokens:
        layers["prompt"] = a.prompt_tokens == b.prompt_tokens
        details["prompt"] = f"{a.prompt_tokens} and {b.prompt_tokens} tokens"


def template_detail(a: str, b: str) -> str:
    """Return where two prompts part, with a few characters of each."""
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    begin = max(0, place - 12)
    return f"character {place}: {a[begin : place + 24]!r} and {b[begin : place + 24]!r}"


def first_step(a: Sequence[TokenStep], b: Sequence[TokenStep]) -> FirstStep | None:
    """Return the comparison of the first tokens; None where a side tells no likeliest tokens."""
    chosen = 0.0
    found: FirstStep | None = None
    for x, y in zip(a, b, strict=False):
        if found is None and len(x.top) > 1 and len(y.top) > 1:
            found = _compared(x, y)
        if x.token != y.token:
            break
        chosen = max(chosen, abs(x.logprob - y.logprob))
    return None if found is None else replace(found, deviation=max(found.deviation, chosen))


def _apart(a: Observation, b: Observation) -> float | None:
    """Return how far the confidences of equal values lie apart, as logarithms; None if there are none."""
    least = math.exp(-50)
    pairs = [
        (a.sure[path], b.sure[path])
        for path in a.sure.keys() & b.sure.keys()
        if (a.fields or {}).get(path) == (b.fields or {}).get(path)
    ]
    if not pairs:
        return None
    return max(abs(math.log(max(x, least)) - math.log(max(y, least))) for x, y in pairs)


def _compared(a: TokenStep, b: TokenStep) -> FirstStep:
    tops = [{one.token: one.logprob} | dict(one.top) for one in (a, b)]
    shared = tops[0].keys() & tops[1].keys()
    ranks = [sorted(top, key=top.__getitem__, reverse=True) for top in tops]

    def place(token: str, order: list[str]) -> int | None:
        return order.index(token) + 1 if token in order else None

    return FirstStep(
        overlap=len(shared) / min(len(top) for top in tops),
        # Of the lists alone: a sampled token may be far less probable than the last that is listed.
        divergence=divergence(_shares(a.top), _shares(b.top)),
        deviation=_deviation(tops[0], tops[1]),
        ranks=(place(a.token, ranks[1]), place(b.token, ranks[0])),
    )


def _deviation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Return the largest difference of two lists of log-probabilities.

    Of all tokens that both list: improbable ones show other numbers as well as probable ones do. A probable one that
    only one side lists counts as the last of the other.
    """
    found = max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=0.0)
    for one, other in ((a, b), (b, a)):
        last = min(other.values())
        alone = (one[token] for token in one.keys() - other.keys() if one[token] >= math.log(LEAST_SHARE))
        # One below the other's last is missing there since the list ends, as a sampled token is.
        found = max([found, *(logprob - last for logprob in alone)])
    return float(found)


def _shares(logprobs: Mapping[str, float]) -> dict[str, float]:
    return {token: math.exp(min(0.0, logprob)) for token, logprob in logprobs.items()}


def divergence(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Return KL of B from A in nats, of what either lists and of the rest as one outcome; the least that both allow.

    What a side does not list is no more probable than the last that it does, and all of it together no more than is
    left of 1. Within these bounds it is taken to be as the other side has it.
    """
    whole_a, whole_b = _completed(a, b), _completed(b, a)
    pairs = [(whole_a[token], whole_b[token]) for token in whole_a]
    pairs.append((1 - sum(whole_a.values()), 1 - sum(whole_b.values())))
    floored = [(max(x, _FLOOR), max(y, _FLOOR)) for x, y in pairs]
    sum_a, sum_b = (sum(column) for column in zip(*floored, strict=True))
    found = sum(x / sum_a * math.log((x / sum_a) / (y / sum_b)) for x, y in floored)
    return max(0.0, float(found))


def _completed(mine: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Return the probabilities of both lists' tokens; those that `mine` lacks are as near to the other's as can be."""
    left, others_left = (max(0.0, 1 - sum(one.values())) for one in (mine, other))
    lacking = {token: share for token, share in other.items() if token not in mine}
    last, whole = min(mine.values(), default=1.0), sum(lacking.values()) + others_left
    added = {token: min(last, left * share / whole) if whole else 0.0 for token, share in lacking.items()}
    return {**mine, **added}


def _parting(a: Sequence[TokenStep], b: Sequence[TokenStep], tolerance: float) -> Parting | None:
    apart = 0.0
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x.token == y.token:
            apart = max(apart, abs(x.logprob - y.logprob))
            continue
        other_a, other_b = x.top.get(y.token), y.top.get(x.token)
        margins = (None if other_a is None else x.logprob - other_a, None if other_b is None else y.logprob - other_b)
        apart_here = max(apart, _deviation(x.top, y.top)) if x.top and y.top else apart
        # A tie is one that the noise between the two sides can turn: no wider than what they are apart anyway.
        width = max(NEAR_TIE, 4 * tolerance)
        tie = all(margin is not None and abs(margin) <= width for margin in margins)
        return Parting(index, (x.token, y.token), margins, apart_here, tie)
    if len(a) == len(b) or not a or not b:
        return None
    index = min(len(a), len(b))
    longer = (a if len(a) > len(b) else b)[index].token
    tokens = (longer, "(end)") if len(a) > len(b) else ("(end)", longer)
    return Parting(index, tokens, (None, None), apart, tie=False)


def _told(parting: Parting) -> str:
    wide = [f"{margin:.3g}" if margin is not None else "much" for margin in parting.margins]
    kind = "a near tie" if parting.tie else "a real difference"
    return (
        f"token {parting.index}: {parting.tokens[0]!r} (A prefers it by {wide[0]} nats) and {parting.tokens[1]!r} "
        f"(B by {wide[1]}): {kind}"
    )


def field_pairs(a: JsonMapping, b: JsonMapping) -> list[FieldPair]:
    """Return the comparison of every value of two analyses, by path; a path that one lacks is different there."""
    found = []
    for path in sorted(a.keys() | b.keys()):
        there = path in a and path in b
        x, y = a.get(path), b.get(path)
        exact = there and type(x) is type(y) and x == y
        equal = exact or (there and x is not None and y is not None and rule_for(x).right(x, y))
        found.append(FieldPair(path, exact, equal, overlap(x, y) if there else None))
    return found


def _decisions(a: Observation, b: Observation) -> tuple[dict[str, bool], dict[str, float], dict[str, float]]:
    answers_a, answers_b = a.choices or {}, b.choices or {}
    choices = {name: answers_a[name] == answers_b[name] for name in answers_a if name in answers_b}
    distances, divergences = {}, {}
    for name, shares in (a.decisions or {}).items():
        others = (b.decisions or {}).get(name)
        if others is not None:
            values = shares.keys() | others.keys()
            distances[name] = sum(abs(shares.get(value, 0.0) - others.get(value, 0.0)) for value in values) / 2
            divergences[name] = divergence(shares, others)
    return choices, distances, divergences


def by_field(pairs: Sequence[FieldPair]) -> dict[str, bool]:
    """Return whether the values of each field are equal: those of lists together."""
    found: dict[str, bool] = {}
    for pair in pairs:
        name = field_name(pair.path)
        found[name] = found.get(name, True) and pair.equal
    return found
