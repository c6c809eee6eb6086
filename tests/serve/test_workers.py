"""What is true of workers and of the queue in front of them, with real processes and the real store."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.serve.workshop import (
    BLOCK_FRAMES,
    LONG,
    OTHER_PROMPT,
    Workshop,
    ask,
    cycles,
    digests,
    record,
    settings,
    statuses,
)
from vidgen.media.source import VideoSource
from vidgen.serve.config import video_folder
from vidgen.serve.errors import ApiError
from vidgen.serve.records import Kind, Status
from vidgen.serve.work import body
from vidgen.serve.work.housekeeping import sweep
from vidgen.serve.work.worker import explain

HEARTBEAT_S, GRACE_S = 8, 2
CYCLES = 12  # more of them: python -m tests.serve.workshop 200


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    timings = {"heartbeat_timeout_s": HEARTBEAT_S, "cancel_grace_s": GRACE_S}
    made = Workshop(settings(tmp_path_factory.mktemp("workers"), timings=timings, limits={"max_attempts": 2}))
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> str:
    """A video of three chunks that nobody disturbed."""
    id = workshop.submit(record())
    assert workshop.until_ended(id).status is Status.COMPLETED
    return id


def frames_of(video: Path) -> int:
    with VideoSource(video, backend="av") as source:
        return sum(1 for _ in source)


def test_a_video_is_told_chunk_by_chunk_and_every_chunk_is_a_segment(workshop: Workshop, whole: str):
    done, folder = workshop.get(whole), workshop.folder(whole)
    assert (done.progress, done.frames_done, done.chunks_done) == (100, 48, 3)
    assert statuses(workshop.events(whole)) == [Status.QUEUED, Status.IN_PROGRESS, Status.COMPLETED]
    chunks = workshop.do(ask(lambda: workshop.feeds.of(whole).chunks))
    assert [chunk.first_frame for chunk in chunks] == [0, 16, 32]
    for chunk in chunks:
        assert (folder / f"job/segments/{chunk.index:06d}.m4s").stat().st_size == chunk.num_bytes
    assert frames_of(folder / "video.mp4") == 48
    assert (folder / "thumbnail.jpg").read_bytes()[:2] == b"\xff\xd8"
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert done.disk_bytes == on_disk


def test_the_servers_half_of_a_worker_needs_no_torch():
    heavy = ["torch", "av", "ray", "numpy"]
    code = (
        f"import sys, vidgen.serve.work.scheduler; print([name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_job_that_fails_says_why_in_a_line_and_the_next_runs_on_the_same_worker(workshop: Workshop):
    (before,) = workshop.scheduler.replicas()
    failed = workshop.until_ended(workshop.submit(record(prompt="quantum flux")))
    assert (failed.status, failed.error_code) == (Status.FAILED, "invalid_request")
    assert failed.error_message and "no word this model knows" in failed.error_message
    assert "\n" not in failed.error_message and str(workshop.config.data) not in failed.error_message
    assert workshop.until_ended(workshop.submit(record(1))).status is Status.COMPLETED
    assert workshop.scheduler.replicas()[0].pid == before.pid


def test_every_way_to_run_out_of_memory_is_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**52)
    for error in (failure.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert explain(error)[0] == "out_of_memory"
    assert explain(RuntimeError("shape mismatch"))[0] == "render_failed"


def test_a_cancelled_video_lets_its_worker_go_and_resumes_to_the_same_bytes(workshop: Workshop, whole: str):
    id = workshop.submit(record())
    pid = workshop.until_busy(id)
    workshop.until_chunks(id, 1)
    cancelled = workshop.do(workshop.scheduler.cancel(id))
    assert (cancelled.status, cancelled.error_code) == (Status.FAILED, "cancelled")
    assert [facts.video_id for facts in workshop.scheduler.replicas()] == [None]
    assert workshop.scheduler.replicas()[0].pid == pid, "it let go by itself"
    assert workshop.do(workshop.scheduler.cancel(id)) == cancelled, "again is no harm"
    workshop.do(workshop.scheduler.resume(id))
    resumed = workshop.until_ended(id)
    assert (resumed.status, resumed.error_code) == (Status.COMPLETED, None)
    assert digests(workshop.folder(id)) == digests(workshop.folder(whole))
    assert [event.data["index"] for event in workshop.events(id, "chunk")] == [0, 1, 2]


def test_a_queued_video_is_cancelled_at_once_and_a_removed_one_is_gone(workshop: Workshop):
    running, queued = workshop.submit(record(LONG)), workshop.submit(record())
    workshop.until_busy(running)
    assert workshop.do(workshop.scheduler.cancel(queued)).error_code == "cancelled"
    workshop.until_chunks(running, 1)
    feed = workshop.do(ask(lambda: workshop.feeds.of(running)))
    workshop.do(workshop.scheduler.remove(running))
    assert workshop.store.get(running) is None and not workshop.folder(running).exists()
    assert workshop.do(feed.next_chunk(10**6)) is None, "its viewers are sent away"
    with pytest.raises(ApiError) as missing:
        workshop.do(workshop.scheduler.remove(running))
    assert missing.value.status == 404


def test_a_worker_killed_over_a_video_costs_no_byte_of_it(workshop: Workshop, whole: str):
    id = workshop.submit(record())
    pid = workshop.until_busy(id)
    workshop.until_chunks(id, 1)
    os.kill(pid, signal.SIGKILL)
    done = workshop.until_ended(id)
    assert (done.status, done.attempt) == (Status.COMPLETED, 1)
    assert digests(workshop.folder(id)) == digests(workshop.folder(whole))
    (note,) = workshop.events(id, "note")
    assert "ended by itself (exit code -9)" in note.data["message"]


def test_a_stopped_worker_is_noticed_replaced_and_its_video_goes_on(workshop: Workshop, whole: str):
    id = workshop.submit(record())
    pid = workshop.until_busy(id)
    workshop.until_chunks(id, 1)
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    workshop.until(lambda: not psutil.pid_exists(pid))
    assert HEARTBEAT_S - 2 < time.monotonic() - stopped_at < HEARTBEAT_S + 3
    assert not workshop.scheduler.is_ready
    assert workshop.until_ended(id).status is Status.COMPLETED
    assert digests(workshop.folder(id)) == digests(workshop.folder(whole))
    assert f"(pid {pid}) did not answer for {HEARTBEAT_S} s" in workshop.events(id, "note")[0].data["message"]


def test_a_worker_that_does_not_let_go_of_a_cancelled_video_is_replaced(workshop: Workshop):
    id = workshop.submit(record(LONG))
    pid = workshop.until_busy(id)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert workshop.do(workshop.scheduler.cancel(id)).error_code == "cancelled"
    assert time.monotonic() - began < GRACE_S + 2
    assert not psutil.pid_exists(pid)


def test_a_video_that_kills_its_workers_fails_and_the_next_one_is_made(workshop: Workshop):
    id, following = workshop.submit(record(LONG)), workshop.submit(record(1))
    for _ in range(2):
        pid = workshop.until_busy(id)
        os.kill(pid, signal.SIGKILL)
        workshop.until(lambda pid=pid: not psutil.pid_exists(pid))
        workshop.until(lambda pid=pid: all(facts.pid != pid for facts in workshop.scheduler.replicas()))
    failed = workshop.until_ended(id)
    assert (failed.status, failed.error_code) == (Status.FAILED, "worker_died")
    assert workshop.until_ended(following).status is Status.COMPLETED


def test_a_held_video_makes_no_forward_while_its_worker_answers(workshop: Workshop):
    id = workshop.submit(record(LONG))
    workshop.until_chunks(id, 1)
    workshop.do(ask(lambda: workshop.scheduler.hold(id, True)))
    time.sleep(1.0)  # the forward that was running, and what it finished
    before = workshop.get(id).chunks_done
    time.sleep(3.0)
    assert workshop.get(id).chunks_done == before
    assert workshop.scheduler.replicas()[0].beat_age_s < 2.5 and workshop.scheduler.is_ready
    workshop.do(ask(lambda: workshop.scheduler.hold(id, False)))
    workshop.until_chunks(id, before + 2)
    workshop.do(ask(lambda: workshop.scheduler.hold(id, True)))
    assert workshop.do(workshop.scheduler.cancel(id)).error_code == "cancelled", "also while it is held"


def test_a_prompt_changes_at_a_chunk_not_begun_and_one_that_cannot_be_used_is_refused(workshop: Workshop):
    id = workshop.submit(record(LONG, kind=Kind.SESSION))
    workshop.until_chunks(id, 1)
    scheduler = workshop.scheduler
    workshop.do(scheduler.interact(id, "a", OTHER_PROMPT, 0))
    begun = workshop.get(id).chunks_done
    workshop.do(scheduler.interact(id, "b", "quantum flux", 0))
    (applied,) = workshop.until(lambda: workshop.events(id, "prompt_applied"))
    (refused,) = workshop.until(lambda: workshop.events(id, "prompt_refused"))
    assert applied.data["event_id"] == "a" and applied.data["frame"] == BLOCK_FRAMES * applied.data["seq"]
    assert begun <= applied.data["seq"] <= begun + 2
    assert refused.data["event_id"] == "b" and "no word" in refused.data["message"]
    workshop.until_chunks(id, applied.data["seq"] + 1)
    done = workshop.do(scheduler.finish(id))
    assert done.status is Status.COMPLETED and done.num_frames == done.frames_done
    assert frames_of(workshop.folder(id) / "video.mp4") == done.frames_done == 16 * done.chunks_done
    with pytest.raises(ApiError) as late:
        workshop.do(scheduler.interact(id, "c", OTHER_PROMPT, 0))
    assert late.value.status == 409


def test_a_session_waits_for_those_who_watch_it(workshop: Workshop):
    slow = replace(record(LONG, kind=Kind.SESSION), fps=2)  # a chunk plays for 8 s, and is made in one or two
    id = workshop.submit(slow)
    workshop.until_chunks(id, 2)
    time.sleep(4.0)
    assert workshop.get(id).chunks_done == 2
    finished = workshop.do(workshop.scheduler.finish(id))
    assert finished.status is Status.COMPLETED and finished.frames_done == 2 * BLOCK_FRAMES


def test_a_session_stopped_before_its_first_chunk_is_cancelled(workshop: Workshop):
    ahead, session = workshop.submit(record(LONG)), workshop.submit(record(LONG, kind=Kind.SESSION))
    workshop.until_busy(ahead)
    assert workshop.do(workshop.scheduler.finish(session)).error_code == "cancelled"
    workshop.do(workshop.scheduler.cancel(ahead))


def test_higher_priority_comes_first_then_the_older(workshop: Workshop):
    running = workshop.submit(record(LONG))
    workshop.until_busy(running)
    ids = [workshop.submit(record(1, priority=priority)) for priority in (0, 5, 0, 5)]
    workshop.do(workshop.scheduler.cancel(running))
    for id in ids:
        workshop.until_ended(id)
    order = sorted(range(4), key=lambda index: started(workshop.folder(ids[index])))
    assert order == [1, 3, 0, 2]


def started(folder: Path) -> int:
    return (folder / "thumbnail.jpg").stat().st_mtime_ns


def test_ctrl_c_at_the_terminal_is_for_the_server_alone(workshop: Workshop):
    id = workshop.submit(record(2))
    pid = workshop.until_busy(id)
    os.kill(pid, signal.SIGINT)
    assert workshop.until_ended(id).status is Status.COMPLETED
    assert workshop.scheduler.replicas()[0].pid == pid


def test_start_and_cancel_cycles_leak_nothing(workshop: Workshop):
    before = cycles(workshop, 5)
    after = cycles(workshop, CYCLES)
    for name in ("files", "children", "worker files", "worker threads"):
        assert after[name] <= before[name], f"{name}: {before} {after}"
    assert after["threads"] <= before["threads"] + 4, "asyncio's pool may not have been at its full size"
    for name in ("MiB", "worker MiB"):
        assert after[name] < before[name] + 12, f"{name}: {before} {after}"


def test_on_a_full_disk_a_video_waits_says_so_and_loses_nothing(whole: str, workshop: Workshop, disk: Path):
    made = Workshop(settings(disk / "data"))
    made.start()
    try:
        id = made.submit(record(40))
        feed = made.do(ask(lambda: made.feeds.of(id)))
        made.until_chunks(id, 1)
        with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(2**16)):
                pass
        made.until(lambda: "no space left" in str(made.events(id, "note")) + str(feed.progress))
        kept = made.get(id).chunks_done
        time.sleep(2)
        assert made.scheduler.is_ready and made.get(id).chunks_done <= kept + 1
        (disk / "ballast").unlink()
        done = made.until_ended(id)
        assert (done.status, done.chunks_done) == (Status.COMPLETED, 40)
        assert [event.data["index"] for event in made.events(id, "chunk")] == list(range(40))
        assert digests(made.folder(id))["000001.m4s"] == digests(workshop.folder(whole))["000001.m4s"]
    finally:
        made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system just large enough for a video to be taken; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_workers_of_one_rank_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(body, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    for index, gpu in ((0, "0"), (1, "1"), (2, "0")):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        body.take_share(index, settings(tmp_path, replicas=3))
        assert environment["CUDA_VISIBLE_DEVICES"] == gpu
    environment["CUDA_VISIBLE_DEVICES"] = "4,7"
    body.take_share(1, settings(tmp_path, replicas=2))
    assert environment["CUDA_VISIBLE_DEVICES"] == "7"
    environment["CUDA_VISIBLE_DEVICES"] = "4,7"
    body.take_share(0, settings(tmp_path))
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,7", "one worker may have them all"


# without workers


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Workshop]:
    """A queue that nobody works on."""
    made = Workshop(settings(tmp_path, limits={"max_queue": 2, "disk_quota_bytes": 1000, "retention_s": 60}))
    yield made
    made.close()


def test_a_full_queue_and_a_used_up_quota_take_no_more(idle: Workshop):
    ids = [idle.submit(record()) for _ in range(2)]
    with pytest.raises(ApiError) as full:
        idle.submit(record())
    assert full.value.status == 429 and full.value.headers["Retry-After"].isdigit()
    idle.do(idle.scheduler.cancel(ids[0]))
    idle.store.update(ids[0], disk_bytes=1000)
    with pytest.raises(ApiError) as no_room:
        idle.submit(record())
    assert no_room.value.status == 507
    idle.do(idle.scheduler.remove(ids[0]))
    idle.submit(record())


def test_what_is_expired_or_belongs_to_no_video_is_deleted(idle: Workshop):
    kept, old, orphan = idle.submit(record()), idle.submit(record()), record().id
    for id in (kept, old, orphan):
        (idle.folder(id) / "job").mkdir(parents=True)
    ended = idle.do(idle.scheduler.cancel(old))
    assert ended.expires_at is not None and 50 < ended.expires_at - time.time() <= 60
    idle.store.update(old, expires_at=int(time.time()) - 1)
    idle.do(idle.scheduler.expire())
    assert sweep(idle.config, idle.store) == 1
    assert list((idle.config.data / "videos").iterdir()) == [video_folder(idle.config.data, kept)]


def test_viewers_get_every_event_once_in_order_whenever_they_come(idle: Workshop):
    id = idle.submit(record())

    async def watch() -> list[int]:
        feed, numbers = idle.feeds.of(id), [0]
        while (event := await feed.next_event(numbers[-1])) is not None:
            numbers.append(event.number)
        return numbers[1:]

    async def watched() -> list[list[int]]:
        viewers = [asyncio.create_task(watch())]
        for index in range(20):
            data = {"index": index, "first_frame": index, "num_frames": 1, "num_bytes": 1}
            await idle.scheduler.ledger.write(id, "chunk", data, chunks_done=index + 1)
            viewers.append(asyncio.create_task(watch()))
        await idle.scheduler.cancel(id)
        return await asyncio.gather(*viewers)

    for seen in idle.do(watched()):
        assert seen == list(range(1, 23))


def test_no_key_has_more_videos_in_progress_than_it_may(tmp_path: Path):
    made = Workshop(settings(tmp_path, replicas=2, limits={"max_running_per_key": 1}))
    made.start()
    try:
        ids = [made.submit(record(4, owner=owner)) for owner in ("a", "a", "b")]
        made.until_busy(ids[2])
        made.until_busy(ids[0])
        assert made.get(ids[1]).status is Status.QUEUED
        assert [made.until_ended(id).status for id in ids] == [Status.COMPLETED] * 3
    finally:
        made.close()
