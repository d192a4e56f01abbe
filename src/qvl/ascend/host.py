"""The machine under examination: file tree, environment, programs, interpreter, user.

`doctor` and `launch` access the machine only through a Host, so that tests can use another root folder, a scripted
`npu-smi` and a recorded interpreter.
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
# A program may print without end; what is shown of it is a line.
_LONGEST_TAIL = 4096
_LONGEST_LINE = 400


@dataclass(frozen=True, slots=True)
class Completed:
    """The outcome of a program. `code` is 127 if the program was not found and 124 if it timed out."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last non-empty line of stderr, or of stdout, not too long: usually the reason of a failure."""
        for text in (self.stderr, self.stdout):
            lines = text[-_LONGEST_TAIL:].strip().splitlines()
            if lines:
                return lines[-1].strip()[:_LONGEST_LINE]
        return f"exit code {self.code}"


@dataclass(frozen=True)
class Host:
    """A machine, accessed by its root folder, environment and programs.

    `root` is prepended to every absolute path. `interpreter` is the Python whose packages are examined and which
    runs the operation probe; `site` are its package folders (None: those of this process).
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    interpreter: str = sys.executable
    site: tuple[str, ...] | None = None
    python_version: str = field(default_factory=platform.python_version)
    uid: int = field(default_factory=lambda: _identity()[0])
    groups: tuple[int, ...] = field(default_factory=lambda: _identity()[1])

    def path(self, absolute: str | Path) -> Path:
        """Return `absolute` below the root; a relative path is unchanged."""
        path = Path(absolute)
        if self.root == Path("/") or not path.is_absolute():
            return path
        return self.root / path.relative_to("/")

    def read(self, absolute: str) -> str | None:
        """Return the text of a file, or None if it cannot be read."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def names(self, absolute: str) -> tuple[str, ...]:
        """Return the sorted entries of a folder, () if it cannot be listed."""
        try:
            return tuple(sorted(entry.name for entry in self.path(absolute).iterdir()))
        except OSError:
            return ()

    def which(self, program: str) -> str | None:
        """Return the full path of a program on this host's PATH, or None."""
        return shutil.which(program, path=self.environ.get("PATH", os.defpath))

    def run(
        self, command: Sequence[str], *, timeout: float = 30.0, environ: Mapping[str, str] | None = None
    ) -> Completed:
        """Run a program and return its outcome. Never raises: see `Completed.code`; `timeout` is in seconds."""
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
            return Completed(124, "", f"{command[0]}: timed out after {timeout:g} s")
        except OSError as error:
            return Completed(126, "", f"{command[0]}: {error}")
        return Completed(done.returncode, done.stdout, done.stderr)

    def may_use(self, absolute: str) -> bool:
        """True if this host's user may read and write a file, by its owner and mode.

        The file is not opened, since opening a device node has side effects in its driver.
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
        """Return (total, free) bytes of the file system of a path or its nearest existing parent, or None."""
        folder = self.path(absolute)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            return None
        return usage.total, usage.free

    def open_files_limit(self) -> int:
        """Return the soft limit of open files of a process; -1 if unknown."""
        try:
            import resource
        except ImportError:
            return -1
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def packages(self) -> dict[str, str]:
        """Return the versions of the interpreter's installed distributions by normalised name (`torch-npu`)."""
        path = sys.path if self.site is None else list(self.site)
        versions: dict[str, str] = {}
        for distribution in importlib.metadata.distributions(path=path):
            name = distribution.metadata["Name"]
            if name:
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
        return versions

    def package_text(self, name: str, relative: str) -> str | None:
        """Return the text of a file beside an installed distribution (`vllm_ascend/_build_info.py`), None if absent."""
        path = sys.path if self.site is None else list(self.site)
        for distribution in importlib.metadata.distributions(name=name, path=path):
            try:
                return Path(str(distribution.locate_file(relative))).read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
        return None

    def cores(self) -> int:
        """Return the number of processor cores, from /proc/cpuinfo, else from Python."""
        return (self.read("/proc/cpuinfo") or "").count("processor\t") or os.cpu_count() or 1

    @property
    def in_container(self) -> bool:
        """True if this is a docker, podman or kubernetes container."""
        if self.path("/.dockerenv").exists() or self.path("/run/.containerenv").exists():
            return True
        return "kubepods" in (self.read("/proc/1/cgroup") or "")

    @property
    def privileged(self) -> bool:
        """True if all capabilities are available, which in a container means `--privileged` (for any user)."""
        match = re.search(r"^CapBnd:\s*([0-9a-fA-F]+)", self.read("/proc/self/status") or "", re.MULTILINE)
        return match is not None and bin(int(match[1], 16)).count("1") >= _FULL_CAPABILITIES

    def listening_ports(self) -> frozenset[int]:
        """Return the TCP ports in use by listeners, from /proc/net/tcp and tcp6."""
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
