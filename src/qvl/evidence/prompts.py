"""The prompts that ask for boxes and points: versioned, and part of the cache key.

A changed prompt changes the answers, so every edit must raise its version. The bundled model is trained on these texts,
which are imported there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

Convention: TypeAlias = Literal["0-1000", "pixels"]
"""How a model writes coordinates: as thousandths of width and height, or as pixels of the picture as resized for it."""

LOCATE_VERSION: Final = "1"
EVIDENCE_VERSION: Final = "1"

_COORDINATES: Final[dict[Convention, str]] = {"0-1000": "coordinates from 0 to 1000", "pixels": "coordinates in pixels"}
_EVIDENCE: Final[dict[str, dict[Convention, str]]] = {
    "en": {
        "0-1000": (
            "At the end, evidence: for each field the box [x1, y1, x2, y2] where it is seen, "
            "coordinates from 0 to 1000, or null."
        ),
        "pixels": (
            "At the end, evidence: for each field the box [x1, y1, x2, y2] where it is seen, "
            "coordinates in pixels, or null."
        ),
    },
    "zh": {
        "0-1000": "最后给出 evidence：每个字段在图上所见之处的框 [x1, y1, x2, y2]，坐标从 0 到 1000，看不到则为 null。",
        "pixels": "最后给出 evidence：每个字段在图上所见之处的框 [x1, y1, x2, y2]，坐标以像素为单位，看不到则为 null。",
    },
    "pt": {
        "0-1000": (
            "No fim, evidence: para cada campo a caixa [x1, y1, x2, y2] onde é visto, coordenadas de 0 a 1000, ou null."
        ),
        "pixels": (
            "No fim, evidence: para cada campo a caixa [x1, y1, x2, y2] onde é visto, coordenadas em pixels, ou null."
        ),
    },
    "es": {
        "0-1000": (
            "Al final, evidence: para cada campo el recuadro [x1, y1, x2, y2] donde se ve, "
            "coordenadas de 0 a 1000, o null."
        ),
        "pixels": (
            "Al final, evidence: para cada campo el recuadro [x1, y1, x2, y2] donde se ve, "
            "coordenadas en píxeles, o null."
        ),
    },
}

PAGES_VERSION: Final = "1"
_PAGES: Final[dict[str, str]] = {
    "en": "At the end, page_of: for each field the number of the page that tells it, or null.",
    "zh": "最后给出 page_of：每个字段所在的页码，没有则为 null。",
    "pt": "No fim, page_of: para cada campo o número da página que o informa, ou null.",
    "es": "Al final, page_of: para cada campo el número de la página que lo indica, o null.",
}


def pages_sentence(language: str) -> str:
    """Return the sentence that asks for the page of each field of an analysis."""
    return _PAGES[language]


def locate_prompt(targets: Sequence[str], *, points: bool = False, convention: Convention = "0-1000") -> str:
    """Return the text of the user's turn that follows the picture; there is no system turn.

    The answer is a JSON list in the order of the targets, then by x1 (or x), with each target's own words as the label.
    """
    form = '{"point_2d": [x, y], "label": "..."}' if points else '{"bbox_2d": [x1, y1, x2, y2], "label": "..."}'
    return (
        f"Locate every instance of: {'; '.join(targets)}. Answer with a JSON list of {form}, "
        f"{_COORDINATES[convention]}. Answer [] if there is none."
    )


def evidence_sentence(language: str, convention: Convention = "0-1000") -> str:
    """Return what follows the prompt of an analysis, behind a space, so that its answer ends with `evidence`.

    `evidence` is an object with the name of each field of the answer, in their order, and a box or null for each.
    """
    return _EVIDENCE[language][convention]
