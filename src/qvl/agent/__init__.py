"""Look first, then find, then recommend: a catalogue, a workflow with a fixed order, and tools for other agents.

The catalogue works by itself. The workflow, the LangChain classes and the MCP server need the extra `agent`,
and are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog, Retriever
    from qvl.agent.catalog.product import Changes, Found, Hit, Problem, Product, Query
    from qvl.agent.free_agent import build_agent, build_tools
    from qvl.agent.integrations.langchain import QvlCache, QvlChatModel
    from qvl.agent.steps import Recommendation, StepError
    from qvl.agent.workflow import Recommender

_HOMES: Final = {
    "Catalog": "catalog.catalog",
    "Changes": "catalog.product",
    "Found": "catalog.product",
    "Hit": "catalog.product",
    "Problem": "catalog.product",
    "Product": "catalog.product",
    "Query": "catalog.product",
    "QvlCache": "integrations.langchain",
    "QvlChatModel": "integrations.langchain",
    "Recommendation": "steps",
    "Recommender": "workflow",
    "Retriever": "catalog.catalog",
    "StepError": "steps",
    "build_agent": "free_agent",
    "build_tools": "free_agent",
}
__all__ = [
    "Catalog",
    "Changes",
    "Found",
    "Hit",
    "Problem",
    "Product",
    "Query",
    "QvlCache",
    "QvlChatModel",
    "Recommendation",
    "Recommender",
    "Retriever",
    "StepError",
    "build_agent",
    "build_tools",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as exc:
        from qvl.errors import MissingDependencyError
        from qvl.extras import install_line

        raise MissingDependencyError(f"{name} needs the package {exc.name!r}", hint=install_line("agent")) from exc
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
