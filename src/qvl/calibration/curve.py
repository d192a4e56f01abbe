"""Curves from a raw confidence to how often answers with it are right; applied without any library."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Beyond these a logit says nothing that a count of labels could bear out.
LEAST: Final = 1e-6
STRICT: Final = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
Share: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


def logit(share: float) -> float:
    """Return the logit of `share`, which is kept LEAST away from 0 and 1."""
    share = min(max(share, LEAST), 1.0 - LEAST)
    return math.log(share / (1.0 - share))


class IsotonicCurve(BaseModel):
    """Straight lines between the points (`raw`, `share`), both of which never fall; flat beyond the first and last."""

    model_config = STRICT

    method: Literal["isotonic"] = "isotonic"
    raw: list[Share] = Field(min_length=1)
    share: list[Share] = Field(min_length=1)

    @model_validator(mode="after")
    def _rises(self) -> IsotonicCurve:
        if len(self.raw) != len(self.share):
            raise ValueError("raw and share have different lengths")
        if any(a >= b for a, b in zip(self.raw, self.raw[1:], strict=False)):
            raise ValueError("raw does not rise")
        if any(a > b for a, b in zip(self.share, self.share[1:], strict=False)):
            raise ValueError("share falls")
        return self

    def apply(self, raw: float) -> float:
        """Return how often answers of the raw confidence `raw` are right, 0 to 1."""
        place = bisect_left(self.raw, raw)
        if place == 0:
            return self.share[0]
        if place == len(self.raw):
            return self.share[-1]
        left, right = self.raw[place - 1], self.raw[place]
        low, high = self.share[place - 1], self.share[place]
        return low + (high - low) * (raw - left) / (right - left)


class PlattCurve(BaseModel):
    """A sigmoid over the logit of the raw confidence, which rises with it."""

    model_config = STRICT

    method: Literal["platt"] = "platt"
    slope: float = Field(ge=0.0)
    offset: float

    def apply(self, raw: float) -> float:
        """Return how often answers of the raw confidence `raw` are right, 0 to 1."""
        exponent = self.slope * logit(raw) + self.offset
        # Either form overflows on one side.
        return 1.0 / (1.0 + math.exp(-exponent)) if exponent >= 0 else math.exp(exponent) / (1.0 + math.exp(exponent))


Curve: TypeAlias = Annotated[IsotonicCurve | PlattCurve, Field(discriminator="method")]
