import openai
from common import BRAND, FILE, MODEL, QUESTION, SCHEMA, TEXT, URL, Picked, check, fails, run
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent
from haystack.tools import Tool
from haystack.utils import Secret


def ask(message, name=MODEL, streamed=None, **kwargs):
    tools = kwargs.pop("tools", None)
    generator = OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        model=name,
        api_base_url=f"{URL}/v1",
        streaming_callback=streamed,
        max_retries=0,
        generation_kwargs={"max_tokens": 64, **kwargs},
        tools=tools,
    )
    return generator.run([message])["replies"][0]


SEEN = ChatMessage.from_user(content_parts=[ImageContent.from_file_path(FILE), QUESTION])
PICK = ChatMessage.from_user("Pick.")


def stream():
    pieces = []
    ask(SEEN, streamed=lambda chunk: pieces.append(chunk.content or ""))
    check("".join(pieces), BRAND)


def tools():
    tool = Tool(name="pick_size", description="Picks", parameters=SCHEMA, function=lambda size: size)
    chosen = {"type": "function", "function": {"name": "pick_size"}}
    (call,) = ask(PICK, tools=[tool], tool_choice=chosen).tool_calls
    Picked.model_validate(call.arguments)


run(
    "haystack-ai",
    text=lambda: check(ask(ChatMessage.from_user(QUESTION)).text, TEXT),
    picture=lambda: check(ask(SEEN).text, BRAND),
    stream=stream,
    tools=tools,
    structured=lambda: Picked.model_validate_json(ask(PICK, response_format=Picked).text),
    error=lambda: fails(lambda: ask(PICK, name="nope"), openai.NotFoundError),
)
