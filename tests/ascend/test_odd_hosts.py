"""Hosts and checkpoints that are not as they should be: one clear line each, no traceback, no wait without end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from qvl.ascend.checks import fit
from qvl.ascend.doctor import Options, examine
from qvl.ascend.launch import Launcher, LaunchError
from qvl.cli.launch import LaunchOptions
from qvl.errors import ConfigError
from tests.ascend.conftest import of, recording
from tests.ascend.reports import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ascend.conftest import Machine

QUIET = Options(probe=False)
HEAD = "echo '| npu-smi 24.1 Version: 24.1 |'"


def tools(machine: Machine, *names: str) -> None:
    for name in names:
        (machine.bin / name).symlink_to(f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "exit code 0"),
        ("kill -9 $$", "exit code -9"),
        ("echo 'ret is -8001: permission denied' >&2; exit 1", "permission denied"),
        (r"printf '\xff\xfe\x80 npu-smi 25.0 Version: 25.0\n| \xff\xff |\n'", "was not understood"),
        (rf"{HEAD}; printf '\0\0|\n'", "lists no chip"),
        (f"{HEAD}; head -c 3000000 /dev/zero | tr '\\0' x; echo", "lists no chip"),
        ("head -c 3000000 /dev/zero | tr '\\0' x", "printed no table: xxx"),
    ],
)
def test_whatever_npu_smi_prints_is_one_short_finding_and_no_start(script: str, said: str, healthy: Machine) -> None:
    tools(healthy, "head", "tr")
    healthy.program("npu-smi", script)
    found = of(examine(healthy.host(), QUIET).findings, "npu-smi")

    assert [item.status for item in found] == ["fail"]
    assert said in found[0].summary
    assert len(found[0].summary) < 600
    with pytest.raises(LaunchError, match=r"no table|is lost"):
        Launcher(healthy.host()).check_npus((0,))


def test_a_table_without_end_gives_the_first_rows_and_a_count(healthy: Machine) -> None:
    tools(healthy, "yes", "head")
    healthy.program("npu-smi", f"{HEAD}; yes '| 0     910B4 | OK | 80.0 35 0 / 0 |' | head -5000")
    found = of(examine(healthy.host(), QUIET).findings, "npu-smi")

    assert len(found) == 17
    assert found[-1].summary.endswith("4984 more rows are not as they should be")


def test_two_chips_of_one_number_are_not_taken_for_a_whole_table(healthy: Machine) -> None:
    text = recording("24.1.rc3-910B4.txt").replace("| 3     910B4 ", "| 2     910B4 ")
    healthy.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    found = of(examine(healthy.host(), QUIET).findings, "npu-smi")

    assert "4 chips have rows, but only 3 different numbers" in found[0].summary
    with pytest.raises(LaunchError, match="NPU 3 is lost"):
        Launcher(healthy.host()).check_npus((3,))


def test_chips_of_several_kinds_are_told_and_not_launched_together(healthy: Machine) -> None:
    text = recording("24.1.rc3-910B4.txt").replace("| 3     910B4 ", "| 3     310P3 ")
    healthy.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    found = of(examine(healthy.host(), QUIET).findings, "chip")
    options = LaunchOptions(model="a/b", image="i:1", engine="vllm")

    assert [item.status for item in found] == ["warn", "ok"]
    assert "310P3, 910B4" in found[0].summary
    with pytest.raises(ConfigError, match="several kinds: 910B4, 310P3"):
        options.plan(healthy.host(), (0, 3), ())
    assert options.plan(healthy.host(), (3,), ()).chip_facts.kind == "310P"
    assert options.plan(healthy.host(), (0, 1), ()).chip_facts.kind == "910B"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", "\ufeff{}", "", "{"])
def test_a_config_that_is_no_object_fails_in_one_line_and_does_not_start(
    text: str, healthy: Machine, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "odd", gib=0.001)
    (folder / "config.json").write_text(text)
    found = of(examine(healthy.host(), Options(probe=False, weights=folder)).findings, "weights")
    plan = LaunchOptions(model=str(folder), image="i:1", engine="vllm").plan(healthy.host(), (0,), ())

    assert [item.status for item in found] == ["fail"]
    assert "config.json" in found[0].summary
    assert "itself failed" not in found[0].summary
    with pytest.raises(LaunchError, match=r"config\.json"):
        Launcher(healthy.host()).check_weights(plan)


@pytest.mark.parametrize("name", ["quant_model_description.json", "quant_model_weights.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"weight_map": 3}', "{"])
def test_odd_files_of_modelslim_are_findings(name: str, text: str, healthy: Machine, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "odd", gib=0.001)
    (folder / "quant_model_description.json").write_text('{"w.weight": "W8A8"}')
    (folder / "quant_model_weights.safetensors.index.json").write_text(
        '{"weight_map": {"w.weight": "model.safetensors"}}'
    )
    (folder / name).write_text(text)
    findings = examine(healthy.host(), Options(probe=False, weights=folder)).findings

    assert [item.check for item in findings if item.status == "fail"]
    assert not [item for item in findings if "itself failed" in item.summary]


@pytest.mark.parametrize(
    "change",
    [
        lambda text, vision: text.update(num_hidden_layers=10**12),
        lambda text, vision: text.update(num_key_value_heads=0),
        lambda text, vision: text.update(hidden_size=-4096),
        lambda text, vision: text.update(hidden_size=float("inf")),
        lambda text, vision: text.update(hidden_size="4096"),
        lambda text, vision: text.update(num_attention_heads=True),
        lambda text, vision: vision.update(patch_size=0),
        lambda text, vision: vision.update(depth=10**12),
        lambda text, vision: text.clear(),
    ],
)
def test_sizes_that_no_model_has_give_no_estimate(change: Callable[[Any, Any], None], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "odd", gib=0.001)
    body = json.loads((folder / "config.json").read_text())
    change(body["text_config"], body["vision_config"])
    (folder / "config.json").write_text(json.dumps(body))

    assert fit.need_of(folder, 4096) is None
