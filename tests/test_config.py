"""Arguments over environment over config file over defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl import config
from qvl.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in config.Settings.model_fields:
        monkeypatch.delenv(f"QVL_{name.upper()}", raising=False)
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    monkeypatch.setenv("QVL_CONFIG", str(empty))


def test_the_order_of_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "qvl.toml"
    file.write_text('model = "from-file"\nlanguage = "zh"\nconcurrency = 3\n')
    monkeypatch.setenv("QVL_CONFIG", str(file))
    monkeypatch.setenv("QVL_LANGUAGE", "pt")
    monkeypatch.setenv("QVL_CONCURRENCY", "4")
    settings = config.load(concurrency=5, language=None)
    assert (settings.model, settings.language, settings.concurrency) == ("from-file", "pt", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle = 'x'", "unknown setting 'modle' in"),
        ("modle = 'x'", "did you mean 'model'?"),
        ("concurrency = 'many'", "concurrency"),
        ("not toml", "TOML"),
    ],
)
def test_a_bad_config_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    monkeypatch.setenv("QVL_CONFIG", str(file))
    with pytest.raises(ConfigError) as caught:
        config.load()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_config_file_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVL_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match="QVL_CONFIG"):
        config.load()


def test_a_bad_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_CACHE_TTL", "soon")
    with pytest.raises(ConfigError, match="QVL_CACHE_TTL"):
        config.load()
