"""What an editor knows of a user's program: a type checker in its strict mode finds no fault and nothing unknown."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import qvl
from qvl.pipeline.parse_request import RequestParams
from qvl.testing.asking import square
from qvl.types import ChatRequest, ImagePart, Message, SamplingParams, TextPart, map_parts

PROGRAM = Path(__file__).with_name("users_program.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="basedpyright is not installed")
def test_nothing_of_a_users_program_is_unknown_to_a_type_checker(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(PROGRAM.read_text().replace("temperature=", "temprature=").replace("bill.value", "bill.valu"))
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(json.dumps({"include": [str(PROGRAM), str(wrong)], "typeCheckingMode": "strict"}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(settings)]
    done = subprocess.run([*command, "--pythonpath", sys.executable], capture_output=True, check=False)
    faults = json.loads(done.stdout)["generalDiagnostics"]
    assert [fault for fault in faults if fault["file"] == str(PROGRAM)] == []
    words = " ".join(fault["message"] for fault in faults)
    assert 'No parameter named "temprature"' in words
    assert 'Cannot access attribute "valu"' in words


def test_every_parameter_of_a_request_is_known_by_its_name() -> None:
    own = {field.name for field in fields(ChatRequest)} - {"messages", "sampling", "prefill"}
    assert RequestParams.__annotations__.keys() == SamplingParams.names() | own | {"min_pixels", "pages", "video"}
    assert Path(qvl.__file__).with_name("py.typed").is_file(), "without it nobody's checker reads the types"


def test_text_and_media_are_told_apart_in_one_function() -> None:
    """So a second kind of medium comes in at one place for pictures of a request, its key and the wire."""
    picture = square()
    message = Message("user", (TextPart("a"), ImagePart(picture), TextPart("b")))
    parts = map_parts(message.parts, lambda text: text.text, lambda media: media.pictures[0].sha256)
    assert parts == ["a", picture.sha256, "b"]
    for name in ("types.py", "caches/key.py", "pipeline/load_pictures.py", "backends/openai/wire.py"):
        source = Path(qvl.__file__).parent / name
        text = source.read_text(encoding="utf-8")
        assert "map_parts(" in text
        assert ", ImagePart)" not in text


def test_a_request_lists_what_it_shows_and_copies_are_equal_and_list_it_anew() -> None:
    picture = square()
    request = ChatRequest((Message("user", (TextPart("a"), ImagePart(picture))),))
    assert (request.pictures, request.videos) == ((picture,), ())
    for same in (pickle.loads(pickle.dumps(request)), copy.deepcopy(request), copy.copy(request), request.replace()):
        assert same == request
        assert len(same.pictures) == 1
    other = request.with_messages((Message("user", (TextPart("b"),)),))
    assert (other.pictures, other.sampling) == ((), request.sampling)
    with pytest.raises(AttributeError, match="'ChatRequest' object has no attribute 'picture'"):
        request.picture  # type: ignore[attr-defined] # noqa: B018
    with pytest.raises(TypeError, match="message"):
        request.replace(message=())


def test_what_a_caller_does_with_changed_parameters_is_not_the_parameters_own() -> None:
    sampling = SamplingParams(max_tokens=5, top_k=-1)
    sampling.changed()["seed"] = 1
    assert sampling.changed() == {"max_tokens": 5}
    assert pickle.loads(pickle.dumps(sampling)).changed() == {"max_tokens": 5}
