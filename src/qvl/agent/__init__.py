"""Product recommendation: a catalogue, a workflow (analyze, search, answer), and tools for other agents.

The catalogue needs no extra. The workflow, the LangChain classes and the MCP server need the extra `agent`,
and are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl._lazy import lazy

if TYPE_CHECKING:
    from qvl.agent.catalog.catalog import Catalog, Retriever
    from qvl.agent.catalog.product import Changes, Hit, Problem, Product, Query, SearchHits
    from qvl.agent.free_agent import build_agent, build_tools
    from qvl.agent.integrations.langchain import QvlCache, QvlChatModel
    from qvl.agent.integrations.langchain_decisions import QvlDecisionModel
    from qvl.agent.integrations.langchain_tools import locate_tool
    from qvl.agent.steps import Recommendation, StepError
    from qvl.agent.workflow import Recommender

__all__ = [
    "Catalog",
    "Changes",
    "Hit",
    "Problem",
    "Product",
    "Query",
    "QvlCache",
    "QvlChatModel",
    "QvlDecisionModel",
    "Recommendation",
    "Recommender",
    "Retriever",
    "SearchHits",
    "StepError",
    "build_agent",
    "build_tools",
    "locate_tool",
]
__getattr__ = lazy(
    __name__,
    {
        ".catalog.catalog": ("Catalog", "Retriever"),
        ".catalog.product": ("Changes", "Hit", "Problem", "Product", "Query", "SearchHits"),
        ".integrations.langchain": ("QvlCache", "QvlChatModel"),
        ".integrations.langchain_decisions": ("QvlDecisionModel",),
        ".integrations.langchain_tools": ("locate_tool",),
        ".steps": ("Recommendation", "StepError"),
        ".workflow": ("Recommender",),
        ".free_agent": ("build_agent", "build_tools"),
    },
    extra="agent",
)


def __dir__() -> list[str]:
    return sorted(__all__)
