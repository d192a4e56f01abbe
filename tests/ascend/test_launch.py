"""`qvl launch` with a scripted docker on PATH that records its arguments, and real sockets for port and readiness."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qvl.ascend import chips, recipe
from qvl.ascend.devices import parse_npus
from qvl.ascend.launch import Launcher, LaunchError, as_text, docker_arguments
from qvl.ascend.recipe import ContainerPlan
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.ascend.conftest import Machine

IMAGES = "qvl-npu:0.1.0@sha256:" + "1" * 64
DOCKER = r"""
printf '%s\0' "$@" >> "{calls}/docker"; printf '\n' >> "{calls}/docker"
case "$1" in
images) printf 'qvl-npu:0.1.0@<none>\nregistry.local:5000/qvl-npu:0.0.9@sha256:{digest}\nvllm-ascend:v0.23.0@<none>\n';;
run) {run};;
inspect) echo "{state}";;
logs) echo "loading shards"; echo "RuntimeError: NPU out of memory" >&2;;
esac
"""


def docker(machine: Machine, *, state: str = "running 0", run: str = "echo 0123456789abcdef") -> None:
    text = DOCKER.replace("{calls}", str(machine.calls)).replace("{digest}", "1" * 64)
    machine.program("docker", text.replace("{state}", state).replace("{run}", run))


def calls(machine: Machine) -> list[list[str]]:
    text = (machine.calls / "docker").read_text()
    return [line.split("\0")[:-1] for line in text.splitlines()]


def plan(**changes: Any) -> ContainerPlan:
    return ContainerPlan(**{"model": "Qwen/Qwen3-VL-8B-Instruct", "image": "qvl-npu:0.1.0", "npus": (2,), **changes})


def values(words: list[str], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == flag]


@contextmanager
def service(*statuses: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers with each status in turn, the last one for ever; the requests it saw."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the test's output quiet."""

        def do_GET(self) -> None:
            seen.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(statuses[min(len(seen), len(statuses)) - 1])
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, seen
        server.shutdown()


class TestArguments:
    def test_only_the_npus_asked_for_are_given_and_they_are_numbered_from_0_inside(self) -> None:
        words = docker_arguments(plan(npus=(2, 5), engine="vllm"))

        assert values(words, "--device") == [
            "/dev/davinci2",
            "/dev/davinci5",
            "/dev/davinci_manager",
            "/dev/devmm_svm",
            "/dev/hisi_hdc",
        ]
        assert "ASCEND_RT_VISIBLE_DEVICES=0,1" in values(words, "--env")
        assert values(words, "--tensor-parallel-size") == ["2"]

    def test_a_privileged_container_sees_the_hosts_numbers(self) -> None:
        words = docker_arguments(plan(npus=(2, 5), engine="vllm", privileged=True))

        assert "--privileged" in words
        assert "ASCEND_RT_VISIBLE_DEVICES=2,5" in values(words, "--env")

    def test_nothing_is_privileged_unless_asked_and_no_namespace_is_shared(self) -> None:
        words = docker_arguments(plan())

        assert not {"--privileged", "--ipc", "--ipc=host", "--net", "--net=host", "--network", "--pid"} & set(words)

    def test_driver_mounts_are_read_only_and_hub_cache_is_not(self) -> None:
        mounts = values(docker_arguments(plan(hub_cache="/data/hub")), "--volume")

        for path in (*chips.DEFAULT.mounts, chips.TOOLS[0]):
            assert f"{path}:{path}:ro" in mounts
        assert "/data/hub:/root/.cache" in mounts

    def test_weights_answers_and_code_are_mounted_and_used(self, tmp_path: Path) -> None:
        weights = tmp_path / "Qwen3-VL-8B"
        weights.mkdir()
        words = docker_arguments(plan(model=str(weights), answers="/data/answers", code="/srv/qvl"))
        mounts = values(words, "--volume")

        assert f"{weights}:/models/Qwen3-VL-8B:ro" in mounts
        assert "/data/answers:/var/cache/qvl" in mounts
        assert "/srv/qvl:/workspace/qvl:ro" in mounts
        assert values(words, "--cache") == ["sqlite:////var/cache/qvl/answers.db"]
        assert "PYTHONPATH=/workspace/qvl/src" in values(words, "--env")
        start = words.index("python3")
        assert words[start : start + 4] == ["python3", "-m", "qvl.cli.serve", "/models/Qwen3-VL-8B"]

    def test_the_vllm_engine_has_the_flags_of_its_qwen3_vl_recipe(self) -> None:
        words = docker_arguments(plan(engine="vllm", image="vllm-ascend:v0.23.0"))
        start = words.index("vllm")

        assert words[start : start + 3] == ["vllm", "serve", "Qwen/Qwen3-VL-8B-Instruct"]
        assert {"--no-enable-prefix-caching", "--async-scheduling"} < set(words)
        flags = {"--mm-processor-cache-gb": "0", "--max-model-len": "32768", "--gpu-memory-utilization": "0.91"}
        for flag, value in flags.items():
            assert values(words, flag) == [value]
        graphs = json.loads(values(words, "--compilation-config")[0])
        assert graphs["cudagraph_mode"] == "FULL_DECODE_ONLY"

    def test_a_310p_gets_float16_more_shared_memory_and_a_shorter_context(self) -> None:
        words = docker_arguments(plan(engine="vllm", chip="310P3"))

        assert values(words, "--dtype") == ["float16"]
        assert values(words, "--shm-size") == ["10g"]
        assert values(words, "--max-model-len") == ["16384"]
        assert values(docker_arguments(plan(chip="910B4")), "--shm-size") == ["1g"]

    @pytest.mark.parametrize(
        ("npus", "memory", "longest", "most"),
        [
            ((2,), 0, "16384", "32"),
            ((2,), 44280, "16384", "32"),
            ((2, 3), 21527, "16384", "32"),
            ((2,), 24576, "8192", "7"),
            ((2,), 21527, "4096", "1"),
        ],
    )
    def test_the_memory_of_the_npus_sets_context_and_requests(
        self, npus: tuple[int, ...], memory: int, longest: str, most: str
    ) -> None:
        limited = plan(engine="vllm", chip="310P3", npus=npus, memory_mb=memory)
        words = docker_arguments(limited)

        assert (values(words, "--max-model-len"), values(words, "--max-num-seqs")) == ([longest], [most])
        said = " ".join(recipe.notes(limited))
        assert (f"--max-num-seqs {most} and not 32" in said) == (most != "32")
        assert (f"--max-model-len {longest} and not 16384" in said) == (longest != "16384")

    def test_own_limits_win_over_those_of_the_memory(self) -> None:
        words = docker_arguments(plan(engine="vllm", memory_mb=32768, extra=("--max-num-seqs", "7")))

        assert values(words, "--max-num-seqs") == ["7"]

    @pytest.mark.parametrize(
        ("model", "quantised"),
        [
            ("Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-mxfp8", True),
            ("vllm-ascend/Qwen3-VL-8B-Instruct-W8A8", True),
            ("RedHatAI/Qwen3-VL-8B-Instruct-w8a8", False),
            ("Qwen/Qwen3-VL-8B-Instruct", False),
        ],
    )
    def test_weights_of_modelslim_are_known_by_their_hub_id(self, model: str, quantised: bool) -> None:
        one = plan(model=model, engine="vllm", chip="Ascend950PR")

        assert values(docker_arguments(one), "--quantization") == (["ascend"] if quantised else [])
        assert any("w8a8-mxfp8" in note for note in recipe.notes(one)) is not quantised
        assert recipe.notes(plan(model=model, engine="vllm", chip="910B3")) == []

    def test_several_npus_divide_the_experts_of_a_mixture(self) -> None:
        mixture: dict[str, Any] = {"model": "Qwen/Qwen3-VL-30B-A3B-Instruct", "engine": "vllm"}

        assert "--enable-expert-parallel" in docker_arguments(plan(npus=(0, 1), **mixture))
        assert "--enable-expert-parallel" not in docker_arguments(plan(npus=(0,), **mixture))
        assert "--enable-expert-parallel" not in docker_arguments(plan(npus=(0, 1), chip="310P3", **mixture))
        assert "--enable-expert-parallel" not in docker_arguments(plan(npus=(0, 1), engine="vllm"))

    def test_several_310p_capture_two_graphs_only(self) -> None:
        def sizes(*npus: int) -> object:
            words = docker_arguments(plan(engine="vllm", chip="310P3", npus=npus, image="vllm-ascend:v0.23.0-310p"))
            return json.loads(values(words, "--compilation-config")[0])["cudagraph_capture_sizes"]

        assert sizes(0) == [1, 2, 4, 8, 16]
        assert sizes(0, 1) == [1, 8]

    def test_a_key_is_handed_over_by_name_only(self) -> None:
        with_key = docker_arguments(plan(with_key=True))

        assert "QVL_API_KEY" in values(with_key, "--env")
        assert "--allow-unauthenticated" not in with_key
        assert "--allow-unauthenticated" in docker_arguments(plan())

    def test_flags_after_two_dashes_come_last_so_that_they_win(self) -> None:
        words = docker_arguments(plan(engine="vllm", extra=("--max-num-seqs", "64")))

        assert words[-2:] == ["--max-num-seqs", "64"]

    def test_cann_is_set_up_before_the_engine_starts(self, machine: Machine) -> None:
        entrypoint, arguments = recipe.shell(plan())
        host = machine.host(environ={"PATH": str(machine.bin)})
        for name in ("qvl-serve",):
            machine.program(name, 'echo "$LD_LIBRARY_PATH|$*"')
        done = host.run([entrypoint, *arguments])

        assert done.code == 0, done.stderr
        assert done.stdout.startswith("/usr/local/Ascend/driver/lib64:")
        assert "|Qwen/Qwen3-VL-8B-Instruct --host 0.0.0.0" in done.stdout

    def test_the_text_is_what_a_shell_reads_back(self, machine: Machine) -> None:
        words = docker_arguments(plan(engine="vllm", extra=("--chat-template", "it's {{ a }} $HOME")))
        docker(machine)

        assert machine.host().run(["bash", "-c", as_text(words)]).code == 0
        assert calls(machine) == [words[1:]]


class TestPlan:
    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"image": "qvl-npu"}, "no tag"),
            ({"image": "registry.local:5000/qvl-npu"}, "no tag"),
            ({"engine": "sglang"}, "sglang"),
            ({"npus": ()}, "no NPU"),
            ({"port": 70000}, "70000"),
            ({"npus": (0, 1)}, "one NPU"),
        ],
    )
    def test_what_cannot_work_is_refused_in_one_line_with_the_way_out(self, changes: dict[str, Any], word: str) -> None:
        with pytest.raises(ConfigError) as caught:
            plan(**changes)

        assert word in str(caught.value)
        assert caught.value.hint

    @pytest.mark.parametrize(
        "image", ["qvl-npu:0.1.0", "registry.local:5000/team/qvl:1", f"qvl-npu@sha256:{'0' * 64}", "a/b:v0.23.0-a3"]
    )
    def test_images_with_a_tag_or_digest_are_taken(self, image: str) -> None:
        assert plan(image=image).image == image

    @pytest.mark.parametrize(
        ("text", "numbers"),
        [("0", (0,)), ("3,1", (1, 3)), ("0-3", (0, 1, 2, 3)), ("0-1, 6", (0, 1, 6)), ("all", (4, 5))],
    )
    def test_npus_are_read(self, text: str, numbers: tuple[int, ...]) -> None:
        assert parse_npus(text, (4, 5)) == numbers

    @pytest.mark.parametrize("text", ["", "a", "3-1", "0,0", "0-2,1", "-1", "all"])
    def test_what_is_no_list_of_npus_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError):
            parse_npus(text)


class TestChecks:
    def test_a_free_npu_and_a_present_image_pass(self, healthy: Machine) -> None:
        docker(healthy)
        with service(200) as (port, _):
            pass
        launcher = Launcher(healthy.host())

        with pytest.raises(LaunchError, match="docker would make folders"):
            launcher.check(plan(port=port))
        with pytest.raises(ConfigError, match="skip-check"):
            launcher.check(plan(port=port), skip=["npu"])
        launcher.check(plan(port=port), skip=["mounts"])
        for path in (*chips.DEFAULT.mounts, chips.TOOLS[0]):
            if not healthy.host().path(path).exists():
                healthy.write(path)
        launcher.check(plan(port=port))

    def test_a_held_npu_is_refused_by_naming_the_holder(self, healthy: Machine) -> None:
        identity = "7c" * 32
        docker(healthy)
        healthy.npu_smi("23.0.2.1-910B2C.txt")
        healthy.write("/proc/91822/comm", "python3.10\n")
        healthy.write("/proc/91822/cgroup", f"0::/docker/{identity}\n")
        healthy.program("docker", f'[ "$1" = ps ] && echo "{identity} catalog-b"')
        launcher = Launcher(healthy.host())

        with pytest.raises(LaunchError) as caught:
            launcher.check_npus((0, 1))

        assert "NPU 0 is held by python3.10 (pid 91822) in container catalog-b" in str(caught.value)
        assert "free NPUs: 1" in str(caught.value)
        launcher.check_npus((1,))
        launcher.check_npus((0,), share=True)

    def test_an_npu_that_is_not_there_and_a_silent_npu_smi_are_refused(self, healthy: Machine) -> None:
        with pytest.raises(LaunchError, match="NPU 9 not found on this host, which has: 0, 1, 2, 3"):
            Launcher(healthy.host()).check_npus((9,))
        healthy.npu_smi("error-8005.txt", code=1)
        with pytest.raises(LaunchError, match="no table"):
            Launcher(healthy.host()).check_npus((0,))

    def test_a_taken_port_is_refused(self, machine: Machine) -> None:
        with service(200) as (port, _), pytest.raises(LaunchError, match=f"port {port}"):
            Launcher(machine.host()).check_port("127.0.0.1", port)

    def test_an_absent_tag_is_refused_with_the_tags_that_are_there(self, machine: Machine) -> None:
        docker(machine)
        launcher = Launcher(machine.host())

        launcher.check_image("vllm-ascend:v0.23.0")
        launcher.check_image(f"registry.local:5000/qvl-npu@sha256:{'1' * 64}")
        with pytest.raises(LaunchError) as caught:
            launcher.check_image("qvl-npu:latest")
        assert "qvl-npu:0.1.0, registry.local:5000/qvl-npu:0.0.9" in str(caught.value)
        with pytest.raises(LaunchError, match="docker pull other:1"):
            launcher.check_image("other:1")

    def test_no_docker_is_told(self, machine: Machine) -> None:
        with pytest.raises(LaunchError, match="not found on PATH"):
            Launcher(machine.host()).check_image("a:1")

    def test_weights_that_no_npu_holds_are_refused_before_the_start(self, machine: Machine) -> None:
        large: dict[str, Any] = {"model": "Qwen/Qwen3-VL-32B-Instruct", "engine": "vllm", "memory_mb": 32768}

        with pytest.raises(LaunchError) as caught:
            Launcher(machine.host()).check_memory(plan(npus=(0, 1), **large))
        assert "weights 62." in str(caught.value)
        assert "each of 2 NPUs gives 29.1 GiB" in str(caught.value)
        assert "--skip-check memory" in str(caught.value)
        Launcher(machine.host()).check_memory(plan(npus=(0, 1, 2, 3), **large))
        Launcher(machine.host()).check_memory(plan(npus=(0, 1), **large | {"memory_mb": 0}))

    def test_every_file_of_the_driver_that_is_absent_is_named(self, machine: Machine) -> None:
        root = plan(engine="vllm", kind="310P RC")

        with pytest.raises(LaunchError) as caught:
            Launcher(machine.host()).check_mounts(root)
        for path in ("/var/slogd", "/usr/lib64/libmmpa.so", "/usr/lib/aarch64-linux-gnu/libyaml-0.so.2"):
            assert path in str(caught.value)

    def test_a_broken_checkpoint_is_refused_before_the_start(self, machine: Machine, tmp_path: Path) -> None:
        folder = tmp_path / "weights"
        folder.mkdir()

        with pytest.raises(LaunchError, match=r"config\.json"):
            Launcher(machine.host()).check_weights(plan(model=str(folder)))


class TestRun:
    def test_docker_gets_exactly_the_arguments(self, machine: Machine) -> None:
        docker(machine)

        assert Launcher(machine.host()).start(plan()) == "0123456789abcdef"
        assert calls(machine) == [docker_arguments(plan())[1:]]

    def test_a_refusal_of_docker_is_passed_on(self, machine: Machine) -> None:
        docker(machine, run='echo "Conflict. The container name is already in use" >&2; exit 125')

        with pytest.raises(LaunchError, match="already in use"):
            Launcher(machine.host()).start(plan())

    @pytest.mark.parametrize(("engine", "path"), [("qvl", "/ready"), ("vllm", "/health")])
    def test_it_waits_until_the_service_says_ready(self, machine: Machine, engine: str, path: str) -> None:
        docker(machine)
        said: list[str] = []
        machine.environ |= {"QVL_API_KEY": "k1", "VLLM_API_KEY": "k1"}
        with service(503, 503, 200) as (port, seen):
            Launcher(machine.host(), say=said.append, poll=0.01).wait(
                plan(port=port, engine=engine, with_key=True), timeout=60
            )

        assert seen == [f"{path} Bearer k1"] * 3
        assert len(said) == 2

    def test_a_container_that_ends_gives_its_log(self, machine: Machine) -> None:
        docker(machine, state="exited 137")

        with pytest.raises(LaunchError) as caught:
            Launcher(machine.host(), poll=0.01).wait(plan(port=1), timeout=60)

        assert "exited with exit code 137" in str(caught.value)
        assert "NPU out of memory" in caught.value.log
        assert "loading shards" in caught.value.log

    def test_a_service_that_stays_unready_gives_its_log_and_is_left_running(self, machine: Machine) -> None:
        docker(machine)
        with service(503) as (port, _), pytest.raises(LaunchError) as caught:
            Launcher(machine.host(), poll=0.01).wait(plan(port=port), timeout=0.1)

        assert "not ready" in str(caught.value)
        assert "loading shards" in caught.value.log
        assert {words[0] for words in calls(machine)} == {"inspect", "logs"}
