"""The op probe: really run on this CPU, and its recorded answers for hosts that this machine is not."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from qvl.ascend.checks import ops
from qvl.ascend.host import Host
from qvl.ascend.probe import DTYPES, MARK, OPERATIONS, measure

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine


def answer(device: str, count: int = 2, **changes: Any) -> dict[str, Any]:
    operations = [
        {"op": name, "dtype": dtype, "first_ms": 812.5, "second_ms": 0.4} for name in OPERATIONS for dtype in DTYPES
    ]
    body = {"device": device, "torch": "2.7.1", "device_count": count, "name": "Ascend910B4", "operations": operations}
    return {**body, **changes}


def script(machine: Machine, *bodies: dict[str, Any]) -> Host:
    """A host whose interpreter is a program that answers for a device as recorded, and keeps what it was given."""
    cases = "".join(f"{body['device']}) echo {shlex.quote(MARK + json.dumps(body))};;\n" for body in bodies)
    record = f'echo "$TORCH_NPU_FALLBACK_CPU_DISABLE $*" >> "{machine.calls}/python"'
    interpreter = machine.program(
        "python-recorded", f'{record}\necho "some warning of a driver"\ncase "$4" in\n{cases}esac'
    )
    return machine.host(interpreter=str(interpreter))


def test_every_operation_runs_twice_on_this_cpu() -> None:
    findings = list(ops.probe(Host(), "cpu"))

    assert [finding.status for finding in findings] == ["ok"]
    operations = findings[0].detail["operations"]
    assert {item["op"] for item in operations} == set(OPERATIONS)
    assert all(item["first_ms"] >= 0 and item["second_ms"] >= 0 for item in operations)


def test_an_operation_that_fails_is_told_in_one_line() -> None:
    outcome = measure("matmul", "cpu", "no_such_dtype")

    assert outcome["error"].startswith("AttributeError")
    assert "\n" not in outcome["error"]


def test_every_npu_is_probed_with_the_cpu_fallback_disabled(machine: Machine) -> None:
    machine.nodes(0, 1)
    findings = list(ops.probe(script(machine, answer("npu:0"), answer("npu:1")), "npu"))

    assert [(finding.check, finding.status) for finding in findings] == [
        ("device-count", "ok"),
        ("op-probe", "ok"),
        ("op-probe", "ok"),
    ]
    calls = (machine.calls / "python").read_text().splitlines()
    assert calls == [f"1 -m qvl.ascend.probe --device npu:{index}" for index in (0, 1)]


def test_a_count_that_is_not_the_nodes_is_a_failure_that_names_the_variable(machine: Machine) -> None:
    machine.nodes(0, 1)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1,0"
    body = {"device": "npu:0", "torch": "2.7.1", "device_count": 0, "error": "torch.npu sees no device"}

    count, probe = ops.probe(script(machine, body), "npu")

    assert count.status == "fail"
    assert "0 NPUs, expected 2 (torch.npu sees no device)" in count.summary
    assert "ASCEND_RT_VISIBLE_DEVICES" in (count.fix or "")
    assert probe.status == "fail"


def test_visible_devices_lower_the_count_that_is_expected(machine: Machine) -> None:
    machine.nodes(0, 1, 2, 3)
    machine.environ["ASCEND_RT_VISIBLE_DEVICES"] = "2,3"

    findings = list(ops.probe(script(machine, answer("npu:0"), answer("npu:1")), "npu"))

    assert findings[0].status == "ok"


def test_a_missing_bfloat16_leads_to_float16(machine: Machine) -> None:
    machine.nodes(0)
    body = answer("npu:0", count=1)
    body["operations"][1] = {"op": "matmul", "dtype": "bfloat16", "error": "RuntimeError: not supported"}

    finding = list(ops.probe(script(machine, body), "npu"))[1]

    assert finding.status == "fail"
    assert "--dtype float16" in (finding.fix or "")


def test_slow_first_calls_lead_to_the_compiler_cache(machine: Machine) -> None:
    machine.nodes(0)
    body = answer("npu:0", count=1)
    body["operations"][0]["first_ms"] = 61_000.0

    finding = list(ops.probe(script(machine, body), "npu"))[1]

    assert finding.status == "warn"
    assert "ACL_OP_COMPILER_CACHE_DIR" in (finding.fix or "")


def test_a_probe_that_dies_is_told_with_its_last_words(machine: Machine) -> None:
    interpreter = machine.program("python-dying", 'echo "ImportError: libhccl.so: cannot open" >&2; exit 1')

    findings = list(ops.probe(machine.host(interpreter=str(interpreter)), "cuda"))

    assert findings[0].status == "fail"
    assert "libhccl.so" in findings[0].summary
