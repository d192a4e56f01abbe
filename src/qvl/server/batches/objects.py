"""The objects of `/v1/files` and `/v1/batches`, and the body that creates a batch."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from typing_extensions import TypedDict

HOUR: Final = 3600
DAY: Final = 24 * HOUR
LONGEST: Final = 30 * DAY
_UNITS: Final = {"m": 60, "h": HOUR, "d": DAY}

Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
UNFINISHED: Final[tuple[Status, ...]] = ("validating", "in_progress", "finalizing", "cancelling")


class FileObject(TypedDict):
    """A stored file. Times are seconds since the epoch."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(TypedDict):
    """One page of files."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(TypedDict):
    """The answer to a deletion."""

    id: str
    object: Literal["file"]
    deleted: bool


class LineProblem(TypedDict):
    """An error in one line of an input file; `line` counts from 1, None for the whole file."""

    code: str
    line: int | None
    message: str
    param: str | None


class LineProblems(TypedDict):
    """The problems for which a batch failed."""

    object: Literal["list"]
    data: list[LineProblem]


class LineCounts(TypedDict):
    """Lines of a batch: all, answered, and ended with an error."""

    total: int
    completed: int
    failed: int


class CachedDetails(TypedDict):
    cached_tokens: int


class ReasoningDetails(TypedDict):
    reasoning_tokens: int


class BatchUsage(TypedDict):
    """Tokens of all answers of a batch."""

    input_tokens: int
    input_tokens_details: CachedDetails
    output_tokens: int
    output_tokens_details: ReasoningDetails
    total_tokens: int


class BatchObject(TypedDict):
    """A batch. Times are seconds since the epoch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: LineProblems | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: LineCounts
    metadata: dict[str, str] | None
    model: str | None
    usage: BatchUsage


class BatchList(TypedDict):
    """One page of batches."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OutputExpiry(BaseModel):
    """When the files of a batch expire."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR, le=LONGEST)]


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: OutputExpiry | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        window_seconds(value)
        return value


def window_seconds(window: str) -> int:
    """Return the seconds of a completion window such as "24h".

    Raises:
        ValueError: it is no number of minutes, hours or days, or longer than 30 days.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})([mhd])", window, re.ASCII)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= LONGEST:
        raise ValueError("a completion window is 24h, or another time from 1m to 30d")
    return seconds
