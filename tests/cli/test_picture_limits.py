"""`--limit-mm-per-prompt` in the forms that vLLM takes, and what else is written there."""

from __future__ import annotations

import pytest

from qvl.cli.serve_settings import ServeSettings, read_mm_limits
from qvl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ('{"image": 4}', {"image": 4}),
        ('{"image": {"count": 3}, "video": 0}', {"image": 3, "video": 0}),
        ("image=4", {"image": 4}),
        ("image=0,video=2", {"image": 0, "video": 2}),
        ('{"video": 0, "audio": 0}', {"video": 0, "audio": 0}),
    ],
)
def test_every_form_names_the_most_pictures_and_videos(text: str, most: dict[str, int]) -> None:
    assert read_mm_limits(text) == most


@pytest.mark.parametrize(
    "text", ["", "4", "image", "image=x", "image=-1", "{", '{"image": true}', '{"image": {"count": 1, "width": 9}}']
)
def test_a_malformed_limit_is_told_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="limit-mm-per-prompt") as caught:
        read_mm_limits(text)
    assert "image=4" in str(caught.value)


def test_other_media_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'audio' is not supported"):
        read_mm_limits('{"image": 1, "audio": 2}')


def test_both_forms_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="in two forms"):
        ServeSettings(limit_mm_per_prompt="image=1", limit_images=2).limits()
    with pytest.raises(ConfigError, match="in two forms"):
        ServeSettings(limit_mm_per_prompt="image=1", limit_videos=2).limits()
    settings = ServeSettings(limit_images=2, limit_videos=0)
    assert settings.limits() == {"image": 2, "video": 0}
    assert settings.media_policy().max_videos == 0
