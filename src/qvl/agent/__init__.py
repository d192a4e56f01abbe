"""Look first, then find, then recommend: a catalogue, a workflow with a fixed order, and tools for other agents.

The catalogue works by itself. The workflow, the LangChain classes and the MCP server need `pip install 'qvl[agent]'`,
and are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qvl.agent.catalog import Catalog, Retriever
    from qvl.agent.product import Changes, Found, Hit, Problem, Product, Query
    from qvl.agent.steps import Recommendation, StepError
    from qvl.agent.workflow import Recommender

_HOMES: Final = {
    "Catalog": "catalog",
    "Changes": "product",
    "Found": "product",
    "Hit": "product",
    "Problem": "product",
    "Product": "product",
    "Query": "product",
    "Recommendation": "steps",
    "Recommender": "workflow",
    "Retriever": "catalog",
    "StepError": "steps",
}
__all__ = [
    "Catalog",
    "Changes",
    "Found",
    "Hit",
    "Problem",
    "Product",
    "Query",
    "Recommendation",
    "Recommender",
    "Retriever",
    "StepError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
