"""`qvl doctor`: runs every applicable check on this host and collects the findings.

Exit code: 0 all ok, 1 warnings only, 2 at least one failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl._version import __version__
from qvl.ascend import devices, matrix
from qvl.ascend.checks import (
    chip,
    driver,
    endpoint,
    fit,
    model_slim,
    ops,
    resources,
    settings,
    software,
    store,
    version_matrix,
    weights,
)
from qvl.ascend.host import Host
from qvl.ascend.report import MARKS, DoctorReport, Finding
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

DEVICES: Final = ("auto", "npu", "cuda", "cpu")


@dataclass(frozen=True, slots=True)
class Options:
    """The parts of a host to examine; those that are None are skipped. `device` is auto, npu, cuda or cpu.

    `probe` runs the operations on the device, which loads torch and takes seconds to minutes. `software` False skips
    CANN, Python packages and the probe, which a host that only runs containers does not need.
    """

    device: str = "auto"
    weights: Path | None = None
    cache: str | None = None
    url: str | None = None
    api_key: str | None = None
    model: str | None = None
    dtype: str | None = None
    ports: tuple[int, ...] = (8000,)
    folder: str = "/"
    probe: bool = True
    software: bool = True

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"unknown --device {self.device!r}", hint=f"one of {', '.join(DEVICES)}")


def examine(
    host: Host, options: Options | None = None, *, on_finding: Callable[[Finding], None] | None = None
) -> DoctorReport:
    """Run the checks in order and return their report. `on_finding` is called with each finding.

    A check that raises becomes a failed finding, so that the other checks still run.
    """
    options = options or Options()
    kind = devices.kind_of(host) if options.device == "auto" else options.device
    findings: list[Finding] = []
    with devices.one_look():
        for name, check in _plan(host, options, kind):
            for finding in _guarded(name, check):
                findings.append(finding)
                if on_finding is not None:
                    on_finding(finding)
    facts = {
        "qvl": __version__,
        "device": kind,
        "python": host.python_version,
        "container": host.in_container,
        "matrix": matrix.load().date,
        "matrix_origin": matrix.load().origin,
    }
    return DoctorReport(tuple(findings), facts)


def render(finding: Finding) -> Text:
    """Return one finding for a terminal: a line with status, check and summary, and its fix, if any, below."""
    from rich.text import Text

    word, colour = MARKS[finding.status]
    line = Text.assemble((f"{word:<5}", colour), (f"{finding.check:<18} ", "bold"), finding.summary)
    if finding.fix and finding.status in ("warn", "fail"):
        line.append_text(Text.assemble("\n     ", ("fix: ", "cyan"), finding.fix))
    return line


def verdict(report: DoctorReport) -> str:
    """Return the last line of the output: the number of findings by status, and the date of the version matrix."""
    fails, warns = report.count("fail"), report.count("warn")
    counts = f"{report.count('ok')} ok, {warns} warnings, {fails} failures"
    origin = report.facts.get("matrix_origin")
    source = "" if origin == matrix.SHIPPED else f", from {origin}"
    return f"{counts} (version matrix of {report.facts.get('matrix')}{source})"


def _plan(host: Host, options: Options, kind: str) -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    if kind == "npu":
        yield "matrix", version_matrix.age
        yield "device-nodes", lambda: driver.device_nodes(host)
        yield "npu-smi", lambda: driver.smi(host)
        yield "driver", lambda: driver.firmware(host)
        yield "chip", lambda: chip.kind(host, options.dtype)
        if options.software:
            yield "cann", lambda: software.cann(host)
            yield "chip-software", lambda: chip.software(host)
        yield "visible-devices", lambda: settings.visible_devices(host)
        yield "privileges", lambda: settings.privileges(host)
    elif kind == "cuda":
        yield "nvidia-smi", lambda: driver.nvidia(host)
    else:
        yield "cpu", lambda: resources.processor(host)
    if options.software:
        yield "versions", lambda: software.versions(host, kind)
    yield "environment", lambda: settings.names(host)
    yield "conflicts", lambda: settings.conflicts(host)
    yield "shm", lambda: resources.shared_memory(host)
    if options.software:
        yield "shm-ray", lambda: resources.ray_memory(host)
    yield "disk", lambda: resources.disk(host, options.folder)
    yield "open-files", lambda: resources.open_files(host)
    yield "ports", lambda: resources.ports(host, options.ports, len(devices.device_numbers(host)))
    if kind == "npu":
        yield "hccl-npu-ports", lambda: resources.hccl_ports(host)
    yield "clock", lambda: resources.clock(host)
    if options.probe and options.software:
        yield "op-probe", lambda: ops.probe(host, kind)
    if options.weights is not None:
        has = host.packages().get("transformers") if options.software else None
        yield "weights", partial(weights.check, options.weights, transformers=has)
        known = devices.chip_of(host, devices.query(host)) if kind == "npu" else None
        yield "model-slim", partial(model_slim.check, options.weights, known)
        yield "fit", partial(fit.check, host, options.weights)
    if options.cache is not None:
        yield "cache-store", partial(store.check, host, options.cache)
    if options.url is not None:
        yield "endpoint", partial(endpoint.check, options.url, api_key=options.api_key, model=options.model)


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - reported as a finding, with its type and words
        text = str(error).strip().splitlines()
        yield Finding.fail(
            name,
            f"the check itself failed: {type(error).__name__}: {text[0] if text else ''}",
            "please report this with the output of `qvl doctor --json`",
        )
