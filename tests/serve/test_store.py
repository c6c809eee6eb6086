"""The queue: order, priorities, owners, pages and events hold, and no question reads every row."""

import itertools
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.requests_made import made
from vidgen.serve.records import Kind, Status, is_id, make_id
from vidgen.serve.store import Store

DEADLINE_S = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as store:
        yield store


def test_a_record_comes_back_as_it_was(path: Path):
    record = made(
        kind=Kind.SESSION, status=Status.FAILED, priority=-3, started_at=2, completed_at=3, expires_at=4,
        prompt="ä\n'\"; DROP TABLE videos; --\u2028🎬", request={"a": [1, None, {"b": "ü"}]}, eta_s=1.5,
        seed=2**63 - 1, attempt=2, error_code="cancelled", error_message="cancelled", disk_bytes=2**40,
    )  # fmt: skip
    with closing(Store(path)) as store:
        store.add(record)
    with closing(Store(path)) as store:
        assert store.get(record.id) == record
        assert type(store.get(record.id).status) is Status  # type: ignore[union-attr]


def test_an_update_changes_what_it_names_and_nothing_else(store: Store):
    first, second = made(), made()
    store.add(first)
    store.add(second)
    changed = store.update(first.id, status=Status.COMPLETED, completed_at=9, job={"seed": 4}, eta_s=None)
    expected = replace(first, status=Status.COMPLETED, completed_at=9, job={"seed": 4})
    assert changed == store.get(first.id) == expected
    assert store.get(second.id) == second
    for wrong in ({"id": "x"}, {"place": 1}, {"owner = 'x' --": 1}):
        with pytest.raises(TypeError):
            store.update(first.id, **wrong)
    with pytest.raises(KeyError):
        store.update(made().id, status=Status.FAILED)
    assert store.get(first.id) == expected


def test_an_id_is_taken_once(store: Store):
    record = made()
    store.add(record)
    with pytest.raises(ValueError, match="is taken"):
        store.add(replace(record, owner="eve"))
    assert store.page(limit=9) == ([record], False)


def test_the_next_video_is_of_the_highest_priority_then_the_oldest(store: Store):
    records = [made(priority=priority, created_at=1) for priority in (0, 2, -1, 2, 0)]
    for record in records:
        store.add(record)
    order = [records[place].id for place in (1, 3, 0, 4, 2)]
    assert [store.queue_position(id) for id in order] == [0, 1, 2, 3, 4]
    for id in order:
        chosen = store.next_queued(None)
        assert chosen is not None and chosen.id == id
        store.update(id, status=Status.IN_PROGRESS)
        assert store.queue_position(id) is None
    assert store.next_queued(None) is None
    assert [record.id for record in store.running()] == [record.id for record in records]


def test_owners_at_their_limit_are_passed_over_and_hold_nobody_up(store: Store):
    for owner in ("ada", "ada", "ada", "bob", "eve"):
        store.add(made(owner=owner, priority=1 if owner == "ada" else 0))
    started = []
    while (record := store.next_queued(2, {"eve": 0})) is not None:
        store.update(record.id, status=Status.IN_PROGRESS)
        started.append(record.owner)
    assert started == ["ada", "ada", "bob"]
    store.update(store.running()[0].id, status=Status.COMPLETED)
    assert [record.owner for record in [store.next_queued(2, {"eve": 0})] if record] == ["ada"]


def test_counts_bytes_and_expiry_are_those_of_the_rows(store: Store):
    assert store.counts() == dict.fromkeys(Status, 0) and store.disk_bytes() == 0
    for number, status in enumerate(itertools.islice(itertools.cycle(Status), 10)):
        store.add(made(status=status, disk_bytes=number, expires_at=number if number % 2 else None))
    assert sum(store.counts().values()) == 10 and store.counts()[Status.QUEUED] == 3
    assert store.disk_bytes() == 45
    assert [record.expires_at for record in store.expired(7)] == [3, 7]
    assert all(record.has_ended for record in store.expired(7))


def test_events_are_numbered_per_video_and_go_with_it(store: Store):
    first, second = made(), made()
    store.add(first)
    store.add(second)
    numbers = [store.add_event(first.id, "chunk", {"index": index}) for index in range(4)]
    assert numbers == [1, 2, 3, 4] and store.add_event(second.id, "status", {}) == 1
    assert [event.data["index"] for event in store.events(first.id, after=2)] == [2, 3]
    assert store.delete(first.id) and not store.delete(first.id)
    assert store.get(first.id) is None and store.events(first.id, 0) == []
    assert len(store.events(second.id, 0)) == 1
    with pytest.raises(KeyError):
        store.add_event(first.id, "late", {})


def paged(store: Store, owner: str | None, *, limit: int, descending: bool) -> list[str]:
    """Ids over all pages."""
    found: list[str] = []
    has_more = True
    while has_more:
        page, has_more = store.page(
            owner=owner, after=found[-1] if found else None, limit=limit, descending=descending
        )
        assert len(page) == limit or not has_more
        assert page or not found, "announced, and nothing on it"
        found += [record.id for record in page]
    return found


def test_each_owner_sees_and_pages_through_their_own_only(store: Store):
    records = [made(owner=owner) for owner in ("ada", "bob", "ada", "eve", "bob", "ada", "ada")]
    for record in records:
        store.add(record)
    for owner in ("ada", "bob", "eve", "nobody", None):
        mine = [record.id for record in records if owner in (None, record.owner)]
        for limit in (1, 2, 3, 100):
            assert paged(store, owner, limit=limit, descending=False) == mine
            assert paged(store, owner, limit=limit, descending=True) == mine[::-1]
    stranger = records[1].id
    refusals = []
    for after in (stranger, made().id):  # another's, and one that never was, look the same
        with pytest.raises(ValueError) as refusal:
            store.page(owner="ada", after=after, limit=3, descending=True)
        refusals.append(str(refusal.value).replace(after, "ID"))
    assert refusals[0] == refusals[1]
    store.delete(stranger)
    with pytest.raises(ValueError):
        store.page(owner="ada", after=stranger, limit=3, descending=True)


ACTIONS = st.lists(
    st.one_of(
        st.just(("add", 0)),
        st.tuples(st.sampled_from(["delete", "delete_cursor"]), st.integers(0, 10**6)),
        st.tuples(st.just("page"), st.integers(1, 4)),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Examples of a property share a file, each with an owner of its own."""
    with closing(Store(tmp_path_factory.mktemp("pages") / "server.sqlite")) as store:
        yield store


@settings(max_examples=60)
@given(num_first=st.integers(0, 8), actions=ACTIONS, descending=st.booleans())
def test_pages_are_stable_while_videos_come_and_go(
    shared: Store, num_first: int, actions: list[tuple[str, int]], descending: bool
):
    store, owner = shared, make_id(Kind.VIDEO)
    there: list[str] = []  # in the order of adding
    seen: list[str] = []
    at_start: set[str] = set()
    gone: set[str] = set()

    def add() -> None:
        record = made(owner=owner)
        store.add(record)
        there.append(record.id)

    def read(limit: int) -> bool:
        page, has_more = store.page(
            owner=owner, after=seen[-1] if seen else None, limit=limit, descending=descending
        )
        seen.extend(record.id for record in page)
        return has_more

    for _ in range(num_first):
        add()
    at_start |= set(there)
    for name, number in actions:
        if name == "add":
            add()
        elif name == "page":
            read(number)
        else:
            id = seen[-1] if name == "delete_cursor" and seen else None
            id = id or (there[number % len(there)] if there else None)
            if id is not None:
                store.delete(id)
                gone.add(id)
    while read(2):
        pass
    order = {id: place for place, id in enumerate(there)}
    places = [order[id] for id in seen]
    assert places == sorted(set(places), reverse=descending), "in order, and none twice"
    assert at_start - gone <= set(seen), "none is left out that was there all the time"


def test_a_page_can_begin_at_any_video_deleted_lately(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vidgen.serve.store.DELETED_KEPT", 3)
    records = [made() for _ in range(8)]
    for record in records:
        store.add(record)
    for record in records[:6]:
        store.delete(record.id)
    for record in records[3:6]:
        page, _ = store.page(after=record.id, limit=9, descending=False)
        assert page == records[6:]
    with pytest.raises(ValueError):  # its place is forgotten: the list of the deleted does not grow
        store.page(after=records[0].id, limit=9, descending=False)


def test_threads_lose_nothing(store: Store):
    record = made()
    store.add(record)

    def work(thread: int) -> None:
        for number in range(25):
            store.add(made(owner=f"thread{thread}"))
            store.add_event(record.id, "chunk", {"thread": thread, "number": number})
            store.update(record.id, frames_done=number)
            assert store.get(record.id) is not None

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    events = store.events(record.id, 0)
    assert [event.number for event in events] == list(range(1, 101))
    assert sum(store.counts().values()) == 101


def test_a_failed_change_leaves_no_half(store: Store):
    record = made()
    store.add(record)
    with pytest.raises(sqlite3.Error):
        store.update(record.id, frames_done=5, num_frames=None)
    assert store.get(record.id) == record
    store.update(record.id, frames_done=6)  # and no transaction stays open


@pytest.mark.parametrize(
    "question",
    [
        lambda store: store.next_queued(2),
        lambda store: store.queue_position(made().id),
        lambda store: store.get(made().id),
        lambda store: store.counts(),
        lambda store: store.running(),
        lambda store: store.expired(5),
        lambda store: store.disk_bytes(),
        lambda store: store.page(owner="ada", limit=20),
        lambda store: store.add_event(made().id, "chunk", {}),
    ],
    ids=["next", "position", "get", "counts", "running", "expired", "bytes", "page", "event"],
)
def test_no_question_reads_every_row(store: Store, question: Any):
    asked: list[str] = []
    store._db.set_trace_callback(asked.append)
    try:
        question(store)
    except KeyError:
        pass
    finally:
        store._db.set_trace_callback(None)
    selects = [text for text in asked if text.lstrip().startswith("SELECT")]
    assert selects
    for text in selects:
        plan = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {text}").fetchall()]
        # an index alone is small; a scan of the table would read every job
        assert not [step for step in plan if step.startswith("SCAN") and "COVERING INDEX" not in step], plan


def test_ids_are_unguessable_and_only_their_exact_form_is_one():
    ids = {make_id(kind) for kind in Kind for _ in range(1000)}
    assert len(ids) == 2000 and all(is_id(id) for id in ids)
    good = make_id(Kind.VIDEO)
    for bad in ("", "../" + good, good + "\n", good.upper(), good[:-1], good + "0", "video_" + "g" * 32):
        assert not is_id(bad), bad
