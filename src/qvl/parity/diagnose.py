"""Recognises why cases part, from what both sides showed and told of themselves."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qvl.media.smart_resize import smart_resize
from qvl.parity.causes import Cause, cause
from qvl.parity.differences import LAYERS, Difference, Layer, template_detail
from qvl.parity.variants import variants

if TYPE_CHECKING:
    from qvl.parity.case import Case
    from qvl.parity.observation import Observation
    from qvl.types import JsonMapping

# Median deviations in nats from float32, as measured on the bundled model: float16 0.01, bfloat16 0.065, int8 0.09 and,
# with bfloat16 beside it, 0.11, one layer with a LoRA of rank 4 0.35. The processor's instructions have a say in these,
# so only what sides tell of themselves makes a cause certain.
DTYPE_MOST: Final = 0.077
QUANTISED_MOST: Final = 0.2
# What sides tell of themselves, by how much it explains.
FACTS: Final = ("adapter", "quantisation", "weights", "dtype")
# How far below the likeliest token a chosen one must lie to be called not chosen greedily.
NOT_GREEDY: Final = 0.02
PATCHES: Final = (14, 16)
_MERGE: Final = 2
# The budget of Qwen3-VL's own preprocessor_config.json.
MIN_PIXELS: Final = 65536
MAX_PIXELS: Final = 16777216
_SYSTEM: Final = re.compile(r"<\|im_start\|>\s*system\s(.*?)<\|im_end\|>\s*", re.DOTALL)
_SYSTEM_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class Evidence:
    """The first evidence for a cause: in words, at another layer than the cause's own, and whether it fits no other.

    `side` is the side, "A" or "B", whose answer alone shows it.
    """

    told: str
    layer: Layer | None = None
    certain: bool = True
    side: str = ""


@dataclass(slots=True)
class Diagnosis:
    """Collects evidence case by case, in bounded memory; `causes` says what it amounts to.

    Args:
        identities: what each side tells of itself.
    """

    identities: tuple[JsonMapping, JsonMapping]
    _seen: Counter[str] = field(default_factory=Counter)
    _evidence: dict[str, Evidence] = field(default_factory=dict)
    _deviations: list[float] = field(default_factory=list)

    def add(self, case: Case, one: Difference, a: Observation, b: Observation) -> None:
        """Take in a compared case. Blocking: a picture that differs is read again."""
        match one.layer:
            case "pixels":
                self._pixels(case, a, b, one.detail)
            case "picture tokens":
                self._picture_tokens(a, b, one.detail)
            case "template":
                self._template(a, b, one.detail)
            case "prompt":
                self._prompt(a, b, one.detail)
            case "log-probabilities" | "decisions" | "text" | "fields":
                self._numbers(one, a, b)

    def _note(self, name: str, told: str, layer: Layer | None = None, *, certain: bool = True, side: str = "") -> None:
        self._seen[name] += 1
        known = self._evidence.setdefault(name, Evidence(told, layer, certain, side))
        if certain and not known.certain:
            self._evidence[name] = Evidence(told, layer, certain, side)

    def _pixels(self, case: Case, a: Observation, b: Observation, detail: str) -> None:
        for place, source in enumerate(case.pictures):
            if place >= min(len(a.pixels), len(b.pixels)) or a.pixels[place] == b.pixels[place]:
                continue
            known = variants(source)
            for name, pixels, side in (("B", b.pixels[place], b), ("A", a.pixels[place], a)):
                made = known.get((side.sizes[place], pixels))
                if made is not None:
                    self._note(made.cause, f"{name} reads {case.id} {made.told}")
                    return
            (width, height), (other_width, other_height) = a.sizes[place], b.sizes[place]
            if (width, height) == (other_height, other_width) and width != height:
                self._note("exif", f"{case.id}: {detail}, width and height exchanged")
            elif (width, height) != (other_width, other_height):
                self._note("budget", f"{case.id}: {detail}", "pixels")
            else:
                self._note("gate", f"{case.id}: {detail}")
            return
        self._note("gate", f"{case.id}: {detail}")

    def _picture_tokens(self, a: Observation, b: Observation, detail: str) -> None:
        counts_a, counts_b = a.picture_tokens or (), b.picture_tokens or ()
        for size, x, y in zip(a.sizes, counts_a, counts_b, strict=False):
            if x == y:
                continue
            patch_a, patch_b = self._patch(0, size, x), self._patch(1, size, y)
            if patch_a and patch_b and patch_a != patch_b:
                told = f"a picture of {size[0]}x{size[1]}: {detail}, as patches of {patch_a} and {patch_b} pixels give"
                self._note("patch", told)
            else:
                self._note("budget", f"a picture of {size[0]}x{size[1]}: {detail}")
            return

    def _patch(self, side: int, size: tuple[int, int], tokens: int) -> int | None:
        """Return the patch size that gives so many tokens: the told one, else the only one of those known that does."""
        told = _patch_size(self.identities[side])
        if told is not None:
            return told
        other = self.identities[1 - side].get("processor")
        rules = other if isinstance(other, Mapping) else {}
        low, high = int(rules.get("min_pixels", MIN_PIXELS)), int(rules.get("max_pixels", MAX_PIXELS))
        fitting = [patch for patch in PATCHES if tokens_of(size, patch, low, high) == tokens]
        return fitting[0] if len(fitting) == 1 else None

    def _template(self, a: Observation, b: Observation, detail: str) -> None:
        (system_a, rest_a), (system_b, rest_b) = (without_system(one.template or "") for one in (a, b))
        if system_a != system_b:
            self._note("system", f"A has {_quoted(system_a)}, B {_quoted(system_b)}")
        if rest_a != rest_b:
            self._note("template", template_detail(rest_a, rest_b) if system_a != system_b else detail)
        elif system_a == system_b:
            self._note("template", detail)

    def _prompt(self, a: Observation, b: Observation, detail: str) -> None:
        if a.prompt_ids and b.prompt_ids and a.template is not None and b.template is not None:
            self._note("tokenizer", detail)
            return
        # Without the text of both, the ids do not tell a template from a tokenizer; without the pictures' tokens, the
        # count may be theirs.
        pictures = None in (a.picture_tokens, b.picture_tokens) and bool(a.sizes or b.sizes)
        self._note("prompt", detail, certain=not pictures)

    def _numbers(self, one: Difference, a: Observation, b: Observation) -> None:
        for name, side in (("B", b), ("A", a)):
            place = not_greedy(side)
            if place is not None:
                token = side.steps[place]
                self._note(
                    "sampling",
                    f"{name} writes {token.token!r} as token {place} of {one.case}, though "
                    f"{max(token.top, key=lambda t: token.top[t])!r} is likelier",
                    # Until it is asked twice, it may be a penalty.
                    certain=False,
                    side=name,
                )
                return
        shorter = _shorter(one, a, b) if one.layer == "text" else None
        if shorter is not None:
            # That the longer one met a limit says nothing of why the shorter one ended.
            name = "length" if shorter.finish_reason == "length" else "stop"
            ends = [f"{side.finish_reason or 'ended'} after {_length(side)}" for side in (a, b)]
            self._note(name, f"{one.case}: {ends[0]}, {ends[1]}", certain=shorter.finish_reason in ("length", "stop"))
            return
        if one.near_tie:
            self._note("near-ties", one.detail)
            return
        if one.deviation is not None:
            self._deviations.append(one.deviation)
        else:
            self._deviations += list(one.distances.values())
        self._note("numbers", one.detail)

    def causes(self) -> list[Cause]:
        """Return what was recognised, by layer and number of cases."""
        found = []
        # Where an answer ends is as much of chance as its words.
        by_chance = ("stop", "length") if "sampling" in self._evidence else ()
        for name, count in self._seen.items():
            known = self._evidence[name]
            if name != "numbers" and name not in by_chance:
                found.append(cause(name, known.told, count, certain=known.certain, layer=known.layer))
        if self._seen["numbers"]:
            found.append(self._of_numbers(self._seen["numbers"]))
        return sorted(found, key=lambda one: (LAYERS.index(one.layer), -one.cases))

    def samples(self, side: str) -> bool:
        """Return whether the evidence for "sampling" is an answer of `side`, "A" or "B"."""
        return "sampling" in self._evidence and self._evidence["sampling"].side == side

    def _of_numbers(self, cases: int) -> Cause:
        """Return the cause of other numbers from equal prompts: as the sides tell, else by how far they lie apart."""
        typical = statistics.median(self._deviations) if self._deviations else 0.0
        told = f"equal prompts, log-probabilities {typical:.3g} nats apart (median of the largest in each case)"
        patches = [_patch_size(identity) for identity in self.identities]
        if None not in patches and patches[0] != patches[1]:
            return cause("patch", f"{told}; A cuts patches of {patches[0]} pixels, B of {patches[1]}", cases)
        # A quantised checkpoint is other weights too, and computes in another dtype.
        for fact in FACTS:
            if self._told_apart(fact):
                a, b = (identity[fact] for identity in self.identities)
                revisions = [identity.get("revision") for identity in self.identities]
                more = f" (revisions {revisions[0]} and {revisions[1]})" if fact == "weights" and any(revisions) else ""
                return cause(fact, f"{told}; A has {fact} {a}, B {b}{more}", cases)
        # What both tell alike is not what parts them.
        sizes = (("dtype", DTYPE_MOST), ("quantisation", QUANTISED_MOST), ("adapter", math.inf), ("weights", math.inf))
        for name, most in sizes:
            if typical <= most and self._may_part(name):
                return cause(name, told, cases, certain=False)
        return cause("kernels", f"{told}; both tell the same weights and dtype", cases, certain=False)

    def _may_part(self, name: str) -> bool:
        """Whether what a side does not tell may be another `name`; an adapter only where the other has one."""
        told = [identity[name] for identity in self.identities if name in identity]
        return any(told) if name == "adapter" else len(told) < 2

    def _told_apart(self, name: str) -> bool:
        a, b = (identity.get(name, ...) for identity in self.identities)
        return a is not ... and b is not ... and a != b


def without_system(template: str) -> tuple[str | None, str]:
    """Return (the text of a prompt's first system message, the prompt without that message)."""
    found = _SYSTEM.search(template)
    if found is None:
        return None, template
    return found[1].strip(), template[: found.start()] + template[found.end() :]


def _quoted(system: str | None) -> str:
    return "no system message" if system is None else f"the system message {system[:_SYSTEM_SHOWN]!r}"


def _shorter(one: Difference, a: Observation, b: Observation) -> Observation | None:
    """Return the answer that ends where the other goes on; None where they part otherwise."""
    if one.parting is not None:
        return None if "(end)" not in one.parting.tokens else a if one.parting.tokens[0] == "(end)" else b
    # A side may tell no tokens.
    if a.fields is None and b.fields is None and a.text != b.text:
        return a if b.text.startswith(a.text) else b if a.text.startswith(b.text) else None
    return None


def _length(one: Observation) -> str:
    return f"{len(one.steps) or one.completion_tokens} tokens"


def tokens_of(size: tuple[int, int], patch: int, low: int = MIN_PIXELS, high: int = MAX_PIXELS) -> int:
    """Return how many tokens a picture of (width, height) takes with patches of `patch` pixels, within the budget."""
    factor = patch * _MERGE
    height, width = smart_resize(size[1], size[0], factor, low, high)
    return height * width // factor**2


def _patch_size(identity: JsonMapping) -> int | None:
    rules = identity.get("processor")
    size = rules.get("patch_size") if isinstance(rules, Mapping) else None
    return size if isinstance(size, int) else None


def not_greedy(one: Observation) -> int | None:
    """Return the index of the first token that is not the likeliest of its own list; None if all are, or unknown.

    Answers under a schema are left out: a grammar forbids likelier tokens.
    """
    if one.fields is not None:
        return None
    for place, step in enumerate(one.steps):
        if step.top and step.logprob < max(step.top.values()) - NOT_GREEDY:
            return place
    return None
