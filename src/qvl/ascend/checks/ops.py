"""The operation probe, run in a process of its own per device, and the number of devices that torch sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import qvl
from qvl.ascend import chips, devices
from qvl.ascend.explain import explanations
from qvl.ascend.host import Host
from qvl.ascend.probe import MARK, OperationOutcome, ProbeResult
from qvl.ascend.report import Finding
from qvl.suggest import install_line

_TIMEOUT = 600.0
_SLOW_FIRST_MS = 5000.0


def run_probe(host: Host, device: str) -> ProbeResult:
    """Return the probe's result on `device`; its `error` is set if the probe failed."""
    source = str(Path(qvl.__file__).resolve().parent.parent)
    search = ":".join(filter(None, (source, host.environ.get("PYTHONPATH", ""))))
    done = host.run(
        [host.interpreter, "-m", "qvl.ascend.probe", "--device", device],
        timeout=_TIMEOUT,
        environ={"TORCH_NPU_FALLBACK_CPU_DISABLE": "1", "PYTHONPATH": search},
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            body: ProbeResult = json.loads(line.removeprefix(MARK))
            return body
    return {"device": device, "error": f"the probe crashed: {done.last_line}", "exit_code": done.code}


def probe(host: Host, kind: str) -> Iterator[Finding]:
    """Check every operation that Qwen3-VL needs on each device of `kind` (npu, cuda or cpu), without CPU fallback."""
    first = run_probe(host, "cpu" if kind == "cpu" else f"{kind}:0")
    count = int(first.get("device_count", 0))
    if kind == "npu":
        yield from _count(host, count, first.get("error"))
    yield from _outcome(first)
    if kind != "cpu" and "operations" in first:
        for index in range(1, count):
            yield from _outcome(run_probe(host, f"{kind}:{index}"))


def _count(host: Host, count: int, error: str | None) -> Iterator[Finding]:
    nodes = devices.device_numbers(host)
    text = host.environ.get(devices.VISIBLE_DEVICES)
    expected = len(devices.parse_visible(text).read) if text is not None else len(nodes)
    detail = {"torch": count, "nodes": len(nodes), "visible": text}
    if count == expected:
        yield Finding.ok("device-count", f"torch sees {count} NPUs, as expected", detail)
        return
    reason = f" ({error})" if error else ""
    order = f"check {devices.VISIBLE_DEVICES}: ascending, no blanks, in range; " if text is not None else ""
    yield Finding.fail(
        "device-count",
        f"torch sees {count} NPUs, expected {expected}{reason}",
        f"{order}source set_env.sh before Python starts, and give the container each NPU's node",
        detail,
    )


def _outcome(body: ProbeResult) -> Iterator[Finding]:
    device = body["device"]
    if "operations" not in body:
        yield Finding.fail(
            "op-probe", f"{device}: {body.get('error', 'no answer')}", _fix_import(device, body.get("error", "")), body
        )
        return
    failed = [item for item in body["operations"] if "error" in item]
    for item in failed:
        yield Finding.fail(
            "op-probe",
            f"{device}: {item['op']} in {item['dtype']} failed: {item['error']}",
            _fix_operation(device, item),
            item,
        )
    if failed:
        return
    slowest = max(body["operations"], key=lambda item: item["first_ms"])
    text = f"{device} ({body['name']}): {len(body['operations'])} operations run, first calls up to "
    text += f"{slowest['first_ms']:.0f} ms, second {slowest['second_ms']:.1f} ms ({slowest['op']})"
    if slowest["first_ms"] > _SLOW_FIRST_MS:
        yield Finding.warn(
            "op-probe",
            text,
            "first requests take minutes while operations compile: keep the compiled ones with "
            "ACL_OP_COMPILER_CACHE_MODE=enable and ACL_OP_COMPILER_CACHE_DIR on a volume",
            body,
        )
    else:
        yield Finding.ok("op-probe", text, body)


def _fix_import(device: str, error: str) -> str:
    if device.startswith("npu"):
        if found := explanations(error):
            return f"{found[0].code}: {found[0].cause}; {found[0].fix}"
        return "source /usr/local/Ascend/ascend-toolkit/set_env.sh, then compare the versions above"
    if device.startswith("cuda"):
        return "install a torch built for this driver's CUDA, and give the container --gpus"
    return install_line("local")


def _fix_operation(device: str, item: OperationOutcome) -> str:
    if device.startswith("npu") and item["op"] == "masked_assign":
        releases = ", ".join(f"{chip.kind}: {chip.serves_from} or newer" for chip in chips.CHIPS if chip.supported)
        return (
            "without it pictures do not enter the prompt: use the newest vllm-ascend image of this chip, whole "
            f"({releases})"
        )
    if item["dtype"] == "bfloat16":
        return "this chip or CANN has no bfloat16 for it: use --dtype float16"
    if device.startswith("npu"):
        if found := explanations(item["error"]):
            return f"{found[0].code}: {found[0].cause}; {found[0].fix}"
        return "install the kernels package of this chip for the installed CANN, or a CANN that fits torch_npu"
    return "use --dtype float32, or another device"
