"""What the doctor says of the environment, of resources, and of hosts with another device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qvl.ascend.doctor import Options, examine
from qvl.ascend.report import Finding
from tests.ascend.conftest import of
from tests.ascend.sized_host import GIB

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine, SizedHost

QUIET = Options(probe=False)


def findings(host: SizedHost, check: str, options: Options = QUIET) -> list[Finding]:
    return of(examine(host, options).findings, check)


def only(host: SizedHost, check: str, options: Options = QUIET) -> Finding:
    found = findings(host, check, options)
    assert len(found) == 1, found
    return found[0]


class TestEnvironment:
    @pytest.mark.parametrize(
        ("value", "status", "word"),
        [
            ("0,1", "ok", "0,1"),
            ("2,0", "fail", "ascend"),
            ("0, 1", "fail", "keeps 0"),
            ("0,1,7", "fail", "7 is out of range"),
            ("", "fail", "keeps nothing"),
            ("all", "fail", "keeps nothing"),
            ("1,1", "fail", "ascend"),
        ],
    )
    def test_visible_devices_are_read_as_the_runtime_reads_them(
        self, healthy: Machine, value: str, status: str, word: str
    ) -> None:
        healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = value

        finding = only(healthy.host(), "visible-devices")

        assert finding.status == status
        assert word in finding.summary

    @pytest.mark.parametrize(
        ("value", "plugin", "status"),
        [
            ("0,2", "0.8.4rc1", "warn"),
            ("1", "0.7.3", "warn"),
            ("0,1", "0.8.4rc1", "ok"),
            ("0,2", "0.9.0rc1", "ok"),
            ("0,2", "0.23.0", "ok"),
            ("0,2", "0.1.dev1+g0f3c2d1", "ok"),
            ("0,2", "", "ok"),
        ],
    )
    def test_gaps_in_the_choice_are_for_a_vllm_ascend_that_counts_by_itself(
        self, healthy: Machine, value: str, plugin: str, status: str
    ) -> None:
        healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
        if plugin:
            healthy.package("vllm-ascend", plugin)

        assert only(healthy.host(), "visible-devices").status == status

    def test_a_container_counts_its_nodes_from_0(self, healthy: Machine) -> None:
        for number in (0, 1):
            (healthy.root / f"dev/davinci{number}").unlink()
        healthy.write("/.dockerenv")
        healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = "2,3"
        plain = only(healthy.host(), "visible-devices")
        healthy.write("/proc/self/status", "CapBnd:\t000001ffffffffff\n")

        assert plain.status == "fail"
        assert plain.fix == "ASCEND_RT_VISIBLE_DEVICES=0,1"
        assert only(healthy.host(), "privileges").status == "warn"

    def test_a_host_with_a_gap_in_its_slots_is_counted_from_0_too(self, healthy: Machine) -> None:
        (healthy.root / "dev/davinci2").unlink()
        healthy.write("/dev/davinci4").chmod(0o660)
        healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,3,4"

        finding = only(healthy.host(), "visible-devices")

        assert "4 is out of range" in finding.summary
        assert "counts the nodes davinci0, davinci1, davinci3, davinci4 from 0" in finding.summary
        assert finding.fix == "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3"

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("ASCEND_RT_VISIBLE_DEVICE", "ASCEND_RT_VISIBLE_DEVICES"),
            ("ASCEND_VISIBLE_RT_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"),
            ("PYTORCH_NPU_ALLOC_CONFIG", "PYTORCH_NPU_ALLOC_CONF"),
            ("TASK_QUEUE_ENABEL", "TASK_QUEUE_ENABLE"),
            ("QVL_CAHCE", "QVL_CACHE"),
            ("Hccl_Buffsize", "HCCL_BUFFSIZE"),
        ],
    )
    def test_misspelt_names_are_found_with_the_name_that_was_meant(
        self, healthy: Machine, name: str, meant: str
    ) -> None:
        healthy.environ[name] = "1"

        finding = only(healthy.host(), "environment")

        assert finding.status == "warn"
        assert meant in finding.summary

    def test_names_of_others_are_left_alone(self, healthy: Machine) -> None:
        healthy.environ |= {"VLLM_SOMETHING_ELSE": "1", "ASCEND_MY_TEAM_FOLDER": "x", "HOME": "/", "HF_HUB_CACHE1": "x"}

        assert only(healthy.host(), "environment").status == "ok"

    def test_settings_left_from_debugging_warn(self, healthy: Machine) -> None:
        healthy.environ |= {"ASCEND_LAUNCH_BLOCKING": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

        assert only(healthy.host(), "launch-blocking").status == "warn"
        assert only(healthy.host(), "backend-autoload").status == "warn"


class TestResources:
    def test_small_shm_disk_and_limits_warn(self, healthy: Machine) -> None:
        sizes = {"/dev/shm": (64 * 2**20, 64 * 2**20), "/": (100 * GIB, 3 * GIB)}
        host = healthy.host(sizes=sizes, open_files=1024)

        assert "64 MiB" in only(host, "shm").summary
        assert only(host, "disk").status == "warn"
        assert only(host, "open-files").status == "warn"

    def test_taken_ports_come_with_a_free_one(self, healthy: Machine) -> None:
        head = "  sl  local_address rem_address   st\n"
        rows = "".join(
            f"   {index}: 0100007F:{port:04X} 00000000:0000 {state}\n"
            for index, (port, state) in enumerate([(8000, "0A"), (8001, "0A"), (9000, "01"), (60003, "0A")])
        )
        healthy.write("/proc/net/tcp", head + rows)
        report = examine(healthy.host(), Options(probe=False, ports=(8000, 9000)))

        assert [finding.fix for finding in of(report.findings, "ports")] == ["choose another: --port 8002"]
        assert "60003" in of(report.findings, "hccl-ports")[0].summary

    def test_310p_computes_in_float16_only(self, machine: Machine) -> None:
        machine.nodes(2, 3)
        machine.npu_smi("24.1.0.1-310P3.txt")

        wrong = only(machine.host(), "dtype", Options(probe=False, dtype="bfloat16"))

        assert (wrong.status, wrong.fix) == ("fail", "use --dtype float16")
        assert only(machine.host(), "dtype", Options(probe=False, dtype="float16")).status == "ok"


class TestOtherHosts:
    def test_a_cuda_host_is_examined_through_nvidia_smi(self, machine: Machine) -> None:
        machine.program(
            "nvidia-smi",
            """case "$1" in
            --query-gpu*) echo "0, NVIDIA H200, 570.86.15, 143771, 140000";;
            *) echo "4211, /usr/bin/python3, 139000";;
            esac""",
        )
        machine.package("torch", "2.9.0+cpu")
        report = examine(machine.host(), QUIET)

        assert report.facts["device"] == "cuda"
        assert "570.86.15" in of(report.findings, "nvidia-smi")[0].summary
        assert "3771 of 143771 MiB free" in of(report.findings, "memory")[0].summary
        assert "pid 4211" in of(report.findings, "gpu-holders")[0].summary
        assert "without CUDA" in of(report.findings, "torch")[0].summary

    def test_a_container_host_is_not_asked_for_software(self, machine: Machine) -> None:
        machine.nodes(0)
        machine.npu_smi("24.1.rc3-910B4.txt")
        checks = {finding.check for finding in examine(machine.host(), Options(software=False)).findings}

        assert "npu-health" in checks
        assert not checks & {"cann", "torch", "torch-npu", "transformers", "op-probe", "device-count"}

    def test_a_host_without_accelerator_is_a_cpu_host(self, machine: Machine) -> None:
        machine.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
        machine.write("/proc/cpuinfo", "processor\t: 0\nprocessor\t: 1\n")
        report = examine(machine.host(), QUIET)

        assert report.facts["device"] == "cpu"
        assert of(report.findings, "cpu")[0].status == "warn"
