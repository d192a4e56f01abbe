"""The whole examination over a made-up host: what a healthy one says, and what each fault adds."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from qvl.ascend.doctor import Options, examine, render, verdict
from qvl.ascend.report import Finding
from qvl.errors import ConfigError
from tests.ascend.conftest import of, recording

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine, SizedHost

QUIET = Options(probe=False)


def findings(host: SizedHost, check: str, options: Options = QUIET) -> list[Finding]:
    return of(examine(host, options).findings, check)


def only(host: SizedHost, check: str, options: Options = QUIET) -> Finding:
    found = findings(host, check, options)
    assert len(found) == 1, found
    return found[0]


def test_a_healthy_host_has_no_warning_and_exit_code_0(healthy: Machine) -> None:
    report = examine(healthy.host(), QUIET)

    assert [finding for finding in report.findings if finding.status in ("warn", "fail")] == []
    assert report.exit_code == 0
    assert report.facts["device"] == "npu"


def test_exit_code_is_1_for_warnings_and_2_for_failures(healthy: Machine) -> None:
    warned = examine(healthy.host(open_files=1024), QUIET)
    healthy.environ["PYTORCH_NPU_ALLOC_CONF"] = healthy.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    failed = examine(healthy.host(), QUIET)

    assert (warned.exit_code, failed.exit_code) == (1, 2)


def test_every_warning_and_failure_has_one_fix_line(machine: Machine) -> None:
    machine.environ["ASCEND_RT_VISIBLE_DEVICE"] = "1"
    report = examine(machine.host(), Options(device="npu", probe=False, weights=machine.root / "none", cache="nosuch:"))

    bad = [finding for finding in report.findings if finding.status in ("warn", "fail")]
    assert len(bad) > 8
    assert all(finding.fix and "\n" not in finding.fix and "\n" not in finding.summary for finding in bad)
    with pytest.raises(ValueError, match="without a fix"):
        Finding("x", "fail", "something")


def test_json_and_text_say_the_same(machine: Machine) -> None:
    stream = io.StringIO()
    console = Console(width=400, file=stream, highlight=False)
    report = examine(
        machine.host(), Options(device="npu", probe=False), on_finding=lambda finding: console.print(render(finding))
    )
    body = json.loads(report.to_json())
    text = stream.getvalue()

    assert body["exit_code"] == 2
    assert body["counts"]["fail"] == report.count("fail")
    assert {"check", "status", "summary", "detail", "fix"} == set(body["findings"][0])
    for finding in body["findings"]:
        assert finding["summary"] in text
        if finding["status"] in ("warn", "fail"):
            assert f"fix: {finding['fix']}" in text
    assert f"{report.count('fail')} failures" in verdict(report)


def test_an_unknown_device_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tpu"):
        Options(device="tpu")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(healthy: Machine) -> None:
    class Broken(type(healthy.host())):  # type: ignore[misc]
        def listening_ports(self) -> frozenset[int]:
            raise RuntimeError("table of a new kernel")

    host = healthy.host()
    broken = Broken(**{name: getattr(host, name) for name in host.__dataclass_fields__})
    report = examine(broken, QUIET)

    assert "table of a new kernel" in of(report.findings, "ports")[0].summary
    assert of(report.findings, "clock")[0].status == "ok"


class TestDeviceNodes:
    def test_no_node_is_told_with_the_way_for_host_and_container(self, machine: Machine) -> None:
        found = findings(machine.host(), "device-nodes", Options(device="npu", probe=False))

        assert {finding.status for finding in found} == {"fail"}
        assert "--device /dev/davinci0" in (found[0].fix or "")

    def test_no_npu_is_one_failure_with_all_that_is_missing_and_not_all_0_npus_visible(self, machine: Machine) -> None:
        host, options = machine.host(), Options(device="npu", probe=False)

        nodes = only(host, "device-nodes", options)
        assert all(name in nodes.summary for name in ("/dev/davinciN", "/dev/davinci_manager", "/dev/hisi_hdc"))
        assert only(host, "visible-devices", options).status == "skip"

    def test_a_missing_control_node_is_named(self, healthy: Machine) -> None:
        (healthy.root / "dev/devmm_svm").unlink()

        finding = only(healthy.host(), "device-nodes")

        assert finding.status == "fail"
        assert "/dev/devmm_svm" in finding.summary

    def test_a_folder_in_place_of_a_node_is_seen(self, healthy: Machine) -> None:
        (healthy.root / "dev/davinci1").unlink()
        (healthy.root / "dev/davinci1").mkdir(mode=0o777)

        assert "is a folder" in findings(healthy.host(), "device-nodes")[0].summary

    def test_a_node_of_another_group_is_refused_to_this_user(self, healthy: Machine) -> None:
        finding = findings(healthy.host(uid=54321, groups=(54321,)), "device-nodes")[0]

        assert finding.status == "fail"
        assert "HwHiAiUser" in (finding.fix or "")

    def test_the_group_of_the_node_is_enough(self, healthy: Machine) -> None:
        group = (healthy.root / "dev/davinci0").stat().st_gid

        assert only(healthy.host(uid=54321, groups=(group,)), "device-nodes").status == "ok"


class TestNpuSmi:
    def test_a_driver_that_is_not_loaded_is_told_with_a_reboot(self, healthy: Machine) -> None:
        healthy.npu_smi("error-8005.txt", code=1)

        finding = only(healthy.host(), "npu-smi")

        assert finding.status == "fail"
        assert "-8005" in finding.summary
        assert "reboot" in (finding.fix or "")

    def test_a_missing_tool_is_a_failure_on_the_host_and_a_warning_in_a_container(self, healthy: Machine) -> None:
        (healthy.bin / "npu-smi").unlink()
        on_host = only(healthy.host(), "npu-smi")
        healthy.write("/.dockerenv")

        assert (on_host.status, only(healthy.host(), "npu-smi").status) == ("fail", "warn")

    def test_ill_and_full_npus_are_named(self, healthy: Machine) -> None:
        healthy.npu_smi("25.5.2-910B3.txt")

        assert "NPU 2 (910B3) reports health Warning" in only(healthy.host(), "npu-health").summary
        assert "NPU 1 has 5524 of 65536 MiB free" in only(healthy.host(), "memory").summary

    def test_a_holder_in_another_container_is_named_with_process_and_container(self, healthy: Machine) -> None:
        identity = "3f" * 32
        healthy.npu_smi("23.0.2.1-910B2C.txt")
        healthy.write("/proc/91822/comm", "python3.10\n")
        healthy.write("/proc/91822/cgroup", f"0::/system.slice/docker-{identity}.scope\n")
        healthy.program("docker", f'echo "{identity} catalog-b"')

        finding = only(healthy.host(), "npu-holders")

        assert finding.summary == "NPU 0 is held by python3.10 (pid 91822) in container catalog-b, 17812 MiB"
        assert finding.fix == "docker stop catalog-b"

    def test_another_process_with_the_same_pid_is_not_taken_for_the_holder(self, healthy: Machine) -> None:
        healthy.npu_smi("23.0.2.1-910B2C.txt")
        healthy.write("/proc/91822/comm", "sshd\n")
        healthy.write("/proc/91822/cgroup", f"0::/docker/{'ab' * 32}\n")

        assert "container" not in only(healthy.host(), "npu-holders").summary

    def test_a_table_without_its_list_of_processes_does_not_say_that_none_holds_an_npu(self, healthy: Machine) -> None:
        whole = only(healthy.host(), "npu-holders")
        lines = recording("24.1.rc3-910B4.txt").splitlines()
        cut = next(index for index, line in enumerate(lines) if "Process id" in line)
        healthy.program("npu-smi", "cat <<'EOF'\n" + "\n".join(lines[:cut]) + "\nEOF")
        finding = only(healthy.host(), "npu-holders")

        assert (whole.status, whole.summary) == ("ok", "no process holds an NPU")
        assert finding.status == "warn"
        assert "no list of processes" in finding.summary

    def test_a_holder_that_is_not_seen_is_told_by_its_memory(self, healthy: Machine) -> None:
        healthy.npu_smi("25.5.2-910B3.txt")

        held = [finding.summary for finding in findings(healthy.host(), "npu-holders")]

        assert held[0].startswith("NPU 1 is held by a process without a name (pid 1333928)")
        assert held[1].startswith("NPU 3 is held by a process of another container or of the host")


class TestDriverAndCann:
    def test_firmware_outside_the_drivers_range_fails(self, healthy: Machine) -> None:
        healthy.write("/usr/local/Ascend/firmware/version.info", "Version=6.4.0.4.220\n")

        finding = only(healthy.host(), "driver")

        assert finding.status == "fail"
        assert "7.0.0 to 7.5.99" in finding.summary

    def test_no_cann_and_no_environment_are_two_findings(self, machine: Machine) -> None:
        machine.nodes(0)
        missing = only(machine.host(), "cann")
        machine.software()
        del machine.environ["ASCEND_HOME_PATH"]
        unset = only(machine.host(), "set-env")

        assert (missing.status, unset.status) == ("fail", "fail")
        assert unset.fix == "source /usr/local/Ascend/ascend-toolkit/set_env.sh"

    def test_newer_layouts_of_cann_are_found(self, machine: Machine) -> None:
        machine.nodes(0)
        text = recording("toolkit-8.3.RC1.install.info").replace("8.3.RC1", "9.1.0")
        machine.write("/usr/local/Ascend/cann-9.1.0/x86_64-linux/ascend_toolkit_install.info", text)

        assert "CANN 9.1.0 in /usr/local/Ascend/cann-9.1.0" in only(machine.host(), "cann").summary

    def test_nnal_that_is_not_sourced_warns(self, healthy: Machine) -> None:
        healthy.write("/usr/local/Ascend/nnal/atb/set_env.sh")

        assert only(healthy.host(), "set-env-atb").status == "warn"


class TestVersions:
    @pytest.mark.parametrize(
        ("cann", "torch", "torch_npu", "status", "fix"),
        [
            ("8.3.RC1", "2.7.1", "2.7.1", "ok", None),
            ("8.5.0", "2.7.1", "2.7.1", "fail", "pip install torch-npu==2.7.1.post2"),
            ("9.1.0", "2.10.0", "2.10.0.post4", "ok", None),
            ("8.5.1", "2.9.0", "2.9.0", "warn", "install CANN 8.5.0"),
            ("9.1.0", "2.9.0", "2.7.1.post8", "fail", "pip install torch==2.7.1"),
            ("9.9.0", "3.0.0", "3.0.0", "ok", None),
        ],
    )
    def test_torch_npu_is_held_against_torch_and_cann(
        self, machine: Machine, cann: str, torch: str, torch_npu: str, status: str, fix: str | None
    ) -> None:
        machine.nodes(0)
        machine.software(cann, torch=f"{torch}+cpu", torch_npu=torch_npu, transformers="4.57.1")

        finding = only(machine.host(), "torch-npu")

        assert (finding.status, finding.fix) == (status, fix)

    def test_torch_without_torch_npu_would_run_on_the_cpu(self, machine: Machine) -> None:
        machine.nodes(0)
        machine.software(torch="2.7.1")

        finding = only(machine.host(), "torch-npu")

        assert "CPU" in finding.summary
        assert finding.fix == "pip install torch-npu==2.7.1"

    def test_an_old_transformers_and_an_old_python_fail(self, machine: Machine) -> None:
        machine.nodes(0)
        machine.software(transformers="4.56.2")

        assert only(machine.host(), "transformers").status == "fail"
        assert only(machine.host(python_version="3.10.18"), "python").status == "fail"
        assert only(machine.host(python_version="3.11.2"), "python").status == "ok"
        assert only(machine.host(python_version="3.14.0"), "python").status == "warn"
        elsewhere = Options(device="cpu", probe=False)
        assert only(machine.host(python_version="3.14.0"), "python", elsewhere).status == "ok"

    def test_vllm_without_its_plugin_and_a_mixed_set_fail(self, machine: Machine) -> None:
        machine.nodes(0)
        machine.software("8.5.0", torch="2.9.0", torch_npu="2.9.0", vllm="0.18.0")
        alone = only(machine.host(), "vllm-ascend")
        machine.package("vllm-ascend", "0.13.0")
        mixed = only(machine.host(), "vllm-ascend")

        assert "will not use the NPU" in alone.summary
        assert "vllm 0.18.0 (wants 0.13.0)" in mixed.summary
        assert "torch 2.9.0 (wants 2.8.0)" in mixed.summary
