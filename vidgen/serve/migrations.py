"""The tables of the durable queue, by version of the file."""

import sqlite3
from pathlib import Path

# a step is a version of the file; add steps, never change one
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE videos (
            place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
            owner TEXT NOT NULL, model TEXT NOT NULL, status TEXT NOT NULL, priority INTEGER NOT NULL,
            created_at INTEGER NOT NULL, started_at INTEGER, completed_at INTEGER, expires_at INTEGER,
            prompt TEXT NOT NULL, request TEXT NOT NULL, job TEXT NOT NULL, width INTEGER NOT NULL,
            height INTEGER NOT NULL, num_frames INTEGER NOT NULL, fps INTEGER NOT NULL, seed INTEGER NOT NULL,
            chunks_done INTEGER NOT NULL, chunks_total INTEGER NOT NULL, frames_done INTEGER NOT NULL,
            eta_s REAL, attempt INTEGER NOT NULL, error_code TEXT, error_message TEXT,
            disk_bytes INTEGER NOT NULL)""",
        "CREATE INDEX videos_by_queue ON videos (status, priority DESC, place)",
        "CREATE INDEX videos_by_owner ON videos (owner, place)",
        "CREATE INDEX videos_by_expiry ON videos (expires_at) WHERE expires_at IS NOT NULL",
        "CREATE INDEX videos_by_bytes ON videos (disk_bytes)",
        """CREATE TABLE events (
            video TEXT NOT NULL REFERENCES videos (id) ON DELETE CASCADE, number INTEGER NOT NULL,
            name TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (video, number)) WITHOUT ROWID""",
        "CREATE TABLE deleted (place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL)",
    ),
)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring a file to the newest version, a version at a time. ValueError for one of a newer program."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ValueError(
            f"{path}: written by a newer vidgen (version {version} of the file, this one knows "
            f"{len(MIGRATIONS)}); update vidgen or choose another folder"
        )
    for number in range(version, len(MIGRATIONS)):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[number]:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number + 1}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
