"""The version matrix: its facts, a newer one from a file or a URL, and one that is old."""

from __future__ import annotations

import datetime
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from qvl.ascend import matrix
from qvl.ascend.checks import version_matrix, weights
from qvl.ascend.doctor import Options, examine
from qvl.backends.local.model.family import FAMILIES
from qvl.cli import app
from qvl.errors import BackendUnavailableError, ConfigError
from tests.ascend.conftest import of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.ascend.conftest import Machine

SHIPPED: dict[str, Any] = json.loads(resources.files("qvl.ascend").joinpath("matrix.json").read_bytes())


def changed(**fields: object) -> bytes:
    return json.dumps(SHIPPED | fields).encode()


@contextmanager
def web(body: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the test's output quiet."""

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/matrix.json"
        server.shutdown()


def test_every_row_of_a_known_set_agrees_with_the_table_of_torch_npu() -> None:
    table = matrix.load()
    for version, row in table.vllm_ascend.items():
        npu, torch = row.get("torch_npu"), row.get("torch")
        if npu and torch:
            assert matrix.release(npu) == matrix.release(torch), version
        cann = table.cann_for_torch_npu.get(npu or "")
        if cann and "cann" in row:
            # Candidates, and 0.18.0, ran with another patch of CANN than torch_npu's own page asks for.
            assert matrix.release(cann)[:2] == matrix.release(row["cann"])[:2], version


def test_what_is_not_known_of_a_release_is_left_out_and_said(machine: Machine) -> None:
    machine.nodes(0)
    machine.npu_smi("24.1.rc3-910B4.txt")
    machine.software("9.2.1", torch="2.14.0", torch_npu="2.14.0", vllm="0.30.0", vllm_ascend="0.30.0")
    found = examine(machine.host(), Options(probe=False)).findings

    assert matrix.load().vllm_ascend["0.30.0"] == {"vllm": "0.30.0", "cann": "9.2.1"}
    (plugin,) = of(found, "vllm-ascend")
    assert (plugin.status, plugin.summary) == (
        "ok",
        "vllm-ascend 0.30.0 with vllm 0.30.0; its torch is not known to the matrix",
    )
    (npu,) = of(found, "torch-npu")
    assert npu.status == "ok"
    assert "its CANN is not known" in npu.summary


@pytest.mark.parametrize(
    ("version", "row"),
    [
        ("0.23.0", "0.23.0"),
        ("v0.23.0rc1", "0.23.0rc1"),
        ("0.23.0.post1", "0.23.0.post1"),
        ("0.23.0.post7", "0.23.0"),
        ("0.30.0rc9", None),
        ("0.23.0.dev3", None),
        ("0.23.0b1", None),
        ("0.23.1.dev4+g0f3c2d1", None),
        ("0.12.0", None),
        ("9.9", None),
    ],
)
def test_a_release_has_its_own_row_and_a_post_that_of_its_final(version: str, row: str | None) -> None:
    assert matrix.load().release(version) == row


def test_versions_of_a_release_candidate_are_compared(machine: Machine) -> None:
    machine.nodes(0)
    machine.npu_smi("24.1.rc3-910B4.txt")
    machine.software("8.5.1", torch="2.9.0", torch_npu="2.9.0", vllm="0.17.0", vllm_ascend="0.16.0rc1")
    (finding,) = of(examine(machine.host(), Options(probe=False)).findings, "vllm-ascend")

    assert finding.status == "fail"
    assert "vllm 0.17.0 (wants 0.16.0)" in finding.summary


def test_a_newer_matrix_is_read_from_a_file_and_from_a_url(tmp_path: Path) -> None:
    rows = SHIPPED["vllm_ascend"] | {"0.31.0": {"vllm": "0.31.0", "cann": "9.3.0"}}
    body = changed(date="2027-01-02", vllm_ascend=rows)
    (tmp_path / "m.json").write_bytes(body)
    with web(body) as url:
        for source in (str(tmp_path / "m.json"), url):
            table = matrix.read(source)
            assert (table.date, table.origin) == ("2027-01-02", source)
            with matrix.use(table):
                assert matrix.load().release("0.31.0") == "0.31.0"
    assert matrix.load().release("0.31.0") is None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"<html>", "JSON"),
        (b"[]", "object"),
        (changed(date="22.8.2026"), "date"),
        (changed(date="2026-13-45"), "date"),
        (changed(sources=[]), "sources"),
        (changed(sourcs=["x"]), "sourcs"),
        (changed(format="qvl-matrix-9"), "format"),
        (changed(vllm_ascend={"0.30.0": {"vlm": "0.30.0"}}), "vlm"),
        (changed(vllm_ascend={"latest": {"vllm": "0.30.0"}}), "latest"),
        (changed(cann_for_torch_npu={"2.9.0": 9}), "cann_for_torch_npu"),
        (changed(python={"min": "banana", "max": "3.12"}), "python.min.*banana"),
        (changed(python=[]), "python"),
        (changed(transformers={"min": "4.57.0", "max": "six"}), "transformers.max.*six"),
        (changed(vllm_ascend={"0.30.0": {"vllm": "garbage"}}), "vllm.*garbage"),
        (changed(vllm_ascend={"0.30.0": {"python": []}}), "python"),
        (changed(vllm_ascend={"0.30.0": {"python": ["3.10", "x"]}}), "python"),
        (changed(cann_for_torch_npu={"2.9.0": "banana"}), "cann_for_torch_npu.*banana"),
        (changed(cann_for_torch_npu={"2.9.0": "8" * 5000}), "not a version"),
        (changed(model_types={"qwen3_vl": "soon"}), "model_types.*soon"),
        (b" " * (matrix.LARGEST + 1), "1 MiB"),
    ],
)
def test_what_is_no_matrix_is_refused_in_one_line(body: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(body)
    with pytest.raises(ConfigError, match=word) as caught:
        matrix.read(str(tmp_path / "m.json"))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        matrix.read(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="directory"):
        matrix.read(str(tmp_path))
    with web(b"", 404) as url, pytest.raises(BackendUnavailableError, match="HTTP 404"):
        matrix.read(url)
    with pytest.raises(BackendUnavailableError, match="ConnectError"):
        matrix.read("http://127.0.0.1:1/matrix.json")


def test_a_device_and_a_pipe_are_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match="not a regular file"):
            matrix.read(source)
    with pytest.raises(ConfigError, match="names no file"):
        matrix.read("")


def test_a_byte_order_mark_and_a_scheme_in_capitals_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + changed(date="2027-01-02"))
    assert matrix.read(str(tmp_path / "m.json")).date == "2027-01-02"
    with web(changed(date="2027-01-02")) as url:
        assert matrix.read(url.replace("http://", "HTTP://")).date == "2027-01-02"


def test_versions_are_in_the_order_in_which_they_come_out() -> None:
    order = ["0.22.1", "0.23.0.dev3", "0.23.0a1", "0.23.0b1", "0.23.0rc1.dev2", "0.23.0rc1", "0.23.0", "0.23.0.post1"]

    keys = [matrix.key(text) for text in order]
    assert keys == sorted(set(keys))
    assert matrix.same("8.3.RC1", "8.3.rc1")
    assert [matrix.untagged(text) for text in ("0.1.dev1+g0f3c2d1", "0.23.0.dev3", "0.1.0")] == [True, False, False]


def test_a_matrix_of_a_day_to_come_is_not_taken_for_fresh() -> None:
    day = matrix.load().day()
    (today,) = version_matrix.age(day)
    (ahead,) = version_matrix.age(day - datetime.timedelta(days=1))

    assert (today.status, ahead.status) == ("ok", "warn")
    assert "1 days from now" in ahead.summary


def test_a_matrix_of_91_days_is_old_and_one_of_90_is_not() -> None:
    day = matrix.load().day()
    (fresh,) = version_matrix.age(day + datetime.timedelta(days=90))
    (old,) = version_matrix.age(day + datetime.timedelta(days=91))

    assert (fresh.status, old.status) == ("ok", "warn")
    assert "91 days old" in old.summary
    assert "--matrix" in str(old.fix)


def test_the_doctor_says_which_matrix_it_used_and_refuses_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(changed(date="2027-01-02"))
    words = ["doctor", "--no-probe", "--no-software", "--device", "npu", "--matrix"]
    used = CliRunner().invoke(app, [*words, str(tmp_path / "m.json")])
    told = CliRunner().invoke(app, [*words, str(tmp_path / "m.json"), "--json"])
    broken = CliRunner().invoke(app, [*words, str(tmp_path / "none.json")])

    assert used.stdout.splitlines()[-1].endswith(f"(version matrix of 2027-01-02, from {tmp_path / 'm.json'})")
    assert json.loads(told.stdout)["facts"]["matrix"] == "2027-01-02"
    assert broken.exit_code == 2
    assert broken.stderr.count("\n") == 1


def checkpoint(folder: Path, kind: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def judged(folder: Path, **options: Any) -> tuple[str, str]:
    (finding,) = of(weights.check(folder, **options), "model-type")
    return finding.status, f"{finding.summary} {finding.fix}"


def test_the_doctor_says_of_a_model_type_what_each_engine_says(tmp_path: Path) -> None:
    local = {kind for family in FAMILIES for kind in family.model_types}
    served = set(matrix.load().model_types)
    for kind in sorted(local | served | {"llama"}):
        folder = checkpoint(tmp_path, kind)
        assert (judged(folder, engine="qvl")[0] == "fail") == (kind not in local), kind
        assert judged(folder, engine="vllm")[0] == ("ok" if kind in served else "warn"), kind
        both = "ok" if kind in local else "warn" if kind in served else "fail"
        assert judged(folder)[0] == both, kind


def test_a_type_of_vllm_alone_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FAMILIES", FAMILIES[:1])
    status, text = judged(checkpoint(tmp_path, "qwen3_5"))

    assert status == "warn"
    assert "is served by vllm only" in text
    assert "--engine vllm" in text


def test_an_installed_transformers_that_is_too_old_for_the_type_fails(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_5")

    status, text = judged(folder, transformers="4.57.1")
    assert status == "fail"
    assert "transformers 5.2.0 and newer, but 4.57.1" in text
    assert judged(folder, transformers="5.2.0")[0] != "fail"
