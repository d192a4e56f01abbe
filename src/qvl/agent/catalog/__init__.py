"""Products: read from files, indexed, ranked, and found by what a customer wishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog, Retriever
    from qvl.agent.catalog.product import Changes, Found, Hit, Problem, Product, Query

__all__ = ["Catalog", "Changes", "Found", "Hit", "Problem", "Product", "Query", "Retriever"]
__getattr__ = lazy(
    __name__,
    {
        ".catalog": ("Catalog", "Retriever"),
        ".product": ("Changes", "Found", "Hit", "Problem", "Product", "Query"),
    },
)
