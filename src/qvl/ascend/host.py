"""The machine under examination, as one value: file tree, environment, programs, interpreter, user.

Everything that `doctor` and `launch` look at goes through a Host, so that a made-up tree under another root, a scripted
`npu-smi` and a recorded interpreter take the place of the real ones.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_FULL_CAPABILITIES = 38


@dataclass(frozen=True, slots=True)
class Completed:
    """The outcome of a program. `code` is 127 when there is no such program and 124 when it ran past its time."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last non-empty line of stderr, or of stdout: usually the reason of a failure."""
        lines = [line.strip() for line in f"{self.stdout}\n{self.stderr}".splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Host:
    """A machine seen through its root folder, environment and programs.

    `root` stands in front of every absolute path. `interpreter` is the Python whose packages are examined and which
    runs the op probe; `site` are its package folders (None: those of this process).
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    interpreter: str = sys.executable
    site: tuple[str, ...] | None = None
    python_version: str = field(default_factory=platform.python_version)
    uid: int = field(default_factory=lambda: _identity()[0])
    groups: tuple[int, ...] = field(default_factory=lambda: _identity()[1])

    def path(self, absolute: str | Path) -> Path:
        """`absolute` below the root; a relative path stays as it is."""
        path = Path(absolute)
        if self.root == Path("/") or not path.is_absolute():
            return path
        return self.root / path.relative_to("/")

    def read(self, absolute: str) -> str | None:
        """The text of a file, or None where it cannot be read."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def names(self, absolute: str) -> tuple[str, ...]:
        """The sorted entries of a folder, none where it cannot be listed."""
        try:
            return tuple(sorted(entry.name for entry in self.path(absolute).iterdir()))
        except OSError:
            return ()

    def which(self, program: str) -> str | None:
        """The full path of a program on this host's PATH."""
        return shutil.which(program, path=self.environ.get("PATH", os.defpath))

    def run(
        self, command: Sequence[str], *, timeout: float = 30.0, environ: Mapping[str, str] | None = None
    ) -> Completed:
        """Run a program to its end. Never raises: a missing program gives code 127, one out of time 124."""
        program = self.which(command[0])
        if program is None:
            return Completed(127, "", f"{command[0]}: not found on PATH")
        try:
            done = subprocess.run(  # noqa: S603 - the commands are this package's own, no shell
                [program, *command[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env={**self.environ, **(environ or {})},
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Completed(124, "", f"{command[0]}: no end within {timeout:g} s")
        except OSError as error:
            return Completed(126, "", f"{command[0]}: {error}")
        return Completed(done.returncode, done.stdout, done.stderr)

    def may_use(self, absolute: str) -> bool:
        """True if this host's user may read and write a file, by its owner and mode.

        The mode is computed, not tried: opening a device node has side effects in its driver.
        """
        try:
            facts = self.path(absolute).stat()
        except OSError:
            return False
        if self.uid == 0:
            return True
        if facts.st_uid == self.uid:
            needed = 0o600
        elif facts.st_gid in self.groups:
            needed = 0o060
        else:
            needed = 0o006
        return facts.st_mode & needed == needed

    def space(self, absolute: str) -> tuple[int, int] | None:
        """Total and free bytes of the file system that holds a path (its nearest existing parent), or None."""
        folder = self.path(absolute)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            return None
        return usage.total, usage.free

    def open_files_limit(self) -> int:
        """The soft limit of open files of a process; -1 where it cannot be told."""
        try:
            import resource
        except ImportError:
            return -1
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def packages(self) -> dict[str, str]:
        """Versions of the interpreter's installed distributions, by normalised name (`torch-npu`)."""
        path = sys.path if self.site is None else list(self.site)
        versions: dict[str, str] = {}
        for distribution in importlib.metadata.distributions(path=path):
            name = distribution.metadata["Name"]
            if name:
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
        return versions

    def cores(self) -> int:
        """Processor cores, from /proc/cpuinfo, or as Python counts them where that file is not there."""
        return (self.read("/proc/cpuinfo") or "").count("processor\t") or os.cpu_count() or 1

    @property
    def in_container(self) -> bool:
        """True if this is a docker, podman or kubernetes container."""
        if self.path("/.dockerenv").exists() or self.path("/run/.containerenv").exists():
            return True
        return "kubepods" in (self.read("/proc/1/cgroup") or "")

    @property
    def privileged(self) -> bool:
        """True if no capability is out of reach, which in a container means `--privileged` (for any user)."""
        match = re.search(r"^CapBnd:\s*([0-9a-fA-F]+)", self.read("/proc/self/status") or "", re.MULTILINE)
        return match is not None and bin(int(match[1], 16)).count("1") >= _FULL_CAPABILITIES

    def listening_ports(self) -> frozenset[int]:
        """TCP ports on which something listens, from /proc/net/tcp and tcp6."""
        ports: set[int] = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in (self.read(table) or "").splitlines()[1:]:
                cells = line.split()
                if len(cells) > 3 and cells[3] == "0A":
                    ports.add(int(cells[1].rpartition(":")[2], 16))
        return frozenset(ports)


def _identity() -> tuple[int, tuple[int, ...]]:
    # Windows has no numeric users; there the nodes of this module do not exist either.
    if not hasattr(os, "geteuid"):
        return 0, ()
    return os.geteuid(), (os.getegid(), *os.getgroups())
