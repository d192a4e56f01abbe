"""The manifests of docs/scaling.md: valid, and true to the commands and metrics that they name."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qvl.backends.openai.endpoint_list import read_endpoint_list
from qvl.cli.serve_settings import ServeSettings

FOLDER = Path(__file__).parents[2] / "deploy" / "scaling"
FILES = sorted(FOLDER.glob("*.yaml"))
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
# What these resources say in their own definitions, as far as the manifests use it; Kubernetes does not have them.
SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): closed(
        ["selector", "targetPorts", "endpointPickerRef"],
        selector=closed(["matchLabels"], matchLabels=LABELS),
        targetPorts={"type": "array", "items": closed(["number"], number=PORT), "minItems": 1, "maxItems": 8},
        endpointPickerRef=closed(
            ["name", "port"],
            name=NAME,
            group={"type": "string"},
            kind={"type": "string"},
            port=closed(["number"], number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): {
        "type": "object",
        "required": ["parentRefs", "rules"],
        "properties": {"rules": {"type": "array", "items": {"type": "object", "required": ["backendRefs"]}}},
    },
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): closed(
        ["supportedModelFormats", "containers"],
        annotations=LABELS,
        multiModel={"type": "boolean"},
        supportedModelFormats={
            "type": "array",
            "items": closed(
                ["name"], name={"type": "string"}, version={"type": "string"}, autoSelect={"type": "boolean"}
            ),
        },
        containers={"type": "array", "items": {"type": "object", "required": ["name", "image"]}, "minItems": 1},
    ),
    ("serving.kserve.io/v1beta1", "InferenceService"): {
        "type": "object",
        "required": ["predictor"],
        "properties": {
            "predictor": closed(
                ["model"],
                minReplicas={"type": "integer"},
                maxReplicas={"type": "integer"},
                model=closed(
                    ["modelFormat"],
                    runtime=NAME,
                    modelFormat=closed(["name"], name={"type": "string"}),
                    storageUri={"type": "string", "pattern": "^[a-z0-9]+://"},
                ),
            )
        },
    },
}


def documents() -> list[dict[str, Any]]:
    return [one for file in FILES for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one]


def containers(value: Any) -> list[dict[str, Any]]:
    """All containers below a value."""
    if isinstance(value, list):
        return [found for one in value for found in containers(one)]
    if not isinstance(value, dict):
        return []
    return [*value.get("containers", []), *(found for one in value.values() for found in containers(one))]


def test_custom_resources_have_the_form_of_their_definitions() -> None:
    seen = set()
    for document in documents():
        kind = (document["apiVersion"], document["kind"])
        if kind in SPECS:
            seen.add(kind)
            jsonschema.validate(document["spec"], SPECS[kind])
    assert seen == SPECS.keys()


def test_kubernetes_own_resources_are_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="`make test-deploy` installs it")
    own = [one for one in documents() if (one["apiVersion"], one["kind"]) not in SPECS]
    assert len(own) >= 8
    for document in own:
        validate.validate(document, validate.latest_version(), strict=True)


def test_commands_have_the_options_that_are_named() -> None:
    known = {"--" + field.name.replace("_", "-") for field in fields(ServeSettings)}
    commands = [one["args"] for one in containers(documents()) if one.get("args", [""])[0] == "qvl-serve"]
    assert len(commands) == 3
    for arguments in commands:
        named = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert named <= known


def test_the_list_of_endpoints_is_read(tmp_path: Path) -> None:
    (text,) = [one["data"]["endpoints.txt"] for one in documents() if one["kind"] == "ConfigMap"]
    (tmp_path / "endpoints.txt").write_text(text)
    listed = read_endpoint_list(str(tmp_path / "endpoints.txt"))
    assert [one.weight for one in listed][:2] == [4.0, 2.0]


@pytest.mark.slow
def test_the_picker_is_told_metrics_that_an_engine_has() -> None:
    from qvl.backends.local.backend import LocalBackend
    from tests.server.conftest import question, start

    (picker,) = [one["args"] for one in containers(documents()) if one["name"] == "epp"]
    named = {argument.partition("=")[2] for argument in picker if "-metric=" in argument}
    assert len(named) == 3
    running = start(LocalBackend(None))
    try:
        end = time.monotonic() + 120
        while running.get("/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert running.post("/v1/chat/completions", {**question("hello"), "max_tokens": 1}).status_code == 200
        text = running.get("/metrics").text
        for name in named:
            assert re.search(rf"^# TYPE {name} gauge$", text, re.MULTILINE), name
        usage = float(re.search(r"^qvl_backend_kv_cache_usage_perc (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
        assert 0 <= usage <= 1
    finally:
        running.stop()
