"""What `qvl tune` varies: the built-in grids within the NPUs there are, and values that no server would take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qvl.ascend import devices, recipe
from qvl.bench import tune
from qvl.bench.tune_grid import DATA, GRIDS, TENSOR, Axis, grid, parallel
from tests.bench.test_tune import run, server, small, starts

if TYPE_CHECKING:
    from qvl.ascend.host import Host

__all__ = ["server"]


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """This host has four NPUs, as far as its nodes tell."""

    def numbers(host: Host) -> tuple[int, ...]:
        return (0, 1, 2, 3)

    monkeypatch.setattr(devices, "device_numbers", numbers)


@pytest.mark.parametrize("npus", range(1, 17))
def test_parallel_sizes_never_take_more_npus_than_there_are(npus: int) -> None:
    pairs = parallel(npus)

    assert len(set(pairs)) == len(pairs)
    assert all(tensor * data <= npus for tensor, data in pairs)
    assert pairs[0] == (1 << (npus.bit_length() - 1), 1)
    # None is left out that fits.
    sizes = [1, 2, 4, 8, 16]
    assert set(pairs) == {(tensor, data) for tensor in sizes for data in sizes if tensor * data <= npus}


def test_the_grid_crosses_them_only_where_there_are_several() -> None:
    crossed = grid("vllm", 4)[0]

    assert crossed.flags == [TENSOR, DATA]
    assert crossed.values == ("4*1", "2*2", "1*4", "2*1", "1*2", "1*1")
    assert crossed.words("2*1") == [TENSOR, "2", DATA, "1"]
    for npus in (0, 1):
        assert not {TENSOR, DATA} & {flag for axis in grid("vllm", npus) for flag in axis.flags}
    assert grid("qvl", 4) == grid("qvl")


def test_graph_modes_start_from_the_recipe_of_launch() -> None:
    (axis,) = [axis for axis in grid("vllm") if axis.flag == "--compilation-config"]
    plan = recipe.ContainerPlan(model="a/b", image="i:1", npus=(0,), engine="vllm")
    words = recipe.command(plan)

    configs = [json.loads(value) for value in axis.values]
    assert [config["cudagraph_mode"] for config in configs] == ["FULL_DECODE_ONLY", "PIECEWISE", "NONE"]
    assert configs[0] == json.loads(words[words.index("--compilation-config") + 1])


def test_every_grid_can_be_read() -> None:
    for rows in GRIDS.values():
        assert all(Axis.read(row).values for row in rows)
    assert Axis.read('--x={"a":1,"b":2};{"a":2}').values == ('{"a":1,"b":2}', '{"a":2}')
    assert Axis.read("--compilation-config.cudagraph_mode=none,Piecewise").values == ("none", "Piecewise")


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("--x", "cannot be read"),
        ("--a b=1,2", "cannot be read"),
        ("--=1,2", "cannot be read"),
        ("--max-num-seqs=8,0", "'0' is not a count"),
        ("--max-num-seqs=8,many", "'many' is not a count"),
        ("--tensor-parallel-size=1,1.5", "'1.5' is not a count"),
        ("--max-num-batched-tokens=-8,16", "'-8' is not a count"),
        ("--max-num-seqs=+,8", "needs a value"),
        ("--gpu-memory-utilization=0.9,1.2", "'1.2' is not a share"),
        ("--gpu-memory-utilization=90%", "'90%' is not a share"),
        ('--compilation-config={"cudagraph_mode":"NONE","x":1}', "between semicolons"),
        ('--compilation-config={"cudagraph_mode":"FULL_DECODE"};{"cudagraph_mode":"NONE"}', "FULL_DECODE_ONLY"),
        ('--compilation-config={"cudagraph_mode":2}', "unknown cudagraph_mode 2"),
        ("--compilation-config.cudagraph_mode=eager,NONE", "unknown cudagraph_mode 'eager'"),
        ("--tensor-parallel-size*--data-parallel-size=2*1,2", "'2' is not 2 values"),
        ("--tensor-parallel-size*--data-parallel-size=2*1,1*0", "'0' is not a count"),
        ("--a*--a=1*2,2*1", "a flag twice"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_and_nothing_is_started(vary: str, said: str, tmp_path: Path) -> None:
    result = run("--launch", "none-such {port}", "--vary", vary, "--out", str(tmp_path / "out"))

    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("launch", "more", "said"),
    [
        ("x {port}", ["--vary", "--tensor-parallel-size=4,8"], "takes 8 NPUs of 4"),
        ("x {port}", ["--vary", "--tensor-parallel-size=2,4", "--vary", "--data-parallel-size=1,2"], "takes 8 NPUs"),
        ("x {port} -tp 4", ["--vary", "--data-parallel-size=1,2"], "takes 8 NPUs of 4"),
        ("x {port} --tensor-parallel-size=4", ["--vary", "--data-parallel-size=2"], "takes 8 NPUs of 4"),
        ("x {port}", ["--npus", "2", "--vary", "--tensor-parallel-size=1,4"], "takes 4 NPUs of 2"),
        ("x {port}", ["--npus", "5"], "this host has 4"),
        ("qvl launch m --npus 2,3 --port {port} --", ["--vary", "--data-parallel-size=1,4"], "takes 4 NPUs of 2"),
        ("x {port} -tp 2", ["--vary", "--tensor-parallel-size=1,2"], "both varied"),
    ],
)
def test_no_setting_takes_more_npus_than_there_are(launch: str, more: list[str], said: str, tmp_path: Path) -> None:
    result = run("--launch", launch, *more, "--out", str(tmp_path / "out"))

    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("four")
def test_two_of_four_npus_are_crossed_and_what_launch_says_stands(server: str, tmp_path: Path) -> None:
    words = ["--launch", f"{server} --max-num-seqs 64 --enforce-eager", "--grid", "vllm", "--npus", "2"]
    words += ["--vary", "--compilation-config.cudagraph_mode=NONE", "--vary", "--compilation-config=-"]
    words += ["--vary", "--max-num-batched-tokens=8192", "--vary", "--mm-processor-cache-gb=0"]
    words += ["--vary", "--no-enable-prefix-caching=+", "--vary", "--mm-encoder-tp-mode=data"]
    result = run(*words, *small(tmp_path / "out"))

    assert result.exit_code == 0, result.stderr
    tried = [shlex.split(line) for line in starts(tmp_path)]
    sizes = [(int(line[line.index(TENSOR) + 1]), int(line[line.index(DATA) + 1])) for line in tried]
    assert sizes == [(2, 1), (1, 2), (1, 1)]
    assert all(line.count("--max-num-seqs") == 1 for line in tried)
    assert json.loads((tmp_path / "out" / tune.RECIPE).read_text())["asked"]["axes"][-1][0] == f"{TENSOR}*{DATA}"
