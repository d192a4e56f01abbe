"""`qvl tune`: measure settings of a server on this host, and write the best as a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import failure
from qvl.cli.bench_options import BenchOptions
from qvl.cli.expand import expand
from qvl.cli.terminal import print_json
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.bench.tune import TunePlan

_input = partial(typer.Option, rich_help_panel="What to ask")


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """The options of `qvl tune`."""

    url: Annotated[str | None, typer.Option(help="A running endpoint; only its load is varied.")] = None
    launch: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Starts a server at {port}; flags go to {flags} or the end.")
    ] = None
    vary: Annotated[
        list[str] | None, typer.Option(metavar="FLAG=A,B", help="Values to try, + alone, - without; may be repeated.")
    ] = None
    grid: Annotated[str | None, typer.Option(help="Flags to vary: vllm or qvl.")] = None
    npus: Annotated[
        int | None, typer.Option(min=1, help="NPUs a server may take. Default: of --launch's --npus, or this host.")
    ] = None
    stop: Annotated[str | None, typer.Option(metavar="COMMAND", help="Ends what --launch leaves running.")] = None
    wait: Annotated[float, typer.Option(min=1, help="Seconds until a server must be ready.")] = 600.0
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the first that it lists.")] = None
    api_key: Annotated[str | None, typer.Option(envvar=["QVL_API_KEY", "OPENAI_API_KEY"], help="Its key.")] = None
    data: Annotated[list[str] | None, _input("--data", "-d", help="JSONL file or glob; may be repeated.")] = None
    synthetic: Annotated[int, _input(min=1, help="So many drawn pictures, without --data.")] = 64
    size: Annotated[str, _input(help="Of drawn pictures, WxH.")] = "512x512"
    prompt: Annotated[str, _input(help="The question for pictures without one.")] = "Describe it."
    max_tokens: Annotated[int, _input(min=1, help="Longest answer.")] = 64
    concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Numbers of clients.")] = "1,4,16"
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Requests a measurement.")] = 64
    slo: Annotated[str, typer.Option(help="ttft=500ms,tpot=50ms,e2e=10s: only these count.")] = ""
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: a new one here.")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the tuning in --out.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the recipe as JSON.")] = False

    def plan(self) -> TunePlan:
        """Return what is to be measured."""
        from qvl.bench.tune import TunePlan, given_flags
        from qvl.bench.tune_grid import Axis, grid

        npus = self._npus()
        own = [Axis.read(text) for text in self.vary or ()]
        usual = grid(self.grid, npus) if self.grid else []
        # What --launch or --vary says stands.
        named = {flag for axis in own for flag in axis.flags} | given_flags(self.launch)
        bench = BenchOptions(
            url=[self.url] if self.url else None,
            model=self.model,
            api_key=self.api_key,
            data=self.data,
            synthetic=None if self.data else self.synthetic,
            size=self.size,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            count=self.count,
            warmup=2,
            slo=self.slo,
        )
        levels = [part.strip() for part in self.concurrency.split(",")]
        if not all(level.isdecimal() and int(level) for level in levels):
            raise ConfigError(f"--concurrency {self.concurrency!r} cannot be read", hint="as 1,4,16")
        return TunePlan(
            target=bench.endpoints_asked(),
            dataset=bench.dataset(),
            load=bench.plan(),
            clients=tuple(sorted({int(level) for level in levels})),
            command=self.launch,
            axes=(*own, *(axis for axis in usual if named.isdisjoint(axis.flags))),
            stop=self.stop,
            wait=self.wait,
            npus=npus,
        )

    def _npus(self) -> int:
        """Return how many NPUs a server may take; 0 if that is unknown, as it is without NPUs.

        Raises:
            ConfigError: --npus names more than this host has.
        """
        import re

        from qvl.ascend import devices
        from qvl.ascend.host import Host

        numbers = devices.device_numbers(Host())
        if self.npus is not None:
            if numbers and self.npus > len(numbers):
                raise ConfigError(f"--npus {self.npus}: this host has {len(numbers)}", hint=f"--npus {len(numbers)}")
            return self.npus
        launched = re.search(r"\blaunch\b.*?\s--npus[ =]([\w,-]+)", self.launch or "")
        return len(devices.parse_npus(launched[1], numbers)) if launched else len(numbers)


@expand
def tune(options: TuneOptions) -> None:
    """Measure a small grid of settings on this host with `qvl bench`; the best is written to recipe.json.

    One flag after the other is varied from its first value on. Exit code: 0 done, 1 nothing could be measured, 2 wrong
    use, 130 after Ctrl-C.
    """
    from qvl.bench.tune import RECIPE, Tuning

    plan = options.plan()
    if options.resume and options.out is None:
        raise ConfigError("--resume needs the folder of a tuning", hint="name it with --out")
    folder = options.out or Path(f"tune-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        recipe = Tuning(plan, folder, options.resume, lambda line: typer.echo(line, err=True)).work()
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command with --out {folder} --resume goes on", err=True)
        raise
    if options.as_json:
        print_json(recipe)
    else:
        best = recipe["best"]
        assert isinstance(best, dict)
        typer.echo(
            f"best: {' '.join(best['flags']) or 'as it is'}, {best['clients']} clients: {best['score']:.2f} requests/s"
        )
        if recipe["command"]:
            typer.echo(recipe["command"])
    failure.stderr().print(f"written: {folder / RECIPE}")
