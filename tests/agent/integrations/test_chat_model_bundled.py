"""langchain-tests' standard suites over the bundled model: a real one, which can look and can neither talk nor plan."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from langchain_core.messages import HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from qvl import Pipeline
from qvl.agent.integrations.langchain import QvlChatModel
from tests.agent.integrations.langchain_suites import IntegrationSuite, UnitSuite

pytestmark = pytest.mark.slow
MADE: list[Pipeline] = []
PICTURES = Path(__file__).parents[3] / "examples" / "pictures"

RAMBLES: Final = "the grammar lets any text into a string, and a model that was taught ten products never ends one"
GUESSES: Final = "calls the tool that it has to call, with a number that it makes up"
LIMITS: Final = {
    "test_bind_runnables_as_tools": RAMBLES,
    "test_json_mode": RAMBLES,
    "test_structured_output": RAMBLES,
    "test_structured_output_async": RAMBLES,
    "test_structured_output_optional_param": RAMBLES,
    "test_structured_output_pydantic_2_v1": RAMBLES,
    "test_tool_calling": GUESSES,
    "test_tool_calling_async": GUESSES,
    "test_unicode_tool_call_integration": RAMBLES,
    "test_agent_loop": "wants the model to call a tool of its own accord, which it was never taught",
}


def bundled() -> Pipeline:
    if not MADE:
        MADE.append(Pipeline(cache="off"))
    return MADE[0]


@pytest.fixture(scope="module", autouse=True)
def _closing() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


class TestUnit(UnitSuite):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"pipeline": bundled()}


class TestIntegration(IntegrationSuite):
    @pytest.fixture(autouse=True)
    def _limits(self, request: pytest.FixtureRequest) -> None:
        """What this model cannot do, each with its reason; a mark on the suite's own tests would be everybody's."""
        reason = LIMITS.get(request.node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason))

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"pipeline": bundled(), "max_tokens": 64}


def test_every_limit_is_of_a_test_that_there_is() -> None:
    assert [name for name in LIMITS if not hasattr(ChatModelIntegrationTests, name)] == []


@pytest.mark.parametrize(
    ("name", "mime", "color"), [("norvik-mug-red.png", "image/png", "red"), ("shoe.webp", "image/webp", "blue")]
)
def test_the_pixels_of_a_picture_in_a_message_reach_the_answer(name: str, mime: str, color: str) -> None:
    data = base64.b64encode((PICTURES / name).read_bytes()).decode()
    content: list[Any] = [
        {"type": "image", "base64": data, "mime_type": mime},
        {"type": "text", "text": "What color is it?"},
    ]
    model = QvlChatModel(pipeline=bundled(), temperature=0, max_tokens=16)
    answer = model.invoke([HumanMessage(content)])
    assert color in answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] > 8
    assert "".join(chunk.text for chunk in model.stream([HumanMessage(content)])) == answer.text
