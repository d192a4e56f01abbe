import openai
from common import BRAND, DATA_URL, MODEL, QUESTION, TEXT, URL, Picked, check, fails, run
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def model(name=MODEL, **options):
    return ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key="none", max_retries=0, temperature=0, **options)


SEEN = [HumanMessage([{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": QUESTION}])]


def tools():
    (call,) = model().bind_tools([Picked], tool_choice="Picked").invoke("Pick.").tool_calls
    Picked.model_validate(call["args"])


def structured():
    assert isinstance(model().with_structured_output(Picked, method="json_schema").invoke("Pick."), Picked)
    assert isinstance(model(use_responses_api=True).with_structured_output(Picked).invoke("Pick."), Picked)


run(
    "langchain-openai",
    text=lambda: check(model().invoke(QUESTION).text, TEXT),
    picture=lambda: check(model().invoke(SEEN).text, BRAND),
    stream=lambda: check("".join(piece.text for piece in model().stream(SEEN)), BRAND),
    tools=tools,
    structured=structured,
    error=lambda: fails(lambda: model("nope").invoke("x"), openai.NotFoundError),
)
