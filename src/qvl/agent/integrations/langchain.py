"""`QvlChatModel`: any Pipeline as a LangChain chat model; `QvlCache`: a qvl cache for LangChain's `set_llm_cache`.

model = QvlChatModel(pipeline=Pipeline("openai:qwen3-vl", base_url="http://localhost:8000/v1"))
model.invoke([HumanMessage([{"type": "text", "text": "What is it?"}, {"type": "image", "url": "https://…"}])])
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import aclosing

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, message_to_dict, messages_from_dict
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field
from structlog.contextvars import get_contextvars

from qvl.agent.integrations.langchain_messages import to_qvl
from qvl.agent.integrations.langchain_structured import Structured, sureness
from qvl.caches.base import Cache, CacheEntry
from qvl.errors import CacheError, ConfigError
from qvl.log import logger
from qvl.pipeline.async_pipeline import AsyncPipeline
from qvl.pipeline.sync_pipeline import Pipeline
from qvl.types import Chunk, JsonMapping, JsonObject, Result, Usage

log = logger("qvl.agent")


class QvlChatModel(BaseChatModel):
    """A LangChain chat model over a Pipeline (all methods) or an AsyncPipeline (async methods only).

    `params` are added to every request: SamplingParams fields, `max_pixels`, `response_format`, `extra`, `cache`.
    Pictures are LangChain's standard content blocks, with a URL or base64; file paths are refused.
    With `params={"logprobs": 0}` the `response_metadata` of a JSON answer has `confidence`, `field_confidence` by path
    and `confidence_method`: how likely the model was to write it, since a calibration is of `analyze()`'s prompts.
    A `request_id` bound in structlog's context becomes the request's id, so that all logs of a run share it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    pipeline: Pipeline | AsyncPipeline = Field(default_factory=Pipeline, exclude=True)
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    params: JsonObject = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "qvl"

    @property
    def model_name(self) -> str:
        """The pipeline's model as `backend:model`."""
        inner = self.pipeline.pipeline if isinstance(self.pipeline, Pipeline) else self.pipeline
        backend = inner.backend
        return f"{backend.name}:{backend.model}"

    @property
    def _identifying_params(self) -> JsonObject:
        return {
            "model": self.model_name,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            **self.params,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: object) -> LangSmithParams:
        provider, _, model = self.model_name.partition(":")
        params = LangSmithParams(ls_provider=f"qvl-{provider}", ls_model_name=model, ls_model_type="chat")
        arguments = self._arguments(stop, kwargs)
        if "temperature" in arguments:
            params["ls_temperature"] = arguments["temperature"]
        if "max_tokens" in arguments:
            params["ls_max_tokens"] = arguments["max_tokens"]
        if arguments.get("stop"):
            params["ls_stop"] = list(arguments["stop"])
        return params

    def _arguments(self, stop: list[str] | None, kwargs: JsonMapping) -> JsonObject:
        """Return the parameters of a request: the model's, overridden by those of the call."""
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": self.stop}
        # Not a parameter of the call, or LangChain's cache would take every run for another question.
        own["request_id"] = get_contextvars().get("request_id")
        arguments = {**own, **self.params, **kwargs, **({"stop": stop} if stop else {})}
        # Only LangChain itself reads these.
        ignored = ("ls_structured_output_format", "stream", "strict")
        return {name: value for name, value in arguments.items() if value is not None and name not in ignored}

    def _blocking(self) -> Pipeline:
        if isinstance(self.pipeline, Pipeline):
            return self.pipeline
        raise ConfigError("an AsyncPipeline has only async methods", hint="call ainvoke(), or pass a Pipeline")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: object,
    ) -> ChatResult:
        return _chat_result(self._blocking().chat(to_qvl(messages), **self._arguments(stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: object,
    ) -> ChatResult:
        arguments = self._arguments(stop, kwargs)
        if isinstance(self.pipeline, AsyncPipeline):
            return _chat_result(await self.pipeline.chat(to_qvl(messages), **arguments))
        # A Pipeline lives in a loop of its own.
        return _chat_result(await asyncio.to_thread(self.pipeline.chat, to_qvl(messages), **arguments))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: object,
    ) -> Generator[ChatGenerationChunk]:
        chunks = self._blocking().stream_chat(to_qvl(messages), **self._arguments(stop, kwargs))
        try:
            for chunk in chunks:
                generation = self._generation(chunk)
                if run_manager is not None and generation.text:
                    run_manager.on_llm_new_token(generation.text, chunk=generation)
                yield generation
        finally:
            chunks.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: object,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if isinstance(self.pipeline, Pipeline):
            chunks = self._stream(messages, stop, None, **kwargs)
            try:
                while (generation := await asyncio.to_thread(next, chunks, None)) is not None:
                    if run_manager is not None and generation.text:
                        await run_manager.on_llm_new_token(generation.text, chunk=generation)
                    yield generation
            finally:
                await asyncio.to_thread(chunks.close)
            return
        arguments = self._arguments(stop, kwargs)
        async with aclosing(self.pipeline.stream_chat(to_qvl(messages), **arguments)) as items:
            async for chunk in items:
                generation = self._generation(chunk)
                if run_manager is not None and generation.text:
                    await run_manager.on_llm_new_token(generation.text, chunk=generation)
                yield generation

    def _generation(self, chunk: Chunk) -> ChatGenerationChunk:
        calls = [
            tool_call_chunk(name=delta.name, args=delta.arguments, id=delta.id, index=delta.index)
            for delta in chunk.tool_calls
        ]
        facts: JsonObject = {}
        if chunk.finish_reason is not None:
            facts = {"finish_reason": chunk.finish_reason, "model_name": self.model_name}
        message = AIMessageChunk(
            content=chunk.text,
            tool_call_chunks=calls,
            usage_metadata=_usage(chunk.usage) if chunk.usage is not None else None,
            response_metadata=facts,
            chunk_position="last" if chunk.usage is not None else None,
        )
        return ChatGenerationChunk(message=message, generation_info=facts or None)

    def bind_tools(
        self,
        tools: Sequence[JsonObject | type | Callable[..., object] | BaseTool],
        *,
        tool_choice: str | JsonObject | bool | None = None,
        **kwargs: object,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools; `tool_choice` is "auto", "none", "any" ("required", True), or a tool's name."""
        if isinstance(tool_choice, dict):
            tool_choice = tool_choice.get("function", {}).get("name")
        if tool_choice is True or tool_choice == "any":
            tool_choice = "required"
        if tool_choice:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def with_structured_output(
        self, schema: JsonObject | type, *, include_raw: bool = False, **kwargs: object
    ) -> Runnable[LanguageModelInput, JsonObject | BaseModel]:
        """Return a runnable whose output is an instance of `schema` if that is a pydantic class, else a dictionary."""
        form = Structured(schema, str(kwargs.get("method", "json_schema")))
        tracing = {"kwargs": {"method": form.method}, "schema": schema}
        bound: Runnable[LanguageModelInput, AIMessage]
        if form.tool is not None:
            bound = self.bind_tools([form.tool], tool_choice="any", ls_structured_output_format=tracing)
        else:
            bound = self.bind(response_format=form.response_format, ls_structured_output_format=tracing)
        if not include_raw:
            return bound | RunnableLambda(form.read)
        parsed = RunnablePassthrough.assign(
            parsed=lambda outputs: form.read(outputs["raw"]), parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return {"raw": bound} | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _chat_result(result: Result) -> ChatResult:
    facts = {
        "model_name": f"{result.backend}:{result.model}",
        "model_provider": "qvl",
        "cache": result.cache,
        "request_id": result.request_id,
    }
    generations = []
    for choice in result.choices:
        calls, bad = [], []
        for call in choice.tool_calls:
            try:
                arguments = json.loads(call.arguments or "{}")
                if not isinstance(arguments, dict):
                    raise ValueError(f"the arguments of the tool call {call.name!r} are not a JSON object")
                calls.append(tool_call(name=call.name, args=arguments, id=call.id))
            except ValueError as exc:
                bad.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=str(exc)))
        own = {**facts, "finish_reason": choice.finish_reason, **sureness(choice)}
        message = AIMessage(
            content=choice.text,
            tool_calls=calls,
            invalid_tool_calls=bad,
            usage_metadata=_usage(result.usage),
            response_metadata=own,
        )
        generations.append(ChatGeneration(message=message, generation_info={"finish_reason": choice.finish_reason}))
    return ChatResult(generations=generations, llm_output={"model_name": facts["model_name"]})


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details={"cache_read": usage.cached_tokens},
        output_token_details={"reasoning": usage.reasoning_tokens},
    )


class QvlCache(BaseCache):
    """LangChain's LLM cache, stored in a cache of qvl: `set_llm_cache(QvlCache("sqlite:///answers.db"))`.

    A cache failure counts as a miss. `ttl` is in seconds.
    """

    def __init__(self, cache: str | Cache, *, ttl: float | None = None) -> None:
        from qvl.caches.open import open_cache
        from qvl.plugins.host import PluginHost

        opened = cache if isinstance(cache, Cache) else open_cache(cache, PluginHost().caches)
        if opened is None:
            raise ConfigError(f"unknown cache {cache!r}", hint="sqlite:///file.db, redis://… or memory:")
        self.cache: Cache = opened
        self.ttl = ttl

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        try:
            entry = self.cache.get(_key(prompt, llm_string))
            if entry is None:
                return None
            return [
                ChatGeneration(message=messages_from_dict([item["message"]])[0], generation_info=item["info"])
                if "message" in item
                else Generation(text=item["text"], generation_info=item["info"])
                for item in entry.result["generations"]
            ]
        except (CacheError, KeyError, ValueError, TypeError) as exc:
            log.warning("unreadable cached answer ignored", error=str(exc))
            return None

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        entry = CacheEntry(
            result={"generations": [_generation(generation) for generation in return_val]},
            manifest={"llm": hashlib.sha256(llm_string.encode()).hexdigest()},
            task="langchain",
            text="".join(generation.text for generation in return_val),
            created_at=time.time(),
        )
        try:
            self.cache.set(_key(prompt, llm_string), entry, ttl=self.ttl)
        except CacheError as exc:
            log.warning("answer not cached", error=str(exc))

    def clear(self, **kwargs: object) -> None:
        self.cache.clear(task="langchain")


def _generation(item: Generation) -> JsonObject:
    if isinstance(item, ChatGeneration):
        # The same answer twice in a conversation is two messages, and gets an id each.
        item = item.model_copy(update={"message": item.message.model_copy(update={"id": None})})
        return {"message": message_to_dict(item.message), "info": item.generation_info}
    return {"text": item.text, "info": item.generation_info}


def _key(prompt: str, llm_string: str) -> str:
    return hashlib.sha256(json.dumps(["langchain", prompt, llm_string]).encode()).hexdigest()
