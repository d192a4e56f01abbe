import openai
from common import BRAND, FILE, MODEL, QUESTION, TEXT, URL, Picked, check, fails, run
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def model(name=MODEL):
    return OpenAILike(
        model=name,
        api_base=f"{URL}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        max_tokens=64,
        temperature=0,
    )


SEEN = [ChatMessage(role="user", blocks=[ImageBlock(path=FILE), TextBlock(text=QUESTION)])]


def asked(text):
    return [ChatMessage(role="user", content=text)]


def tools():
    tool = FunctionTool.from_defaults(fn=lambda size: size, name="pick_size", description="Picks", fn_schema=Picked)
    told = model().chat_with_tools([tool], user_msg="Pick.", tool_required=True)
    (call,) = model().get_tool_calls_from_response(told)
    Picked.model_validate(call.tool_kwargs)


run(
    "llama-index-llms-openai-like",
    text=lambda: check(model().chat(asked(QUESTION)).message.content, TEXT),
    picture=lambda: check(model().chat(SEEN).message.content, BRAND),
    stream=lambda: check("".join(piece.delta or "" for piece in model().stream_chat(SEEN)), BRAND),
    tools=tools,
    structured=lambda: Picked.model_validate(model().as_structured_llm(Picked).chat(asked("Pick.")).raw),
    error=lambda: fails(lambda: model("nope").chat(asked("x")), openai.NotFoundError),
)
