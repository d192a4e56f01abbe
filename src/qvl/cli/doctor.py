"""`qvl doctor`: the problems of this host, each with a one-line fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu: what the host is meant to compute on.")] = "auto",
    url: Annotated[str | None, typer.Option(help="Also examine an OpenAI-compatible endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's model, where it serves several.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="QVL_API_KEY", help="Key of the endpoint.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Also examine a checkpoint folder.")] = None,
    cache: Annotated[str | None, typer.Option(help="Also examine a cache: sqlite:////file.db, redis://...")] = None,
    dtype: Annotated[str | None, typer.Option(help="The dtype you mean to use.")] = None,
    port: Annotated[list[int] | None, typer.Option(help="A port that must be free; may be repeated.")] = None,
    folder: Annotated[Path, typer.Option(help="Where weights and answers will lie.")] = Path("/"),
    probe: Annotated[bool, typer.Option(help="Run Qwen3-VL's operations on every device (loads torch).")] = True,
    software: Annotated[bool, typer.Option(help="Look at CANN and Python packages (not for a container host).")] = True,
    explain: Annotated[
        str | None, typer.Option(metavar="CODE", help="Only explain an error code, such as 207001, EI0006 or -8020.")
    ] = None,
    matrix: Annotated[
        str | None, typer.Option(metavar="FILE|URL", help="A newer matrix of versions than the one of this qvl.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Examine this host: driver, CANN, versions, environment, operations, weights, endpoint, cache.

    Exit code: 0 all ok, 1 warnings only, 2 at least one failure. With --explain: 0 explained, 2 a code is not known.
    """
    if explain is not None:
        # Where each value is from: one that was typed would go unheard, even if it is the default.
        sources = {name: context.get_parameter_source(name) for name in context.params}
        typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        if others := sorted(typed - {"explain", "as_json"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            typer.echo(f"qvl doctor: --explain examines no host: {flags} has no meaning with it", err=True)
            raise typer.Exit(2)
        _explain(explain, as_json=as_json)
        return
    from contextlib import AbstractContextManager, nullcontext

    from qvl.ascend import matrix as versions
    from qvl.ascend.doctor import Options, examine, render, verdict
    from qvl.ascend.host import Host
    from qvl.errors import QvlError

    try:
        table: AbstractContextManager[None] = nullcontext()
        if matrix is not None:
            table = versions.use(versions.read(matrix))
        options = Options(
            device=device,
            url=url,
            model=model,
            api_key=api_key,
            weights=weights,
            cache=cache,
            dtype=dtype,
            ports=tuple(port or (8000,)),
            folder=str(folder.resolve()),
            probe=probe,
            software=software,
        )
    except QvlError as error:
        typer.echo(f"qvl doctor: {error}", err=True)
        raise typer.Exit(2) from error
    with table:
        if as_json:
            report = examine(Host(), options)
            typer.echo(report.to_json())
        else:
            from qvl.cli.console import PlainConsole

            console = PlainConsole(soft_wrap=True, highlight=False)
            report = examine(Host(), options, on_finding=lambda finding: console.print(render(finding)))
            console.print(verdict(report), style="bold")
    raise typer.Exit(report.exit_code)


def _explain(text: str, *, as_json: bool) -> None:
    """Print what the error codes in `text` mean; exit code 2 if one is not known, or there is none."""
    import json
    from dataclasses import asdict

    from qvl.ascend.explain import codes_in, explanations, known

    codes = codes_in(text)
    if not codes:
        shape = "an error code looks like 207001, EI0006, ERR00100 or -8020"
        typer.echo(f"qvl doctor: {text[:80]!r} is not an error code, and has none in it: {shape}", err=True)
        raise typer.Exit(2)
    if found := explanations(text):
        if as_json:
            typer.echo(json.dumps([asdict(item) for item in found], ensure_ascii=False, indent=2))
        else:
            typer.echo("\n".join(map(str, found)))
    if unknown := [code for code in codes if code not in known()]:
        place = "the plog under ~/ascend/log names the operation and the first error"
        typer.echo(f"qvl doctor: no explanation of {', '.join(unknown)}: {place}", err=True)
        raise typer.Exit(2)
