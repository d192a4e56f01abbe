"""langchain-tests' standard suites for QvlChatModel, to be given a pipeline: what holds for every model of ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from qvl.agent.integrations.langchain import QvlChatModel

# Under pytest-asyncio's strict mode an async test needs a mark, which the suite's own do not carry.
for function in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(function):
        pytest.mark.asyncio(function)


class UnitSuite(ChatModelUnitTests):
    @pytest.mark.xfail(reason="a Pipeline has one model: another model is another Pipeline")
    def test_standard_params_model_override(self, model: Any) -> None:
        super().test_standard_params_model_override(model)

    @property
    def chat_model_class(self) -> type[QvlChatModel]:
        return QvlChatModel


class IntegrationSuite(ChatModelIntegrationTests):
    @pytest.mark.xfail(reason="downloads its picture, and tests run without a network; others of ours have pictures")
    def test_image_inputs(self, model: Any) -> None:
        super().test_image_inputs(model)

    @pytest.mark.xfail(reason="downloads its picture, and tests run without a network")
    def test_image_tool_message(self, model: Any) -> None:
        super().test_image_tool_message(model)

    @property
    def chat_model_class(self) -> type[QvlChatModel]:
        return QvlChatModel

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True
