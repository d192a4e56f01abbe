import anthropic
from common import BRAND, MODEL, PNG, QUESTION, TEXT, URL, Picked, check, fails, run
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage


def model(name=MODEL):
    return ChatAnthropic(model=name, base_url=URL, api_key="none", max_retries=0, max_tokens=64)


IMAGE = {"type": "image", "base64": PNG, "mime_type": "image/png"}
SEEN = [HumanMessage([IMAGE, {"type": "text", "text": QUESTION}])]


def tools():
    (call,) = model().bind_tools([Picked], tool_choice="Picked").invoke("Pick.").tool_calls
    Picked.model_validate(call["args"])


run(
    "langchain-anthropic",
    text=lambda: check(model().invoke(QUESTION).text, TEXT),
    picture=lambda: check(model().invoke(SEEN).text, BRAND),
    stream=lambda: check("".join(piece.text for piece in model().stream(SEEN)), BRAND),
    tools=tools,
    structured=lambda: Picked.model_validate(model().with_structured_output(Picked).invoke("Pick.")),
    error=lambda: fails(lambda: model("nope").invoke("x"), anthropic.NotFoundError),
)
