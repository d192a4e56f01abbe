"""`qvl launch`: checks an Ascend host, starts a container on it and waits until it is ready."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli.expand import expand
from qvl.errors import ConfigError, QvlError, write_failed

if TYPE_CHECKING:
    from qvl.ascend.host import Host
    from qvl.ascend.recipe import ContainerPlan

HUB_CACHE = Path("~/.cache")
_host = partial(typer.Option, rich_help_panel="On this host")
_inside = partial(typer.Option, rich_help_panel="In the container")
_way = partial(typer.Option, rich_help_panel="How")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("launch", context_settings={"allow_extra_args": True})(launch)


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """The options of `qvl launch`."""

    model: Annotated[str, typer.Argument(help="A checkpoint folder of this host, or a hub id. Required.")] = ""
    image: Annotated[str, typer.Option(help="Image with its tag; none is assumed. Required.")] = ""
    engine: Annotated[str, typer.Option(help="qvl (qvl-serve) or vllm (vllm serve).")] = "qvl"
    npus: Annotated[str, _host(help="0,1 or 0-3 or all; only these are given.")] = "0"
    port: Annotated[int, _host(help="Port to publish.")] = 8000
    host: Annotated[str, _host(help="Address to publish on.")] = "127.0.0.1"
    name: Annotated[str, _host(help="Name of the container. Default: engine and port.")] = ""
    hub_cache: Annotated[Path, _host(help="Folder mounted at /root/.cache.")] = HUB_CACHE
    answers: Annotated[Path | None, _host(help="Folder in which cached answers are kept.")] = None
    code: Annotated[Path | None, _host(help="A source tree of qvl to run in place of the image's.")] = None
    served_model_name: Annotated[str, _inside(help="Name in the API. Default: the model's.")] = ""
    chip: Annotated[str, _inside(help="910B, A3, 310P, 310P RC, 950, or npu-smi's name, which is the default.")] = ""
    shm_size: Annotated[str, _inside(help="Shared memory. Default: the chip's recipe.")] = ""
    restart: Annotated[str, _inside(help="docker's restart policy.")] = "no"
    env: Annotated[list[str] | None, _inside(metavar="NAME=VALUE", help="Or NAME: the host's value.")] = None
    mount: Annotated[list[str] | None, _inside(metavar="HOST:INSIDE[:ro]", help="A further folder.")] = None
    network: Annotated[str, _inside(help="docker's network; host: no port is published.")] = ""
    docker_arg: Annotated[list[str] | None, _inside(help="A further option of docker run, as --option=value.")] = None
    privileged: Annotated[bool, _inside("--privileged", help="Show it every NPU. Not needed.")] = False
    skip_check: Annotated[list[str] | None, _way(help="flags, npus, mounts, port, image, weights, memory.")] = None
    share: Annotated[bool, _way("--share", help="Start on NPUs that are held, too.")] = False
    pull: Annotated[bool, _way("--pull", help="Pull the image first.")] = False
    replace: Annotated[bool, _way("--replace", help="End qvl's container of this name first.")] = False
    allow_unauthenticated: Annotated[bool, _way("--allow-unauthenticated", help="Publish without a key.")] = False
    dry_run: Annotated[bool, _way("--dry-run", help="Print the command and do nothing.")] = False
    compose: Annotated[Path | None, _way(help="Write a compose file, one engine an NPU, into this folder.")] = None
    pool_image: Annotated[str, _way(help="Image of the pool, for --compose --engine vllm.")] = ""
    wait: Annotated[float, _way(help="Seconds to wait until it is ready; 0: do not.")] = 1200.0

    def missing(self) -> list[str]:
        """Return the names of required options that are missing."""
        pool = self.compose is not None and self.engine == "vllm" and not self.pool_image
        required = {
            "MODEL": not self.model,
            "--image NAME:TAG": not self.image,
            "--pool-image NAME:TAG (an image with qvl[server,redis] in it, for --compose --engine vllm)": pool,
        }
        return [name for name, lacking in required.items() if lacking]

    def plan(self, host: Host, npus: tuple[int, ...], extra: Sequence[str]) -> ContainerPlan:
        """Return the container's plan; with --compose it has only the first of `npus`."""
        from qvl.ascend import chips, devices
        from qvl.ascend.recipe import KEY_NAMES, ContainerPlan

        with devices.one_look():
            chip, memory = self.chip or devices.chip_name(host, npus), devices.smallest_memory(host, npus)
        if self.compose is not None:
            npus = npus[:1]
        return ContainerPlan(
            model=self.model,
            image=self.image,
            npus=npus,
            engine=self.engine,
            name=self.name,
            host=self.host,
            port=self.port,
            served_name=self.served_model_name,
            chip=chip,
            kind=known.kind if (known := chips.named(self.chip)) else "",
            shm=self.shm_size,
            hub_cache=str(_in_home(self.hub_cache).resolve()),
            answers=str(self.answers.resolve()) if self.answers else "",
            code=str(self.code.resolve()) if self.code else "",
            restart=self.restart,
            privileged=self.privileged,
            with_key=bool(host.environ.get(KEY_NAMES.get(self.engine, ""))),
            nodes=host.names("/dev"),
            files=tuple(path for path in chips.looked_for() if host.path(path).exists()),
            memory_mb=memory,
            env=(*_of_host(host), *(self.env or ())),
            mounts=tuple(self.mount or ()),
            docker_args=tuple(self.docker_arg or ()),
            network=self.network,
            extra=tuple(extra),
        )


@expand
def launch(context: typer.Context, options: LaunchOptions) -> None:
    """Run one engine in a container with only the NPUs of --npus; `-- FLAGS` go to the engine.

    The key is taken from QVL_API_KEY (engine qvl) or VLLM_API_KEY (engine vllm) and passed by name. Exit code: 0 the
    service is ready, 2 it could not be started.
    """
    from qvl.ascend.host import Host
    from qvl.ascend.launch import LaunchError

    try:
        _launch(Host(), options, context.args)
    except QvlError as error:
        if isinstance(error, LaunchError) and error.log:
            typer.echo(error.log, err=True)
        typer.echo(f"qvl launch: {error}", err=True)
        raise typer.Exit(2) from error


def _launch(host: Host, options: LaunchOptions, extra: Sequence[str]) -> None:
    from qvl.ascend import chips, devices, flags
    from qvl.ascend.launch import refuse_unknown
    from qvl.ascend.recipe import KEY_NAMES, absent_folders, notes, refuse_other_image

    # All at once, and not one a try, as the options' own check would.
    if missing := options.missing():
        raise ConfigError(
            f"missing: {', '.join(missing)}", hint="qvl launch Qwen/Qwen3-VL-8B-Instruct --image qvl-npu:0.1.0 --npus 0"
        )
    # Without -- an option would not be known, so what comes first can only be one word too many.
    if extra and not extra[0].startswith("-"):
        raise ConfigError(f"unexpected {extra[0]!r}", hint="flags of the engine stand after --")
    refuse_unknown(options.skip_check or ())
    if not 0 <= options.wait < math.inf:
        raise ConfigError(f"invalid --wait {options.wait:g}", hint="seconds, or 0 for not to wait")
    if options.chip and not (chips.named(options.chip) or chips.find(options.chip)):
        hint = f"one of {', '.join(chip.kind for chip in chips.CHIPS)}, or the name in npu-smi, such as 910B4"
        raise ConfigError(f"unknown --chip {options.chip!r}", hint=hint)
    npus = devices.parse_npus(options.npus, devices.device_numbers(host))
    plan = options.plan(host, npus, extra)
    if "image" not in (options.skip_check or ()):
        refuse_other_image(plan)
    if extra and "flags" not in (options.skip_check or ()):
        flags.check(plan.engine, extra, _flags_of(plan.engine))
    if options.hub_cache == HUB_CACHE and options.compose is None and not options.dry_run:
        # Nobody named it, so there is nothing to warn of on a fresh machine; made here, it is not root's.
        with contextlib.suppress(OSError):
            Path(plan.hub_cache).mkdir(exist_ok=True)
    for note in notes(plan):
        typer.echo(f"note: {note}", err=True)
    for option, folder in absent_folders(plan):
        typer.echo(f"warning: {option} {folder} does not exist; docker would mount an empty folder of root's", err=True)
    if options.compose is not None:
        if options.pull or options.replace:
            option = "--pull" if options.pull else "--replace"
            raise ConfigError(f"{option} does not go with --compose", hint="docker compose pull, docker compose up -d")
        _write_compose(plan, npus, options.pool_image, options.compose)
        return
    local = plan.host in ("127.0.0.1", "::1", "localhost")
    if not local and not plan.with_key and not options.allow_unauthenticated:
        raise ConfigError(
            f"--host {plan.host} needs an API key", hint=f"set {KEY_NAMES[plan.engine]}, or --allow-unauthenticated"
        )
    _run(host, plan, options)


def _flags_of(engine: str) -> frozenset[str]:
    """Return the flags that the engine's program takes."""
    from qvl.ascend import flags

    if engine == "vllm":
        return flags.of_vllm()[1]
    from qvl.cli.serve import serve

    # Not as qvl registers it, which would read this host's config file.
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    options = typer.main.get_command(app).params
    names = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    return frozenset(["--help", *(name for name in names if name.startswith("-"))])


def _of_host(host: Host) -> list[str]:
    """Return the names of the hub's settings and proxies that this host has; docker takes their values by name."""
    names = ("QVL_HUB", "VLLM_USE_MODELSCOPE", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE")
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
    return [name for name in (*names, *proxies) if host.environ.get(name)]


def _in_home(folder: Path) -> Path:
    """Return `folder` with ~ expanded."""
    from qvl.config import in_home

    path = in_home(folder)
    if path.parts[:1] == ("~",):
        raise ConfigError(f"{folder} cannot be resolved: this user has no home", hint="--hub-cache FOLDER")
    return path


def _run(host: Host, plan: ContainerPlan, options: LaunchOptions) -> None:
    from qvl.ascend.launch import Launcher, script

    if options.dry_run:
        typer.echo(script(plan, pull=options.pull, replace=options.replace))
        return
    launcher = Launcher(host, say=lambda line: typer.echo(f"  {line}", err=True))
    skip = [*(options.skip_check or ()), *(["image"] if options.pull else [])]
    old = options.replace and launcher.replaceable(plan)
    # The old container may hold NPU and port itself: what it hides is asked when it has ended, all else before.
    launcher.check(plan, share=options.share, skip=[*skip, "port"] if old else skip, replacing=old)
    if options.pull:
        launcher.pull(plan.image)
    if old:
        launcher.remove(plan)
        launcher.check(plan, share=options.share, skip=[*skip, "mounts", "image", "weights"])
    identity = launcher.start(plan)
    typer.echo(f"started {plan.container} ({identity[:12]}) on NPU {','.join(map(str, plan.npus))}", err=True)
    if options.wait > 0:
        typer.echo(f"ready after {launcher.wait(plan, timeout=options.wait):.0f} s", err=True)
    typer.echo(f"http://{plan.host}:{plan.port}/v1  model {plan.label}")


def _write_compose(plan: ContainerPlan, npus: tuple[int, ...], pool_image: str, folder: Path) -> None:
    from qvl.ascend import compose

    for path, text in compose.files(plan, npus, pool_image=pool_image or plan.image).items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as exc:
            raise write_failed(str(target), exc) from exc
        typer.echo(str(target))
