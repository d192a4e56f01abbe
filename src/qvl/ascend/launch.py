"""`qvl launch`: checks an Ascend host, starts one container on it and waits until it is ready.

`docker_arguments` is a pure function of the plan. `Launcher` checks the host (NPUs, port, image, weights), starts the
container and waits for its readiness; every failure is a LaunchError of one line.
"""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qvl.ascend import devices, recipe
from qvl.ascend.checks import fit, weights
from qvl.errors import ConfigError, QvlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvl.ascend.host import Host
    from qvl.ascend.recipe import ContainerPlan

CHECKS: Final = ("flags", "npus", "mounts", "port", "image", "weights", "memory")
_LOG_LINES = 60
# What a container that qvl started bears; its value is the engine.
LABEL: Final = "qvl.launch"
_PULL_SECONDS: Final = 4 * 3600.0
_END_SECONDS: Final = 120.0


class LaunchError(QvlError):
    """The container was not started, or did not become ready. `log` is the end of its log, if there is one."""

    default_code = "launch_failed"

    def __init__(self, message: str, *, hint: str, log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


def docker_arguments(plan: ContainerPlan) -> list[str]:
    """Return the `docker run` command as an argument list, the program first."""
    words = ["docker", "run", "--detach", "--name", plan.container]
    words += ["--label", f"{LABEL}={plan.engine}", "--restart", plan.restart]
    if plan.privileged or plan.chip_facts.privileged:
        words.append("--privileged")
    for node in recipe.devices(plan):
        words += ["--device", node]
    for source, target, read_only in recipe.volumes(plan):
        words += ["--volume", f"{source}:{target}:ro" if read_only else f"{source}:{target}"]
    given = {text.partition("=")[0] for text in plan.env}
    own = {name: value for name, value in recipe.environment(plan).items() if name not in given}
    for name, value in own.items():
        words += ["--env", f"{name}={value}"]
    if plan.with_key:
        # By name only: docker takes the value from this process, so it stands in no command line.
        words += ["--env", recipe.KEY_NAMES[plan.engine]]
    for text in plan.env:
        words += ["--env", text]
    for text in plan.mounts:
        words += ["--volume", text]
    words += ["--shm-size", plan.shm_size, "--ulimit", "nofile=65536:65536"]
    address = f"[{plan.host}]" if ":" in plan.host else plan.host
    if plan.network:
        words += ["--network", plan.network]
    if plan.network != "host":
        words += ["--publish", f"{address}:{plan.port}:{recipe.INNER_PORT}"]
    words += plan.docker_args
    entrypoint, arguments = recipe.shell(plan)
    return [*words, "--entrypoint", entrypoint, plan.image, *arguments]


def script(plan: ContainerPlan, *, pull: bool = False, replace: bool = False) -> str:
    """Return what a launch would run as text for a shell, the pull and the old container's end first.

    What fails ends it, so that no container is removed for an image that could not be pulled.
    """
    lines = ["docker pull " + shlex.quote(plan.image)] if pull else []
    if replace:
        chosen = ["docker", "ps", "--all", "--quiet", "--filter", f"name=^{plan.container.replace('.', '[.]')}$"]
        ended = 'xargs -r sh -c \'docker stop "$@" && docker rm "$@"\' --'
        lines.append(f"{shlex.join([*chosen, '--filter', f'label={LABEL}'])} | {ended}")
    return " &&\n".join([*lines, as_text(docker_arguments(plan))])


def refuse_unknown(skip: Sequence[str]) -> None:
    """Raise ConfigError if a name in `skip` is not the name of a check."""
    for name in skip:
        if name not in CHECKS:
            raise ConfigError(f"unknown --skip-check {name!r}", hint=f"one of {', '.join(CHECKS)}")


def as_text(words: Sequence[str]) -> str:
    """Return a command quoted for a shell, with one option per line."""
    lines: list[str] = []
    current = shlex.quote(words[0])
    for word in words[1:]:
        if word.startswith("--") and len(word) > 2:
            lines.append(current)
            current = "  " + shlex.quote(word)
        else:
            current += " " + shlex.quote(word)
    return " \\\n".join([*lines, current])


@dataclass(slots=True)
class Launcher:
    """Starts containers on a host. `say` is called with progress; `poll` is the seconds between readiness checks."""

    host: Host
    say: Callable[[str], None] = field(default=lambda line: None)
    poll: float = 2.0

    def check(
        self, plan: ContainerPlan, *, share: bool = False, skip: Sequence[str] = (), replacing: bool = False
    ) -> None:
        """Run every check of the host that is not in `skip`, names of `CHECKS`; "flags" needs no host (see `flags`).

        `share` allows NPUs that are held, `replacing` those that the container of the plan's name holds.
        """
        steps: dict[str, Callable[[], None]] = {
            "npus": lambda: self.check_npus(plan.npus, share=share, ending=plan.container if replacing else ""),
            "mounts": lambda: self.check_mounts(plan),
            "port": lambda: self.check_port(plan.host, plan.port),
            "image": lambda: self.check_image(plan.image),
            "weights": lambda: self.check_weights(plan),
            "memory": lambda: self.check_memory(plan),
        }
        refuse_unknown(skip)
        for name, step in steps.items():
            if name not in skip:
                step()

    def check_npus(self, npus: tuple[int, ...], *, share: bool = False, ending: str = "") -> None:
        """Check that the device nodes exist, and (unless `share`) that no process uses the NPUs.

        `ending` names a container that is about to end: its processes, and those npu-smi hides, are passed over.
        """
        present = devices.device_numbers(self.host)
        absent = [number for number in npus if number not in present]
        if absent:
            have = ", ".join(map(str, present)) or "none"
            raise LaunchError(f"NPU {absent[0]} not found on this host, which has: {have}", hint="see `qvl doctor`")
        table = devices.query(self.host)
        for number in npus if table else ():
            npu = table.npu(number) if table else None
            if npu is None or npu.lost:
                raise LaunchError(f"NPU {number} is lost: npu-smi does not read it", hint="leave it out of --npus")
            if npu.health not in ("OK", "Warning"):
                raise LaunchError(f"NPU {number} has health {npu.health}", hint="leave it out of --npus; `qvl doctor`")
            if npu.health == "Warning":
                self.say(f"warning: NPU {number} has health Warning: npu-smi info -t health -i {npu.npu_id}")
        if share:
            return
        if table is None:
            raise LaunchError("cannot tell which NPUs are free: npu-smi info has no table", hint="see `qvl doctor`")
        holders = devices.holders(self.host, table)
        for holder in holders:
            if holder.device_id in npus and not (ending and (holder.container == ending or holder.pid is None)):
                free = sorted(set(present) - {item.device_id for item in holders})
                choice = f"free NPUs: {', '.join(map(str, free))}" if free else "no NPU is free"
                raise LaunchError(str(holder), hint=f"{choice}; --share starts beside it")

    def check_mounts(self, plan: ContainerPlan) -> None:
        """Check that the driver's files are there: docker would make a folder of the host for each that is not."""
        sources = (source for source, _ in recipe.driver_mounts(plan))
        absent = [source for source in sources if not self.host.path(source).exists()]
        if absent:
            raise LaunchError(
                f"{', '.join(absent)}: not on this host, and docker would make folders of them",
                hint="install the driver, or see `qvl doctor --no-software`; --skip-check mounts starts anyway",
            )

    def check_port(self, address: str, port: int) -> None:
        """Check that nothing listens on the port to publish."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                reason = error.strerror or str(error)
                raise LaunchError(f"port {port} of {address}: {reason}", hint="choose another with --port") from error

    def check_image(self, image: str) -> None:
        """Check that the host has the image with this tag."""
        done = self.host.run(["docker", "images", "--format", "{{.Repository}}:{{.Tag}}@{{.Digest}}"])
        if done.code != 0:
            raise LaunchError(f"docker images: {done.last_line}", hint="see that docker runs and this user may use it")
        listed = [line.rpartition("@") for line in done.stdout.splitlines() if "@" in line]
        tags = {tag for tag, _, _ in listed}
        digests = {f"{tag.rpartition(':')[0]}@{digest}" for tag, _, digest in listed}
        short = image.removeprefix("docker.io/").removeprefix("library/")
        if short in tags | digests or image in tags | digests:
            return
        repository = image.partition("@")[0] if "@" in image else image.rpartition(":")[0]
        others = sorted(tag for tag in tags if tag.rpartition(":")[0].split("/")[-1] == repository.split("/")[-1])
        have = f"other tags on this host: {', '.join(others)}" if others else f"docker pull {image}, or --pull"
        raise LaunchError(f"image {image} not found on this host", hint=have)

    def check_weights(self, plan: ContainerPlan) -> None:
        """Check that the plan's local checkpoint is complete; a hub id is not checked."""
        if plan.weights is None:
            return
        for finding in weights.check(plan.weights, engine=plan.engine):
            if finding.status == "fail":
                raise LaunchError(f"weights: {finding.summary}", hint=finding.fix or "see `qvl doctor --weights`")

    def check_memory(self, plan: ContainerPlan) -> None:
        """Check that the weights alone fit the NPUs, as far as the size of both is known."""
        need, room = plan.need, fit.room_in(plan.memory_mb)
        if need is not None and need.weights / plan.sharing > room:
            raise LaunchError(
                f"{need}; {fit.given(plan.sharing, room)}",
                hint="more --npus with --engine vllm, or a smaller model or quantised weights; --skip-check memory",
            )

    def pull(self, image: str) -> None:
        """Pull the image with docker, which may take an hour."""
        self.say(f"docker pull {image}")
        done = self.host.run(["docker", "pull", image], timeout=_PULL_SECONDS)
        if done.code != 0:
            hint = "see its name and tag, this host's network, and `docker login` if the registry wants it"
            raise LaunchError(f"docker pull {image}: {done.last_line}", hint=hint)

    def replaceable(self, plan: ContainerPlan) -> bool:
        """Return whether there is a container of the plan's name; raise LaunchError if qvl launch did not start it."""
        template = f'{{{{index .Config.Labels "{LABEL}"}}}}'
        done = self.host.run(["docker", "container", "inspect", "--format", template, plan.container])
        if done.code != 0:
            if "no such container" in done.stderr.lower():
                return False
            raise LaunchError(f"docker inspect: {done.last_line}", hint="see that docker runs and this user may use it")
        if done.stdout.strip() in ("", "<no value>"):
            raise LaunchError(
                f"container {plan.container} was not started by qvl launch: it has no label {LABEL}",
                hint=f"another --name, or docker rm -f {plan.container} if it is yours",
            )
        return True

    def remove(self, plan: ContainerPlan) -> None:
        """Stop the container of the plan's name, so that it may finish its requests, and remove it."""
        for word in ("stop", "rm"):
            done = self.host.run(["docker", word, plan.container], timeout=_END_SECONDS)
            # One that was started with docker's --rm is gone once it has stopped.
            if done.code != 0 and "no such container" not in done.stderr.lower():
                raise LaunchError(f"docker {word}: {done.last_line}", hint=f"docker rm -f {plan.container}")
        self.say(f"removed the old container {plan.container}")

    def start(self, plan: ContainerPlan) -> str:
        """Start the container and return its id."""
        words = docker_arguments(plan)
        done = self.host.run(words, timeout=120)
        if done.code != 0:
            hint = f"an old container? docker rm -f {plan.container}, or --replace"
            raise LaunchError(f"docker run: {done.last_line}", hint=hint)
        return done.stdout.strip()

    def wait(self, plan: ContainerPlan, *, timeout: float) -> float:
        """Wait until the service is ready and return the seconds it took.

        Raises LaunchError with the container's log if the container exits, or after `timeout` seconds.
        """
        import httpx

        where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plan.host, plan.host)  # noqa: S104
        address = f"[{where}]" if ":" in where else where
        url = f"http://{address}:{plan.port}{recipe.READY_PATHS[plan.engine]}"
        key = self.host.environ.get(recipe.KEY_NAMES[plan.engine]) if plan.with_key else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(timeout=5.0, trust_env=False, headers=headers) as client:
            start = time.monotonic()
            while True:
                try:
                    response = client.get(url)
                    if response.status_code == 200:
                        return time.monotonic() - start
                    last = f"{response.status_code} {response.text.strip()[:120]}"
                except httpx.HTTPError as error:
                    last = type(error).__name__
                state = self.state(plan)
                if state not in ("running", "created"):
                    raise LaunchError(
                        f"container {plan.container} is {state}", hint=f"docker rm {plan.container}", log=self.log(plan)
                    )
                remaining = timeout - (time.monotonic() - start)
                if remaining <= 0:
                    break
                self.say(f"{timeout - remaining:.0f} s: {last}")
                time.sleep(min(self.poll, remaining))
        raise LaunchError(
            f"{url} is not ready after {timeout:g} s ({last})",
            hint=f"the container is still running: docker logs -f {plan.container}; wait longer with --wait",
            log=self.log(plan),
        )

    def state(self, plan: ContainerPlan) -> str:
        """Return docker's word for the container's state, such as "running", with the exit code if it has exited."""
        template = "{{.State.Status}} {{.State.ExitCode}}"
        done = self.host.run(["docker", "inspect", "--format", template, plan.container])
        word, _, code = done.stdout.strip().partition(" ")
        if done.code != 0 or not word:
            return "gone"
        return f"{word} with exit code {code}" if word in ("exited", "dead") else word

    def log(self, plan: ContainerPlan) -> str:
        """Return the last lines of the container's log, stdout and stderr."""
        done = self.host.run(["docker", "logs", "--tail", str(_LOG_LINES), plan.container])
        return (done.stdout + done.stderr).strip()
