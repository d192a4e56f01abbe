"""Options that are the fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from qvl.cli.expand import Without, expand


@dataclass(frozen=True, slots=True)
class Cup:
    ENV_PREFIX: ClassVar[str] = "CUP_"

    size: Annotated[int, typer.Option(min=1, envvar=["OLD_SIZE"], help="In ml.")] = 200
    lid: Annotated[bool, typer.Option(envvar=[], help="With a lid.")] = False
    maker: Annotated[str, typer.Option(help="Who made it.")] = "nobody"
    top: Annotated[int, typer.Option(help="Most cups.")] = 9
    made: int = field(default=1, init=False)


@expand
def fill(
    drink: str, cup: Cup, other: Annotated[Cup, Without("size", "lid", "maker", "top")], hot: bool = False
) -> None:
    """Fill a cup."""
    print(drink, cup, other == Cup(), hot)


def run(*words: str, **environment: str) -> str:
    app = typer.Typer()
    app.command()(fill)
    return CliRunner().invoke(app, list(words), env=environment).output


def test_each_field_is_an_option_with_its_default_bounds_and_help() -> None:
    assert run("tea", "--hot") == "tea Cup(size=200, lid=False, maker='nobody', top=9, made=1) True True\n"
    assert run("tea", "--size", "3", "--lid") == "tea Cup(size=3, lid=True, maker='nobody', top=9, made=1) True False\n"
    assert "--size" in run("tea", "--size", "0")
    help_text = run("--help")
    assert "Fill a cup." in help_text
    assert "In ml." in help_text
    assert "--made" not in help_text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUP_SIZE": "5"}, "size=5"),
        ({"OLD_SIZE": "6"}, "size=6"),
        ({"CUP_SIZE": "5", "OLD_SIZE": "6"}, "size=5"),
        ({"CUP_LID": "1"}, "lid=False"),
        ({"CUP_MAKER": "me"}, "maker='me'"),
    ],
)
def test_a_prefix_gives_each_option_a_variable(environment: dict[str, str], expected: str) -> None:
    assert expected in run("tea", **environment)


def test_a_value_of_a_variable_that_cannot_be_read_is_said_with_its_name() -> None:
    assert "(env var: 'CUP_TOP')" in run("tea", CUP_TOP="many")


def test_several_variables_of_an_option_are_said_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.cli import app

    for variable in ("QVL_PORT", "SERVER_PORT"):
        monkeypatch.setenv(variable, "many")
        ran = CliRunner().invoke(app, ["serve"], prog_name="qvl")
        assert "'--port' (env var: 'QVL_PORT', 'SERVER_PORT'): " in ran.stderr
        monkeypatch.delenv(variable)
