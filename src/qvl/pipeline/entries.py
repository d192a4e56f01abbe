"""What the cache keeps of a finished job, and a job's outcome out of what it kept."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from qvl.caches import key as keys
from qvl.caches.base import CacheEntry
from qvl.errors import CacheError
from qvl.log import logger
from qvl.pipeline.single_flight import Outcome

if TYPE_CHECKING:
    from qvl.pipeline.job import Job

log = logger("qvl.cache")


def to_entry(job: Job, outcome: Outcome) -> CacheEntry:
    result = outcome.result
    pictures = job.request.pictures
    return CacheEntry(
        result={**keys.result_to_json(result), "confidence": dict(outcome.confidence)},
        manifest=job.manifest,
        image_hash=pictures[0].sha256 if pictures else "",
        task=job.task,
        language=job.language,
        model=result.model,
        namespace=job.namespace,
        text=result.text,
        analysis=outcome.analysis,
        usage=dataclasses.asdict(result.usage),
        created_at=result.created_at or time.time(),
    )


def from_entry(entry: CacheEntry) -> Outcome | None:
    """None, and a warning, for an entry that cannot be read."""
    try:
        result = keys.result_from_json(entry.result)
    except CacheError as exc:
        log.warning("cached answer left out", error=str(exc))
        return None
    return Outcome(result, entry.analysis, entry.result.get("confidence") or {}, "cache")
