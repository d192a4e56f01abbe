"""How vllm spreads a model over the NPUs of a container: by the sizes among its flags, else all of them share it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qvl.errors import ConfigError

_NAMES: Final = {
    "--tensor-parallel-size": "tensor",
    "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline",
    "-pp": "pipeline",
    "--data-parallel-size": "data",
    "-dp": "data",
}
# With these some of the NPUs are of other containers or hosts.
_ELSEWHERE: Final = (
    "--nnodes",
    "--node-rank",
    "--data-parallel-address",
    "--data-parallel-rank",
    "--data-parallel-size-local",
    "--distributed-executor-backend",
)


@dataclass(frozen=True, slots=True)
class Spread:
    """The parallel sizes of an engine; `tensor` times `pipeline` NPUs share one copy of the model."""

    tensor: int
    pipeline: int
    data: int

    @property
    def sharing(self) -> int:
        """The NPUs that share a copy of the model."""
        return self.tensor * self.pipeline


def spread(npus: int, flags: Sequence[str]) -> Spread:
    """Return how `npus` are used with `flags`: what they leave open, tensor parallel takes."""
    own: dict[str, int] = {}
    for word, after in itertools.pairwise([*flags, ""]):
        flag, glued, value = word.partition("=")
        size = value if glued else after
        name = _NAMES.get(flag.replace("_", "-"))
        if name and size.isdecimal() and int(size[:9]) > 0:
            own[name] = int(size[:9])
    pipeline, data = own.get("pipeline", 1), own.get("data", 1)
    return Spread(own.get("tensor", max(1, npus // (pipeline * data))), pipeline, data)


def check(npus: int, flags: Sequence[str], *, heads: int | None, model: str) -> None:
    """Refuse sizes that take more than `npus`, or among which the model's attention heads cannot be divided.

    Raises:
        ConfigError: with the sizes that go.
    """
    sizes = spread(npus, flags)
    needed = sizes.sharing * sizes.data
    given = {word.partition("=")[0].replace("_", "-") for word in flags}
    if needed > npus and given.isdisjoint(_ELSEWHERE):
        raise ConfigError(
            f"tensor {sizes.tensor} x pipeline {sizes.pipeline} x data parallel {sizes.data} takes {needed} NPUs, but "
            f"--npus names {npus}",
            hint="name more with --npus, or smaller sizes after --",
        )
    if heads is not None and heads % sizes.tensor:
        fewer = next(number for number in range(sizes.tensor - 1, 0, -1) if heads % number == 0)
        raise ConfigError(
            f"{sizes.tensor} NPUs cannot share the {heads} attention heads of {model}",
            hint=f"--npus for {fewer} of them, or -- --tensor-parallel-size 1 --data-parallel-size {sizes.tensor}",
        )
