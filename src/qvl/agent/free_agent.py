"""A free-form LangChain agent with the same tools; every picture is analyzed first, and answers are checked.

agent = build_agent(Pipeline("openai:qwen3-vl", base_url="…"), catalog)
agent.invoke({"messages": [HumanMessage([picture_block, {"type": "text", "text": "What do you have like it?"}])]})
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Final, NotRequired, TypeAlias, TypedDict, cast

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse, hook_config
from langchain.tools import ToolRuntime, tool
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.runtime import Runtime
from langgraph.types import Checkpointer
from pydantic import Field
from structlog.contextvars import bound_contextvars

from qvl.agent import grounding
from qvl.agent.catalog.catalog import Catalog
from qvl.agent.catalog.product import AnalysisRecord, Hit, HitRecord, Query
from qvl.agent.integrations.langchain import QvlChatModel
from qvl.agent.integrations.langchain_messages import to_qvl
from qvl.errors import ConfigError, QvlError
from qvl.ids import new_request_id
from qvl.pipeline.parse_parts import UnreadPicture
from qvl.pipeline.sync_pipeline import Pipeline

if TYPE_CHECKING:
    from langchain.agents.middleware.types import InputAgentState, OutputAgentState
    from langgraph.graph.state import CompiledStateGraph

SYSTEM: Final = (
    "You advise a customer of a shop. Every picture is analysed before you speak. Search the catalogue before you "
    "recommend, and name only products that search_products returned, with ids and prices as they are there."
)
MAX_STEPS: Final = 8
# LangGraph then hands on what a node returns, and not the words of a model before they are checked.
_UNSTREAMED: Final = "nostream"
_WITHDRAWN: Final = "(withdrawn)"
Speak: TypeAlias = Callable[[ModelRequest], ModelResponse]
SpeakAsync: TypeAlias = Callable[[ModelRequest], Awaitable[ModelResponse]]


class RunState(AgentState):
    """The state of a run: its messages, and the request id that all its requests share."""

    request_id: NotRequired[str]


class SearchResult(TypedDict, total=False):
    """The result of `search_products`; a failed search has only `error`."""

    products: list[HitRecord]
    notes: list[str]
    error: str


def build_agent(
    pipeline: Pipeline,
    catalog: Catalog,
    *,
    model: BaseChatModel | None = None,
    max_steps: int = MAX_STEPS,
    checkpointer: Checkpointer = None,
) -> CompiledStateGraph[AgentState, None, InputAgentState, OutputAgentState]:
    """Return a compiled LangGraph agent.

    Args:
        pipeline: analyzes the pictures, and is the chat model unless `model` is given.
        model: any LangChain chat model that can call tools. Its text is not streamed, since it is checked first.
        max_steps: the most model turns per run; then the run ends with a list of the found products.
    """
    if max_steps < 1:
        raise ConfigError(f"max_steps={max_steps} must be larger", hint="1 or more", param="max_steps")
    middleware: list[AgentMiddleware[RunState]] = [LookFirst(pipeline), Grounded(catalog, max_steps)]
    speaker = model or QvlChatModel(pipeline=pipeline)
    return create_agent(
        speaker.model_copy(update={"tags": [*(speaker.tags or []), _UNSTREAMED]}),
        build_tools(pipeline, catalog),
        system_prompt=SYSTEM,
        middleware=middleware,
        checkpointer=checkpointer,
    )


def build_tools(pipeline: Pipeline, catalog: Catalog) -> list[BaseTool]:
    """Return `analyze_image` and `search_products`, for any LangChain agent."""

    @tool
    def analyze_image(
        runtime: ToolRuntime,
        picture: Annotated[int, Field(ge=1, description="Which picture of the conversation, from 1.")] = 1,
    ) -> str:
        """Brand, category and attributes of the product on a picture of the conversation, as JSON."""
        pictures = pictures_of(runtime.state["messages"])
        if picture > len(pictures):
            return json.dumps({"error": f"the conversation has {len(pictures)} pictures"})
        try:
            return _analysis(pipeline, pictures[picture - 1], runtime.state.get("request_id"))
        except QvlError as exc:
            return json.dumps({"error": str(exc)}, ensure_ascii=False)

    @tool
    def search_products(
        text: str = "",
        brand: str | None = None,
        category: str | None = None,
        attributes: Annotated[dict[str, str] | None, Field(description='Wishes, such as {"color": "blue"}.')] = None,
        only: Annotated[dict[str, str] | None, Field(description="Conditions every product must meet.")] = None,
        min_price: float | None = None,
        max_price: float | None = None,
        limit: Annotated[int, Field(ge=1, le=20)] = 5,
    ) -> str:
        """Products of the catalogue that fit best, with the reasons for each, as JSON."""
        try:
            query = Query(text, brand, category, attributes or {}, only or {}, min_price, max_price)
            matches = catalog.search(query, limit=limit)
        except QvlError as exc:
            return json.dumps({"error": str(exc)}, ensure_ascii=False)
        result: SearchResult = {"products": [hit.to_json() for hit in matches.hits], "notes": list(matches.notes)}
        return json.dumps(result, ensure_ascii=False)

    return [analyze_image, search_products]


class LookFirst(AgentMiddleware[RunState]):
    """Middleware that runs `analyze_image` on every new picture before the model's first turn.

    All requests of a run, those of a QvlChatModel included, have the same request id.

    Raises:
        QvlError: a picture cannot be analysed; the model is not called.
    """

    state_schema = RunState

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = pipeline

    def before_agent(self, state: RunState, runtime: Runtime) -> dict[str, object]:
        request_id = new_request_id()
        messages = state["messages"]
        known = _analysed_numbers(messages)
        new = [(n, picture) for n, picture in enumerate(pictures_of(messages), 1) if n not in known]
        if not new:
            return {"request_id": request_id}
        calls, answers = [], []
        for number, picture in new:
            call = f"look-{uuid.uuid4().hex[:12]}"
            calls.append(ToolCall(name="analyze_image", args={"picture": number}, id=call))
            analysis = _analysis(self.pipeline, picture, request_id)
            answers.append(ToolMessage(analysis, tool_call_id=call, name="analyze_image"))
        return {"request_id": request_id, "messages": [AIMessage("", tool_calls=calls), *answers]}

    async def abefore_agent(self, state: RunState, runtime: Runtime) -> dict[str, object]:
        return await asyncio.to_thread(self.before_agent, state, runtime)

    def wrap_model_call(self, request: ModelRequest, handler: Speak) -> ModelResponse:
        with bound_contextvars(**_log_context(request.state)):
            return handler(request)

    async def awrap_model_call(self, request: ModelRequest, handler: SpeakAsync) -> ModelResponse:
        with bound_contextvars(**_log_context(request.state)):
            return await handler(request)


class Grounded(AgentMiddleware[RunState]):
    """Middleware that keeps invented products from the user, and ends a run after `max_steps` model turns."""

    def __init__(self, catalog: Catalog, max_steps: int) -> None:
        super().__init__()
        self.catalog = catalog
        self.max_steps = max_steps

    @hook_config(can_jump_to=["end"])
    def before_model(self, state: RunState, runtime: Runtime) -> dict[str, object] | None:
        turns = sum(isinstance(message, AIMessage) and not _is_look(message) for message in _run(state["messages"]))
        if turns < self.max_steps:
            return None
        text = f"{self._template(state['messages'])}\n(The run was ended after {turns} steps.)"
        return {"messages": [AIMessage(text)], "jump_to": "end"}

    def wrap_model_call(self, request: ModelRequest, handler: Speak) -> ModelResponse:
        """Check the model's text before anything else uses it, and retry once if it invents something."""
        response = handler(request)
        wrong = self._problem(request, response)
        return self._safe(request, response if wrong is None else handler(_again(request, wrong)))

    async def awrap_model_call(self, request: ModelRequest, handler: SpeakAsync) -> ModelResponse:
        response = await handler(request)
        wrong = self._problem(request, response)
        return self._safe(request, response if wrong is None else await handler(_again(request, wrong)))

    @hook_config(can_jump_to=["model"])
    def after_model(self, state: RunState, runtime: Runtime) -> dict[str, object] | None:
        last = state["messages"][-1]
        if not isinstance(last, AIMessage) or last.tool_calls or not last.invalid_tool_calls:
            return None
        errors = [
            ToolMessage(
                f"the arguments are not a JSON object: {bad['error']}", tool_call_id=bad["id"] or "", status="error"
            )
            for bad in last.invalid_tool_calls
        ]
        return {"messages": errors, "jump_to": "model"}

    def _problem(self, request: ModelRequest, response: ModelResponse) -> str | None:
        """Return the fault of an answer; None if it is valid or calls tools."""
        last = response.result[-1]
        if not isinstance(last, AIMessage) or last.tool_calls or last.invalid_tool_calls:
            return None
        return self._invented(request.messages, last.text) if last.text.strip() else "it is empty"

    def _safe(self, request: ModelRequest, response: ModelResponse) -> ModelResponse:
        """Return the response with its references filled in, or without its text if that cannot be shown."""
        last = response.result[-1]
        if not isinstance(last, AIMessage):
            return response
        if last.tool_calls or last.invalid_tool_calls:
            # Beside its calls a model may think aloud, of things that no search has found yet.
            text = "" if self._invented(request.messages, last.text) else last.text
        elif self._problem(request, response) is not None:
            text = self._template(request.messages)
        else:
            text = grounding.filled(last.text, hits_of(request.messages))
        return dataclasses.replace(response, result=[*response.result[:-1], last.model_copy(update={"content": text})])

    def _invented(self, messages: Sequence[BaseMessage], text: str) -> str | None:
        known = [*map(grounding.describe, analyses_of(messages))]
        known += [message.text for message in messages if isinstance(message, HumanMessage)]
        return grounding.problem(text, hits_of(messages), known, partial(self.catalog.has, "brand"), references=False)

    def _template(self, messages: Sequence[BaseMessage]) -> str:
        hits = hits_of(messages)
        if analyses := analyses_of(messages):
            return grounding.template(analyses[-1], hits)
        lines = [f"{number}. {grounding.label(hit)}" for number, hit in enumerate(hits, 1)]
        return "\n".join(["The catalogue has:", *lines]) if lines else "Nothing was found in the catalogue."


def pictures_of(messages: Sequence[BaseMessage]) -> list[UnreadPicture]:
    """Return all pictures of user messages, in order."""
    users = [message for message in messages if isinstance(message, HumanMessage) and isinstance(message.content, list)]
    return [part for message in to_qvl(users) for part in message["content"] if isinstance(part, UnreadPicture)]


def analyses_of(messages: Sequence[BaseMessage]) -> list[AnalysisRecord]:
    results = (cast("AnalysisRecord", json.loads(message.text)) for message in _answers(messages, "analyze_image"))
    return [analysis for analysis in results if "category" in analysis]


def hits_of(messages: Sequence[BaseMessage]) -> list[Hit]:
    """Return the hits of the latest search of the conversation, then those of earlier ones."""
    hits: dict[str, Hit] = {}
    for message in reversed(_answers(messages, "search_products")):
        result: SearchResult = json.loads(message.text)
        for hit in map(Hit.from_json, result.get("products", [])):
            hits.setdefault(hit.product.id, hit)
    return list(hits.values())


def _analysed_numbers(messages: Sequence[BaseMessage]) -> set[int]:
    """Return the numbers (from 1) of the conversation's pictures that have an analysis."""
    answers = {message.tool_call_id for message in _answers(messages, "analyze_image") if analyses_of([message])}
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    return {call["args"].get("picture", 1) for call in calls if call["id"] in answers}


def _again(request: ModelRequest, wrong: str) -> ModelRequest:
    """Return the request with a message about the fault `wrong`; the answer itself is not repeated to the model."""
    reminder = f"That cannot be shown to the customer: {wrong}. Use only what the tools returned."
    return request.override(messages=[*request.messages, AIMessage(_WITHDRAWN), HumanMessage(reminder)])


def _answers(messages: Sequence[BaseMessage], name: str) -> list[ToolMessage]:
    return [
        message
        for message in messages
        if isinstance(message, ToolMessage) and message.name == name and message.status == "success"
    ]


def _run(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """Return the messages since the last user message, the latest first."""
    return list(takewhile(lambda message: not isinstance(message, HumanMessage), reversed(messages)))


def _is_look(message: AIMessage) -> bool:
    """True for a message with LookFirst's tool calls."""
    return any((call["id"] or "").startswith("look-") for call in message.tool_calls)


def _log_context(state: AgentState) -> dict[str, str]:
    """Return variables for the log context, from which QvlChatModel takes its request id."""
    request_id = cast("RunState", state).get("request_id")
    return {"request_id": request_id} if request_id else {}


def _analysis(pipeline: Pipeline, picture: UnreadPicture, request_id: str | None) -> str:
    value = pipeline.analyze(picture, request_id=request_id)
    told = {"brand", "category", "attributes"} | ({"abstained"} if value.abstained else set())
    return value.model_dump_json(include=told)
