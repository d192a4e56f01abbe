"""Both images of deploy/Dockerfile, built by buildah on a Debian that debootstrap makes, since no registry is asked.

What this cannot show is the real base of the engine's image: 15 GB of CANN, torch and torch_npu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
# Hosts whose certificates are their own are reached by theirs.
NETWORK = ("--network", "host", "--volume", "/etc/ssl/certs:/etc/ssl/certs:ro")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Builder:
    """buildah with a store of its own."""

    store: Path

    def __call__(self, *words: str) -> str:
        command = ["buildah", "--root", str(self.store / "root"), "--runroot", str(self.store / "run"), *words]
        environ = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=PROJECT, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    def build(self, target: str, *arguments: str) -> str:
        """Build a target; returns its name."""
        given = [word for argument in arguments for word in ("--build-arg", argument)]
        words = ["bud", "--quiet", "--format", "docker", *NETWORK, "--target", target, *given, "--tag", target]
        self(*words, "--file", "deploy/Dockerfile", ".")
        return f"localhost/{target}"

    def run(self, image: str, script: str) -> str:
        container = self("from", image)
        try:
            return self("run", container, "--", "sh", "-c", script)
        finally:
            self("rm", container)


def mirror() -> str:
    """The address from which this machine has its Debian packages."""
    told = subprocess.run(["apt-cache", "policy", "base-files"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d (https?://\S+) \w+/main ", told)
    return found[1] if found else ""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    for tool in ("buildah", "debootstrap", "apt-cache"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here; buildah and debootstrap are Debian's packages")
    if os.geteuid() != 0 or not mirror():
        pytest.skip("a Debian can be made as root, and where packages come from a mirror")
    folder = tmp_path_factory.mktemp("images")
    tree, builder = folder / "debian", Builder(folder)
    packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", str(tree), mirror()],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no Debian could be made: {made.stdout.decode().splitlines()[-1:]}")
    subprocess.run(["tar", "-C", str(tree), "-cf", str(folder / "debian.tar"), "."], check=True)
    container = builder("from", "scratch")
    builder("add", "--quiet", container, str(folder / "debian.tar"), "/")
    builder("commit", "--quiet", container, "localhost/debian")
    # What the base of an engine has already, and older than the tested versions.
    builder("config", "--env", "PIP_BREAK_SYSTEM_PACKAGES=1", container)
    builder(
        "run", *NETWORK, container, "--", "python3", "-m", "pip", "install", "--quiet", "numpy==1.26.4", "httpx==0.27.2"
    )
    builder("commit", "--quiet", container, "localhost/old")
    return builder


def pinned() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def installed(told: str) -> dict[str, str]:
    return {name.lower(): version for name, _, version in (line.partition("==") for line in told.splitlines())}


def test_the_pool_has_no_torch_the_tested_versions_and_another_user_than_root(builder: Builder) -> None:
    image = builder.build("pool", "SLIM=localhost/debian")
    told = builder.run(image, "id -u; qvl-serve --help >/dev/null && hf version && modelscope --version; pip freeze")
    found = installed(told)

    assert told.startswith("10001\n")
    assert "torch" not in found
    assert {name: found[name] for name in ("fastapi", "redis", "openai", "numpy", "huggingface_hub")} == {
        name: pinned()[name] for name in ("fastapi", "redis", "openai", "numpy", "huggingface_hub")
    }


def test_an_engine_keeps_what_its_base_has_and_takes_tested_versions_of_the_rest(builder: Builder) -> None:
    image = builder.build("engine", "BASE=localhost/old", "SLIM=localhost/debian", "EXTRAS=server,redis")
    found = installed(builder.run(image, "qvl-serve --help >/dev/null && python3 -m pip freeze"))

    assert found["numpy"] == "1.26.4"
    assert found["httpx"] == "0.27.2"
    assert found["fastapi"] == pinned()["fastapi"]
    assert found["pydantic"] == pinned()["pydantic"]
