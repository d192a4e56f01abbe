"""A plugin adds names through the same hooks as the built-ins; a broken one is left out and told about."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from PIL import Image

from qvl import Pipeline, hookimpl
from qvl.errors import MissingDependencyError, PluginError, UnknownNameError
from qvl.plugins.host import PluginHost
from qvl.plugins.names import split_model
from tests.pipeline.conftest import TalkingBackend


class Talker:
    def __init__(self) -> None:
        self.done: list[tuple[Any, Any]] = []

    @hookimpl
    def register_backends(self, register: Any) -> None:
        register("talking", TalkingBackend)

    @hookimpl
    def response_done(self, request: Any, result: Any) -> None:
        self.done.append((request, result))


class Clashing:
    @hookimpl
    def register_backends(self, register: Any) -> None:
        register("fine", TalkingBackend)
        register("local", TalkingBackend)


class Misspelt:
    @hookimpl
    def register_backend(self, register: Any) -> None: ...


class Raising:
    @hookimpl
    def response_done(self, result: Any) -> None:
        raise RuntimeError("plugin bug")


def test_a_plugin_backend_is_named_like_any_other() -> None:
    talker = Talker()
    with Pipeline("talking:model-x", cache="off", plugins=[talker]) as pipe:
        result = pipe.ask(Image.new("RGB", (32, 32)), "q")
    assert result.model == "model-x"
    assert [(request.request_id, done.text) for request, done in talker.done] == [(result.request_id, "1:q")]


def test_a_plugin_that_fails_after_the_answer_does_not_cost_the_answer() -> None:
    with Pipeline(backend=TalkingBackend(), cache="off", plugins=[Raising()]) as pipe:
        assert pipe.ask(Image.new("RGB", (32, 32)), "q").text == "1:q"


def test_broken_plugins_are_left_out_and_named() -> None:
    broken = EntryPoint("absent", "no_such_module_anywhere", "qvl")
    host = PluginHost([Clashing(), Misspelt(), Talker()], installed=[broken])
    assert [failure.name for failure in host.failures] == ["absent", "Clashing", "Misspelt"]
    assert "registered by qvl" in host.failures[1].error
    assert "fine" not in host.backends.factories
    assert "talking" in host.backends.factories
    assert host.backends.owners["local"] == "qvl"


def test_factories_given_as_strings_are_imported_on_use() -> None:
    host = PluginHost(installed=[])
    register = host.backends.register_for("test")
    register("lazy", "tests.pipeline.conftest:TalkingBackend")
    register("absent", "no_such_package.module:Thing")
    register("wrong", "qvl.types:Nothing")
    assert host.backends.build("lazy", "m").model == "m"
    with pytest.raises(MissingDependencyError, match="pip install no_such_package"):
        host.backends.build("absent", "m")
    with pytest.raises(PluginError):
        host.backends.build("wrong", "m")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen3-VL-8B-Instruct", ("local", "Qwen/Qwen3-VL-8B-Instruct")),
        ("./weights", ("local", "./weights")),
        ("openai:gpt:4", ("openai", "gpt:4")),
        ("local:weights", ("local", "weights")),
        ("/a:b/c", ("local", "/a:b/c")),
    ],
)
def test_model_names(model: str, expected: tuple[str, str]) -> None:
    assert split_model(model, ["local", "openai"]) == expected


def test_an_unknown_backend_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'openai'"):
        split_model("opanai:x", ["local", "openai"])


def test_an_engine_of_others_finds_every_argument_of_the_map_by_its_name() -> None:
    calls: list[dict[str, object]] = []

    async def note(
        pipeline: object, sources: object, call: dict[str, object], **options: object
    ) -> AsyncGenerator[object, None]:
        calls.append(call)
        for item in ():
            yield item

    class Noting:
        @hookimpl
        def register_map_engines(self, register: Callable[[str, object], None]) -> None:
            register("noting", note)

    with Pipeline(backend=TalkingBackend(), cache="off", plugins=[Noting()]) as pipe:
        assert list(pipe.map([b"1"], engine="noting")) == []
        assert list(pipe.map([b"1"], "q", engine="noting", language="zh", cache="off", keep_pictures=True)) == []
    none = dict.fromkeys(("question", "schema", "language", "cache"))
    assert calls == [
        {**none, "keep_pictures": False},
        {"question": "q", "schema": None, "language": "zh", "cache": "off", "keep_pictures": True},
    ]
