"""A full disk pauses a render, and costs neither what is finished nor a frame of what comes."""

import errno
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vidgen import run as rendering
from vidgen.config import JobConfig, parse_job
from vidgen.journal import Journal
from vidgen.media.source import VideoSource
from vidgen.parallel.evidence import COLUMNS, SpanFile
from vidgen.render import render, resume

JOB: dict[str, Any] = {  # 16 blocks
    "prompt": "a red circle moving left over a gray background",
    "num_frames": 61,
    "num_inference_steps": 3,
    "state_every": 2,
    "queue": {"block_frames": 1, "context_frames": 1, "context_mode": "cache", "anchor_frames": 1},
}
# names of files as they are when they are synced -> which sync of such a name finds the disk full
STAGES = {
    "latents": ("v.job/latents/.", 4),
    "state": ("v.job/state/.", 2),
    "segment": ("v.job/segments/.0", 4),
    "start of an append": ("v.job/live.mp4", 3),
    "end of an append": ("v.job/live.mp4", 6),
    "output": ("/.v.mp4.tmp", 1),
    "joined latents": ("/.v.safetensors.tmp", 1),
    "sheet": ("/.v.png.tmp", 1),
}
TIMES_FULL = 3
TIMEOUTS = {"heartbeat_timeout_s": 6, "link_timeout_s": 8}
DISK_BYTES = 4 * 2**20
PATIENCE_S = 120.0


def job(output: Path) -> JobConfig:
    return parse_job(JOB | {"output": {"path": output, "save_latents": output.with_suffix(".safetensors")}})


def files(folder: Path) -> dict[str, bytes]:
    """A job's latents and segments, what was made of them, and the output's frames: its metadata differ."""
    paths = [*(folder / "v.job/latents").iterdir(), *(folder / "v.job/segments").iterdir()]
    paths += [folder / "v.safetensors", folder / "v.png"]
    with VideoSource(folder / "v.mp4") as video:
        frames = video.frames(range(video.num_frames)).tobytes()
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths} | {"frames": frames}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("whole")
    render(job(folder / "v.mp4"))
    return files(folder)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "RETRY_EVERY_S", 0.01)


class FullDisk:
    """os.fsync that finds the disk full: for paths with a name in them, from the first-th time on."""

    def __init__(self, name: str, first: int, times: float = TIMES_FULL) -> None:
        self.name, self.first, self.times, self.seen = name, first, times, 0
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.name in path:
            self.seen += 1
            if 0 <= self.seen - self.first < self.times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self._fsync(descriptor)


@pytest.mark.parametrize("stage", STAGES)
def test_wherever_the_disk_is_full_the_render_waits_and_makes_the_same_bytes(
    stage: str, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    disk, notes = FullDisk(*STAGES[stage]), []
    monkeypatch.setattr(os, "fsync", disk)
    render(job(tmp_path / "v.mp4"), note=notes.append)
    assert disk.seen >= disk.first + TIMES_FULL, "it was full, and tried again"
    assert len(notes) == 2, "one pause, one note"
    assert notes[0].startswith(f"paused: no space left for {tmp_path / 'v.job'};") and "going on" in notes[1]
    assert files(tmp_path) == whole
    log = (tmp_path / "v.job/log.txt").read_text().splitlines()
    assert [line.partition(" ")[2] for line in log] == notes


def test_a_journal_that_cannot_grow_pauses_the_render(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    commit, notes = Journal.commit, []
    folder = tmp_path / ("long" * 50)  # rows hold paths: so they need more than one page
    folder.mkdir()

    def limit(journal: Journal, pages: int) -> None:
        journal._db.execute(f"PRAGMA max_page_count = {pages}")

    def commit_in_little_room(journal: Journal, record: Any, digest: str) -> None:
        if not notes:
            (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
            limit(journal, pages)
        try:
            commit(journal, record, digest)
        finally:
            if notes:
                limit(journal, 2**30)

    monkeypatch.setattr(Journal, "commit", commit_in_little_room)
    render(job(folder / "v.mp4"), note=notes.append)
    assert [note.split(":")[0] for note in notes] == ["paused", "there is room again, going on"]
    assert files(folder) == whole


@pytest.mark.parametrize("stage", ["latents", "state", "end of an append", "sheet"])
def test_stopped_while_it_waits_the_job_keeps_what_is_finished_and_goes_on_later(
    stage: str, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    name, first = STAGES[stage]
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(name, first, times=float("inf")))
        with pytest.raises(OSError, match="No space left") as raised:
            render(job(tmp_path / "v.mp4"), note=notes.append, should_stop=lambda: bool(notes))
    assert raised.value.errno == errno.ENOSPC and len(notes) == 1
    with Journal(tmp_path / "v.job") as journal:
        kept = [record.block for record in journal.written()]
        assert kept and kept == list(range(len(kept)))
    again: list[str] = []
    resume(tmp_path / "v.job", note=again.append)
    assert not again and files(tmp_path) == whole


def test_a_trace_that_finds_no_room_is_in_nobodys_way(tmp_path: Path):
    path, span = tmp_path / "trace.jsonl", (0, (3, 2, 1, 0, 0.25, 0.5))
    spans = SpanFile(path)
    path.symlink_to("/dev/full")
    spans.write(0, [span])
    path.unlink()
    spans.write(0, [span])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [COLUMNS, [0, *span[:1], *span[1]]]


# a real disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of a few megabytes; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount`")
    if done.returncode:
        pytest.skip(f"this process may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class Ballast:
    """A file that takes all room, again and again, until it is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def fill(self) -> None:
        with suppress(OSError):
            while self._file.write(bytes(4096)):
                pass

    def drop(self) -> None:
        self._file.close()
        self.path.unlink()


Started = tuple["subprocess.Popen[str]", Callable[[Callable[[], None]], dict[str, Any] | None]]


@pytest.fixture
def vidgen(small_disk: Path) -> Iterator[Callable[..., Started]]:
    """Starts `vidgen render --json` on the small disk; the process, and what gives its next event."""
    processes: list[subprocess.Popen[str]] = []

    def start(*argv: object) -> Started:
        (small_disk.parent / "job.yaml").write_text(json.dumps(JOB | {"parallel": TIMEOUTS}))  # is YAML
        made = ["-o", small_disk / "v.mp4", "--save-latents", small_disk / "v.safetensors"]
        what = ["render", "--config", "job.yaml", *made, "--json", *argv]
        process = subprocess.Popen(
            [sys.executable, "-m", "vidgen", *map(str, what)], cwd=small_disk.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        processes.append(process)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    lines.put(line)
            lines.put("null")

        threading.Thread(target=read, daemon=True).start()

        def next_event(while_waiting: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                while_waiting()
                with suppress(queue.Empty):
                    return json.loads(lines.get(timeout=0.005))
            raise AssertionError(f"no event in {PATIENCE_S:g} s")

        return process, next_event

    yield start
    for process in processes:
        process.kill()
        process.wait(PATIENCE_S)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_render_on_a_full_disk_goes_on_when_there_is_room(
    ranks: int, small_disk: Path, vidgen: Callable[..., Started], whole: dict[str, bytes]
):
    process, next_event = vidgen("--ranks", ranks)
    seen: list[dict[str, Any]] = []

    def until(name: str, while_waiting: Callable[[], None] = lambda: None) -> dict[str, Any]:
        while not seen or seen[-1]["event"] != name:
            event = next_event(while_waiting)
            assert event is not None, f"ended without {name}: {seen[-2:]}"
            seen.append(event)
        return seen[-1]

    until("progress")
    ballast = Ballast(small_disk / "ballast")
    paused = until("note", ballast.fill)
    assert paused["message"].startswith(f"paused: no space left for {small_disk / 'v.job'};")
    # several tries, all in vain; ranks are not taken for lost because nobody asks them meanwhile
    time.sleep(2.0 if ranks == 1 else 1.5 * max(TIMEOUTS.values()))
    ballast.drop()
    finished = until("finished")
    assert process.wait(PATIENCE_S) == 0
    notes = [event["message"] for event in seen if event["event"] == "note"]
    assert len(notes) == 2 and "going on" in notes[1], notes
    assert ranks == 1 or finished["evidence"]["restarts"] == 0
    assert files(small_disk) == whole
