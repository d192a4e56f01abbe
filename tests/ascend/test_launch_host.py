"""What `qvl launch` takes from its host and its checkpoint: hub settings, proxies, NPUs, forms of weights."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qvl.ascend import matrix, recipe
from qvl.ascend.devices import parse_npus
from qvl.ascend.launch import Launcher
from qvl.cli import launch
from qvl.cli.launch import LaunchOptions
from qvl.errors import ConfigError
from tests.ascend.reports import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ascend.conftest import Machine

NAMES = ("QVL_HUB", "VLLM_USE_MODELSCOPE", "MODELSCOPE_API_TOKEN", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
IMAGE = "quay.io/ascend/vllm-ascend:v0.23.0"


def dry_run(machine: Machine, folder: Path, **options: Any) -> tuple[str, str]:
    """(command, what was said) on this host."""
    given = {"model": "Qwen/Qwen3-VL-8B-Instruct", "image": IMAGE, "engine": "vllm", "dry_run": True, **options}
    command, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(command), contextlib.redirect_stderr(said):
        launch._launch(machine.host(), LaunchOptions(**given, hub_cache=folder), [])
    return command.getvalue(), said.getvalue()


def passed_on(command: str) -> list[str]:
    words = command.replace("\\\n", " ").split()
    return [name for option, name in itertools.pairwise(words) if option == "--env" and "=" not in name]


@pytest.mark.parametrize("engine", ["qvl", "vllm"])
def test_hub_settings_and_proxies_go_along_by_name(engine: str, healthy: Machine, tmp_path: Path) -> None:
    healthy.environ |= {name: f"secret-of-{name}" for name in (*NAMES, *PROXIES)}
    command, said = dry_run(healthy, tmp_path, engine=engine)

    assert passed_on(command) == [*NAMES, *PROXIES]
    assert "secret" not in command + said


def test_what_the_host_does_not_set_is_not_passed_on(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ |= {"HF_TOKEN": "", "QVL_HUB": "modelscope", "HF_HOME": "/data", "MY_TOKEN": "x"}

    assert passed_on(dry_run(healthy, tmp_path)[0]) == ["QVL_HUB"]


def test_an_own_value_takes_the_place_of_the_hosts(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ["HF_ENDPOINT"] = "http://of-the-host"
    command, _ = dry_run(healthy, tmp_path, env=["HF_ENDPOINT=http://mirror"])
    places = [command.index("--env HF_ENDPOINT \\"), command.index("--env HF_ENDPOINT=http://mirror")]

    # docker takes the last one.
    assert places == sorted(places)


def test_a_compose_file_asks_the_shell_for_them(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ["HF_TOKEN"] = "hush-hush"
    dry_run(healthy, tmp_path, engine="qvl", npus="all", compose=tmp_path / "out")
    text = (tmp_path / "out/docker-compose.yml").read_text()
    engines = [item for name, item in yaml.safe_load(text)["services"].items() if name.startswith("engine-")]

    assert len(engines) == 4
    assert {engine["environment"]["HF_TOKEN"] for engine in engines} == {"${HF_TOKEN:-}"}
    assert "hush" not in text


def test_all_npus_are_those_that_have_a_node(healthy: Machine, tmp_path: Path) -> None:
    (healthy.root / "dev/davinci1").unlink()
    healthy.nodes(4)
    command, _ = dry_run(healthy, tmp_path, npus="all", model="Qwen/Qwen3-VL-4B-Instruct")
    nodes = [line.split()[1] for line in command.splitlines() if "--device /dev/davinci" in line]

    assert nodes == [*(f"/dev/davinci{number}" for number in (0, 2, 3, 4)), "/dev/davinci_manager"]
    assert "--env ASCEND_RT_VISIBLE_DEVICES=0,1,2,3" in command
    assert "--tensor-parallel-size 4" in command


def test_npus_that_cannot_share_the_heads_are_refused(healthy: Machine, tmp_path: Path) -> None:
    for model in ("Qwen/Qwen3-VL-8B-Instruct", str(checkpoint(tmp_path / "8b", gib=0.001))):
        with pytest.raises(ConfigError) as caught:
            dry_run(healthy, tmp_path, model=model, npus="0-2")
        assert "3 NPUs cannot share" in str(caught.value)
        assert "--npus for 2 of them" in str(caught.value)
        assert "--data-parallel-size 3" in str(caught.value)
        own = LaunchOptions(model=model, image=IMAGE, engine="vllm", npus="0-2")
        own.plan(healthy.host(), (0, 1, 2), ("--tensor-parallel-size", "1", "--data-parallel-size=3"))
        own.plan(healthy.host(), (0, 1, 2), ("-tp", "1"))
    assert dry_run(healthy, tmp_path, model="someone/else", npus="0-2")[0]


def test_all_npus_of_a_host_without_one_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no /dev/davinciN on this host"):
        dry_run(machine, tmp_path, npus="all")


@pytest.mark.parametrize(
    ("npus", "extra", "said"),
    [
        ("0", ("--tensor-parallel-size", "2"), "takes 2 NPUs, but --npus names 1"),
        ("0,1", ("-tp", "2", "-dp=2"), "takes 4 NPUs, but --npus names 2"),
        ("0,1", ("--pipeline_parallel_size", "3"), "takes 3 NPUs"),
        ("0-3", ("-tp", "3"), "3 NPUs cannot share the 32 attention heads"),
    ],
)
def test_sizes_that_the_npus_cannot_have_are_refused(
    npus: str, extra: tuple[str, ...], said: str, healthy: Machine
) -> None:
    options = LaunchOptions(model="Qwen/Qwen3-VL-8B-Instruct", image=IMAGE, engine="vllm")

    with pytest.raises(ConfigError, match=said):
        options.plan(healthy.host(), parse_npus(npus), extra)
    options.plan(healthy.host(), parse_npus(npus), ("--nnodes", "2", "-tp", "4"))


@pytest.mark.parametrize(
    ("extra", "tensor"), [(("-dp", "2"), "2"), (("--data-parallel-size=4",), "1"), ((), "4"), (("-pp", "2"), "2")]
)
def test_what_other_sizes_leave_is_tensor_parallel(extra: tuple[str, ...], tensor: str, healthy: Machine) -> None:
    options = LaunchOptions(model="Qwen/Qwen3-VL-8B-Instruct", image=IMAGE, engine="vllm")
    words = recipe.command(options.plan(healthy.host(), (0, 1, 2, 3), extra))

    assert words[words.index("--tensor-parallel-size") + 1] == tensor


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (f"{IMAGE}-a3", "another chip than 910B, whose tags end in no chip"),
        (f"{IMAGE}-310p-openeuler", "another chip"),
        ("vllm-ascend:v0.10.0rc1", "does not serve Qwen3-VL on 910B: 0.11.0 or newer does"),
    ],
)
def test_an_image_of_another_chip_or_too_old_is_refused(
    image: str, said: str, healthy: Machine, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        dry_run(healthy, tmp_path, image=image)
    assert dry_run(healthy, tmp_path, image=image, skip_check=["image"])[0]


def test_an_image_of_ones_own_and_an_unknown_chip_are_not_judged(healthy: Machine, tmp_path: Path) -> None:
    assert dry_run(healthy, tmp_path, image="registry:5000/own-a3:1")[0]
    healthy.npu_smi("error-8005.txt", code=1)
    assert dry_run(healthy, tmp_path, image=f"{IMAGE}-a3")[0]


@pytest.mark.parametrize(
    "options",
    [{"host": "no host"}, {"network": "x y"}, {"model": "a\nb"}, {"wait": float("nan")}, {"wait": -1.0}, {"host": ""}],
)
def test_odd_options_are_one_line(options: dict[str, Any], healthy: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        dry_run(healthy, tmp_path, allow_unauthenticated=True, **options)
    assert "\n" not in str(caught.value)


def slim(folder: Path, *, index: bool = True) -> Path:
    """A checkpoint with the names that ModelSlim gives."""
    checkpoint(folder, gib=0.001)
    (folder / "model.safetensors").rename(folder / "quant_model_weights-00001-of-00001.safetensors")
    (folder / "quant_model_description.json").write_text('{"model_quant_type": "W8A8", "w.weight": "W8A8"}')
    if index:
        names = {"w.weight": "quant_model_weights-00001-of-00001.safetensors"}
        (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_modelslims_weights_pass_the_check_and_get_their_flag(index: bool, healthy: Machine, tmp_path: Path) -> None:
    folder = slim(tmp_path / "w8a8", index=index)
    command, _ = dry_run(healthy, tmp_path, model=str(folder))

    assert "--quantization ascend" in command
    plan = LaunchOptions(model=str(folder), image=IMAGE, engine="vllm").plan(healthy.host(), (0,), ())
    Launcher(healthy.host()).check_weights(plan)
    assert "--quantization" not in dry_run(healthy, tmp_path, model=str(checkpoint(tmp_path / "plain", gib=0.001)))[0]


def test_mixtures_keep_the_caches_that_dense_models_lose(healthy: Machine, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mixture", gib=0.001)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_moe"}))
    dense = dry_run(healthy, tmp_path)[0]

    assert "--no-enable-prefix-caching" in dense
    assert "--mm-processor-cache-gb 0" in dense
    for model in (str(folder), "Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Thinking"):
        command = dry_run(healthy, tmp_path, model=model)[0]
        assert "prefix-caching" not in command
        assert "chunked-prefill" not in command
        assert "--mm-processor-cache-gb" not in command
        assert "--limit-mm-per-prompt.video 0" in command


@pytest.mark.parametrize(
    ("image", "eager"),
    [
        ("quay.io/ascend/vllm-ascend:v0.18.0-310p", True),
        ("quay.io/ascend/vllm-ascend:v0.18.0-310p-openeuler", True),
        ("quay.io/ascend/vllm-ascend:v0.23.0-310p", False),
        ("quay.io/ascend/vllm-ascend:v0.30.0-310p", False),
        ("own:1", False),
    ],
)
def test_graphs_of_a_310p_want_cann_9(image: str, eager: bool, machine: Machine, tmp_path: Path) -> None:
    machine.nodes(2, 3)
    machine.npu_smi("24.1.0.1-310P3.txt")
    command, _ = dry_run(machine, tmp_path, image=image, npus="3")

    assert ("--enforce-eager" in command) is eager
    assert ("--compilation-config" in command) is not eager


def test_a_newer_matrix_moves_that_border(machine: Machine, tmp_path: Path) -> None:
    machine.nodes(2, 3)
    machine.npu_smi("24.1.0.1-310P3.txt")
    table = matrix.load()
    rows = {**table.vllm_ascend, "0.23.0": {**table.vllm_ascend["0.23.0"], "cann": "8.5.1"}}
    with matrix.use(table.model_copy(update={"vllm_ascend": rows})):
        assert "--enforce-eager" in dry_run(machine, tmp_path, image=f"{IMAGE}-310p", npus="3")[0]
