"""Writes docs/fields.md from what the backends declare, so that the page says what requests are refused for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qvl.backends.base import Backend, Capabilities
from qvl.backends.local.backend import LocalBackend
from qvl.backends.openai.probe import ASSUMED
from qvl.backends.openvino.backend import OpenVinoBackend
from qvl.backends.vllm.backend import VllmBackend
from qvl.sampling import PARAMETERS
from qvl.types import PROMPT_FIELDS

PAGE: Final = Path(__file__).parents[2] / "docs" / "fields.md"
ENGINES: Final[Mapping[str, Backend]] = {
    "local": LocalBackend(),
    "vllm": VllmBackend(),
    "openvino": OpenVinoBackend("a-folder"),
}
FORMATS: Final = ("json_object", "json_schema", "regex", "choice", "grammar")
# What a capability does not tell.
NOTES: Final[Mapping[tuple[str, str], str]] = {
    ("logprob_token_ids", "vllm"): "from 0.32, not on NPUs",
    ("priority", "vllm"): "with `-O scheduling_policy=priority`",
    ("reasoning_effort", "vllm"): "`none` alone",
    ("reasoning_effort", "openvino"): "`none` alone",
    ("tools", "openvino"): "yes; `strict`, and one call alone, where a call is forced",
    ("logprobs", "openvino"): "of the chosen token",
}
_HEAD: Final = """# Request fields

Which fields a request may have, by the backend behind `qvl-serve` or `Pipeline`. Made by `make docs` from what the
backends declare; a test asks each for every field. "no": a request that has the field, at a value that changes
anything, is refused with an error that names it. "probed": sent to an endpoint that was seen to honour it, by a small
request when the backend opens, and refused for others. "passed on": sent to every endpoint, whose own refusal is handed
back. `ray` takes what the backend of its replicas takes. The names are those of `/v1/chat/completions`; the other
routes have them too, but for what they call otherwise (`max_output_tokens`, `stop_sequences`, `reasoning.effort`,
`text.format`).

| field | local | vllm | openvino | openai |
|---|---|---|---|---|
"""
_TAIL: Final = """
The server or the pipeline sees to these itself, whatever the backend:

| field | what becomes of it |
|---|---|
| `max_pixels`, `min_pixels`, `mm_processor_kwargs` | the limits of every picture (`size` with \
`longest_edge` and `shortest_edge` too); `fps`, `num_frames` and the other fields of a \
video part say which frames of videos are shown |
| `media_io_kwargs` | its `video` may have `fps` or `num_frames`, which choose the frames; nothing else of it, since \
frames are chosen here. The rest goes to an endpoint as it is |
| `cache_salt` | keeps answers apart; prefixes and picture features too, in `local` and `vllm`, and at \
endpoints that know it |
| `request_id` | the answer's `X-Request-Id`; a part of the id of chats and completions, whose ids nothing is found by |
| `include_reasoning` | false leaves the reasoning out of the answer, not out of the count of tokens |
| `return_token_ids`, `prompt_logprobs` | refused by `/v1/responses` and `/v1/messages`, whose answers have no place \
for them; `/v1/messages` refuses `logprob_token_ids` too |
| `echo` | of a chat: the last message comes first; of `/v1/completions`: the prompt, with its \
logprobs where they are asked for, of a backend that has `prompt` |
| several prompts, with `stream` too | each is a request of its own |
| `user`, `metadata`, `safety_identifier`, `prompt_cache_key`, `service_tier` | labels, which change nothing |
| `verbosity`, `text.verbosity` | goes on to endpoints; changes nothing elsewhere, where no template knows it |
| `suffix`, `best_of` other than `n`, `background` | refused |
"""


def page() -> str:
    """Return the page: a row for every field."""
    names = [*PARAMETERS, *(name for name, _ in PROMPT_FIELDS), "priority"]
    rows = [_row(f"`{name}`", name) for name in sorted(names)]
    rows += [_row(f"`response_format`: {kind}", kind) for kind in FORMATS]
    return _HEAD + "".join([*rows, _row("`tools`", "tools")]) + _TAIL


def _row(title: str, name: str) -> str:
    cells = [NOTES.get((name, engine)) or ("yes" if takes(have, name) else "no") for engine, have in _engines()]
    return f"| {title} | {' | '.join(cells)} | {_of_endpoints(name)} |\n"


def _engines() -> list[tuple[str, Capabilities]]:
    found = [(name, engine.peek_capabilities()) for name, engine in ENGINES.items()]
    return [(name, have) for name, have in found if have is not None]


def takes(have: Capabilities, name: str) -> bool:
    """Return whether a backend with these capabilities has a field, or a kind of response format."""
    return name in have.sampling | have.fields | have.response_formats or (name == "tools" and have.tools)


def _of_endpoints(name: str) -> str:
    if name in ASSUMED.capabilities.fields:
        return "passed on"
    if name == "max_tokens" or (name in PARAMETERS and PARAMETERS[name].sent == "always"):
        return "passed on"
    return "probed" if takes(ASSUMED.capabilities, name) else "no"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
