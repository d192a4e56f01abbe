"""The recommender's question about each hit, whether it fits the wish, and the order that the answers give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qvl.agent import grounding
from qvl.decisions.questions import Predicate

if TYPE_CHECKING:
    from qvl.agent.catalog.product import AnalysisRecord, Hit
    from qvl.decisions.answers import Decision

UNLEARNT = "the bundled model has learnt no such questions, so its order of the products says nothing"


def context(analysis: AnalysisRecord, wish: str) -> str:
    """Return what all questions are about: what the picture shows, and what the customer says."""
    says = f"The customer says: {wish.strip()}" if wish.strip() else "The customer wants something like it."
    return f"The picture shows: {grounding.describe(analysis)}.\n{says}"


def questions(hits: Sequence[Hit]) -> list[Predicate]:
    """Return the question about each hit, with what the catalogue says of it."""
    asked = []
    for hit in hits:
        item = hit.product
        known = [item.name, item.brand, item.category, *(f"{name} {text}" for name, text in item.attributes.items())]
        told = "; ".join(filter(None, (*known, item.price_text)))
        asked.append(Predicate(f"A product of the shop: {told}.\nDoes this product fit the wish?"))
    return asked


def ordered(hits: Sequence[Hit], answers: Iterable[Decision]) -> list[Hit]:
    """Return the hits by how probably they fit; equal ones, and last those without an answer, as they were."""
    fitting = []
    for hit, answer in zip(hits, answers, strict=True):
        fit = answer.probability
        if fit is None and isinstance(answer.value, bool):
            fit = float(answer.value)
        fitting.append(dataclasses.replace(hit, fit=fit))
    return sorted(fitting, key=lambda hit: -1.0 if hit.fit is None else hit.fit, reverse=True)
