"""The clients that the server is tested with, and the environments that they are installed in.

Each environment is a folder in `.venv-clients`, made again when its list of packages changes. Clients stand together as
far as the versions that they need of each other allow.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import AS_FOUND

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = HERE / "programs"
FOLDER = ROOT / ".venv-clients"
FEATURES = ("text", "picture", "stream", "tools", "structured", "error")


@dataclass(frozen=True)
class Environment:
    """Packages of Python with their versions; `beside`: found too is what this environment has (torch, mostly)."""

    packages: tuple[str, ...]
    beside: bool = False


ENVIRONMENTS = {
    "new": Environment(
        (
            "openai==3.57.0",
            "anthropic==2.14.0",
            "pydantic-ai-slim[openai,anthropic]==2.68.0",
            "litellm==1.110.2",
            "haystack-ai==3.4.1",
            "langchain-openai==1.7.4",
            "langchain-anthropic==1.7.10",
            "dspy==3.4.1",
        )
    ),
    # These need an older openai.
    "old": Environment(("openai==2.54.0", "llama-index-llms-openai-like==0.8.1", "instructor==1.17.0")),
    "system-one": Environment(("jevcompat==0.1.1", "typesafe-sdk==0.7.5")),
    "lm-eval": Environment(("lm-eval[api]==0.4.13",), beside=True),
    "guidellm": Environment(("guidellm==0.8.1",), beside=True),
}


@dataclass(frozen=True)
class Client:
    """A client: its name in the table, the API that it speaks, its program, and the features that the program tries."""

    name: str
    api: str
    environment: str
    program: str
    without: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(feature for feature in FEATURES if feature not in self.without)


CLIENTS = (
    Client("openai", "chat completions", "new", "openai_chat.py"),
    Client("openai", "responses", "new", "openai_responses.py"),
    Client("openai", "chat completions", "old", "openai_chat.py"),
    Client("openai", "responses", "old", "openai_responses.py"),
    Client("anthropic", "messages", "new", "anthropic_messages.py"),
    Client("openai (npm)", "chat completions, responses", "node", "openai.mjs"),
    Client("ai (npm)", "chat completions, responses, messages", "node", "ai.mjs"),
    Client("langchain-openai", "chat completions, responses", "new", "langchain_openai_chat.py"),
    Client("langchain-anthropic", "messages", "new", "langchain_anthropic_chat.py"),
    Client("llama-index-llms-openai-like", "chat completions", "old", "llama_index_chat.py"),
    Client("pydantic-ai", "chat completions", "new", "pydantic_ai_agent.py"),
    Client("pydantic-ai", "messages", "new", "pydantic_ai_anthropic.py", ("structured",)),
    Client("instructor", "chat completions", "old", "instructor_models.py", ("text",)),
    Client("litellm", "chat completions, messages", "new", "litellm_sdk.py"),
    Client("haystack-ai", "chat completions", "new", "haystack_generator.py"),
    Client("dspy", "chat completions", "new", "dspy_programs.py", ("stream", "tools")),
    Client("lm-eval", "chat completions", "lm-eval", "lm_eval_task.py", FEATURES[1:]),
    Client("guidellm", "chat completions", "guidellm", "guidellm_load.py", FEATURES[3:]),
)


def command(client: Client, url: str, model: str, picture: Path) -> list[str]:
    """Return the command line of a client's program, whose environment is made first if it is not there."""
    folder = ready(client.environment)
    arguments = [url, model, str(picture)]
    if client.environment == "node":
        return [str(shutil.which("node")), str(folder / client.program), *arguments]
    return [str(folder / "bin" / "python"), str(PROGRAMS / client.program), *arguments]


def ready(name: str) -> Path:
    """Return the folder of an environment, made now if it is missing or out of date."""
    folder = FOLDER / name
    known = _files_of_node() if name == "node" else repr(ENVIRONMENTS[name]).encode()
    stamp = folder / f".made-of-{hashlib.sha256(known).hexdigest()[:16]}"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _install_node(folder) if name == "node" else _install(folder, ENVIRONMENTS[name])
        stamp.touch()
    return folder


def _files_of_node() -> bytes:
    return b"".join(path.read_bytes() for path in sorted((PROGRAMS / "node").iterdir()))


def _install_node(folder: Path) -> None:
    # Node looks for packages beside the program, not where it is called.
    shutil.copytree(PROGRAMS / "node", folder, dirs_exist_ok=True)
    _run(["npm", "install", "--no-audit", "--no-fund", "--silent"], folder)


def _install(folder: Path, environment: Environment) -> None:
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    if environment.beside:
        site = next(folder.glob("lib/python3*/site-packages"))
        (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
    _run([*pip, *environment.packages], folder)


def _run(arguments: Sequence[str], folder: Path) -> None:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=1200, env=AS_FOUND)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
