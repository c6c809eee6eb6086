"""The durable queue: every video and its events in one SQLite file, which survives a kill at any moment.

Write-ahead log, every commit synced: what a method has returned is on disk. One server at a time holds the
file, by a lock beside it. Methods are short and may be called from any thread; those that write wait for the
disk, so an event loop calls them through asyncio.to_thread.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import RLock
from typing import IO, Any

from vidgen.serve.errors import disk_full
from vidgen.serve.migrations import migrate
from vidgen.serve.records import ENDED, Kind, Record, Status

COLUMNS = tuple(field.name for field in fields(Record))
AS_JSON = ("request", "job")
DELETED_KEPT = 10_000  # ids of deleted videos at which a page may still begin


class DataInUse(ValueError):
    """Another server holds the data folder."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a video; numbers count from 1, per video."""

    number: int
    name: str
    data: dict[str, Any]


def hold(path: Path) -> IO[str]:
    """A lock file, held until it is closed or the process ends. DataInUse when another one holds it."""
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read(20).strip()
        lock.close()
        by = f" (process {holder})" if holder else ""
        raise DataInUse(
            f"data={path.parent}: in use by another vidgen server{by}; stop it or choose another folder"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


class Store:
    """See the module. ValueError in one line for a file that another server holds or that is none of ours."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held = hold(path.with_suffix(".lock"))
        except OSError as error:
            raise ValueError(
                f"data={path.parent}: cannot be written: {error.strerror}; choose another folder"
            ) from error
        self._lock = RLock()
        try:
            self._db = _open(path)
        except BaseException:
            self._held.close()
            raise

    def close(self) -> None:
        """Let go of the file and its lock."""
        with self._lock:
            self._db.close()
            self._held.close()

    def add(self, record: Record) -> None:
        """Keep a new video, behind all others of its priority. ValueError when its id is taken."""
        columns = ", ".join(COLUMNS)
        marks = ", ".join("?" * len(COLUMNS))
        values = [_to_sql(name, getattr(record, name)) for name in COLUMNS]
        try:
            with self._write() as db:
                db.execute(f"INSERT INTO videos ({columns}) VALUES ({marks})", values)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"id={record.id}: is taken; make another") from error

    def get(self, id: str) -> Record | None:
        """The video of that id."""
        found = self._records("WHERE id = ?", (id,))
        return found[0] if found else None

    def update(self, id: str, **changes: Any) -> Record:
        """The video with some of its fields changed, all at once. KeyError when there is none."""
        unknown = sorted(name for name in changes if name not in COLUMNS or name == "id")
        if unknown:
            raise TypeError(f"a video has no {unknown[0]} that can be changed")
        with self._write() as db:
            if changes:
                settings = ", ".join(f"{name} = ?" for name in changes)
                values = [_to_sql(name, value) for name, value in changes.items()]
                db.execute(f"UPDATE videos SET {settings} WHERE id = ?", (*values, id))
            record = self.get(id)
            if record is None:
                raise KeyError(id)
        return record

    def delete(self, id: str) -> bool:
        """Forget a video and its events; whether there was one. Pages that begin after it stay possible."""
        with self._write() as db:
            db.execute("INSERT INTO deleted SELECT place, id, owner FROM videos WHERE id = ?", (id,))
            found = db.execute("DELETE FROM videos WHERE id = ?", (id,)).rowcount
            db.execute(
                """DELETE FROM deleted WHERE place <=
                    (SELECT place FROM deleted ORDER BY place DESC LIMIT 1 OFFSET ?)""",
                (DELETED_KEPT,),
            )
        return bool(found)

    def page(
        self,
        *,
        owner: str | None = None,
        after: str | None = None,
        limit: int = 20,
        descending: bool = True,
    ) -> tuple[list[Record], bool]:
        """(up to `limit` videos in the order they were added, whether there are more).

        It begins after the video `after`, also when that is deleted. `owner` None means everybody's.
        ValueError when the owner never had that video.
        """
        with self._lock:
            wanted, values = ["TRUE"], []
            if owner is not None:
                wanted.append("owner = ?")
                values.append(owner)
            if after is not None:
                wanted.append(f"place {'<' if descending else '>'} ?")
                values.append(self._place(after, owner))
            order = "DESC" if descending else "ASC"
            found = self._records(
                f"WHERE {' AND '.join(wanted)} ORDER BY place {order} LIMIT ?", (*values, limit + 1)
            )
        return found[:limit], len(found) > limit

    def next_queued(
        self, max_per_owner: int | None = None, limits: Mapping[str, int] | None = None
    ) -> Record | None:
        """The video to start now: of the highest priority, then the oldest.

        Owners with `max_per_owner` videos in progress, or their own number in `limits`, are passed over.
        """
        with self._lock:
            rows = self._db.execute(
                "SELECT owner, count(*) FROM videos WHERE status = ? GROUP BY owner", (Status.IN_PROGRESS,)
            ).fetchall()
            running, own = dict(rows), dict(limits or {})
            full = []
            for owner in {*running, *own}:
                limit = own.get(owner, max_per_owner)
                if limit is not None and running.get(owner, 0) >= limit:
                    full.append(owner)
            passed = f"AND owner NOT IN ({', '.join('?' * len(full))})" if full else ""
            found = self._records(
                f"WHERE status = ? {passed} ORDER BY priority DESC, place LIMIT 1", (Status.QUEUED, *full)
            )
        return found[0] if found else None

    def queue_position(self, id: str) -> int | None:
        """How many queued videos come before this one; None when it is not queued."""
        row = self._one(
            """SELECT (SELECT count(*) FROM videos AS other WHERE other.status = mine.status AND
                (other.priority > mine.priority OR
                 (other.priority = mine.priority AND other.place < mine.place)))
               FROM videos AS mine WHERE id = ? AND status = ?""",
            (id, Status.QUEUED),
        )
        return None if row is None else row[0]

    def counts(self) -> dict[Status, int]:
        """How many videos there are of every status."""
        with self._lock:
            rows = self._db.execute("SELECT status, count(*) FROM videos GROUP BY status").fetchall()
        return {status: dict(rows).get(status.value, 0) for status in Status}

    def disk_bytes(self) -> int:
        """Of all videos together."""
        row = self._one("SELECT coalesce(sum(disk_bytes), 0) FROM videos", ())
        assert row is not None
        return row[0]

    def running(self) -> list[Record]:
        """Videos in progress, the oldest first: after a start those are to be resumed."""
        return self._records("WHERE status = ? ORDER BY place", (Status.IN_PROGRESS,))

    def expired(self, now: int) -> list[Record]:
        """Ended videos whose time is over, the oldest first."""
        return self._records("WHERE status IN (?, ?) AND expires_at <= ? ORDER BY place", (*ENDED, now))

    def add_event(self, id: str, name: str, data: dict[str, Any]) -> int:
        """The number of a new event of a video. KeyError when there is no such video."""
        with self._write() as db:
            if self._one("SELECT 1 FROM videos WHERE id = ?", (id,)) is None:
                raise KeyError(id)
            (number,) = db.execute(
                "SELECT coalesce(max(number), 0) + 1 FROM events WHERE video = ?", (id,)
            ).fetchone()
            db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (id, number, name, json.dumps(data)))
        return number

    def events(self, id: str, after: int = 0) -> list[Event]:
        """A video's events with a number above `after`, in order."""
        with self._lock:
            rows = self._db.execute(
                "SELECT number, name, data FROM events WHERE video = ? AND number > ? ORDER BY number",
                (id, after),
            ).fetchall()
        return [Event(number, name, json.loads(data)) for number, name, data in rows]

    def _place(self, id: str, owner: str | None) -> int:
        """Where a video stands or stood in the order of adding."""
        for table in ("videos", "deleted"):
            row = self._one(f"SELECT place, owner FROM {table} WHERE id = ?", (id,))
            if row is not None and owner in (None, row[1]):
                return row[0]
        raise ValueError(f"after={id}: no such video; begin without it")

    def _records(self, clause: str, values: tuple[Any, ...]) -> list[Record]:
        with self._lock:
            rows = self._db.execute(f"SELECT {', '.join(COLUMNS)} FROM videos {clause}", values).fetchall()
        return [_to_record(row) for row in rows]

    def _one(self, query: str, values: tuple[Any, ...]) -> Any:
        with self._lock:
            return self._db.execute(query, values).fetchone()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing, and on disk when it ends. ApiError 507 on a full disk."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    raise disk_full() from error
                raise


def _open(path: Path) -> sqlite3.Connection:
    """The file, at the newest version. ValueError in one line when it is none of ours."""
    db = None
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        migrate(db, path)
        return db
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise ValueError(f"{path}: cannot be used ({error}); move it away to begin anew") from error
        raise


def _to_sql(name: str, value: Any) -> Any:
    return json.dumps(value) if name in AS_JSON else value


def _to_record(row: tuple[Any, ...]) -> Record:
    values = dict(zip(COLUMNS, row, strict=True))
    for name in AS_JSON:
        values[name] = json.loads(values[name])
    values["kind"], values["status"] = Kind(values["kind"]), Status(values["status"])
    return Record(**values)
