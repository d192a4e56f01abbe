"""docs/models.md is true: every model type has its rows, and every test that it names is there."""

from __future__ import annotations

import ast

import pytest

from qvl.cli.serve_settings import ServeSettings
from qvl.errors import ConfigError
from qvl.plugins.host import PluginHost
from tests.backends.models_page import BACKENDS, FORMS, NOTES, PAGE, ROOT, cell, models, page

CELLS = [(model, form, backend) for model in models() for form in FORMS for backend in BACKENDS]


def test_the_page_is_that_of_the_tests() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"
    assert "(docs/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_named_test_is_there() -> None:
    named = {cell(*place)[1] for place in CELLS} - {""}
    assert len(named) > 10
    for path, _, name in (test.partition("::") for test in named):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (path, name)


def test_what_is_said_to_be_tested_or_refused_names_its_test() -> None:
    assert all(test for said, test in (cell(*place) for place in CELLS) if said in ("tested", "refused"))
    assert set(NOTES) <= set(CELLS)


def test_quantize_is_the_local_engines() -> None:
    for model in ("vllm:m", "openai:m"):
        with pytest.raises(ConfigError, match="--quantize is for a local model"):
            ServeSettings(model=model, quantize="int8").backend_options()


def test_openvino_takes_no_adapter() -> None:
    with pytest.raises(ConfigError, match="adapter"):
        PluginHost().backends.build("openvino", "a-folder", adapter="an-adapter")
    with pytest.raises(ConfigError, match="--lora is for a local model and vllm:NAME"):
        ServeSettings(model="openvino:m", lora=["shelf=a"]).backend_options()
