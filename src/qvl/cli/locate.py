"""`qvl locate`: where on a picture something is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import options
from qvl.cli.expand import expand
from qvl.errors import ConfigError, write_failed

if TYPE_CHECKING:
    from qvl.cli.parse_args import Pictures
    from qvl.cli.run_pictures import Answer
    from qvl.evidence.located import Locations


@expand
def locate(
    picture: Annotated[str, typer.Argument(help="A file, a quoted glob, a URL, a data: URL, or - for stdin.")],
    targets: Annotated[list[str], typer.Argument(help='What to locate: "the brand" "the handle".')],
    *,
    points: Annotated[bool, typer.Option("--points", help="A point on each instead of a box around it.")] = False,
    overlay: Annotated[
        Path | None, typer.Option("--overlay", metavar="FILE", help="Draw them on the picture: out.png or out.svg.")
    ] = None,
    settings: options.PipelineOptions,
    run: options.RunOptions,
) -> None:
    """Locate each target on a picture: boxes in pixels of the original, each with a confidence.

    Answers are kept in the cache. Exit code: 0 all done, also where nothing was found, 1 some failed, 2 wrong use.
    """
    from qvl.cli import parse_args, run_pictures
    from qvl.evidence.locate import read_targets
    from qvl.pipeline.parse_request import listed

    options.start_logs(run.verbose, run.as_json)
    others = [target for target in targets if parse_args.is_picture(target)]
    if others:
        raise ConfigError(
            f"{others[0]} is a picture, not what to locate", hint='one picture or a quoted glob, then "the brand" …'
        )
    wanted = read_targets(targets)
    work_items = parse_args.pictures([picture], together=False)
    if overlay is not None:
        _check_overlay(overlay, len(work_items))
    request = settings.request()
    pipeline = settings.build(concurrency=run.concurrency)
    calibrator = pipeline.executor.calibrator
    if calibrator is not None and (points or calibrator.calibration.locations is None):
        what = "points have no calibration" if points else f"the calibration {settings.calibration} is not of boxes"
        raise ConfigError(what, hint="leave --calibration out, or make one with `qvl calibrate --locate`")

    async def answer_one(source: Pictures, request_id: str) -> Answer:
        (one,) = listed(source)
        found = await pipeline.locate(one, wanted, points=points, request_id=request_id, **request)
        if overlay is not None:
            _write(overlay, found)
        return found, found.result

    run_pictures.run(pipeline, work_items, answer_one, run, title=f"qvl locate: {', '.join(wanted)}")


def _check_overlay(path: Path, pictures: int) -> None:
    """Raise ConfigError unless the overlay of so many pictures can be written to `path`."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--overlay {path} is neither PNG nor SVG", hint="name it out.png or out.svg")
    if pictures > 1:
        raise ConfigError(f"--overlay is for one picture, not for {pictures}", hint="--html report.html shows them all")
    options.check_writable(path, "--overlay")


def _write(path: Path, found: Locations) -> None:
    data = found.overlay() if path.suffix.lower() == ".png" else found.overlay_svg().encode("utf-8", "backslashreplace")
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise write_failed(f"--overlay {path}", exc) from exc
