"""`qvl models --fit`: the arithmetic is that of the engine, and a folder, an id or the published sizes are shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qvl.backends.local import backend as local_backend
from qvl.backends.local.model.bandwidth import host_bandwidth
from qvl.backends.local.model.device import open_device
from qvl.backends.local.model.model_folder import bundled_folder
from qvl.backends.local.model.model_size import PUBLISHED, ModelSize, size_of
from qvl.cli.fit import Form, Place, device_bandwidth, fit, fit_all, host_forms, in_16_bits, size_named
from qvl.errors import ConfigError

GB = 10**9
BF16 = Form("local", "bfloat16", 2.0, 2.0, 2.0, 0.25)
DENSE = ModelSize(4 * GB, 4 * GB, GB, tied=False, tower=GB, kv_per_token=50_000, longest=100_000)
MIXTURE = ModelSize(40 * GB, 4 * GB, GB, tied=False, tower=GB, kv_per_token=50_000, longest=100_000)


def place(free_gb: float, forms: tuple[Form, ...] = (BF16,), total_gb: float = 100) -> Place:
    return Place("cpu", "made up", int(free_gb * GB), int(total_gb * GB), 100e9, forms)


def test_all_weights_take_memory_and_the_active_ones_take_time() -> None:
    dense, mixture = (fit("it", size, BF16, place(100)) for size in (DENSE, MIXTURE))
    assert (dense["weights_gb"], mixture["weights_gb"]) == (14.0, 86.0)
    assert dense["tokens_per_second_at_most"] == mixture["tokens_per_second_at_most"] == 9.9  # 100 / (10 + 0.1)
    assert dense["tokens_per_second"] == 5.9
    # 4,096 tokens of 0.1 MB, of which the engine takes a quarter of what is free after loading.
    assert dense["memory_gb"] == round(14 + 2 + 4096 * 1e-4 * 4, 1)
    assert dense["context"] == 100_000, "no more than the model has"


@pytest.mark.parametrize(("free", "fits"), [(17.7, True), (17.6, False), (1.0, False)])
def test_what_does_not_fit_is_said_with_what_it_needs(free: float, fits: bool) -> None:
    row = fit("it", DENSE, BF16, place(free))
    assert row["fits"] is fits
    assert row["memory_gb"] == 17.6
    assert (row["context"] >= 4096) is fits


def test_float32_is_read_as_float16_where_there_is_room_for_the_copies() -> None:
    form = Form("local", "float32", 4.0, 4.0, 4.0, 0.25)
    roomy, tight = (fit("it", DENSE, form, place(free)) for free in (90, 40))
    assert roomy["tokens_per_second_at_most"] == pytest.approx(100 / 10.2, abs=0.1)
    assert tight["tokens_per_second_at_most"] == pytest.approx(100 / 20.2, abs=0.1)


def test_a_form_that_has_no_mixtures_has_no_row_for_one() -> None:
    int8 = Form("openvino", "int8", 1.0, 1.0, 1.0, 1.0, mixtures=False)
    rows = fit_all({"dense": DENSE, "mixture": MIXTURE}, [place(100, (BF16, int8))])
    forms = [(row["model"], row["form"]) for row in rows]
    assert forms == [("dense", "bfloat16"), ("dense", "int8"), ("mixture", "bfloat16")]


def test_a_head_that_is_the_embedding_is_a_copy_on_a_processor_alone() -> None:
    tied = replace(DENSE, tied=True)
    on = {device: fit("it", tied, BF16, replace(place(100), device=device))["weights_gb"] for device in ("cpu", "cuda")}
    assert on == {"cpu": 14.0, "cuda": 12.0}


def test_forms_are_those_of_the_backends_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.plugins.host import PluginHost

    def names() -> set[str]:
        return {f"{form.backend} {form.name}" for form in host_forms()}

    class Quantising(local_backend.LocalBackend):
        def __init__(self, quantize: str | None = None, **options: Any) -> None:
            super().__init__(**options)

    flags = Path("/proc/cpuinfo").read_text()
    multiplies = re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", flags) is not None
    assert ("local float32" in names(), "local bfloat16" in names()) == (True, multiplies)
    assert ("openvino int4" in names()) == ("openvino" in PluginHost().backends.owners)
    monkeypatch.setattr(local_backend, "LocalBackend", Quantising)
    assert "local int8" in names()


def test_memory_is_read_at_a_speed_that_memory_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.backends.local.model.device.host_memory", lambda: (64 << 20, 128 << 20))
    monkeypatch.setattr("qvl.backends.local.model.bandwidth.LARGEST_BLOCK", 16 << 20)
    speeds = host_bandwidth(0.02), device_bandwidth(open_device("cpu"), 0.02)
    assert all(1e7 < speed < 1e13 for speed in speeds)


def test_a_folder_is_told_as_table_and_as_json(qvl, monkeypatch):
    monkeypatch.setattr("qvl.cli.models.places", lambda: [place(20.0)])
    folder = str(bundled_folder())
    answer = json.loads(qvl("models", "--fit", folder, "--json").out)
    assert answer["memory"] == [
        {"device": "cpu", "name": "made up", "free_gb": 20.0, "total_gb": 100.0, "bandwidth_gb_s": 100.0}
    ]
    (row,) = answer["fits"]
    assert (row["model"], row["device"], row["backend"], row["form"]) == (folder, "cpu", "local", "bfloat16")
    assert row["fits"]
    table = qvl("models", "--fit").out
    assert "about" in table
    assert "no room" in table
    assert "so much is not free now" in table
    assert "20.0 GB free of 100.0" in table


def test_the_table_is_whole_at_80_columns_and_explains_what_it_has(qvl, monkeypatch):
    forms = ("float32", "bfloat16", "int8")
    every = tuple(
        Form(backend, name, 1.0, 1.0, 2.0, 0.5, mixtures=backend == "local" and name != "int8")
        for backend, name in (*(("local", form) for form in forms), ("openvino", "int8"), ("openvino", "int4"))
    )
    monkeypatch.setattr("qvl.cli.models.places", lambda: [replace(place(20.0), forms=every)])
    monkeypatch.setenv("COLUMNS", "80")
    table = qvl("models", "--fit").out
    assert not [name for name in PUBLISHED if f"│ {name} " not in table]
    assert "…" not in "".join(line for line in table.splitlines() if line.startswith("│"))
    for words in ("no room is too large", "~: about", "-: this form takes no mixture"):
        assert words in table
    alone = qvl("models", "--fit", str(bundled_folder())).out
    assert "~: about" in alone
    for words in ("no room", "takes no mixture"):
        assert words not in alone


@pytest.mark.slow
def test_this_machine_is_measured(qvl):
    answer = json.loads(qvl("models", "--fit", "Qwen/Qwen3-VL-30B-A3B-Thinking-FP8", "--json").out)
    assert {row["weights_gb"] for row in answer["fits"] if row["form"] == "bfloat16"} <= {62.1}
    assert answer["memory"][-1]["device"] == "cpu"
    assert answer["memory"][-1]["bandwidth_gb_s"] > 0


def test_a_model_that_is_none_is_one_line(qvl, folder):
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "short").mkdir()
    (folder / "short" / "config.json").write_text('{"model_type": "qwen3_vl", "text_config": {"hidden_size": 8}}')
    for model, words in (("./nowhere", "not found"), ("./other", "'llama'"), ("./short", "does not say how large")):
        ran = qvl("models", "--fit", model)
        assert ran.code == 2
        assert words in ran.error
    assert "--fit" in qvl("models", "./other").error


def test_of_a_hub_id_only_the_config_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    patterns: list[list[str]] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return str(bundled_folder())

    monkeypatch.delenv("QVL_HUB", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = json.loads((bundled_folder() / "config.json").read_text())
    assert size_named("someone/Qwen3-VL-tuned") == size_of(config, "bundled")
    assert patterns == [["config.json"]]
    with pytest.raises(ConfigError, match="not found"):
        size_named("unknown")


def test_both_tables_have_one_source_of_sizes_and_names_are_whole_at_80_columns(qvl, monkeypatch):
    int8 = Form("openvino", "int8", 1.0, 1.0, 1.0, 1.0, mixtures=False)
    own = in_16_bits()
    monkeypatch.setattr("qvl.cli.models.places", lambda: [place(20.0, (own, int8))])
    monkeypatch.setenv("COLUMNS", "80")
    rows = {
        row["model"]: row for row in json.loads(qvl("models", "--fit", "--json").out)["fits"] if row["form"] != "int8"
    }
    for listed in json.loads(qvl("models", "--json").out)["published"]:
        assert listed["memory_gb"] == rows[listed["model"]]["memory_gb"]
    told = qvl("models", "--fit").out
    for words in ("235B-A22B", "openvino:FOLDER", "-: this form takes no mixture", "the bundled model", "assumed"):
        assert words in " ".join(told.split())


def test_speed_is_that_of_the_kernels_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.cli.fit.known_bandwidth", lambda: 40.0)
    monkeypatch.setattr("qvl.cli.fit.one_row", lambda form: (2.0, 30.0) if form == "bfloat16" else None)
    assert (in_16_bits().share, in_16_bits().measured) == (0.75, True)
    assert fit("it", DENSE, in_16_bits(), place(100))["tokens_per_second"] == pytest.approx(0.75 * 9.9, abs=0.06)
    assert [form.measured for form in host_forms() if form.name == "float32"] == [False]
