"""`POST /v1/locate`, and `/v1/analyze` with evidence."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from tests.server.conftest import Running, data_url


def test_targets_are_located_and_kept(server: Running) -> None:
    body = {"image": data_url("red", (96, 64)), "targets": ["the cap", "the lid"], "overlay": "png"}
    first, again = server.post("/v1/locate", body), server.post("/v1/locate", body)
    assert first.status_code == 200, first.text
    told = first.json()
    assert told["object"] == "located"
    assert told["usage"]["prompt_tokens"] > 0
    kind, _, data = told["overlay"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "PNG"
    assert (first.headers["x-qvl-cache"], again.headers["x-qvl-cache"]) == ("miss", "hit")
    assert again.json()["located"] == told["located"]
    points = server.post("/v1/locate", {**body, "points": True, "overlay": "svg"})
    assert points.headers["x-qvl-cache"] == "miss"
    assert base64.b64decode(points.json()["overlay"].partition(",")[2]).startswith(b"<svg")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"targets": ""}, "targets[0]", "is empty"),
        ({"targets": []}, "targets", "no target is named"),
        ({"targets": ["cap", "Cap"]}, "targets[1]", "named twice"),
        ({"targets": ["a;b"]}, "targets[0]", "semicolon"),
        ({"targets": 3}, "targets", None),
        ({"image": None}, "image", None),
        ({"image": "data:image/png;base64,AAAA"}, "image", None),
        ({"overlay": "gif"}, "overlay", "png"),
        ({"where": "here"}, "where", None),
        ({"points": "yes"}, "points", None),
    ],
)
def test_bad_input_is_one_line_with_its_field(
    server: Running, change: dict[str, object], param: str, message: str | None
) -> None:
    answer = server.post("/v1/locate", {"image": data_url("red"), "targets": "the cap", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert "\n" not in error["message"]
    assert message is None or message in error["message"]


def test_an_analysis_may_bring_its_evidence(server: Running) -> None:
    body = {"image": data_url("red", (96, 64)), "evidence": True, "overlay": "svg"}
    first, again = server.post("/v1/analyze", body), server.post("/v1/analyze", body)
    assert first.status_code == 200, first.text
    told = first.json()
    assert set(told["evidence"]) == {"brand", "category", "attributes"}
    assert set(told["analysis"]) == {"brand", "category", "attributes"}
    assert told["overlay"].startswith("data:image/svg+xml;base64,")
    assert again.headers["x-qvl-cache"] == "hit"
    assert again.json()["evidence"] == told["evidence"]
    assert "evidence" not in server.post("/v1/analyze", {"image": body["image"]}).json()


def test_a_schema_of_a_client_may_have_boxes(server: Running) -> None:
    schema = {"type": "object", "properties": {"where": {"format": "box"}}}
    answer = server.post("/v1/analyze", {"image": data_url("red", (96, 64)), "schema": schema})
    # The echo fills in zeros, which are no box: the error tells which field, and nothing passes for one.
    assert answer.status_code == 502
    assert "for 'where': it has no area" in answer.json()["error"]["message"]
