"""What `qvl-serve` refuses before it says that it loads: options of another backend, a model that is not there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from qvl.backends.base import Backend
from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.backends.vllm.backend import VllmBackend
from qvl.backends.wrapper import WrappingBackend
from qvl.errors import ConfigError, MissingDependencyError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["openai:x", "--quantize", "int8"],
            "--quantize is for a local model, which openai:x is not"
            " (leave it out, or set it at the server behind the endpoint)",
        ),
        (["openai:x", "--goal", "latency"], "--goal is for a local model, which openai:x is not (leave it out)"),
        (["openai:x", "--decode-kernel", "plain"], "--decode-kernel is for a local model, which openai:x is not"),
        (["openai:x", "--max-step-ms", "20"], "--max-step-ms is for a local model, which openai:x is not"),
        (["openai:x", "--dtype", "float32"], "--dtype is for a model that runs here, which openai:x is not"),
        (["replay:f.jsonl", "--device", "npu"], "--device is for a model that runs here, which replay:f.jsonl is not"),
        (["vllm:x/y", "--quantize", "int8"], "vLLM's own is --option quantization=NAME"),
        (["openvino:f", "--quantize", "int8"], "choose it when the model is converted: --weight-format int8"),
        (["openvino:f", "--max-step-ms", "20"], "--max-step-ms is for a local model, which openvino:f is not"),
    ],
)
def test_an_option_of_another_backend_is_refused_with_the_way_out(qvl, arguments: list[str], said: str) -> None:
    ran = qvl("serve", "--port", "0", *arguments)
    assert ran.code == 2
    assert said in ran.error
    assert "loading" not in ran.err


def test_a_local_options_variable_is_refused_as_the_option_is(qvl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_QUANTIZE", "int8")
    assert "--quantize is for a local model" in qvl("serve", "openai:x", "--port", "0").error


@pytest.mark.parametrize("backend", ["", "local:", "vllm:", "openvino:"])
def test_a_folder_that_is_not_there_is_said_first_and_nothing_is_loaded(qvl, folder: Path, backend: str) -> None:
    (folder / "empty").mkdir()
    for name, said in (("./nowhere", "'./nowhere' not found"), ("./empty", "./empty has no config.json")):
        ran = qvl("serve", f"{backend}{name}", "--port", "0")
        assert ran.code == 2
        assert said in ran.error
        assert "loading" not in ran.err


@pytest.mark.parametrize(("name", "module"), [("vllm", "vllm"), ("openvino", "openvino_genai")])
def test_a_package_that_is_not_installed_is_said_before_anything_is_loaded(qvl, name: str, module: str) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    kind: type[Backend] = {"vllm": VllmBackend, "openvino": OpenVinoBackend}[name]
    with pytest.raises(MissingDependencyError, match="is not installed"):
        WrappingBackend(kind("some/model")).refuse_missing()  # type: ignore[call-arg]
    ran = qvl("serve", f"{name}:some/model", "--port", "0")
    assert "is not installed" in ran.error
    assert "loading" not in ran.err


def test_a_checkpoint_that_is_not_converted_is_said_before_openvino_is_looked_for() -> None:
    from qvl.backends.local.model.model_folder import bundled_folder

    with pytest.raises(ConfigError, match="is not in OpenVINO's form"):
        OpenVinoBackend(str(bundled_folder())).refuse_missing()
