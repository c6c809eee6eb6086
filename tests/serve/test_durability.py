"""A server killed at any moment loses nothing: what it had begun ends, after a restart, in the same bytes."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serve.killed_server import POINTS
from vidgen.media.source import VideoSource
from vidgen.serve.config import store_file
from vidgen.serve.records import Kind, Record, Status
from vidgen.serve.store import Store

SCRIPT = Path(__file__).with_name("killed_server.py")
PATIENCE_S = 150.0
GONE_WITHIN_S = 5.0


class Life:
    """One server, from its start until it is killed or ends."""

    def __init__(self, data: Path, point: str) -> None:
        self.log = data.parent / f"{data.name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, data, point], stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.said: dict[str, Any] = {}

    def hear(self, until: str | None = None) -> None:
        """Take in what it says until it says that, or nothing more."""
        deadline = time.monotonic() + PATIENCE_S
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said |= json.loads(line)
            if until in self.said:
                return
            assert time.monotonic() < deadline
        assert until is None, self.log.read_text()

    def end(self) -> int:
        """The exit code, once its worker is gone too."""
        self.hear()
        code = self.process.wait(PATIENCE_S)
        deadline = time.monotonic() + GONE_WITHIN_S
        while psutil.pid_exists(self.said["pid"]):
            assert time.monotonic() < deadline, "a worker outlives its server"
            time.sleep(0.01)
        assert self.said["torch"] is False, "the server's process has no torch"
        return code


@contextmanager
def life(data: Path, point: str = "") -> Iterator[Life]:
    begun = Life(data, point)
    try:
        yield begun
    finally:
        begun.process.kill()
        begun.process.wait(PATIENCE_S)
        assert begun.process.stdout is not None
        begun.process.stdout.close()


@contextmanager
def opened(data: Path) -> Iterator[Store]:
    store = Store(store_file(data))
    yield store
    store.close()


def digests(data: Path, id: str) -> dict[str, str]:
    """SHA-256 of every segment and of every block's final latents."""
    folder = data / "videos" / id / "job"
    paths = [*(folder / "segments").iterdir(), *(folder / "latents").iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def num_frames(video: Path) -> int:
    with VideoSource(video, backend="av") as source:
        return sum(1 for _ in source)


SOME_POINTS = POINTS[::2]  # the others when slow tests are asked for: each is a start of a server


@pytest.fixture(scope="module")
def history(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A data folder after a server was killed at each point, one after the other; the last ended well."""
    data = tmp_path_factory.mktemp("durable") / "data"
    lives: dict[str, dict[str, Any]] = {}
    for point in SOME_POINTS if "not slow" in str(request.config.getoption("markexpr")) else POINTS:
        with life(data, point) as killed:
            assert killed.end() == -signal.SIGKILL, (point, killed.log.read_text())
        with opened(data) as store:
            status = {name: store.get(killed.said[name]) for name in ("submitted", "queued")}
        lives[point] = {**killed.said, "left": status}
    with life(data) as last:
        assert last.end() == 0, last.log.read_text()
    lives["none"] = last.said
    return data, lives


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in SOME_POINTS else pytest.mark.slow) for point in POINTS],
)
def test_killed_there_and_restarted_every_segment_and_latent_is_what_it_would_have_been(
    point: str, history: tuple[Path, dict[str, dict[str, Any]]]
):
    data, lives = history
    mine, left = lives[point], lives[point]["left"]
    assert left["submitted"].status is Status.IN_PROGRESS and left["queued"].status is Status.QUEUED
    with opened(data) as store:
        done, queued = store.get(mine["submitted"]), store.get(mine["queued"])
        chunks = [event.data["index"] for event in store.events(mine["submitted"]) if event.name == "chunk"]
    assert done is not None and queued is not None
    assert (done.status, done.chunks_done, done.frames_done) == (Status.COMPLETED, 3, 48)
    assert queued.status is Status.COMPLETED
    assert chunks == [0, 1, 2], "every chunk is told, and once"
    whole = digests(data, lives["none"]["submitted"])
    assert len(whole) == 3 + 1 + 3 and digests(data, mine["submitted"]) == whole
    assert num_frames(data / "videos" / mine["submitted"] / "video.mp4") == 48


def test_a_session_that_a_restart_ended_can_be_watched_and_what_was_finished_is_untouched(
    history: tuple[Path, dict[str, dict[str, Any]]],
):
    data, lives = history
    finished = data / "videos" / lives["none"]["submitted"] / "video.mp4"
    before = finished.stat().st_mtime_ns, finished.read_bytes()
    with life(data, "session") as killed:
        killed.hear("queued")
        while killed.said.get("chunk", -1) < 1:
            killed.hear("chunk")
        killed.process.kill()
        killed.end()
    with life(data) as last:
        assert last.end() == 0, last.log.read_text()
    with opened(data) as store:
        session = store.get(killed.said["submitted"])
        completed = store.get(lives["none"]["submitted"])
    assert isinstance(session, Record) and session.kind is Kind.SESSION
    assert (session.status, session.error_code) == (Status.FAILED, "server_restarted")
    assert session.chunks_done >= 2 and session.frames_done == 16 * session.chunks_done
    assert num_frames(data / "videos" / session.id / "video.mp4") == session.frames_done
    assert completed is not None and completed.status is Status.COMPLETED
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
