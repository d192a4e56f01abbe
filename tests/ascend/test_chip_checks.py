"""Chips against nodes, npu-smi, what is built for them, kernels and driver, on made-up hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qvl.ascend import devices, npu_smi
from qvl.ascend.checks.chip import built_for
from qvl.ascend.doctor import Options, examine
from qvl.ascend.report import DoctorReport
from tests.ascend.conftest import of, recording
from tests.ascend.sized_host import GIB

if TYPE_CHECKING:
    from qvl.ascend.report import Finding
    from tests.ascend.conftest import Machine

QUIET = Options(probe=False)
TOOLKIT = "/usr/local/Ascend/ascend-toolkit/latest"
KERNELS = f"{TOOLKIT}/opp/built-in/op_impl/ai_core/tbe/kernel"


def report(machine: Machine, options: Options = QUIET, **changes: object) -> DoctorReport:
    return examine(machine.host(**changes), options)


def only(machine: Machine, check: str, options: Options = QUIET) -> Finding:
    found = of(report(machine, options).findings, check)
    assert len(found) == 1, found
    return found[0]


def with_nodes(machine: Machine, *names: str) -> None:
    for name in names:
        path = machine.root / "dev" / name
        if name == "uburma":
            machine.write("/dev/uburma/udma0")
            path.chmod(0o755)
        else:
            machine.write(f"/dev/{name}").chmod(0o660)


class TestA950:
    @pytest.fixture
    def host(self, machine: Machine) -> Machine:
        with_nodes(machine, "davinci0", "davinci1", "davinci_manager", "hisi_hdc", "ummu", "uburma", "shm/x")
        machine.npu_smi("25.7.rc1-950PR.txt")
        return machine

    def test_its_nodes_are_enough_without_devmm_svm(self, host: Machine) -> None:
        assert only(host, "device-nodes").status == "ok"
        assert "950" in only(host, "device-nodes").summary

    def test_a_node_of_its_own_that_is_missing_is_named(self, host: Machine) -> None:
        (host.root / "dev/ummu").unlink()

        assert only(host, "device-nodes").summary == "the control node /dev/ummu of 950 is missing"

    def test_health_memory_and_holder_are_told(self, host: Machine) -> None:
        findings = report(host).findings

        assert of(findings, "npu-smi")[0].summary == "npu-smi 25.7.rc1: 2 x Ascend950PR"
        assert "health Alarm" in of(findings, "npu-health")[0].summary
        assert of(findings, "npu-holders")[0].summary.startswith("NPU 0 is held by VLLM::Worker (pid 481722)")
        assert "w8a8-mxfp8" in of(findings, "chip")[0].summary

    def test_a_privileged_container_is_as_the_vendor_runs_it(self, host: Machine) -> None:
        host.write("/.dockerenv")
        host.write("/proc/self/status", "CapBnd:\t000001ffffffffff\n")

        assert only(host, "privileges").status == "ok"


class TestRootComplex:
    @pytest.fixture
    def host(self, machine: Machine) -> Machine:
        with_nodes(machine, "davinci0", "davinci_manager", "ascend_manager", "user_config", "shm/x")
        machine.npu_smi("23.0.6-310P3-memory-na.txt")
        return machine

    def test_its_three_control_nodes_are_enough_and_it_has_no_version_info(self, host: Machine) -> None:
        findings = report(host, Options(software=False)).findings

        assert of(findings, "device-nodes")[0].status == "ok"
        assert of(findings, "driver")[0].status == "skip"
        assert not [item for item in findings if item.status == "fail"]

    def test_a_container_gets_the_nodes_of_its_chip_in_the_fix(self, host: Machine) -> None:
        (host.root / "dev/user_config").unlink()

        assert "--device /dev/user_config" in (only(host, "device-nodes").fix or "")


class TestListed:
    def test_a_lost_card_that_npu_smi_leaves_out_is_named_by_its_node(self, healthy: Machine) -> None:
        healthy.write("/dev/davinci4").chmod(0o660)

        finding = only(healthy, "npu-smi")

        assert finding.status == "fail"
        assert finding.summary == "5 NPU nodes but 4 chips in npu-smi: /dev/davinci4 is a lost card"
        healthy.write("/dev/davinci5").chmod(0o660)
        assert only(healthy, "npu-smi").summary.endswith("/dev/davinci4, /dev/davinci5 are lost cards")

    def test_a_card_without_figures_is_lost_too(self, healthy: Machine) -> None:
        for number in (2, 3):
            (healthy.root / f"dev/davinci{number}").unlink()
        healthy.npu_smi("24.1.rc3-910B4-lost-card.txt")

        finding = only(healthy, "npu-health")

        assert (finding.status, finding.detail["npu"]) == ("fail", 1)
        assert "lost card" in finding.summary

    def test_a_chip_without_a_node_is_told_on_the_host(self, healthy: Machine) -> None:
        (healthy.root / "dev/davinci3").unlink()

        assert "no /dev/davinci3" in only(healthy, "npu-smi").summary
        healthy.write("/.dockerenv")
        assert only(healthy, "npu-smi").status == "ok"

    @pytest.mark.parametrize("name", ["24.1.0-310P3-half-printed.txt", "table without rows"])
    def test_what_is_not_understood_is_never_ok(self, healthy: Machine, name: str) -> None:
        if name.endswith(".txt"):
            healthy.npu_smi(name)
        else:
            healthy.program("npu-smi", 'echo "| npu-smi 99.1   Version: 99.1 |"')
        findings = report(healthy).findings

        assert {finding.status for finding in of(findings, "npu-smi")} == {"fail"}
        assert not [item for item in of(findings, "npu-health") + of(findings, "npu-holders") if item.status == "ok"]

    def test_memory_in_use_that_is_not_known_is_a_warning(self, healthy: Machine) -> None:
        healthy.npu_smi("23.0.6-310P3-memory-na.txt")

        assert "does not say how much of 21527 MiB is in use" in only(healthy, "memory").summary

    def test_npu_smis_own_warning_is_a_finding(self, healthy: Machine) -> None:
        text = recording("24.1.rc3-910B4.txt") + "[WARNING]The driver package may not be completely installed."
        healthy.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")

        assert only(healthy, "npu-smi").status == "warn"

    def test_boards_that_count_slots_are_numbered_by_the_mapping(self, healthy: Machine) -> None:
        text = recording("24.1.rc3-910B4.txt")
        for number in range(4):
            text = text.replace(f"| {number}     910B4  ", f"| {number + 8}     910B4  ")
        mapping = "NPU ID  Chip ID  Chip Logic ID  Chip Name\n" + "".join(
            f"{number + 8}  0  {number}  Ascend 910B4\n{number + 8}  1  -  Mcu\n" for number in range(4)
        )
        script = f"if [ \"$2\" = -m ]; then cat <<'EOF'\n{mapping}EOF\nelse cat <<'EOF'\n{text}\nEOF\nfi"
        healthy.program("npu-smi", script)
        table = devices.query(healthy.host())

        assert table is not None
        assert [(npu.npu_id, npu.device_id) for npu in table.npus] == [(8, 0), (9, 1), (10, 2), (11, 3)]
        assert only(healthy, "npu-smi").status == "ok"

    def test_a_mapping_with_physical_numbers_is_read(self) -> None:
        text = "\tNPU ID   Slot ID   Chip ID   Chip Phy-ID   Chip Name\n\t0   1   0   4   Ascend950PR\n"

        assert npu_smi.parse_mapping(text) == {(0, 0): (None, 4)}
        assert npu_smi.parse_mapping("There is no NPU card on this server.") == {}


def test_an_npu_smi_in_sbin_is_found_where_path_lacks_it(healthy: Machine) -> None:
    target = healthy.write("/usr/local/sbin/npu-smi", (healthy.bin / "npu-smi").read_text())
    target.chmod(0o755)
    (healthy.bin / "npu-smi").unlink()

    assert only(healthy, "npu-smi").status == "ok"


def test_npu_smi_runs_no_more_than_twice_in_an_examination(healthy: Machine) -> None:
    calls = healthy.calls / "npu-smi"
    healthy.program("npu-smi", f"echo >> {calls}\ncat <<'EOF'\n{recording('24.1.rc3-910B4.txt')}\nEOF")
    report(healthy)
    report(healthy)

    assert calls.read_text().count("\n") == 4


class TestHolders:
    @pytest.fixture
    def host(self, healthy: Machine) -> Machine:
        for number in (2, 3):
            (healthy.root / f"dev/davinci{number}").unlink()
        healthy.npu_smi("26.0.rc2-910B3-in-container.txt")
        # The host's number of the first process is another process in this container.
        healthy.write("/proc/485946/comm", "qvl-serve\n")
        return healthy

    def test_in_a_container_npu_smi_tells_its_own_processes(self, host: Machine) -> None:
        host.write("/.dockerenv")
        held = of(report(host).findings, "npu-holders")

        assert held[0].summary == "NPU 0 is held by qvl-serve (pid 212) in this container, 35175 MiB"
        assert held[0].fix == "kill 212 in this container, or choose another NPU"
        assert held[1].summary == "NPU 1 is held by pytest of another container or of the host, 17101 MiB"

    def test_on_the_host_the_hosts_number_counts(self, host: Machine) -> None:
        held = of(report(host).findings, "npu-holders")

        assert held[0].summary == "NPU 0 is held by qvl-serve (pid 485946), 35175 MiB"


class TestBuilds:
    @pytest.mark.parametrize(
        ("text", "build"),
        [
            ("__device_type__ = 'A2'\n", "A2"),
            ('# Auto-generated\n__device_type__ = "A3"\n', "A3"),
            ("__device_type__ = '_310P'\n", "310P"),
            ("__device_type__ = 'A5'\n__soc_version__ = 'ascend950pr'\n", "A5"),
            ('__soc_version__ = "ASCEND910B1"\n', "A2"),
            ("__soc_version__ = 'ascend910_9391'\n", "A3"),
            ("__soc_version__ = 'ASCEND310P3'\n", "310P"),
            ("", None),
            ("version = 1\n", None),
        ],
    )
    def test_the_chip_of_a_build_is_read(self, text: str, build: str | None) -> None:
        assert built_for(text) == build

    def test_a_fitting_build_is_ok_also_where_the_image_has_its_source_beside(self, healthy: Machine) -> None:
        healthy.package("vllm-ascend", "0.11.0")
        healthy.write("/vllm-workspace/vllm-ascend/vllm_ascend/_build_info.py", "__device_type__ = 'A2'\n")

        assert only(healthy, "chip-build").summary == "vllm-ascend 0.11.0 is built for 910B"

    def test_kernels_of_the_chip_are_ok_and_others_fail(self, healthy: Machine) -> None:
        healthy.write(f"{KERNELS}/config/ascend910b/x.json")
        fitting = only(healthy, "cann-kernels")
        healthy.npu_smi("25.2.0-910-two-chips.txt")

        assert fitting.status == "ok"
        assert only(healthy, "cann-kernels").summary == "CANN has kernels for ascend910b, none for A3 (ascend910_93)"

    def test_a_chip_of_no_row_is_told_and_not_guessed_in_silence(self, healthy: Machine) -> None:
        text = recording("24.1.rc3-910B4.txt").replace("910B4", "1020X")
        healthy.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")

        assert only(healthy, "chip").status == "warn"
        assert "1020X" in only(healthy, "chip").summary

    def test_two_dies_a_card_are_said_to_go_together(self, healthy: Machine) -> None:
        healthy.npu_smi("25.2.0-910-two-chips.txt")

        assert "2 dies a card" in only(healthy, "chip").summary

    def test_one_die_without_the_other_warns(self, healthy: Machine) -> None:
        (healthy.root / "dev/davinci3").unlink()
        healthy.npu_smi("25.2.0-910-two-chips.txt")
        found = of(report(healthy).findings, "chip")

        assert [item.status for item in found] == ["ok", "warn"]
        assert "/dev/davinci3 is not here" in found[1].summary


class TestDriverWithCann:
    def test_a_driver_on_the_toolkits_list_is_ok(self, healthy: Machine) -> None:
        assert only(healthy, "driver-cann").status == "ok"

    def test_a_newer_driver_whose_own_list_has_the_toolkit_is_ok(self, healthy: Machine) -> None:
        text = recording("driver-24.1.rc3.version.info").replace("V100R001C19SPC001B124", "V100R001C29SPC001B100")
        healthy.write("/usr/local/Ascend/driver/version.info", text.replace("[V100R001C19]", "[V100R001C23]"))

        assert only(healthy, "driver-cann").status == "ok"

    def test_an_older_driver_fails_with_the_range(self, healthy: Machine) -> None:
        text = recording("driver-24.1.rc3.version.info").replace("V100R001C19SPC001B124", "V100R001C13SPC001B100")
        healthy.write("/usr/local/Ascend/driver/version.info", text)
        finding = only(healthy, "driver-cann")

        assert finding.status == "fail"
        assert finding.summary.endswith("is older than CANN 8.3.RC1 accepts: V100R001C15 to V100R001C23")
        assert "reboot" in (finding.fix or "")

    @pytest.mark.parametrize(
        ("driver", "cann", "plugin", "status"),
        [
            ("24.1.rc3", "8.3.RC2", "0.11.0", "warn"),
            ("24.1.0.3", "8.5.1", "0.18.0", "warn"),
            ("24.1.rc3", "8.2.RC1", "0.10.0rc1", "ok"),
            ("25.3.rc1", "8.3.RC2", "0.11.0", "ok"),
            ("24.1.rc3", "8.3.RC2", "", "ok"),
        ],
    )
    def test_a_driver_known_for_timeouts_warns_though_the_lists_take_it(
        self, healthy: Machine, driver: str, cann: str, plugin: str, status: str
    ) -> None:
        text = recording("driver-24.1.rc3.version.info").replace("24.1.rc3", driver)
        healthy.write("/usr/local/Ascend/driver/version.info", text)
        healthy.software(cann)
        if plugin:
            healthy.package("vllm-ascend", plugin)

        assert only(healthy, "driver-cann").status == status

    def test_lines_are_ordered_as_numbers(self, healthy: Machine) -> None:
        text = recording("driver-24.1.rc3.version.info").replace("V100R001C19SPC001B124", "V100R001C9SPC001B100")
        healthy.write("/usr/local/Ascend/driver/version.info", text)

        assert "is older than CANN" in only(healthy, "driver-cann").summary

    def test_files_without_lists_are_not_judged(self, healthy: Machine) -> None:
        healthy.write("/usr/local/Ascend/driver/version.info", "Version=26.0.rc1\n")

        assert of(report(healthy).findings, "driver-cann") == []


class TestReleases:
    @pytest.mark.parametrize(
        ("vllm", "plugin", "status"),
        [
            ("0.28.0", "0.28.0rc1", "ok"),
            ("0.29.0", "0.28.0rc1", "fail"),
            ("0.29.0+empty", "0.29.0rc1", "ok"),
            ("0.99.0", "0.99.0", "ok"),
        ],
    )
    def test_a_release_candidate_wants_the_vllm_of_its_own_number(
        self, healthy: Machine, vllm: str, plugin: str, status: str
    ) -> None:
        healthy.package("vllm", vllm)
        healthy.package("vllm-ascend", plugin)

        assert only(healthy, "vllm-ascend").status == status


class TestNeeds:
    def test_a_build_of_a_source_tree_without_tags_is_not_taken_for_an_old_release(self, healthy: Machine) -> None:
        healthy.package("vllm-ascend", "0.1.dev1+g0f3c2d1")
        found = report(healthy).findings

        assert [item.status for item in of(found, "chip-release")] == ["skip"]
        assert [item.status for item in of(found, "vllm-ascend")] == ["skip"]

    def test_the_size_to_give_is_that_of_the_chip(self, healthy: Machine) -> None:
        small = {"/dev/shm": (64 * 2**20, 64 * 2**20)}
        usual = of(report(healthy, sizes=small).findings, "shm")[0].fix
        healthy.npu_smi("24.1.0.1-310P3.txt")
        duo = of(report(healthy, sizes=small).findings, "shm")[0].fix

        assert "--shm-size=1g" in str(usual)
        assert "--shm-size=10g" in str(duo)

    def test_rays_store_is_never_wanted_larger_than_200_gib(self, healthy: Machine) -> None:
        healthy.package("ray", "2.48.0")
        healthy.write("/proc/meminfo", f"MemTotal: {2000 * 2**20} kB\n")
        for size, status in ((200 * GIB, "ok"), (200 * GIB - 1, "warn")):
            found = of(report(healthy, sizes={"/dev/shm": (size, size)}).findings, "shm-ray")
            assert [item.status for item in found] == [status]

    def test_ray_is_content_with_enough_shared_memory_and_silent_without_ray(self, healthy: Machine) -> None:
        healthy.write("/proc/meminfo", "MemTotal: 263921664 kB\n")
        without = of(report(healthy).findings, "shm-ray")
        healthy.package("ray", "2.48.0")

        assert without == []
        sizes = {"/dev/shm": (100 * 2**30, 100 * 2**30)}
        assert [item.status for item in of(report(healthy, sizes=sizes).findings, "shm-ray")] == ["ok"]

    def test_a_port_range_for_the_npus_ends_the_warning(self, healthy: Machine) -> None:
        healthy.npu_smi("25.5.2-910B3.txt")
        without = of(report(healthy).findings, "hccl-npu-ports")
        healthy.environ["HCCL_NPU_SOCKET_PORT_RANGE"] = "auto"

        assert [item.status for item in without] == ["warn"]
        assert of(report(healthy).findings, "hccl-npu-ports") == []
