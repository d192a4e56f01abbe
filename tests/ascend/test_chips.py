"""The table of chips: every name that npu-smi prints finds its row, and an image finds its chip."""

from __future__ import annotations

import json

import pytest
import yaml

from qvl.ascend import chips
from tests.ascend import chip_page

CARD = ("davinci0", "davinci_manager", "devmm_svm", "hisi_hdc")
ROOT_COMPLEX = ("davinci0", "davinci_manager", "ascend_manager", "user_config")


@pytest.mark.parametrize(
    ("name", "nodes", "kind"),
    [
        ("910B1", CARD, "910B"),
        ("910B2", CARD, "910B"),
        ("910B2C", CARD, "910B"),
        ("910B3", CARD, "910B"),
        ("910B4", CARD, "910B"),
        ("910B4-1", CARD, "910B"),
        ("Ascend910", CARD, "A3"),
        ("Ascend910_9362", CARD, "A3"),
        ("310P3", CARD, "310P"),
        ("310P3", ROOT_COMPLEX, "310P RC"),
        ("310P3", (), "310P"),
        ("310P3vir04", CARD, "310P"),
        ("310P3vir04_3c", CARD, "310P"),
        ("310P3vir02_1c", ROOT_COMPLEX, "310P RC"),
        ("910B3vir10_3c_32g", CARD, "910B"),
        ("Ascend910B4vir05_1c_8g", CARD, "910B"),
        ("Ascend950PR", ("davinci_manager", "hisi_hdc", "ummu", "uburma"), "950"),
        ("950DT", (), "950"),
        ("910A", CARD, "910A"),
        ("910ProB", CARD, "910A"),
        ("910B", CARD, "910A"),
        ("310B4", CARD, "310"),
        ("310", CARD, "310"),
    ],
)
def test_a_name_of_npu_smi_finds_its_row(name: str, nodes: tuple[str, ...], kind: str) -> None:
    chip = chips.find(name, nodes)

    assert chip is not None
    assert chip.kind == kind


def test_an_unknown_name_has_no_row() -> None:
    assert chips.find("1020X") is None
    assert chips.find("") is None


def test_nodes_alone_tell_a_950_and_a_root_complex() -> None:
    by_nodes = [
        chips.find_by_nodes(nodes) for nodes in (("ummu", "uburma", "davinci0"), ROOT_COMPLEX, CARD, ("davinci0",))
    ]

    assert [chip.kind if chip else None for chip in by_nodes] == ["950", "310P RC", None, None]


@pytest.mark.parametrize(
    ("image", "suffix", "fitting"),
    [
        ("quay.io/ascend/vllm-ascend:v0.23.0", "", {"910B"}),
        ("quay.io/ascend/vllm-ascend:v0.23.0-openeuler", "", {"910B"}),
        ("vllm-ascend:v0.23.0-a3-openeuler", "a3", {"A3"}),
        ("vllm-ascend:v0.23.0-310p", "310p", {"310P", "310P RC"}),
        ("vllm-ascend:v0.23.0-a5", "a5", {"950"}),
        ("vllm-ascend:v0.30.0-950DT", "950dt", {"950"}),
    ],
)
def test_an_image_of_vllm_ascend_is_for_one_kind(image: str, suffix: str, fitting: set[str]) -> None:
    assert chips.image_suffix(image) == suffix
    assert {chip.kind for chip in chips.CHIPS if chip.supported and chip.fits_image(image)} == fitting


def test_an_image_of_another_name_is_not_judged() -> None:
    assert chips.image_suffix("registry.local/qvl:v1-a3") is None
    assert all(chip.fits_image("registry.local/qvl:v1") for chip in chips.CHIPS)


def test_only_chips_with_a_build_are_supported_and_the_others_say_why() -> None:
    assert all(bool(chip.build) != bool(chip.why_not) for chip in chips.CHIPS)
    assert all(chip.serves_from and chip.image_suffixes for chip in chips.CHIPS if chip.supported)
    assert [chip.kind for chip in chips.CHIPS if "bfloat16" not in chip.dtypes] == ["310P", "310P RC", "910A", "310"]


def test_the_page_of_chips_is_the_table() -> None:
    assert chip_page.PAGE.read_text(encoding="utf-8") == chip_page.page(), "make docs writes it again"


def test_the_values_of_a3_have_the_share_and_the_step_of_the_table() -> None:
    words = yaml.safe_load((chip_page.PAGE.parents[1] / "deploy/helm/values-a3.yaml").read_text(encoding="utf-8"))
    flags = json.dumps(words).replace('"', "")

    assert f"--max-num-batched-tokens, {chips.STEP_TOKENS}" in flags
    assert f"--gpu-memory-utilization, {chips.MEMORY_SHARE}" in flags
