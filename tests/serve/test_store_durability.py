"""The queue's file: what was acknowledged outlives its process, one server holds it, versions go up."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.serve.requests_made import made
from vidgen.serve import migrations
from vidgen.serve.errors import ApiError
from vidgen.serve.records import Record, Status
from vidgen.serve.store import DataInUse, Event, Store

DEADLINE_S = 60
NUM_KILLS = 12
# adds, changes, notes events and deletes for ever; says so each time, after the store has returned
WRITER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from vidgen.serve.records import Kind, Record, make_id
from vidgen.serve.store import Store

store, usual, number = Store(Path(sys.argv[1])), Record(**json.loads(sys.argv[2])), 0
while True:
    record = replace(usual, id=make_id(Kind.VIDEO), seed=number, prompt="x" * (number * 977 % 9000))
    store.add(record)
    print(record.id, "add", flush=True)
    store.update(record.id, status="in_progress", frames_done=number, attempt=1)
    print(record.id, "update", flush=True)
    store.add_event(record.id, "progress", {"frames_done": number})
    print(record.id, "event", flush=True)
    if number % 5 == 4:
        store.delete(record.id)
        print(record.id, "delete", flush=True)
    number += 1
"""
HOLDER = """
import sys
from pathlib import Path
from vidgen.serve.store import Store
store = Store(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as store:
        yield store


def everything(store: Store) -> list[Record]:
    return store.page(owner=None, limit=10**6, descending=False)[0]


def written_until_killed(path: Path, num_lines: int, delay_s: float) -> list[tuple[str, str]]:
    """(id, what was done) as a writer has said by the time it is killed: `num_lines`, and `delay_s` more."""
    command = [sys.executable, "-c", WRITER, str(path), json.dumps(asdict(made()))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        watchdog = threading.Timer(DEADLINE_S, writer.kill)
        watchdog.start()
        try:
            lines = [writer.stdout.readline() for _ in range(num_lines)]
            time.sleep(delay_s)
            writer.kill()
            lines += writer.stdout.readlines()
        finally:
            watchdog.cancel()
            writer.kill()
    assert all(lines[:num_lines]), "the writer ended or hung before it was killed"
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(id, done) for id, done in words]


def lost(store: Store, runs: list[list[tuple[str, str]]]) -> list[str]:
    """What was acknowledged and is not there, and what is there without having been asked for."""
    found = []
    said = [pair for run in runs for pair in run]
    last = {run[-1][0] for run in runs}
    gone = {id for id, done in said if done == "delete"}
    for id, done in said:
        record, events = store.get(id), store.events(id, 0)
        if id in gone or (record is None and id in last and (id, "event") in said):
            # deleted; or it was, and its writer died before it could say so
            found += [f"{id} is back"] if record is not None or events else []
        elif record is None or record.prompt != "x" * (record.seed * 977 % 9000):
            found.append(f"{id} {done}: {record}")
        elif done == "update" and (record.status, record.frames_done) != ("in_progress", record.seed):
            found.append(f"{id} {done}: {record.status} {record.frames_done}")
        elif done == "event" and events != [Event(1, "progress", {"frames_done": record.seed})]:
            found.append(f"{id} {done}: {events}")
    unsaid = {record.id for record in everything(store)} - {id for id, _ in said}
    return found + ([f"not asked for: {unsaid}"] if len(unsaid) > len(runs) else [])


def test_what_was_acknowledged_is_there_after_kill_9_at_any_moment(path: Path):
    runs = []
    for kill in range(NUM_KILLS):
        # at other lines, and other moments between them, every time
        runs.append(written_until_killed(path, 3 + 7 * kill, delay_s=0.0013 * kill))
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        with closing(Store(path)) as store:
            assert lost(store, runs) == []
    assert sum(len(run) for run in runs) > 3 * NUM_KILLS


def test_the_check_of_what_is_lost_finds_a_lost_update(path: Path):
    run = written_until_killed(path, 9, delay_s=0)
    with closing(Store(path)) as store:
        store.update(run[0][0], status=Status.QUEUED)
        assert len(lost(store, [run])) == 1
        with store._write() as db:
            db.execute("DELETE FROM videos WHERE id = ?", (run[0][0],))
        assert len(lost(store, [run])) == 3


def test_a_second_server_on_the_same_data_is_refused_in_one_line_until_the_first_is_gone(path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(DEADLINE_S, holder.kill)
    watchdog.start()
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(DataInUse) as refusal:
            Store(path)
        message = str(refusal.value)
        assert "\n" not in message and str(holder.pid) in message and str(path.parent) in message
        holder.kill()
    watchdog.cancel()
    Store(path).close()


def test_a_store_that_was_refused_leaves_the_first_one_working(path: Path, store: Store):
    with pytest.raises(DataInUse):
        Store(path)
    store.add(made())
    assert store.counts()[Status.QUEUED] == 1


def test_a_full_disk_is_507_and_the_store_goes_on_when_there_is_room(store: Store):
    store.add(made())
    with store._lock:
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
    kept: list[Record] = []
    with pytest.raises(ApiError) as refusal:
        for _ in range(100):
            record = made(prompt="x" * 4000)
            store.add(record)
            kept.append(record)
    assert refusal.value.status == 507
    with store._lock:
        store._db.execute("PRAGMA max_page_count = 1000000")
    store.add(made(prompt="x" * 4000))
    assert len(everything(store)) == len(kept) + 2


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_file_is_brought_up_a_version_at_a_time_and_keeps_its_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = made()
    with closing(Store(path)) as store:
        store.add(record)
    newest = len(migrations.MIGRATIONS)
    assert version(path) == newest
    more = (("CREATE TABLE later (a INTEGER)", "INSERT INTO later VALUES (1)"), ("DROP TABLE later",))
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, *more))
    with closing(Store(path)) as store:
        assert store.get(record.id) == record
    assert version(path) == newest + 2


def test_a_step_that_fails_is_undone_whole(path: Path, monkeypatch: pytest.MonkeyPatch):
    Store(path).close()
    newest = len(migrations.MIGRATIONS)
    broken = (("CREATE TABLE half (a INTEGER)", "SELECT * FROM nowhere"),)
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, *broken))
        with pytest.raises(ValueError, match="nowhere"):
            Store(path)
    assert version(path) == newest
    with closing(Store(path)) as store:  # and the lock is free
        assert store._one("SELECT 1 FROM sqlite_master WHERE name = 'half'", ()) is None


def test_a_newer_file_and_one_that_is_no_database_are_refused_in_one_line(path: Path):
    Store(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="newer vidgen") as newer:
        Store(path)
    other = path.with_name("other.sqlite")
    other.write_bytes(b"no database at all, " * 1000)
    with pytest.raises(ValueError, match="cannot be used") as none:
        Store(other)
    assert "\n" not in str(newer.value) + str(none.value)


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written") as refusal:
        Store(tmp_path / "file" / "data" / "server.sqlite")
    assert "\n" not in str(refusal.value)


def test_every_commit_is_synced_in_a_write_ahead_log(store: Store):
    # what power loss would take cannot be tested here: a killed process leaves the system's cache as it is
    assert store._one("PRAGMA synchronous", ()) == (2,) and store._one("PRAGMA journal_mode", ()) == ("wal",)
