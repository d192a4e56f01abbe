"""Checks of the chip against what is installed for it: dtype, vllm-ascend, CANN's kernels, the driver."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qvl.ascend import chips, devices, matrix
from qvl.ascend.checks.driver import fields
from qvl.ascend.checks.software import cann_version
from qvl.ascend.host import Host
from qvl.ascend.report import Finding

_KERNELS = ("opp/built-in/op_impl/ai_core/tbe/kernel", "opp/built-in/op_impl/ai_core/tbe/kernel/config")
_LINE = re.compile(r"(V\d{3}R\d{3}C\d+)")
# CANN's list accepts these drivers; vllm-ascend's maintainers know that operations time out with them all the same.
_TIMING_OUT, _SINCE_CANN = "24.1", "8.3"
_BUILDS = {chip.build: chip.kind.split()[0] for chip in chips.CHIPS if chip.build}


def kind(host: Host, dtype: str | None) -> Iterator[Finding]:
    """Check that vllm-ascend and qvl run on the chip, and that it computes in `dtype` (None: any)."""
    table = devices.query(host)
    names = sorted({npu.name for npu in table.npus}) if table else []
    chip = devices.chip_of(host, table)
    if chip is None:
        for name in names:
            yield Finding.warn(
                "chip",
                f"{name} is not a chip that qvl has facts about: it is treated as {chips.DEFAULT.kind}",
                "check device nodes, mounts and image by the vendor's page for this chip",
                {"chip": name},
            )
        return
    if len({chips.find(name, host.names("/dev")) for name in names}) > 1:
        yield Finding.warn(
            "chip",
            f"chips of several kinds: {', '.join(names)}; all is judged here by the facts of {chip.kind}",
            "launch NPUs of one kind together, with the image of that kind",
            {"names": names},
        )
    detail = {"chip": chip.kind, "names": names, "products": chip.products, "dtypes": chip.dtypes}
    if not chip.supported:
        yield Finding.fail(
            "chip",
            f"{', '.join(names) or chip.kind}: {chip.why_not}",
            f"use a host with {chips.kinds()}, or reach a model elsewhere: qvl-serve --base-url",
            detail,
        )
    else:
        text = f"{chip.kind} ({chip.products}): {', '.join(chip.dtypes)}"
        if chip.dies > 1:
            text += f"; {chip.dies} dies a card, used together: --npus 0,1"
        if chip.quantisation:
            text += f"; quantised weights in {chip.quantisation} with --quantization ascend"
        yield Finding.ok("chip", text, detail)
    nodes = devices.device_numbers(host)
    alone = [number for number in nodes if chip.dies == 2 and number ^ 1 not in nodes]
    for number in alone:
        yield Finding.warn(
            "chip",
            f"/dev/davinci{number} is one of the two dies of a card, and /dev/davinci{number ^ 1} is not here",
            f"give both to the container: --device /dev/davinci{number} --device /dev/davinci{number ^ 1}",
            detail,
        )
    if dtype and dtype not in ("auto", *chip.dtypes):
        text = f"{', '.join(names) or chip.kind} does not compute in {dtype}"
        yield Finding.fail("dtype", text, f"use --dtype {chip.dtypes[0]}", detail)
    elif "bfloat16" not in chip.dtypes:
        text = f"{', '.join(names) or chip.kind} computes in {', '.join(chip.dtypes)} only"
        yield Finding.ok("dtype", text, {"allowed": chip.dtypes})


def software(host: Host) -> Iterator[Finding]:
    """Check that vllm-ascend, its build, CANN's kernels and the driver are those for the chip."""
    chip = devices.chip_of(host, devices.query(host))
    if chip is not None and chip.supported:
        yield from _plugin(host, chip)
        yield from _kernels(host, chip)
    yield from _driver_with_cann(host)


def _plugin(host: Host, chip: chips.Chip) -> Iterator[Finding]:
    version = host.packages().get("vllm-ascend")
    if version is None:
        return
    if matrix.untagged(version):
        untagged = f"vllm-ascend {version} is built from a source tree without tags, so its release is not known"
        yield Finding.skip("chip-release", untagged)
    elif matrix.key(version) < matrix.key(chip.serves_from):
        yield Finding.fail(
            "chip-release",
            f"vllm-ascend {version} does not serve Qwen3-VL on {chip.kind}: {chip.serves_from} or newer does",
            f"use an image vllm-ascend:v{chip.serves_from} or newer{_ending(chip)}",
            {"version": version, "from": chip.serves_from},
        )
    text = host.package_text("vllm-ascend", "vllm_ascend/_build_info.py")
    text = text or host.read("/vllm-workspace/vllm-ascend/vllm_ascend/_build_info.py")
    built = built_for(text or "")
    if built is None:
        return
    if built == chip.build:
        yield Finding.ok("chip-build", f"vllm-ascend {version} is built for {_BUILDS[built]}", {"build": built})
    else:
        yield Finding.fail(
            "chip-build",
            f"vllm-ascend {version} is built for {_BUILDS.get(built, built)}, but the chip is {chip.kind}",
            f"use the image of this chip{_ending(chip)}, or build with SOC_VERSION of this chip",
            {"build": built, "wants": chip.build},
        )


def built_for(text: str) -> str | None:
    """Return the device type in vllm-ascend's `_build_info.py` (`A2`, `A3`, `310P`, `A5`), None if it names none.

    Older builds name the chip itself (`__soc_version__ = "ASCEND910B1"`).
    """
    match = re.search(r"__device_type__\s*=\s*['\"](?:\w+\.)?_?(\w+)['\"]", text)
    if match:
        return match[1]
    match = re.search(r"__soc_version__\s*=\s*['\"]([\w-]+)['\"]", text)
    chip = chips.find(match[1]) if match else None
    return (chip.build or chip.kind) if chip else None


def _ending(chip: chips.Chip) -> str:
    suffix = chip.image_suffixes[0]
    return f" (its tag ends in -{suffix})" if suffix else " (its tag has no chip: v0.23.0, v0.23.0-openeuler)"


def _kernels(host: Host, chip: chips.Chip) -> Iterator[Finding]:
    toolkit = cann_version(host)
    if toolkit is None:
        return
    names = {name for folder in _KERNELS for name in host.names(f"{toolkit[1]}/{folder}") if name.startswith("ascend")}
    if not names:
        return
    wanted = chip.kernels
    if any(name.startswith(wanted) for name in names):
        yield Finding.ok("cann-kernels", f"CANN has the kernels of {chip.kind}", {"kernels": sorted(names)})
    else:
        yield Finding.fail(
            "cann-kernels",
            f"CANN has kernels for {', '.join(sorted(names))}, none for {chip.kind} ({wanted})",
            f"install the kernels (ops) package of CANN {toolkit[0]} for {chip.kind}, or use the image of this chip",
            {"kernels": sorted(names), "wants": wanted},
        )


def _driver_with_cann(host: Host) -> Iterator[Finding]:
    driver = fields(host.read("/usr/local/Ascend/driver/version.info"))
    found = cann_version(host)
    facts = cann_facts(host)
    if found is None or not driver.get("version"):
        return
    own, takes = _line(driver.get("innerversion")), _lines(driver.get("compatible_version"))
    toolkit, accepts = _line(facts.get("innerversion")), _lines(facts.get("compatible_version"))
    detail = {"driver": driver["version"], "driver_line": own, "cann": found[0], "cann_accepts": accepts}
    if not own or not accepts:
        return
    timing_out = driver["version"].startswith(_TIMING_OUT) and matrix.key(found[0])[:2] >= matrix.key(_SINCE_CANN)[:2]
    if timing_out and "vllm-ascend" in host.packages() and (own in accepts or toolkit in takes):
        yield Finding.warn(
            "driver-cann",
            f"driver {driver['version']} is one that CANN {found[0]} accepts, but drivers {_TIMING_OUT} are known for "
            "operations that time out with it under vllm-ascend (507014)",
            "host: install the driver and firmware that came with this CANN, then reboot; or an image with CANN 8.2",
            detail,
        )
        return
    if own in accepts or toolkit in takes:
        yield Finding.ok("driver-cann", f"driver {driver['version']} is one that CANN {found[0]} accepts", detail)
        return
    older = _order(own) < _order(accepts[0])
    text = f"driver {driver['version']} ({own}) is {'older' if older else 'other'} than CANN {found[0]} accepts"
    yield Finding.fail(
        "driver-cann",
        f"{text}: {accepts[0]} to {accepts[-1]}",
        "host: install the driver and firmware that CANN's release notes name, then reboot"
        if older
        else f"use a CANN of the driver's own generation, or an image with it, instead of {found[0]}",
        detail,
    )


def cann_facts(host: Host) -> dict[str, str]:
    """Return the fields of the toolkit's `ascend_toolkit_install.info`, keys in lower case; {} without a toolkit."""
    toolkit = cann_version(host)
    for name in host.names(toolkit[1]) if toolkit else ():
        facts = fields(host.read(f"{toolkit[1]}/{name}/ascend_toolkit_install.info")) if toolkit else {}
        if facts.get("version"):
            return facts
    return {}


def _line(text: str | None) -> str:
    match = _LINE.search(text or "")
    return match[1] if match else ""


def _lines(text: str | None) -> list[str]:
    return sorted(_LINE.findall(text or ""), key=_order)


def _order(line: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", line))
