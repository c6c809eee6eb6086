"""Flow control of viewers: real sockets, files, store and feeds; chunks come when the test says so."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from tests.serve.sockets import DEADLINE_S, connected, deaf, receive, receive_until, resume, seqs, wait_until
from tests.serve.stage import EAGER, MEBIBYTE, Stage
from vidgen.serve.live.mime import mime_of
from vidgen.serve.live.realtime import MAX_MISTAKES
from vidgen.serve.records import Status


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, 100_000, EAGER).running() as found:
        yield found


@pytest.fixture
def heavy_stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, MEBIBYTE, EAGER).running() as found:
        yield found


def test_a_viewer_gets_the_start_then_every_chunk_as_it_lies_on_disk_then_the_end(stage: Stage) -> None:
    with stage.watch() as client:
        stage.add_chunks(3)
        got = [receive(client) for _ in range(4)]
        stage.become(Status.COMPLETED)
        done = receive_until(client, "session.done")[-1]
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(DEADLINE_S)
    assert got[0]["data"] == stage.init and got[0]["mime"] == mime_of(stage.init)
    assert seqs(got) == [0, 1, 2] and all(message["data"] == stage.chunk for message in got[1:])
    assert [message["pts"] for message in got[1:]] == [0.0, 1.0, 2.0]
    assert done == {"type": "session.done", "status": "completed", "frames_done": 48}
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


def test_resume_goes_on_behind_the_last_chunk_without_gap_or_duplicate(stage: Stage) -> None:
    stage.add_chunks(12)
    with stage.watch(last_seq=6) as client:
        stage.add_chunks(3)
        assert seqs([receive(client) for _ in range(9)]) == [7, 8, 9, 10, 11, 12, 13, 14]


def test_resume_at_live_begins_with_the_newest_chunk(stage: Stage) -> None:
    stage.add_chunks(12)
    with stage.watch(last_seq="live") as client:
        assert seqs([receive(client) for _ in range(2)]) == [11]


def test_resume_from_a_chunk_that_is_not_there_is_refused_and_may_be_asked_again(stage: Stage) -> None:
    stage.add_chunks(2)
    with stage.watch(last_seq=2) as client:
        refused = receive(client)
        assert refused["code"] == "invalid_value" and "-1 to 1" in refused["message"]
        client.send(json.dumps(resume(stage.record.id, 1)))
        assert receive(client)["type"] == "video.start"


@pytest.mark.parametrize("policy", ["drop", "pause"])
def test_a_client_that_reads_nothing_costs_no_memory_and_slows_nobody(tmp_path: Path, policy: str) -> None:
    count = 200
    patient = replace(EAGER, socket_s=60)
    with (
        Stage(tmp_path, MEBIBYTE, patient).running() as stage,
        deaf(stage.port, resume(stage.record.id, -1, policy)),
        stage.watch() as client,
    ):
        delays_s: list[float] = []
        before = 0
        for index in range(count):
            if index == 20:  # by now its socket is full and all is warm
                before = psutil.Process().memory_info().rss
            asked = time.monotonic()
            stage.add_chunks(1)
            receive_until(client, "video.chunk_metadata")
            delays_s.append(time.monotonic() - asked)
        grown = psutil.Process().memory_info().rss - before
        assert stage.call(lambda: stage.audience.num_viewers) == 2
        assert stage.orders.held == ([True] if policy == "pause" else [])
    print(f"{policy}: {count} MiB past a deaf viewer, RSS +{grown / MEBIBYTE:.1f} MiB, ", end="")
    print(f"p95 {sorted(delays_s)[int(count * 0.95)] * 1e3:.1f} ms a chunk for the other")
    assert grown < 12 * MEBIBYTE
    assert sorted(delays_s)[int(count * 0.95)] < 0.25


def test_drop_leaves_out_whole_chunks_up_to_the_newest_and_says_which(heavy_stage: Stage) -> None:
    stage = heavy_stage
    with stage.watch(-1, "drop") as client:
        stage.add_chunks(60)  # nobody reads meanwhile
        messages = receive_until(client, "video.dropped")
        stage.become(Status.COMPLETED)
        messages += receive_until(client, "session.done")
    dropped = [m for m in messages if m["type"] == "video.dropped"]
    lost = [seq for m in dropped for seq in range(m["from_seq"], m["to_seq"] + 1)]
    assert dropped and sorted(seqs(messages) + lost) == list(range(60))
    assert seqs(messages) == sorted(seqs(messages)) and seqs(messages)[-1] == 59
    assert not stage.orders.held
    assert all(m["data"] == stage.chunk for m in messages if m["type"] == "video.chunk_metadata")


def test_pause_holds_the_render_while_a_viewer_lags_and_loses_nothing(heavy_stage: Stage) -> None:
    stage = heavy_stage
    with stage.watch(-1, "pause") as client:
        while not stage.orders.held:
            stage.add_chunks(1)
            assert stage.num_chunks < 40
            time.sleep(0.02)
        assert stage.orders.held == [True]
        taken = [receive(client) for _ in range(stage.num_chunks + 1)]
        wait_until(lambda: stage.orders.held == [True, False])
    assert seqs(taken) == list(range(stage.num_chunks))


def test_a_dead_viewer_is_cut_off_after_the_deadline_and_no_longer_holds_the_render(
    heavy_stage: Stage,
) -> None:
    stage = heavy_stage
    files = psutil.Process().num_fds()
    with deaf(stage.port, resume(stage.record.id, -1, "pause")):
        while not stage.orders.held:
            stage.add_chunks(1)
            time.sleep(0.02)
        took_s = wait_until(lambda: stage.orders.held == [True, False])
        assert took_s < EAGER.socket_s + EAGER.close_s + 1
        # its connection is gone too, although it has not read what was sent
        wait_until(lambda: psutil.Process().num_fds() <= files + 1)


def test_of_two_that_hold_a_render_the_last_one_lets_it_go(stage: Stage) -> None:
    one, other = object(), object()
    for viewer, is_held in ((one, True), (other, True), (one, False), (one, False), (other, False)):
        stage.call(lambda v=viewer, h=is_held: stage.audience.hold(stage.record.id, v, h))
    assert stage.orders.held == [True, False]


def test_a_session_ends_after_its_grace_and_not_while_somebody_watches(stage: Stage) -> None:
    stage.add_chunks(1)
    with stage.watch() as client:
        receive_until(client, "video.chunk_metadata")
        with stage.watch() as other:
            receive_until(other, "video.chunk_metadata")
        time.sleep(EAGER.grace_s * 2)
        assert not stage.orders.ended
    left = time.monotonic()
    with stage.watch(last_seq=0) as again:  # comes back in time
        receive_until(again, "video.start")
        time.sleep(EAGER.grace_s * 2)
        assert not stage.orders.ended
    left = time.monotonic()
    wait_until(lambda: stage.orders.ended == [stage.record.id])
    assert EAGER.grace_s * 0.9 < time.monotonic() - left < EAGER.grace_s + 5


def test_a_socket_that_asks_for_nothing_is_closed_with_an_error(tmp_path: Path) -> None:
    patience = replace(EAGER, start_s=0.5)
    with Stage(tmp_path, 1000, patience).running() as stage, connected(stage.port) as client:
        asked = time.monotonic()
        assert receive(client)["code"] == "start_timeout"
        assert 0.4 < time.monotonic() - asked < 5
        with pytest.raises(ConnectionClosed):
            client.recv(DEADLINE_S)


def test_a_render_that_gives_no_sign_of_life_is_an_error_and_one_that_is_held_is_not(tmp_path: Path) -> None:
    with Stage(tmp_path, 1000, replace(EAGER, load_s=0.5)).running() as stage:
        stage.add_chunks(1)
        holder = object()
        stage.call(lambda: stage.audience.hold(stage.record.id, holder, True))
        with stage.watch() as client:
            receive_until(client, "video.chunk_metadata")
            with pytest.raises(TimeoutError):
                client.recv(1.0)
            stage.call(lambda: stage.audience.hold(stage.record.id, holder, False))
            assert receive(client)["code"] == "stalled"
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(DEADLINE_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013


def test_a_socket_on_which_nothing_is_said_is_closed(tmp_path: Path) -> None:
    with Stage(tmp_path, 1000, replace(EAGER, idle_s=0.5, socket_s=1)).running() as stage:
        stage.add_chunks(1)
        with stage.watch() as client:
            assert receive_until(client, "error")[-1]["code"] == "idle"


def test_a_video_deleted_meanwhile_is_an_error(stage: Stage) -> None:
    stage.add_chunks(1)
    with stage.watch() as client:
        receive_until(client, "video.chunk_metadata")
        stage.call(lambda: stage.feeds.forget(stage.record.id))
        assert receive(client)["code"] == "deleted"


def test_a_failed_session_shows_what_there_is_and_then_why(stage: Stage) -> None:
    stage.add_chunks(2)
    stage.become(Status.FAILED, error_code="worker_died", error_message="died three times")
    with stage.watch() as client:
        messages = receive_until(client, "session.done")
    assert seqs(messages) == [0, 1]
    assert messages[-2] == {"type": "error", "code": "worker_died", "message": "died three times"}
    assert messages[-1]["status"] == "failed"


def test_a_server_that_ends_sends_its_viewers_away_to_come_back(stage: Stage) -> None:
    with stage.watch() as client:
        client.send('{"type": "session.ping"}')
        receive(client)
        stage.call(stage.server.draining.set)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(DEADLINE_S)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
    assert not stage.orders.ended


def test_a_wish_that_was_fulfilled_before_the_connection_broke_is_told_again(stage: Stage) -> None:
    stage.tell("prompt_applied", {"event_id": "one", "frame": 32, "seq": 2})
    wish = {"type": "session.interaction", "event_id": "one", "event": {"prompt": "a cube"}}
    with stage.watch() as client:
        applied = {"type": "session.interaction.applied", "event_id": "one", "frame": 32, "seq": 2}
        assert receive(client) == applied
        client.send(json.dumps(wish))
        assert receive(client) == applied


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", '"x"', "{}", '{"type": 7}', '{"type": "session.nothing"}', "[" * 50_000,
        '{"type": "session.ping", "nonce": {}}', '{"type": "session.ping", "other": 1}', "9" * 50_000,
        '{"type": "session.interaction", "event_id": "a"}', '{"type": "session.resume"}',
        '{"type": "session.interaction", "event_id": 7, "event": {"prompt": "x"}}',
        '{"type": "session.interaction", "event_id": "a", "event": {"prompt": ""}}',
        '{"type": "session.interaction", "event_id": "a", "event": {"prompt": "x"}, "transition_chunks": -1}',
        '{"type": "session.start", "prompt": "\\ud800"}', '{"type": "session.start", "policy": "none"}',
        '{"type": "session.start", "prompt": "x"}', "x" * 61_000, b"\x00\x01", "\x00", '{"type": NaN}',
        '{"type": "session.resume", "session_id": "../../etc/passwd"}',
    ],
    ids=lambda text: f"{text[:40]!r}-{len(text)}",
)  # fmt: skip
def test_what_makes_no_sense_is_answered_with_an_error_and_the_socket_goes_on(
    stage: Stage, text: str | bytes
) -> None:
    with stage.watch() as client:
        client.send(text)
        answer = receive(client)
        assert answer["type"] == "error" and answer["code"] and "\n" not in answer["message"]
        client.send('{"type": "session.ping", "nonce": "still here"}')
        assert receive(client) == {"type": "session.pong", "nonce": "still here"}


def test_whoever_makes_no_sense_for_ever_is_sent_away(stage: Stage) -> None:
    with stage.watch() as client, pytest.raises(ConnectionClosed):
        for _ in range(MAX_MISTAKES + 1):
            client.send("{")
            assert receive(client)["type"] == "error"
        client.recv(DEADLINE_S)


def test_there_are_no_more_viewers_than_places(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 1000, EAGER)
    stage.server.config = stage.config.model_copy(
        update={"limits": stage.config.limits.model_copy(update={"max_viewers": 2})}
    )
    with stage.running():
        stage.add_chunks(1)
        with stage.watch() as one, stage.watch() as two:
            receive_until(one, "video.start")
            receive_until(two, "video.start")
            with stage.watch() as three:
                assert receive(three)["code"] == "too_many_viewers"
        wait_until(lambda: stage.call(lambda: stage.audience.num_viewers) == 0)
        with stage.watch() as four:
            assert receive(four)["type"] == "video.start"
