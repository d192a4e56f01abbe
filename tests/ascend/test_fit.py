"""The estimate of memory, and the description of quantised weights, over made-up checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.ascend.checks import fit, model_slim
from qvl.ascend.doctor import Options, examine
from qvl.ascend.report import Finding
from tests.ascend.conftest import of, recording
from tests.ascend.reports import checkpoint
from tests.ascend.sized_host import GIB

if TYPE_CHECKING:
    from tests.ascend.conftest import Machine


def estimate(machine: Machine, folder: Path) -> Finding:
    found = list(fit.check(machine.host(), folder))
    assert len(found) == 1
    return found[0]


def test_an_8b_model_takes_what_its_config_says(tmp_path: Path) -> None:
    need = fit.need_of(checkpoint(tmp_path / "8b", gib=16.3), 32768)

    assert need is not None
    assert need.weights == int(16.3 * GIB)
    # Keys and values of 36 layers with 8 heads of 128 numbers, 2 bytes each.
    assert need.context == 2 * 36 * 8 * 128 * 2 * 32768
    assert 2 * GIB < need.picture < 6 * GIB
    assert need.on_each(2) == pytest.approx((need.weights + need.context) / 2 + need.picture)


def test_a_smaller_limit_of_pixels_takes_less(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "8b", gib=16.3)
    large = fit.need_of(folder, 32768)
    settings = {"size": {"shortest_edge": 65536, "longest_edge": 1024 * 1024}, "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    small = fit.need_of(folder, 32768)

    assert large is not None
    assert small is not None
    assert small.picture < large.picture / 2


def test_a_published_model_is_known_by_its_hub_id() -> None:
    plain = fit.need_of("Qwen/Qwen3-VL-8B-Instruct", 32768)
    packed = fit.need_of("Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-mxfp8", 32768)

    assert plain is not None
    assert packed is not None
    assert plain.weights / GIB == pytest.approx(16.3, abs=0.1)
    assert packed.weights / GIB == pytest.approx(9.9, abs=0.2)
    assert plain.per_token == packed.per_token == 2 * 36 * 8 * 128 * 2
    for unknown in ("Qwen/Qwen3-VL-8B-Instruct-AWQ", "Qwen/Qwen3-VL-9B-Instruct", "Qwen/Qwen3.5-5B", ""):
        assert fit.need_of(unknown, 32768) is None


def test_tokens_that_fit_are_what_weights_and_pictures_leave(tmp_path: Path) -> None:
    need = fit.need_of(checkpoint(tmp_path / "8b", gib=16.3), 16384)

    assert need is not None
    tokens = need.tokens_in(2, 19 * GIB)
    assert need.weights + 2 * need.picture + tokens * need.per_token <= 2 * 19 * GIB
    assert need.weights + 2 * need.picture + (tokens + 1) * need.per_token > 2 * 19 * GIB
    assert need.tokens_in(1, 1.0) == 0


def test_what_fits_one_npu_is_ok(healthy: Machine, tmp_path: Path) -> None:
    finding = estimate(healthy, checkpoint(tmp_path / "8b", gib=16.3))

    assert finding.status == "ok"
    assert finding.summary.endswith("it fits on one NPU")


def test_what_fits_several_says_how_many(healthy: Machine, tmp_path: Path) -> None:
    finding = estimate(healthy, checkpoint(tmp_path / "32b", gib=62))

    assert finding.status == "ok"
    assert finding.summary.endswith("it fits on 4 NPUs together (tensor parallel 4)")


def test_only_visible_npus_count(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0"
    finding = estimate(healthy, checkpoint(tmp_path / "32b", gib=62))

    assert finding.status == "fail"
    assert "one NPU gives 29.1 GiB" in finding.summary


def test_npus_beyond_the_largest_count_that_can_share_do_not_help(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,1,2"
    finding = estimate(healthy, checkpoint(tmp_path / "32b", gib=62))

    assert finding.status == "fail"
    assert "a smaller model or quantised weights" in (finding.fix or "")


def test_several_npus_are_for_vllm(healthy: Machine, tmp_path: Path) -> None:
    assert "with --engine vllm it fits on 4 NPUs" in estimate(healthy, checkpoint(tmp_path / "32b", gib=62)).summary


def test_plain_weights_on_a_chip_that_is_served_quantised_ones_warn(healthy: Machine, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "8b", gib=0.5)
    options = Options(probe=False, software=False, weights=folder)
    assert not of(examine(healthy.host(), options).findings, "quantisation")

    healthy.npu_smi("25.7.rc1-950PR.txt")
    found = of(examine(healthy.host(), options).findings, "quantisation")

    assert [item.status for item in found] == ["warn"]
    assert "8b is not in w8a8-mxfp8, in which vllm-ascend's recipe for 950 serves Qwen3-VL" in found[0].summary
    (folder / "quant_model_description.json").write_text('{"w": "W8A8"}')
    assert not of(examine(healthy.host(), options).findings, "quantisation")


def test_weights_that_fit_with_too_little_beside_warn(healthy: Machine, tmp_path: Path) -> None:
    healthy.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0"
    finding = estimate(healthy, checkpoint(tmp_path / "13b", gib=26))

    assert finding.status == "warn"
    assert "--max-model-len" in (finding.fix or "")


def test_memory_that_others_hold_warns(healthy: Machine, tmp_path: Path) -> None:
    text = recording("24.1.rc3-910B4.txt").replace("0    / 0          280", "0    / 0          2080")
    healthy.program("npu-smi", f"cat <<'EOF'\n{text}\nEOF")
    finding = estimate(healthy, checkpoint(tmp_path / "8b", gib=16.3))

    assert finding.status == "warn"
    assert "GiB are free" in finding.summary


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"text_config": {}, "vision_config": {}}'])
def test_a_config_without_sizes_gives_no_estimate(healthy: Machine, tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)

    assert list(fit.check(healthy.host(), tmp_path)) == []


def slim(folder: Path, described: list[str], stored: list[str]) -> list[Finding]:
    body = {"model_quant_type": "W8A8", **dict.fromkeys(described, "W8A8")}
    (folder / "quant_model_description.json").write_text(json.dumps(body))
    index = {"weight_map": dict.fromkeys(stored, "quant_model_weights-00001-of-00001.safetensors")}
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    return list(model_slim.check(folder))


def test_a_description_of_every_weight_is_ok(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]

    assert [item.status for item in slim(tmp_path, names, [*names, "model.layers.0.mlp.up_proj.deq_scale"])] == ["ok"]


def test_names_on_one_side_only_are_counted(tmp_path: Path) -> None:
    found = slim(tmp_path, ["a.weight", "b.weight"], ["a.weight", "c.weight", "d.weight"])

    assert [item.summary for item in found] == [
        "quant_model_description.json does not name c.weight and 1 more: vllm-ascend stops with a KeyError",
        "quant_model_description.json names b.weight, which is in no file",
    ]


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_description_that_cannot_be_read_is_a_finding(tmp_path: Path, text: str) -> None:
    slim(tmp_path, [], [])
    (tmp_path / "quant_model_description.json").write_text(text)

    assert [item.status for item in model_slim.check(tmp_path)] == ["fail"]


def test_plain_weights_have_no_description_to_check(tmp_path: Path) -> None:
    assert list(model_slim.check(checkpoint(tmp_path / "8b", gib=1))) == []
