"""Probes of one live side by Qwen3-VL's own rules, each with its cause: of `qvl parity`, and of `qvl doctor --url`."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from qvl.media.picture import Picture
from qvl.parity.case import Case
from qvl.parity.causes import Cause, cause
from qvl.parity.diagnose import MAX_PIXELS, MIN_PIXELS, PATCHES, not_greedy, tokens_of, without_system
from qvl.parity.differences import TOLERANCE, differ
from qvl.parity.probes import probe_repeats
from qvl.parity.stored import sample, transparent_picture, turned_picture

if TYPE_CHECKING:
    from PIL import Image

    from qvl.parity.observation import Observation
    from qvl.parity.sides import LiveSide
    from qvl.parity.stored import StoredPicture

_ASKED: Final = "What brand is printed in this picture?"
# Within Qwen3-VL's pixel budget, and of other counts by patches of 16 pixels than by patches of 14.
_SIZES: Final = ((448, 320), (672, 448), (896, 672))
_PROMPT: Final = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
_CONTROL: Final = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe's finding: about what, whether that is right (None: it cannot tell), in words, and the cause if not."""

    subject: str
    right: bool | None
    told: str
    cause: Cause | None = None


@dataclass(frozen=True, slots=True)
class PixelBudget:
    """The least and the most pixels that a picture is shown in; by default those of Qwen3-VL's own processor."""

    low: int = MIN_PIXELS
    high: int = MAX_PIXELS

    def __str__(self) -> str:
        return f"budget of {self.low} to {self.high} pixels"


async def probe_pictures(name: str, side: LiveSide, tolerance: float = TOLERANCE) -> list[Probed]:
    """Return how the side `name` reads pictures that qvl did not make upright and opaque before.

    It is shown one picture as a camera or a designer stores it, and as each way of reading would have it; the answers
    tell which of them it took. Sides that are given pixels read nothing themselves.
    """
    if side.backend.wants_pixels:
        return []
    return [
        await _read(name, side, "exif", "EXIF orientation is applied", turned_picture(), tolerance),
        await _read(name, side, "alpha", "transparency is put on white", transparent_picture(), tolerance),
    ]


async def _read(name: str, side: LiveSide, subject: str, rule: str, picture: StoredPicture, tolerance: float) -> Probed:
    shown = [await _repeated(side, image) for image in (picture.stored, picture.right, *picture.wrong.values())]
    answers = [one for one in shown if one is not None]
    if len(answers) < len(shown):
        return Probed(subject, None, f"whether {rule} cannot be told: one picture has another answer each time")
    seen, right = answers[:2]
    wrong = dict(zip(picture.wrong, answers[2:], strict=True))
    error = next((one.error for one in (seen, right, *wrong.values()) if one.error), None)
    if error is not None:
        return Probed(subject, False, f"a picture of this kind is refused: {error}")
    if all(_nearer(seen, right, other) for other in wrong.values()):
        return Probed(subject, True, rule)
    read = [how for how, other in wrong.items() if _nearer(seen, right, other) is False]
    if not read:
        return Probed(subject, None, f"whether {rule} cannot be told from this model's answers")
    # A picture that is read wrongly may be near to several readings.
    nearest = read[0]
    for how in read[1:]:
        nearest = nearest if _nearer(seen, wrong[nearest], wrong[how]) else how
    told = f"a picture sent to {name} as it is stored is answered as if it were read {nearest}"
    sure = _same(seen, wrong[nearest], tolerance)
    found = cause(subject, f"{told}; qvl's own requests are not affected", certain=sure)
    return Probed(subject, False, told, found)


async def probe_tokens(name: str, side: LiveSide, told: PixelBudget | None = None) -> list[Probed]:
    """Return whether pictures take as many tokens as patches of 16 pixels and a pixel budget give.

    The budget is what the side has `told`, since a smaller one may be meant; else that of Qwen3-VL.
    """
    seen = [await _shown(side, sample().resize(size)) for size in _SIZES]
    error = next((one.error for one in seen if one.error), None)
    if error is not None:
        return [Probed("tokens", None, error)]
    counts = [one.picture_tokens[0] if one.picture_tokens else 0 for one in seen]
    # Of whole prompts only the differences tell of pictures.
    less = 0 if all(counts) else seen[0].prompt_tokens
    counts = counts if all(counts) else [one.prompt_tokens - less for one in seen]
    if not seen[0].prompt_tokens:
        return [Probed("tokens", None, f"{name} tells no count of tokens")]
    fitting, budget = {}, told or PixelBudget()
    for patch in PATCHES:
        wanted = [tokens_of(size, patch, budget.low, budget.high) for size in _SIZES]
        fitting[patch] = [count - (wanted[0] if less else 0) for count in wanted]
    if counts == fitting[16]:
        within = "" if told is None or told == PixelBudget() else f", within the {budget} that {name} tells"
        return [Probed("tokens", True, f"pictures take the tokens of patches of 16 pixels{within}")]
    (width, height), more = _SIZES[-1], f" more than one of {_SIZES[0][0]}x{_SIZES[0][1]}" if less else ""
    rules = "Qwen3-VL's own rules" if told is None else f"the {budget} that it tells"
    seen_as = f"a picture of {width}x{height} takes {counts[-1]} tokens{more}, by {rules} {fitting[16][-1]}"
    if counts == fitting[14]:
        seen_as += "; patches of 14 pixels give that"
    known = "patch" if counts == fitting[14] else "budget"
    return [Probed("tokens", False, seen_as, cause(known, f"{name}: {seen_as}"))]


async def probe_template(name: str, side: LiveSide) -> list[Probed]:
    """Return whether a prompt is in the form of Qwen3-VL's own template, without a system message nobody sent."""
    seen = await _shown(side, sample())
    if seen.error is not None or seen.template is None:
        why = seen.error or f"{name} tells no prompt: neither return_token_ids nor /tokenize, with /detokenize"
        return [Probed("template", None, why)]
    if seen.template.startswith(_PROMPT.format(_ASKED)):
        return [Probed("template", True, "the prompt is as Qwen3-VL's own template writes it")]
    known = "system" if without_system(seen.template)[0] is not None else "template"
    told = f"a question is sent to the model as {seen.template[:160]!r}"
    return [Probed("template", False, told, cause(known, f"{name}: {told}"))]


async def probe_answers(name: str, side: LiveSide, tolerance: float = TOLERANCE) -> list[Probed]:
    """Return whether a side ends its answers, tells probable log-probabilities, and repeats itself."""
    case = Case("probe", (_as_stored(sample()),), question="Describe this picture.")
    seen = await side.observe(case)
    if seen.error is not None:
        return [Probed("repeats", False, f"a picture is not answered: {seen.error}")]
    found = [_end(name, seen), *_logprobs(name, seen)]
    causes = await probe_repeats(name, side, [case], tolerance)
    if not causes and (place := not_greedy(seen)) is not None:
        causes = [cause("penalty", f"{name} writes {seen.steps[place].token!r}, which is not the likeliest, each time")]
    found += [Probed("repeats", False, one.evidence, one) for one in causes]
    if not causes:
        found.append(Probed("repeats", True, "the same request has the same answer, alone and among others"))
    return found


def _end(name: str, seen: Observation) -> Probed:
    written = next((token for token in _CONTROL if token in seen.text), None)
    if written is not None:
        told = f"answers go on behind their end: {seen.text[:80]!r}"
        return Probed("end", False, told, cause("stop", f"{name}: {told}"))
    if seen.finish_reason == "length":
        return Probed("end", None, f"an answer had no end within {seen.completion_tokens} tokens")
    return Probed("end", True, "answers end where the model ends them")


def _logprobs(name: str, seen: Observation) -> list[Probed]:
    """Return what is wrong with the probabilities: above 1 alone or together, or none of a list's."""
    for place, step in enumerate(seen.steps):
        told = [step.logprob, *step.top.values()]
        whole = sum(math.exp(min(value, 1.0)) for value in step.top.values())
        if any(math.isnan(value) or value > 1e-6 for value in told) or whole > 1.001:
            what = f"the probabilities of token {place} add up to {max(whole, math.exp(min(told[0], 1.0))):.3g}"
            return [Probed("logprobs", False, f"{name}: {what}")]
    return []


Probe: TypeAlias = "Callable[[str, LiveSide], Coroutine[object, object, list[Probed]]]"


def probes(told: PixelBudget | None = None) -> tuple[Probe, ...]:
    """Return all probes in the order of the layers; `told` is the pixel budget that the side tells."""
    return (probe_pictures, partial(probe_tokens, told=told), probe_template, probe_answers)


async def _shown(side: LiveSide, image: Image.Image) -> Observation:
    return await side.observe(Case("probe", (_as_stored(image),), question=_ASKED))


async def _repeated(side: LiveSide, image: Image.Image) -> Observation | None:
    """Return the answer to a picture; None if it may be sampled, and is another one when asked for again."""
    seen = await _shown(side, image)
    greedy = any(step.top for step in seen.steps) and not_greedy(seen) is None
    if seen.error is None and not greedy and (await _shown(side, image)).text != seen.text:
        return None
    return seen


def _same(a: Observation, b: Observation, tolerance: float) -> bool:
    if a.prompt_tokens != b.prompt_tokens:
        return False
    parted = differ(a, b, tolerance)
    told = parted.layers.get("log-probabilities")
    return a.text == b.text if told is None else told


def _nearer(seen: Observation, right: Observation, wrong: Observation) -> bool | None:
    """True if `seen` is closer to the right answer than to the wrong one; None if they cannot be told apart."""
    if right.text != wrong.text and seen.text in (right.text, wrong.text):
        return seen.text == right.text
    to_right, to_wrong = _distance(seen, right), _distance(seen, wrong)
    if to_right is None or to_wrong is None or math.isclose(to_right, to_wrong, abs_tol=TOLERANCE):
        return None
    return to_right < to_wrong


def _distance(a: Observation, b: Observation) -> float | None:
    gaps = [abs(left.logprob - right.logprob) for left, right in zip(a.steps, b.steps, strict=False)]
    return sum(gaps) / len(gaps) + (a.text != b.text) if gaps else None


def _as_stored(image: Image.Image) -> Picture:
    """Return a picture whose bytes are sent as they are, whatever they say of orientation and alpha."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())
    data = buffer.getvalue()
    name = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Picture(name, *image.size, data, "image/png", "<probe>", untouched=True)
