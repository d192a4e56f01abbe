"""Files and batches in one folder: whose they are, how much they may take, and when they go."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qvl.errors import RateLimitError, RequestError
from qvl.ids import new_id
from qvl.server.batches.database import Database, batch_object, file_object, storage_failed
from qvl.server.batches.objects import DAY, HOUR, LONGEST, UNFINISHED, window_seconds
from qvl.server.errors import HttpError

if TYPE_CHECKING:
    from qvl.server.batches.objects import (
        BatchList,
        BatchObject,
        BatchRequest,
        FileDeleted,
        FileList,
        FileObject,
        LineProblem,
        Status,
    )
    from qvl.server.batches.outputs import Outputs

MAX_FILES: Final = 1000
MAX_UNFINISHED: Final = 100
_OPEN: Final = f"status IN {UNFINISHED!r}"


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """The facts of an unfinished batch that its runner needs. `expires_at` is in seconds since the epoch."""

    id: str
    tenant: str
    endpoint: str
    status: Status
    input_file_id: str
    answers_id: str
    errors_id: str
    expires_at: int


class BatchStore:
    """The files and batches in one folder, which several processes may share. Every method may block: use a thread.

    Args:
        folder: made when the first file comes.
        lane: which batches servers of the same models run; each batch has that of the server which it was sent to.
        max_bytes: of all files; half of it is for one key where keys are required.
        max_file_bytes: of one uploaded file.
        clock: the time in seconds since the epoch.
    """

    def __init__(
        self, folder: Path, lane: str, *, max_bytes: int, max_file_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self.lane = lane
        self.max_bytes = max_bytes
        self.max_file_bytes = max_file_bytes
        self.database = Database(folder)
        self._clock = clock
        # The key and the bytes so far of each upload.
        self._arriving: dict[str, tuple[str, int]] = {}

    def now(self) -> int:
        return int(self._clock())

    def path(self, file_id: str) -> Path:
        return self.folder / "files" / file_id

    # Files

    def begin_upload(self, tenant: str) -> tuple[str, Path]:
        """Return the id of a new file and the path to write it to before `keep_upload` or `drop_upload`.

        Raises:
            RateLimitError: the key has too many files, or no space is left for them.
            StorageError: the folder cannot be written.
        """
        count = self.database.rows("SELECT count(*) FROM files WHERE tenant = ?", tenant)
        if count and count[0][0] >= MAX_FILES:
            raise _full("too_many_files", f"{MAX_FILES} files are stored already", "delete some of them")
        self.refuse_if_full(tenant)
        file_id = f"file-{new_id()}"
        path = self.folder / "uploads" / file_id
        try:
            for folder in (path.parent, self.folder / "files"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise storage_failed(path, exc) from exc
        self._arriving[file_id] = (tenant, 0)
        return file_id, path

    def count_upload(self, file_id: str, size: int) -> None:
        self._arriving[file_id] = (self._arriving[file_id][0], size)

    def drop_upload(self, file_id: str) -> None:
        self._arriving.pop(file_id, None)
        (self.folder / "uploads" / file_id).unlink(missing_ok=True)

    def keep_upload(self, file_id: str, tenant: str, filename: str, purpose: str, seconds: int | None) -> FileObject:
        """Return the file that was written, now stored; `seconds` is the time until it expires."""
        source, now = self.folder / "uploads" / file_id, self.now()
        try:
            size = source.stat().st_size
            source.replace(self.path(file_id))
        except OSError as exc:
            raise storage_failed(source, exc) from exc
        with self.database.transaction() as database:
            _add_file(database, file_id, tenant, filename, purpose, size, now, now + (seconds or LONGEST))
        self._arriving.pop(file_id, None)
        return self.file(file_id, tenant)

    def refuse_if_full(self, tenant: str, coming: int = 1) -> None:
        """Raise RateLimitError if `coming` bytes more are too many for `tenant` or for the folder."""
        used, own = self._used(""), self._used(tenant) if tenant else 0
        if used + coming > self.max_bytes or own + coming > self.max_bytes // 2:
            raise _full("storage_full", "no space is left for files", "delete some, or raise --batch-disk-mb")

    def used(self) -> int:
        """Return the bytes of all files, those under way included."""
        return self._used("")

    def _used(self, tenant: str) -> int:
        where = "WHERE ? IN ('', tenant)"
        found = self.database.rows(
            f"SELECT (SELECT coalesce(sum(bytes), 0) FROM files {where}) +"  # noqa: S608  # a constant
            f" (SELECT coalesce(sum(written), 0) FROM batches {where} AND {_OPEN})",
            tenant,
            tenant,
        )
        arriving = sum(size for owner, size in list(self._arriving.values()) if tenant in ("", owner))
        return (int(found[0][0]) if found else 0) + arriving

    def file(self, file_id: str, tenant: str, param: str | None = None) -> FileObject:
        """Return a file of `tenant`, which the field `param` of the request names.

        Raises:
            HttpError: 404, there is none of this id.
        """
        found = self.database.rows(
            "SELECT * FROM files WHERE id = ? AND tenant = ? AND expires_at > ?", file_id, tenant, self.now()
        )
        if not found:
            raise _missing("file", file_id, param)
        return file_object(found[0])

    def files(self, tenant: str, *, limit: int, after: str | None, newest: bool, purpose: str | None) -> FileList:
        """Return one page of the files of `tenant`."""
        where, values = "tenant = ? AND expires_at > ?", [tenant, self.now()]
        if purpose is not None:
            where += " AND purpose = ?"
            values.append(purpose)
        found, more = self._page("files", where, values, tenant, limit=limit, after=after, newest=newest)
        data = [file_object(row) for row in found]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}

    def delete_file(self, file_id: str, tenant: str) -> FileDeleted:
        """Delete a file of `tenant`.

        Raises:
            HttpError: 404, there is none of this id; 409, a batch needs it.
        """
        self.file(file_id, tenant)
        with self.database.transaction() as database:
            query = f"SELECT id FROM batches WHERE input_file_id = ? AND {_OPEN}"  # noqa: S608  # a constant
            if user := database.execute(query, (file_id,)).fetchone():
                message = f"the file is the input of the batch {user['id']}, which is not finished"
                raise HttpError(409, message, hint="cancel the batch, or wait for it", code="file_in_use")
            if not database.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount:
                raise _missing("file", file_id)  # another request was faster
        self.path(file_id).unlink(missing_ok=True)
        return {"id": file_id, "object": "file", "deleted": True}

    # Batches

    def create(self, request: BatchRequest, tenant: str) -> BatchObject:
        """Return a new batch, which the runner of its lane will find.

        Raises:
            RequestError: the input file is not for batches.
            HttpError: 404, there is no such file.
            RateLimitError: too many batches of this key are unfinished, or no space is left.
        """
        source = self.file(request.input_file_id, tenant, "input_file_id")
        if source["purpose"] != "batch":
            message = f"the file has the purpose {source['purpose']!r}"
            raise RequestError(message, hint="upload it with purpose='batch'", param="input_file_id")
        self.refuse_if_full(tenant)
        now, batch_id = self.now(), f"batch_{new_id()}"
        expiry = request.output_expires_after
        with self.database.transaction() as database:
            query = f"SELECT count(*) FROM batches WHERE tenant = ? AND {_OPEN}"  # noqa: S608  # a constant
            if database.execute(query, (tenant,)).fetchone()[0] >= MAX_UNFINISHED:
                message = f"{MAX_UNFINISHED} batches are not finished yet"
                raise _full("too_many_batches", message, "wait for one, or cancel it")
            database.execute(
                "INSERT INTO batches (id, tenant, lane, endpoint, input_file_id, completion_window, status, metadata,"
                " output_seconds, answers_id, errors_id, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, 'validating', ?, ?, ?, ?, ?, ?)",
                (
                    *(batch_id, tenant, self.lane, request.endpoint, request.input_file_id, request.completion_window),
                    json.dumps(request.metadata) if request.metadata is not None else None,
                    expiry.seconds if expiry else LONGEST,
                    *(f"file-{new_id()}", f"file-{new_id()}", now, now + window_seconds(request.completion_window)),
                ),
            )
        return self.batch(batch_id, tenant)

    def batch(self, batch_id: str, tenant: str) -> BatchObject:
        """Return a batch of `tenant`.

        Raises:
            HttpError: 404, there is none of this id.
        """
        found = self.database.rows("SELECT * FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant)
        if not found:
            raise _missing("batch", batch_id)
        return batch_object(found[0])

    def batches(self, tenant: str, *, limit: int, after: str | None) -> BatchList:
        """Return one page of the batches of `tenant`, the newest first."""
        found, more = self._page("batches", "tenant = ?", [tenant], tenant, limit=limit, after=after, newest=True)
        data = [batch_object(row) for row in found]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}

    def cancel(self, batch_id: str, tenant: str) -> BatchObject:
        """Return a batch of `tenant` on its way to be cancelled.

        Raises:
            HttpError: 404, there is none of this id; 409, it is finished.
        """
        self.batch(batch_id, tenant)
        if not self.change(batch_id, "cancelling", "validating", "in_progress", "cancelling"):
            status = self.batch(batch_id, tenant)["status"]
            raise HttpError(409, f"the batch is {status} and cannot be cancelled", code="batch_finished")
        return self.batch(batch_id, tenant)

    def unfinished(self) -> list[StoredBatch]:
        """Return the batches that are to be run in this lane, and those of others whose time is over."""
        rows = self.database.rows(
            f"SELECT * FROM batches WHERE {_OPEN} AND (lane = ? OR expires_at < ?) ORDER BY seq",  # noqa: S608
            self.lane,
            self.now() - DAY,
        )
        names = StoredBatch.__dataclass_fields__
        return [StoredBatch(**{name: row[name] for name in names}) for row in rows]

    def by_status(self) -> dict[str, int]:
        """Return the number of unfinished batches of this lane by status."""
        query = f"SELECT status, count(*) FROM batches WHERE {_OPEN} AND lane = ? GROUP BY status"  # noqa: S608
        return {row[0]: row[1] for row in self.database.rows(query, self.lane)}

    def change(self, batch_id: str, status: Status, *before: Status, **columns: object) -> bool:
        """Give a batch a new status, unless it has none of those `before`; return whether it was changed."""
        columns |= {"status": status}
        if status != "validating":
            columns.setdefault(f"{status}_at", self.now())
        names = ", ".join(f"{name} = ?" for name in columns)
        marks = ", ".join("?" for _ in before)
        with self.database.transaction() as database:
            done = database.execute(
                f"UPDATE batches SET {names} WHERE id = ? AND status IN ({marks})",  # noqa: S608  # names of ours
                (*columns.values(), batch_id, *before),
            )
            return done.rowcount > 0

    def fail(self, batch_id: str, problems: Sequence[LineProblem], count: int) -> bool:
        """End a batch whose input cannot be run."""
        return self.change(batch_id, "failed", "validating", errors=json.dumps({"data": problems}), total=count)

    def note_progress(self, batch_id: str, outputs: Outputs) -> str:
        """Store the counts of a batch and return its status, which another process may have changed."""
        with self.database.transaction() as database:
            database.execute(
                "UPDATE batches SET completed = ?, failed = ?, written = ?, usage = ? WHERE id = ?",
                (outputs.completed, outputs.failed, outputs.size, json.dumps(outputs.usage), batch_id),
            )
            found = database.execute("SELECT status FROM batches WHERE id = ?", (batch_id,)).fetchone()
            return str(found["status"]) if found else "cancelled"

    def finish(
        self, batch: StoredBatch, status: Status, outputs: Outputs, problems: Sequence[LineProblem] = ()
    ) -> None:
        """Give a batch its last status, and make files of what it wrote."""
        outputs.sync()
        now = self.now()
        columns: dict[str, object] = {"status": status, f"{status}_at": now, "usage": json.dumps(outputs.usage)}
        columns |= {"completed": outputs.completed, "failed": outputs.failed, "written": 0}
        if problems:
            columns["errors"] = json.dumps({"data": problems})
        with self.database.transaction() as database:
            found = database.execute("SELECT output_seconds FROM batches WHERE id = ?", (batch.id,)).fetchone()
            for column, file_id, name in (
                ("output_file_id", batch.answers_id, "output"),
                ("error_file_id", batch.errors_id, "error"),
            ):
                path = self.path(file_id)
                if path.exists() and (size := path.stat().st_size):
                    columns[column] = file_id
                    filename, expires = f"{batch.id}_{name}.jsonl", now + found["output_seconds"]
                    _add_file(database, file_id, batch.tenant, filename, "batch_output", size, now, expires)
            names = ", ".join(f"{name} = ?" for name in columns)
            database.execute(f"UPDATE batches SET {names} WHERE id = ?", (*columns.values(), batch.id))  # noqa: S608

    def sweep(self) -> None:
        """Delete what has expired: files, old batches, and what a killed process left without an owner."""
        now = self.now()
        if not self.database.exists:
            return
        busy = f"SELECT input_file_id FROM batches WHERE {_OPEN}"  # noqa: S608  # a constant
        with self.database.transaction() as database:
            query = f"DELETE FROM files WHERE expires_at <= ? AND id NOT IN ({busy}) RETURNING id"  # noqa: S608
            gone = [row[0] for row in database.execute(query, (now,)).fetchall()]
            database.execute(f"DELETE FROM batches WHERE NOT {_OPEN} AND created_at < ?", (now - 2 * LONGEST,))  # noqa: S608
        owned = {row[0] for row in self.database.rows("SELECT id FROM files")}
        for row in self.database.rows(f"SELECT answers_id, errors_id FROM batches WHERE {_OPEN}"):  # noqa: S608
            owned.update(row)
        with contextlib.suppress(OSError):
            for file_id in gone:
                self.path(file_id).unlink(missing_ok=True)
            for path in [*(self.folder / "uploads").iterdir(), *(self.folder / "files").iterdir()]:
                # What another process is about to give an owner is younger.
                if path.name not in owned and time.time() - path.stat().st_mtime > HOUR:
                    path.unlink(missing_ok=True)

    def _page(
        self, table: str, where: str, values: list[object], tenant: str, *, limit: int, after: str | None, newest: bool
    ) -> tuple[list[sqlite3.Row], bool]:
        """Return up to `limit` rows behind that of the id `after`, and whether there are more."""
        if after is not None:
            found = self.database.rows(f"SELECT seq FROM {table} WHERE id = ? AND tenant = ?", after, tenant)  # noqa: S608
            if not found:
                raise RequestError(f"nothing has the id {after[:100]!r}", param="after", code="invalid_value")
            where += f" AND seq {'<' if newest else '>'} ?"
            values = [*values, found[0][0]]
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY seq {'DESC' if newest else 'ASC'} LIMIT ?"  # noqa: S608
        rows = self.database.rows(query, *values, limit + 1)
        return rows[:limit], len(rows) > limit


def _add_file(
    database: sqlite3.Connection,
    file_id: str,
    tenant: str,
    filename: str,
    purpose: str,
    size: int,
    now: int,
    expires: int,
) -> None:
    database.execute(
        "INSERT OR IGNORE INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (file_id, tenant, filename, purpose, size, now, expires),
    )


def _full(code: str, message: str, hint: str) -> RateLimitError:
    return RateLimitError(message, hint=hint, code=code, retry_after=60.0)


def _missing(what: str, identity: str, param: str | None = None) -> HttpError:
    return HttpError(404, f"no {what} has the id {identity[:100]!r}", param=param, code=f"{what}_not_found")
