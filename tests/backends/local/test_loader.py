"""Where weights come from, and how each way of not getting them is told."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from qvl.backends.local.model import loader, model_folder
from qvl.backends.local.model.device import open_device
from qvl.errors import BackendUnavailableError, ConfigError, MissingDependencyError

HUB_ID = "Qwen/Qwen3-VL-2B-Instruct"

FAKE_MODELSCOPE = '''
"""Gives the folder that FOLDER names and writes down how it was asked."""
import json, os

def snapshot_download(model_id, **asked):
    with open(os.environ["ASKED"], "w") as file:
        json.dump([model_id, asked], file)
    return os.environ["FOLDER"]
'''


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name; what it was asked for is in the file that is returned."""
    package = tmp_path / "site" / "modelscope"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_MODELSCOPE)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.json"))
    monkeypatch.setenv("FOLDER", str(model_folder.bundled_folder()))
    monkeypatch.setenv("QVL_HUB", "modelscope")
    yield tmp_path / "asked.json"
    sys.modules.pop("modelscope", None)


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_modelscope_is_asked_where_the_environment_says_so(modelscope: Path, revision: str | None) -> None:
    import json

    checkpoint = loader.load(HUB_ID, open_device("cpu", "float32"), revision=revision)
    model_id, asked = json.loads(modelscope.read_text())
    assert model_id == HUB_ID
    assert asked.pop("allow_patterns") == model_folder.FILES
    assert asked == ({"revision": revision} if revision else {})
    assert checkpoint.fingerprint == model_folder.fingerprint(model_folder.bundled_folder())


def test_modelscope_that_is_not_installed_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_HUB", "modelscope")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "modelscope").exists()])
    with pytest.raises(MissingDependencyError, match="pip install modelscope"):
        loader.load(HUB_ID, open_device("cpu"))


def test_an_unknown_hub_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_HUB", "gitee")
    with pytest.raises(ConfigError, match="unknown QVL_HUB 'gitee'"):
        loader.load(HUB_ID, open_device("cpu"))


def refusal(kind: type[Exception]) -> Exception:
    made = kind.__new__(kind)
    Exception.__init__(made, "404 Client Error\nmore lines")
    return made


@pytest.mark.parametrize(
    ("kind", "expected", "words"),
    [
        (RepositoryNotFoundError, ConfigError, "not found on the hub"),
        (GatedRepoError, ConfigError, "is gated"),
        (LocalEntryNotFoundError, BackendUnavailableError, "cannot be downloaded"),
        (ConnectionError, BackendUnavailableError, "HF_ENDPOINT"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], expected: type[Exception], words: str
) -> None:
    def refuse(model: str, **asked: Any) -> str:
        raise refusal(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(expected) as caught:
        loader.load(HUB_ID, open_device("cpu"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", ["Got: ConnectError: no such host", "ConnectTimeout: no such host", "no such host"])
def test_what_went_wrong_on_the_way_is_said_without_the_clients_words(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def refuse(model: str, **asked: Any) -> str:
        raise ConnectionError(said)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BackendUnavailableError, match=f"^{HUB_ID} cannot be downloaded: no such host "):
        loader.load(HUB_ID, open_device("cpu"))


def test_offline_without_the_files_says_that_it_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **asked: Any) -> str:
        raise refusal(LocalEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        loader.load(HUB_ID, open_device("cpu"))


def test_a_checkpoint_that_fits_no_set_of_devices_is_refused_and_not_fetched_from_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    parts = {"model.visual": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    folder = shutil.copytree(model_folder.bundled_folder(), tmp_path / "copy")
    loader.load(str(folder), open_device("cpu", "float32"), device_map=parts)
    with pytest.raises(ConfigError) as caught:
        loader.load(str(folder), open_device("cpu", "float32"), device_map={**parts, "model.visual": "disk"})
    assert "\n" not in str(caught.value)


def test_picture_settings_that_cannot_be_read_are_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder.bundled_folder(), tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text('{"image_mean": 5}')
    with pytest.raises(ConfigError, match="invalid image processor settings"):
        loader.peek(str(folder))
