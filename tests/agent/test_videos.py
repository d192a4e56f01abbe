"""A video in the agent: analysed as a picture is, and shown as a strip on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl.agent.page import page
from qvl.agent.steps import Recommendation
from qvl.agent.trace import Trace
from qvl.cli.agent_run import check_picture
from qvl.errors import MediaError
from tests.media.films import film, sound_alone


def test_the_page_shows_a_strip_of_frames(tmp_path: Path) -> None:
    clip = film(tmp_path / "clip.mp4")
    check_picture(str(clip))
    shown = page(Trace("a mug", str(clip)), Recommendation("a mug"), str(clip))
    assert shown.count("<figcaption") == 4
    assert "clip.mp4: 4 frames of 2.0 s" in shown


def test_sound_alone_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="has sound alone"):
        check_picture(str(sound_alone(tmp_path / "song.mp4")))
