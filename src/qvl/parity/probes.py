"""Probes of a live side: does it repeat itself, alone and in a batch; how does it read pictures that qvl did not."""

from __future__ import annotations

import asyncio
import hashlib
import io
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qvl.media.picture import Picture
from qvl.parity.case import Case
from qvl.parity.causes import Cause, cause
from qvl.parity.diagnose import not_greedy
from qvl.parity.differences import Difference, differ
from qvl.parity.variants import on_colour

if TYPE_CHECKING:
    from PIL import Image

    from qvl.parity.observation import Observation
    from qvl.parity.sides import LiveSide

BATCH: Final = 8
_ASKED: Final = "What is shown?"
# Its width and height are multiples of 28 and of 32, so that no processor resizes it to another shape.
_SIZE: Final = (448, 224)
_TURNED: Final = 6
_ORIENTATION: Final = 0x0112


async def probe_repeats(side: LiveSide, cases: Sequence[Case], tolerance: float) -> list[Cause]:
    """Return what a side that disagrees with itself suffers from; asks `cases` alone, again, and at once.

    A side is asked three times alone (twice with the same prefix) and once in a batch of BATCH.
    """
    salted = "cache_salt" in side.backend.capabilities.fields or side.backend.name == "local"

    def salt() -> str:
        return secrets.token_hex(8) if salted else ""

    alone: list[Observation] = []
    found: dict[str, Cause] = {}
    for case in cases[:BATCH]:
        mine = salt()
        first = await side.observe(case, salt=mine)
        again = await side.observe(case, salt=salt())
        cached = await side.observe(case, salt=mine)
        alone.append(first)
        if _parts(parted := differ(first, again, tolerance)):
            place = not_greedy(first)
            name = "sampling" if place is not None or not_greedy(again) is not None or _same_start(parted) else "batch"
            found.setdefault(name, _seen(name, f"{case.id}, asked alone twice", parted))
        elif salted and _parts(parted := differ(first, cached, tolerance)):
            found.setdefault("prefix-cache", _seen("prefix-cache", f"{case.id}, its prefix cached", parted))
    many = [cases[number % len(cases)] for number in range(BATCH)]
    together = await asyncio.gather(*(side.observe(case, salt=salt()) for case in many))
    if not found:
        for case, one in zip(many, together, strict=True):
            mine_alone = next((other for other in alone if other.case == case.id), None)
            if mine_alone is not None and _parts(parted := differ(mine_alone, one, tolerance)):
                found.setdefault("batch", _seen("batch", f"{case.id}, alone and among {BATCH}", parted))
    return list(found.values())


def _seen(name: str, how: str, parted: Difference) -> Cause:
    """Return the cause; a certain one where the answers differ, not their probabilities alone."""
    return cause(name, f"{how}: {parted.detail}", 1, certain=parted.layer != "log-probabilities")


def _parts(one: Difference) -> bool:
    return one.layer is not None and not one.near_tie


def _same_start(one: Difference) -> bool:
    """Whether the first tokens are as likely in both, so that only the choice among them differs."""
    return one.layers.get("log-probabilities", False)


async def probe_pictures(side: LiveSide, tolerance: float) -> list[Cause]:
    """Return how a side misreads pictures that qvl did not make upright and opaque before.

    It is shown one picture as a camera or a designer stores it, and as each way of reading would have it; the answers'
    first tokens tell which of them it took. Sides that are given pixels read nothing themselves.
    """
    if side.backend.wants_pixels:
        return []
    found = []
    for name, stored, readings in (_exif_probe(), _alpha_probe()):
        seen = await _shown(side, stored)
        right, *wrong = [(told, await _shown(side, picture)) for told, picture in readings]
        if seen.error or right[1].error or _same(seen, right[1], tolerance):
            continue
        told = next((told for told, other in wrong if _same(seen, other, tolerance)), None)
        evidence = f"a picture sent to it as it is stored is answered like one {told or 'read in an unknown way'}"
        found.append(cause(name, f"{evidence}; qvl's own requests are not affected", certain=told is not None))
    return found


async def _shown(side: LiveSide, picture: Picture) -> Observation:
    return await side.observe(Case("probe", (picture,), question=_ASKED))


def _same(a: Observation, b: Observation, tolerance: float) -> bool:
    if a.prompt_tokens != b.prompt_tokens:
        return False
    parted = differ(a, b, tolerance)
    told = parted.layers.get("log-probabilities")
    return a.text == b.text if told is None else told


def _exif_probe() -> tuple[str, Picture, list[tuple[str, Picture]]]:
    from PIL import Image

    image = _drawn().convert("RGB")
    exif = Image.Exif()
    exif[_ORIENTATION] = _TURNED
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as decoded:
        as_stored = decoded.convert("RGB")
    upright = as_stored.transpose(Image.Transpose.ROTATE_270)
    stored = _raw(buffer.getvalue(), "image/jpeg", as_stored.size)
    return "exif", stored, [("upright", _png(upright)), ("without its EXIF orientation", _png(as_stored))]


def _alpha_probe() -> tuple[str, Picture, list[tuple[str, Picture]]]:
    from PIL import Image

    image = _drawn()
    mask = Image.linear_gradient("L").resize(image.size)
    image.putalpha(mask)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    readings = [
        ("on white", _png(on_colour(image, 255))),
        ("with its alpha laid on black", _png(on_colour(image, 0))),
        ("with its alpha dropped", _png(image.convert("RGB"))),
    ]
    return "alpha", _raw(buffer.getvalue(), "image/png", image.size), readings


def _drawn() -> Image.Image:
    """Return a picture that is another one when it is turned, mirrored or darkened."""
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", _SIZE, (214, 203, 180, 255))
    canvas = ImageDraw.Draw(image)
    width, height = _SIZE
    canvas.rectangle((20, 20, width // 3, height - 30), fill=(196, 30, 40, 255))
    canvas.polygon(((width // 2, height - 20), (width - 20, height - 20), (width - 40, 30)), fill=(30, 60, 170, 255))
    canvas.ellipse((width // 2 - 30, 16, width // 2 + 50, 96), fill=(240, 200, 30, 255))
    return image


def _png(image: Image.Image) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _raw(buffer.getvalue(), "image/png", image.size)


def _raw(data: bytes, media_type: str, size: tuple[int, int]) -> Picture:
    """Return a picture whose bytes are sent as they are, whatever they say of orientation and alpha."""
    name = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Picture(name, *size, data, media_type, "<probe>", untouched=True)
