"""What the agent says about itself, without a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog

_ABOUT: Final = re.compile(
    r"(what (can|do) you (do|know)|what are you|who are you|how (does|do) (this|it|you|i) (work|use)\b.*|"
    r"how can (you|i) .*|what (is|does) this( do)?|what can i (do|ask|say)|(can you )?help( me)?|"
    r"你(能|会|可以)(做|干)?(什么|啥)|你是谁|帮助|(o )?que (você )?(pode|sabe) fazer|quem é você|ajuda|"
    r"¿?qué (puedes|sabes) hacer|¿?quién eres|ayuda)",
    re.I,
)


def asks_about_agent(text: str) -> bool:
    """True if a line asks what the agent can do: in English, Chinese, Portuguese or Spanish."""
    return _ABOUT.fullmatch(text.strip().strip("?？!.。 ")) is not None


def about_agent(catalog: Catalog, writes: bool) -> str:
    """Return what the agent can do with `catalog`, with lines to try; `writes`: a model writes its answers."""
    by = "the model writes the answer, checked against what was found" if writes else "the answer is from a template"
    where = f" of {catalog.path.name}" if catalog.path is not None else ""
    return (
        f"I look at a product's picture, search the {len(catalog):,} products{where} for similar ones, "
        f"and recommend: {by}.\n"
        "  a picture         its path or URL, at any turn, alone or with a wish: mug.png in blue, under 100\n"
        '  a wish            about the last picture: "in blue", "under 100", "cheaper ones?", "not NORVIK"\n'
        "  quit              leaves; Ctrl-C stops an answer"
    )
