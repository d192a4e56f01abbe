"""Ray, kubectl and helm of a made-up host, each of which fails where the real one would."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import yaml

from tests.ascend.scripted_host import MADE_UP, ToolError, need, option, state

# Those of Ray 2.60.
RAY_FLAGS = {
    "--head", "--port", "--address", "--node-manager-port", "--object-manager-port", "--runtime-env-agent-port",
    "--dashboard-agent-grpc-port", "--metrics-export-port", "--disable-usage-stats", "--block",
}  # fmt: skip


def ray(words: list[str]) -> None:
    head = MADE_UP / "ray-head"
    if words == ["status"]:
        need(head.exists(), "ConnectionError: Could not find any running Ray instance.")
        return
    need(words[0] == "start", f"Error: No such command '{words[0]}'.", 2)
    for word in words[1:]:
        need(word.partition("=")[0] in RAY_FLAGS, f"Error: No such option: {word}", 2)
    need(
        os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"),
        "no authentication token was found",
    )
    if "--head" in words:
        head.write_text(os.environ["RAY_AUTH_TOKEN"])
    else:
        need(head.exists() and head.read_text() == os.environ["RAY_AUTH_TOKEN"], "InvalidAuthToken")
        need(option(words, "--address")[0].endswith(":6379"), "Failed to connect to GCS")


def kubectl(words: list[str]) -> None:
    with state() as kept:
        made: list[str] = kept["kubernetes"]
        rest = words[2:] if words[0] == "-n" else words
        need(rest == words or f"namespace/{words[1]}" in made, f'namespaces "{words[1]}" not found')
        match rest:
            case ["create", "namespace", name]:
                made.append(f"namespace/{name}")
            case ["label", "namespace", name, label]:
                need(f"namespace/{name}" in made and "=" in label, f'namespaces "{name}" not found')
            case ["create", "secret", "generic", name, literal]:
                need(re.fullmatch(r"--from-literal=api-key=\S+", literal), f"the key is empty: {literal}")
                made.append(f"secret/{name}")
            case ["rollout", "status", what]:
                need(what in made, f'statefulsets.apps "{what}" not found')
            case _:
                raise ToolError(f"error: unknown command {words}")


def helm(words: list[str]) -> None:
    need(words[0] == "install", f"Error: unknown command {words[0]}")
    name, chart = words[1:3]
    (space,), (file,) = option(words, "--namespace"), option(words, "--values")
    sets = dict(pair.split("=", 1) for text in option(words, "--set") for pair in text.split(","))
    need((Path(chart) / "Chart.yaml").is_file(), f"Error: path {chart} not found")
    need(Path(file).is_file(), f"Error: open {file}: no such file or directory")
    values = yaml.safe_load(Path(file).read_text())
    for key, value in sets.items():
        part, leaf = key.split(".")
        values.setdefault(part, {})[leaf] = value
    with state() as kept:
        need(
            {f"namespace/{space}", "secret/qvl"} <= set(kept["kubernetes"]),
            "pods wait for the namespace and the Secret qvl",
        )
        for part in ("engine", "pool"):
            need(values[part]["image"] in kept["pushed"], f"ImagePullBackOff: {values[part]['image']}")
        with contextlib.suppress(ImportError):
            import helm_python

            with helm_python.Chart.load(chart) as loaded:
                loaded.validate_schema(values)
                loaded.render(values, name=name, namespace=space)
        kept["kubernetes"].append(f"statefulset/{name}-engine")
