"""A real `qvl-serve` and what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.scripted_endpoint import ScriptedEndpoint

CHAT = "/v1/chat/completions"


@dataclass
class Process:
    """A running `qvl-serve`."""

    popen: subprocess.Popen
    lines: list[str] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stderr:
            self.lines.append(line.rstrip())

    def ended(self, seconds: float) -> int:
        """Its exit code, once it has ended and `lines` has all that it wrote."""
        code = self.popen.wait(seconds)
        self._reader.join(seconds)
        assert not self._reader.is_alive(), "something still holds its stderr open"
        return code

    def wait_for(self, start: str) -> str:
        """The first line that begins so, once it is there."""
        end = time.monotonic() + 400
        while True:
            for line in list(self.lines):
                if line.startswith(start):
                    return line
            assert self.popen.poll() is None, "\n".join(self.lines)
            assert time.monotonic() < end
            time.sleep(0.02)

    def wait_ready(self) -> Process:
        self.address = self.wait_for("  address").split()[1]
        return self

    def post(self, body: dict, path: str = CHAT, timeout: float = 60) -> httpx.Response:
        return httpx.post(self.address + path, json=body, timeout=timeout, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=60, trust_env=False)

    def events(self) -> list[str]:
        """What it logged, as far as that is JSON lines."""
        return [line for line in list(self.lines) if line.startswith("{")]

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(10)
        self.popen.stderr.close()


def launch(*args: str, **env: str) -> Process:
    """Starts one, on any port unless `env` names it."""
    port = [] if "SERVER_PORT" in env else ["--port", "0"]
    popen = subprocess.Popen(
        [sys.executable, "-m", "qvl.cli.serve", *port, *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    return Process(popen)


def gone(pid: int) -> bool:
    """True once a process has ended, even if nobody has asked how: who takes over orphans may never do that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def remote(endpoint: ScriptedEndpoint) -> list[str]:
    """Arguments for a server in front of `endpoint`."""
    return ["openai:echo", "--base-url", endpoint.url, "--option", "probe=false", "--no-canary"]
