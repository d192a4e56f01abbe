"""The group itself: what `--help` costs, what a broken command does, and the small commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qvl.cli import COMMANDS, LazyGroup, app, load_command

HEAVY = ("torch", "transformers", "openai", "fastapi", "redis", "numpy", "PIL", "httpx", "sqlite_utils", "structlog")


def modules_after(*arguments: str) -> set[str]:
    code = (
        "import sys, json\nfrom qvl.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(ran.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("analyze", "--help"), ("version",)])
def test_help_loads_nothing_heavy(arguments):
    assert not modules_after(*arguments) & set(HEAVY)


def test_help_imports_no_command():
    loaded = modules_after("--help")
    assert not loaded & {f"qvl.cli.{name}" for name in COMMANDS}
    assert "qvl.pipeline" not in loaded


def test_every_command_that_there_is_can_be_loaded_and_is_described(qvl):
    names = LazyGroup(name="qvl").list_commands(None)
    assert {"analyze", "ask", "cache", "models", "plugins", "version"} <= set(names)
    for name in names:
        assert load_command(name).get_short_help_str() or load_command(name).help
        ran = qvl(name, "--help")
        assert ran.code == 0
        assert name in ran.out
    assert all(name in qvl("--help").out for name in names)


def test_a_broken_command_fails_alone_with_one_line(folder):
    (folder / "models.py").write_text("raise ImportError('half installed')\n")
    code = "import sys, qvl.cli\nqvl.cli.__path__.insert(0, '.')\nqvl.cli.main(sys.argv[1:])"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)

    broken = run("models")
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: the command 'models' cannot be loaded: ImportError: half installed")
    assert len(broken.stderr.splitlines()) == 1
    assert run("version").returncode == 0


def test_version(qvl):
    from qvl import __version__

    assert qvl("--version").out.strip() == __version__
    found = json.loads(qvl("version", "--json").out)
    assert found["qvl"] == __version__
    assert found["pydantic"]
    assert "torch" in qvl("version").out


def test_plugins_names_what_each_one_brings(qvl):
    found = json.loads(qvl("plugins", "--json").out)
    by_name = {plugin["plugin"]: plugin for plugin in found["plugins"]}
    assert by_name["parrot"] == {
        "plugin": "parrot",
        "version": "1.2",
        "backends": ["parrot"],
        "caches": [],
        "hooks": [],
    }
    assert {"local", "openai", "vllm"} <= set(by_name["qvl"]["backends"])
    assert {"memory", "sqlite", "redis"} <= set(by_name["qvl"]["caches"])
    assert found["failures"] == []
    assert "parrot" in qvl("plugins").out


def test_models_names_the_published_sizes_and_their_memory(qvl, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    found = json.loads(qvl("models", "--json").out)
    sizes = [model["size"] for model in found["published"]]
    qwen3_vl, qwen3_5 = "2B 4B 8B 32B 30B-A3B 235B-A22B", "0.8B 2B 4B 9B 27B 35B-A3B 122B-A10B 397B-A17B"
    assert sizes == f"{qwen3_vl} {qwen3_5}".split()
    assert all(model["memory_gb"] > model["parameters"] * 2 for model in found["published"])
    assert found["bundled"]["path"].endswith("weights")
    assert "Qwen/Qwen3-VL-8B-Instruct" in qvl("models").out


def test_models_lists_what_the_hubs_cache_holds(folder):
    pytest.importorskip("huggingface_hub")
    for name in ("models--Qwen--Qwen3-VL-2B-Instruct", "models--Qwen--Qwen2.5-0.5B"):
        snapshot = folder / "hub" / name / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").write_bytes(b"w" * 1000)
        (snapshot / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
        refs = folder / "hub" / name / "refs"
        refs.mkdir()
        (refs / "main").write_text("a" * 40)
    from qvl.cli.models import on_this_machine

    (found,) = on_this_machine(folder / "hub")
    assert found["model"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert found["bytes"] == 1000 + len('{"quantization_config": {"quant_method": "fp8"}}')
    assert (found["quantisation"], found["readable"]) == ("fp8", True)


def test_the_application_is_the_script():
    assert app.info.cls is LazyGroup
