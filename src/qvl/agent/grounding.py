"""Grounded answers: a model writes about numbered products; names, prices and ids are filled in from the catalogue.

The model's text is checked and refused if it has an unknown product number, a price, or a name that is neither in the
hits nor in the customer's words. False alarms are preferred to missed inventions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qvl.agent.catalog.index import text_fields
from qvl.agent.catalog.tokenize import fold, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from qvl.agent.catalog.product import AnalysisRecord, Hit

SYSTEM: Final = (
    "You advise a customer of a shop. The products that were found are numbered. Recommend the best of them in two or "
    "three sentences, in the customer's language. Refer to a product only by its number in brackets, such as [1]. "
    "Never write names, brands, ids, prices or other numbers: the shop puts them in for you."
)
AGAIN: Final = (
    "That cannot be shown to the customer: {problem}. Write it again, with products only as [1], [2] and so on."
)
_REFERENCE: Final = re.compile(r"\[(\d{1,4})\]")
_QUOTED: Final = re.compile(r"[\"“”«»《》「」『』]([^\"“”«»《》「」『』]{2,80})[\"“”«»《》「」『』]")
_TOKEN: Final = re.compile(r"[^\W_][\w'’\-]*")
_STARTING: Final = """
a all also although an and another any as at based because best both but by choose consider customers each either
    enjoy finally first for found from given go good great here however i if in it its looking next no not nothing of on
    one our perfect pick since so sorry take thank thanks that the their then there these they this those to try two we
    what when which while with would yes you your yours unfortunately prefer ideal similar alternatively
    o a os as um uma este esta estes estas se para com em recomendo também el la los las un una esta este estos estas
    si para con en recomiendo también por
"""
_STARTERS: Final = frozenset(_STARTING.split())


def facts(hits: Sequence[Hit]) -> str:
    """Return the hits as text for the prompt: numbered, without ids."""
    lines = []
    for number, hit in enumerate(hits, 1):
        item = hit.product
        known = [item.category, *(f"{name} {value}" for name, value in item.attributes.items()), item.price_text]
        lines.append(
            f"[{number}] {'; '.join(filter(None, known))} (found because {', '.join(hit.why) or 'it is near'})"
        )
    return "\n".join(lines)


def question(analysis: AnalysisRecord, wish: str, hits: Sequence[Hit]) -> str:
    """Return the user prompt about the hits."""
    says = f"The customer says: {wish.strip()}" if wish.strip() else "The customer has no further wish."
    unsure = cannot_tell(analysis)
    shows = f"The picture shows: {describe(analysis)}.{f' {unsure} for sure.' if unsure else ''}"
    return f"{shows}\n{says}\nProducts found, best first:\n{facts(hits)}"


def problem(
    text: str, hits: Sequence[Hit], known: Sequence[str], is_brand: Callable[[str], bool], *, references: bool = True
) -> str | None:
    """Return the reason why the model's `text` must not reach the customer; None if it may.

    Args:
        known: texts whose words are allowed besides those of the hits: the analysis and the wish.
        is_brand: returns True for a brand of the catalogue.
        references: True if products must be written as [1]; else their names, prices and ids are allowed.
    """
    cited = [int(number) for number in _REFERENCE.findall(text)]
    if references and hits and not cited:
        return "it refers to no product"
    for number in cited:
        if not 1 <= number <= len(hits):
            return f"there is no product [{number}]"
    fields = [
        field for hit in hits for name, field in text_fields(hit.product).items() if references is False or name != "id"
    ]
    if not references:
        fields += [hit.product.price_text for hit in hits]
    allowed = {word for text_of in (*fields, *known) for word, _ in words(fold(text_of))}
    plain = _REFERENCE.sub(" ", text)
    for quoted in _QUOTED.findall(plain):
        if any(word not in allowed for word, _ in words(fold(quoted))):
            return f"{quoted!r} is not one of the products"
    return _unknown_word(plain, allowed, is_brand)


def _unknown_word(text: str, allowed: set[str], is_brand: Callable[[str], bool]) -> str | None:
    start = True
    end = 0
    for token in _TOKEN.finditer(text):
        between = text[end : token.start()]
        start = start or bool(re.search(r"[.!?:;。！？：；\n•*]|^\s*[-\"“]", between))
        end = token.end()
        for part in re.split(r"[-'’]", token.group()):
            folded = [word for word, _ in words(fold(part))]
            if not folded or all(word in allowed for word in folded):
                continue
            if any(char.isdigit() for char in part):
                return f"the number {part!r} is not the shop's"
            if any(is_brand(word) for word in folded):
                return f"{part!r} is not one of the products"
            named = part[:1].isupper() and part not in ("I",)
            if named and not (start and not part[1:].isupper() and folded[0] in _STARTERS):
                return f"{part!r} is not one of the products"
        start = False
    return None


def filled(text: str, hits: Sequence[Hit]) -> str:
    """Return the text with each reference [1] replaced by the product's label."""
    return _REFERENCE.sub(lambda reference: label(hits[int(reference.group(1)) - 1]), text)


def label(hit: Hit) -> str:
    """Return the product's name, price and id as text for the customer."""
    item = hit.product
    return f"{item.name} ({', '.join(filter(None, (item.price_text, item.id)))})"


def template(analysis: AnalysisRecord, hits: Sequence[Hit]) -> str:
    """Return the answer made from a template, without a model."""
    if shows_nothing(analysis):
        unsure = cannot_tell(analysis)
        return f"{unsure or 'The picture shows no product that could be recognised'}, so nothing is recommended."
    shows = ". ".join(filter(None, (f"The picture shows {describe(analysis)}", cannot_tell(analysis)))) + "."
    if not hits:
        return f"{shows} The catalogue has nothing like it."
    lines = [f"{number}. {label(hit)}: {', '.join(hit.why) or 'near it'}" for number, hit in enumerate(hits, 1)]
    return "\n".join([f"{shows} The catalogue has:", *lines])


def shows_nothing(analysis: AnalysisRecord) -> bool:
    return not analysis.get("category") and not analysis.get("brand")


def cannot_tell(analysis: AnalysisRecord) -> str:
    """Return which fields are too unsure to be told, as a sentence without its full stop; "" if all are told."""
    names = [path.removeprefix("attributes.") for path in analysis.get("abstained") or {}]
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"I cannot tell the {listed}"


def describe(analysis: AnalysisRecord) -> str:
    """Return an analysis in a few words: "NORVIK mug (color red)"."""
    named = " ".join(filter(None, (analysis.get("brand"), analysis.get("category")))) or "no product"
    attributes = ", ".join(f"{name} {value}" for name, value in (analysis.get("attributes") or {}).items())
    return f"{named} ({attributes})" if attributes else named
