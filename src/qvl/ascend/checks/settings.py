"""Checks of the environment: visible devices, misspelt variables, conflicting settings, privileges."""

from __future__ import annotations

from collections.abc import Iterator

from qvl.ascend import chips, devices, environment, matrix
from qvl.ascend.host import Host
from qvl.ascend.report import Finding

_NAME = devices.VISIBLE_DEVICES
# The oldest vllm-ascend whose V1 engine was read to count the visible NPUs itself.
_COUNTS_FROM = "0.9.0rc1"


def visible_devices(host: Host) -> Iterator[Finding]:
    """Check that ASCEND_RT_VISIBLE_DEVICES is well formed, ascending, and names only NPUs of this host."""
    text = host.environ.get(_NAME)
    nodes = devices.device_numbers(host)
    if text is None:
        if "ASCEND_VISIBLE_DEVICES" in host.environ and not host.in_container:
            yield Finding.warn(
                "visible-devices",
                "ASCEND_VISIBLE_DEVICES is read by the Ascend docker runtime only; processes here ignore it",
                f"set {_NAME} instead",
            )
        elif not nodes:
            yield Finding.skip("visible-devices", f"{_NAME} is not set, and there is no NPU to see")
        else:
            yield Finding.ok("visible-devices", f"{_NAME} is not set: all {len(nodes)} NPUs are visible")
        return
    visible = devices.parse_visible(text)
    numbers = devices.addressable(nodes)
    detail = {"value": text, "read": visible.read, "addressable": numbers}
    if not visible.read or visible.dropped.strip(" "):
        kept = ",".join(map(str, visible.read)) or "nothing"
        yield Finding.fail(
            "visible-devices",
            f"{_NAME}={text!r}: the runtime stops at {visible.dropped!r} and keeps {kept}",
            f"write numbers and commas only, without blanks: {_NAME}={','.join(map(str, numbers)) or '0'}",
            detail,
        )
        return
    if not visible.ascending:
        yield Finding.fail(
            "visible-devices",
            f"{_NAME}={text} must be ascending: torch.npu.is_available() turns False without a message",
            f"{_NAME}={','.join(str(number) for number in sorted(set(visible.read)))}",
            detail,
        )
        return
    outside = [number for number in visible.read if number not in numbers]
    if outside and nodes:
        known = ",".join(map(str, numbers))
        reason = f"{_NAME}={text}: {outside[0]} is out of range; available NPUs: {known}"
        if nodes != numbers:
            reason += f" (the runtime counts the nodes davinci{', davinci'.join(map(str, nodes))} from 0)"
        yield Finding.fail("visible-devices", reason, f"{_NAME}={known}", detail)
        return
    plugin = host.packages().get("vllm-ascend")
    gaps = visible.read != tuple(range(len(visible.read)))
    if gaps and plugin and not matrix.untagged(plugin) and matrix.key(plugin) < matrix.key(_COUNTS_FROM):
        yield Finding.warn(
            "visible-devices",
            f"{_NAME}={text} with vllm-ascend {plugin}: its V1 engine takes these numbers for its own, which count "
            "from 0, and ends with 'Invalid device id'",
            f"use vllm-ascend {_COUNTS_FROM} or newer, or the NPUs from 0 on: "
            f"{_NAME}={','.join(map(str, range(len(visible.read))))}",
            detail,
        )
    else:
        yield Finding.ok("visible-devices", f"{_NAME}={text}", detail)


def names(host: Host) -> Iterator[Finding]:
    """Check that no variable is a probable misspelling of a known one."""
    from qvl.config import Settings

    wrong = environment.misspelt(host.environ, {f"QVL_{field.upper()}" for field in Settings.model_fields})
    for name, meant in wrong.items():
        yield Finding.warn(
            "environment", f"{name} is unknown; did you mean {meant}?", f"unset {name}; export {meant}=..."
        )
    if not wrong:
        yield Finding.ok("environment", "no variable looks misspelt")


def conflicts(host: Host) -> Iterator[Finding]:
    """Check for conflicting settings and debugging settings that are still on."""
    environ = host.environ
    if "PYTORCH_NPU_ALLOC_CONF" in environ and "PYTORCH_ALLOC_CONF" in environ:
        yield Finding.fail(
            "alloc-conf",
            "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set: newer torch_npu refuses to start",
            "unset PYTORCH_ALLOC_CONF",
        )
    else:
        yield Finding.ok("alloc-conf", "at most one allocator setting")
    if environ.get("ASCEND_LAUNCH_BLOCKING", "0") == "1":
        yield Finding.warn(
            "launch-blocking",
            "ASCEND_LAUNCH_BLOCKING=1 makes every operation synchronous and disables the task queue",
            "unset ASCEND_LAUNCH_BLOCKING",
        )
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        yield Finding.warn(
            "backend-autoload",
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0: torch does not load torch_npu unless a program imports it",
            "unset TORCH_DEVICE_BACKEND_AUTOLOAD",
        )


def privileges(host: Host) -> Iterator[Finding]:
    """Check that a container runs without `--privileged`, which exposes every NPU of the host to it."""
    if not host.in_container:
        yield Finding.skip("privileges", "not in a container")
        return
    chip = devices.chip_of(host, devices.query(host))
    if host.privileged and chip is not None and chip.privileged:
        yield Finding.ok("privileges", f"privileged, as the vendor runs containers on {chip.kind}")
    elif host.privileged:
        nodes = ("davinci0", *(chip or chips.DEFAULT).control_nodes)
        yield Finding.warn(
            "privileges",
            "this container is privileged, which qvl does not need: it sees and numbers every NPU of the host",
            f"give it the nodes instead: {' '.join(f'--device /dev/{node}' for node in nodes)}",
        )
    else:
        yield Finding.ok("privileges", "not privileged; --ipc=host is not needed with a large enough --shm-size")
